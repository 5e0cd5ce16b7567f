"""Where tests find what is outside the project; each fixture skips when it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def outside(variable: str, default: str) -> Path:
    """Folder named by an environment variable, else the one beside the checkout; skips when it is not there."""
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / default))
    if not folder.is_dir():
        pytest.skip(f"{variable}: no folder {folder}")
    return folder


@pytest.fixture(scope="session")
def golden():
    """Load a golden file by name as a dict of arrays."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(outside("COSA_GOLDEN", "golden") / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}

    return load


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets (voc-small320)."""
    return outside("COSA_DATA", "data")


@pytest.fixture(scope="session")
def weights() -> Path:
    """The folder of pretrained backbones."""
    return outside("COSA_WEIGHTS", "weights")
