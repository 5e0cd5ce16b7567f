"""What the metrics of an evaluation are called (without torch, so that looking at runs is quick)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cosa_ray.config.protocol import Protocol, in_run_protocol
from cosa_ray.config.schema import Config


def metric_prefix(config: Config, images: int, split: str | None = None) -> str:
    """What a run's own metrics begin with: the split's name, with `_subset_<n>` where not all images are used."""
    return protocol_prefix(in_run_protocol(config), split or config.data.val_split, images)


def protocol_prefix(protocol: Protocol, split: str, images: int) -> str:
    """What metrics under a protocol begin with: split, `_subset_<n>` where not all images are used, /protocol."""
    name = plain_name(split)
    if protocol.subset is not None and protocol.subset < images:
        name = f"{name}_subset_{protocol.subset}"
    return f"{name}/{protocol.name}" if protocol.name else name


def best_metric(config: Config, prefix: str) -> str:
    """The metric that says which checkpoint is best: AN's plain mIoU, the best CAM mIoU in a classifier-only run."""
    trains_decoder = config.training.warmup_iters < config.last_step
    return f"{prefix}/{'miou' if trains_decoder else 'cam_miou_best'}"


def tracked_names(classes: Sequence[str]) -> list[str]:
    """Class names as they appear in metric names: letters, digits and `_-. :` only, and no two alike."""
    names: list[str] = []
    for name in map(plain_name, classes):
        number = 2
        unique = name
        while unique in names:
            unique = f"{name}_{number}"
            number += 1
        names.append(unique)
    return names


def plain_name(name: str) -> str:
    """A name with what MLflow does not take in a metric's name replaced."""
    plain = re.sub(r"[^A-Za-z0-9_\-. :]", "_", name).strip()
    return plain if plain.strip(".") else "_"  # "." and ".." would name folders
