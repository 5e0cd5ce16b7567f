"""The sweep file: what it may say, and whether what it says can work."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from cosa_ray.config.load import (
    apply_overrides,
    explain,
    find_experiment,
    load_config,
    merge,
    parse_overrides,
    read_yaml,
)
from cosa_ray.config.schema import Config, Count, CountOrZero, Section
from cosa_ray.errors import UserError
from cosa_ray.tuning.space import Dimension, check_space, extremes


class Asha(Section):
    """Asynchronous successive halving (Li et al., arXiv 1810.05934) on optimiser steps, up to training.steps."""

    grace_steps: Count | None = Field(
        None,
        description="Steps of the first rung; null is the first that is no noise: warmup_iters + evaluation.every.",
    )
    reduction_factor: float = Field(2.0, gt=1.0, description="Of the trials at a rung, 1/reduction_factor go on.")


class Sweep(Section):
    """A sweep: a base experiment, what varies, how it is searched, and when a trial is given up."""

    base: str = Field(description="Experiment file, by path (from this file) or shipped name.")
    set: dict[str, Any] = Field(default_factory=dict, description="Overrides of the base, dotted keys.")
    space: dict[str, Dimension] = Field(
        description="Dotted setting -> uniform, loguniform, quniform, randint or choice."
    )
    search: Literal["random", "optuna"] = Field("optuna", description="random, or Optuna's TPE.")
    search_seed: CountOrZero = Field(0, description="Seed of the search.")
    trials: Count = Field(8, description="Number of trials.")
    concurrency: Count | None = Field(None, description="Trials at a time; null fills the cluster.")
    metric: str | None = Field(None, description="Metric to order trials by; null is the base's own (val/miou).")
    mode: Literal["max", "min"] = Field("max", description="Whether more or less of the metric is better.")
    scheduler: Literal["none", "asha"] = Field("none", description="asha gives up trials that fall behind.")
    asha: Asha = Field(default_factory=Asha)
    keep: Literal["best", "all"] = Field("best", description="Whose checkpoints stay when the sweep has finished.")


def find_sweep(name: str | Path) -> Path:
    """Path of a sweep file given by path, or by the name of a shipped one (`shapes` is sweeps/shapes.yaml)."""
    path = Path(name)
    if path.is_file():
        return path.resolve()
    try:
        return find_experiment(Path("sweeps") / path)
    except UserError:
        return find_experiment(path)


def load_sweep(file: str | Path, overrides: Sequence[str] = ()) -> tuple[Sweep, Config]:
    """A sweep and its base experiment, both with `key=value` overrides: a sweep's own keys first, else the base's.

    Raises UserError naming the key, the file and the nearest valid key.
    """
    path = find_sweep(file)
    content = read_yaml(path)
    if "base" not in content or "space" not in content:
        raise UserError(
            f"{path}: no sweep file, it lacks {'base' if 'base' not in content else 'space'}; "
            "a sweep names a base experiment and a space (an experiment is run with `cosa-ray train`)."
        )
    given = parse_overrides(overrides)
    own = {key: value for key, value in given.items() if key in Sweep.model_fields}
    where = str(path) + (" with --set" if own else "")
    try:
        sweep = Sweep.model_validate(merge(content, own))
    except ValidationError as error:
        raise UserError(explain(error, where, Sweep)) from None
    base_file = find_experiment(sweep.base, path.parent)
    if base_file == path:  # sweeps/shapes.yaml on top of shapes.yaml
        base_file = find_experiment(sweep.base, path.parent.parent)
    base = apply_overrides(load_config(base_file), sweep.set, f"{path}: set")
    rest = {key: value for key, value in given.items() if key not in own}
    for key in rest:
        if key not in Config.model_fields:
            close = difflib.get_close_matches(key, [*Sweep.model_fields, *Config.model_fields], n=1)
            raise UserError(
                f"--set {key}: neither a key of a sweep file nor of an experiment"
                f"{f'; did you mean {close[0]}?' if close else '.'}"
            )
    return sweep, apply_overrides(base, rest, "--set") if rest else base


def check_sweep(sweep: Sweep, base: Config, where: str) -> None:
    """Refuse a sweep whose space can produce an invalid experiment, or whose first rung comes too early or never."""
    check_space(sweep.space, base, where)
    if sweep.scheduler == "asha":
        grace_steps(sweep, base, where)


def grace_steps(sweep: Sweep, base: Config, where: str) -> int:
    """Step of the first rung, checked against every length, warm-up and evaluation interval the space can produce.

    Before warm-up has ended and co-training has run for one evaluation interval, mIoU is noise.
    """
    warmup, every, steps = (
        extremes(sweep.space, value, key)
        for key, value in (
            ("training.warmup_iters", base.training.warmup_iters),
            ("evaluation.every", base.evaluation.every),
            ("training.steps", base.training.steps),
        )
    )
    if warmup[0] >= steps[1]:  # classifier only: no mIoU is ever measured, and nothing is to be waited for
        warmup = (0.0, 0.0)
    earliest = round(warmup[1] + every[1])
    arithmetic = f"training.warmup_iters {warmup[1]:g} + evaluation.every {every[1]:g} = {earliest}"
    grace = earliest if sweep.asha.grace_steps is None else sweep.asha.grace_steps
    if grace < earliest:
        raise UserError(
            f"{where}: asha.grace_steps {grace} puts the first rung before co-training has been evaluated "
            f"({arithmetic}), where the metric is noise; set it to {earliest} or more, or leave it out."
        )
    if grace >= steps[1]:
        raise UserError(
            f"{where}: the first ASHA rung at step {grace} ({arithmetic}) is not before training.steps {steps[1]:g}, "
            "so no trial would ever be given up; lengthen training, evaluate more often, or use scheduler: none."
        )
    return grace


def rungs(sweep: Sweep, base: Config) -> list[int]:
    """Steps at which ASHA gives trials up, for messages."""
    last = extremes(sweep.space, base.training.steps, "training.steps")[1]
    at = [float(grace_steps(sweep, base, sweep.base))]
    while at[-1] * sweep.asha.reduction_factor < last:
        at.append(at[-1] * sweep.asha.reduction_factor)
    return [round(step) for step in at]


def dump_sweep(sweep: Sweep) -> str:
    """YAML of a sweep that load_sweep reads back to an equal one."""
    return yaml.safe_dump(
        sweep.model_dump(mode="json", exclude_none=True), sort_keys=False, default_flow_style=None, width=120
    )
