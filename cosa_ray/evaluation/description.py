"""What a trained model's folder says of itself, read without a tensor (nor torch, so that looking at runs is quick)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cosa_ray.config.load import check, read_yaml
from cosa_ray.config.protocol import NetworkName
from cosa_ray.config.schema import Config
from cosa_ray.data.card import CARD

ONLINE, ASSIGNMENT = "online.safetensors", "assignment.safetensors"
DESCRIPTION, CONFIG = "checkpoint.json", "config.yaml"
MODEL_FILES = (ONLINE, ASSIGNMENT, DESCRIPTION, CONFIG, CARD)


@dataclass
class Description:
    """What a checkpoint says of itself, readable without loading a tensor."""

    run: str
    step: int
    classes: list[str]
    metrics: dict[str, float]
    better_network: NetworkName
    worker_seconds: float
    thresholds: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> Description:
        """The description that a checkpoint's `checkpoint.json` holds."""
        return cls(**json.loads(text))

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Read a checkpoint folder's description."""
        return cls.parse((folder / DESCRIPTION).read_text(encoding="utf-8"))

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint folder."""
        (folder / DESCRIPTION).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def is_model(folder: Path) -> bool:
    """True for a folder that `load_trained` takes."""
    return all((folder / name).is_file() for name in MODEL_FILES)


def read_config(folder: Path) -> Config:
    """The config of a trained model in a local folder."""
    return check(read_yaml(folder / CONFIG), f"{folder / CONFIG}")
