"""Where tests find what is outside the project; each fixture skips when it is absent."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

# Before torch is imported, and for all that tests start: threads that wait actively take the cores from one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from cosa_ray.config.load import apply_overrides, load_config
from cosa_ray.config.schema import Config

ROOT = Path(__file__).resolve().parent.parent


def outside(variable: str, default: str) -> Path:
    """Folder named by an environment variable, else the one beside the checkout; skips when it is not there."""
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / default))
    if not folder.is_dir():
        pytest.skip(f"{variable}: no folder {folder}")
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Files in which something starts Ray go to one process, one after the other: one cluster a host."""
    from xdist.scheduler import LoadFileScheduling

    class OneForRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(super()._split_scope(nodeid))

    return OneForRay(config, log)


@functools.cache
def _group(file: str) -> str:
    return "ray" if "pytest.mark.ray" in (ROOT / file).read_text() else file


@pytest.fixture(autouse=True)
def _mlflow_s_environment() -> Iterator[None]:
    """No test leaves a tracking store to the next: MLflow writes the one it is told into the environment."""

    def own() -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}

    before = own()
    yield
    for key in own().keys() - before.keys():
        del os.environ[key]
    os.environ.update(before)


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


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small set of made-up shapes, 48 px, imported without Ray."""
    from cosa_ray.data.importing import import_dataset

    out = tmp_path_factory.mktemp("data") / "shapes"
    import_dataset("shapes", None, str(out), train=40, val=11, size=48, local=True)
    return str(out)


def tiny_config(dataset: str, folder: Path, **changes: object) -> Config:
    """A config of twenty quick steps, co-training from step 8, every step logged; keywords use __ for dots."""
    settings = {
        "storage": str(folder / "runs"),
        "data.dataset": dataset,
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "tracking.log_every": 1,
        "views.crop": 48,
        "model.backbone_args.embed_dim": 32,
        "model.backbone_args.depth": 2,
        "model.backbone_args.num_heads": 2,
        "model.aux": 0,
        "model.decoder_width": 16,
        "training.steps": 20,
        "training.warmup_iters": 8,
        "training.batch_size": 4,
        "training.threads": 1,
        "training.precision": "fp32",  # auto is bf16 on some CPUs, which no tolerance here allows for
        "dynamic_threshold.batches": 4,
        "optimiser.warmup_steps": 2,
        "evaluation.every": 10,
        "evaluation.batch_size": 4,
        "evaluation.panel_images": 2,
        "checkpoint.every": 5,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return apply_overrides(load_config("shapes"), settings)


@pytest.fixture
def tiny(tiny_dataset: str, tmp_path: Path) -> Callable[..., Config]:
    """Make a `tiny_config` in a folder of the test's own."""

    def make(**changes: object) -> Config:
        return tiny_config(tiny_dataset, tmp_path, **changes)

    return make


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[str]:
    """A local Ray cluster of two CPUs for a file of tests (one cluster a host at a time); yields its address."""
    import logging

    import ray

    from cosa_ray.training.ray_train import LOCAL_SETTINGS

    with pytest.MonkeyPatch.context() as patch:
        # In the environment, which the cluster's processes have from here: a runtime_env costs each a second start.
        for key, value in LOCAL_SETTINGS.items():
            patch.setenv(key, value)
        ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Every logged point of a metric as (step, value), in order of logging."""
    from mlflow import MlflowClient

    points = MlflowClient(tracking_uri=uri).get_metric_history(run_id, key)
    return [(point.step, point.value) for point in sorted(points, key=lambda point: (point.step, point.timestamp))]


@pytest.fixture(scope="module")
def trained_run(tiny_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of twenty steps, tracked in SQLite, for tests of what is done with a run."""
    from cosa_ray.training.driver import train

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        result = train(tiny_config(tiny_dataset, folder), name="trained", local=True)
    assert result.state == "finished"
    return Path(result.folder)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures of several sizes and kinds, one in a folder below, one broken, one empty."""
    from tests.unit.tiny_sets import photo

    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(photo(60, 40, seed=1))
    (folder / "b.png").write_bytes(photo(31, 47, seed=2, kind="PNG", mode="L"))
    (folder / "below" / "c.webp").write_bytes(photo(48, 48, seed=3, kind="WEBP"))
    (folder / "broken.jpg").write_bytes(photo(60, 40, seed=4)[:200])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    return folder
