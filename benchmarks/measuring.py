"""What the benchmarks share: turns taken one after the other, medians, ratios within a round, the machine's name."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "timm", "numpy", "pyarrow", "ray", "mlflow")


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, torch's threads, GPU if any, Python and the versions of the packages that are installed."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    found: dict[str, Any] = {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}
    found |= {"threads": torch.get_num_threads(), "python": platform.python_version()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for name in packages or PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every call in every round, after `warm_up` rounds that do not count.

    The calls take turns, each second round in the reverse order, so that what else the machine does falls on all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name in reversed(calls) if turn % 2 else calls:
            began = now()
            calls[name]()
            if turn >= warm_up:
                seconds[name].append(now() - began)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of every list."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of one call's time by another's of the same round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def exponent(growth: Mapping[str, float]) -> float:
    """Exponent of a power law through measured points, by least squares of the logarithms."""
    sizes, values = ([math.log(float(each)) for each in part] for part in (growth.keys(), growth.values()))
    return statistics.linear_regression(sizes, values).slope


def save(result: Mapping[str, Any], file: str | None) -> None:
    """Write a result as JSON, where a file is named."""
    if file:
        Path(file).write_text(json.dumps(result, indent=1) + "\n")


def now() -> float:
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []
