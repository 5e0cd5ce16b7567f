"""The sweep file: what it may say, and whether what it says can work."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cosa_ray.config.load import (
    apply_overrides,
    explain,
    find_experiment,
    load_config,
    merge,
    parse_overrides,
    read_yaml,
)
from cosa_ray.config.schema import Config
from cosa_ray.config.section import Count, CountOrZero, Fraction, Positive, Section
from cosa_ray.errors import UserError
from cosa_ray.tuning.space import Dimension, check_space, extremes, grid_points, sample, with_dimensions
from cosa_ray.tuning.values import alike, as_value, at

Mode = Literal["max", "min"]


class Asha(Section):
    """Asynchronous successive halving (Li et al., arXiv 1810.05934) on optimiser steps, up to training.steps."""

    grace_steps: Count | None = Field(
        None,
        description="Steps of the first rung; null is the first that is no noise: warmup_iters + evaluation.every.",
    )
    reduction_factor: float = Field(2.0, gt=1.0, description="Of the trials at a rung, 1/reduction_factor go on.")
    brackets: Count = Field(
        3, description="Of scheduler: hyperband: brackets with later and later first rungs, of which a trial is in one."
    )


class Median(Section):
    """Median stopping (Golovin et al., Vizier, KDD 2017, 3.2.2) on optimiser steps."""

    grace_steps: Count | None = Field(None, description="Steps before any trial is judged; null as of asha.")
    trials: Count = Field(3, description="Other trials that must have come as far before one is judged.")


class Population(Section):
    """Population-based training (Jaderberg et al., arXiv 1711.09846) in generations: all trials stop at the same step.

    There the worst copy weights, EMA, optimiser and thresholds of the best, and vary their settings.
    """

    every: Count | None = Field(
        None, description="Steps of a generation, a multiple of evaluation.every; null is evaluation.every."
    )
    share: float = Field(
        0.25, gt=0.0, le=0.5, description="Share of the population that copies, and that is copied from."
    )
    resample: Fraction = Field(0.25, description="Probability that a copied setting is drawn afresh, not perturbed.")
    factors: tuple[Positive, ...] = Field(
        (0.8, 1.25), min_length=1, description="A perturbed number is multiplied by one of these, within its range."
    )


class Budget(Section):
    """What a sweep may cost: once any is spent, running trials write a checkpoint and end, and no new one starts."""

    steps: Count | None = Field(None, description="Optimiser steps of all trials together.")
    gpu_hours: Positive | None = Field(None, description="GPU hours of all trials together.")
    cpu_hours: Positive | None = Field(None, description="CPU thread hours of all trials together, without GPUs.")
    wall_hours: Positive | None = Field(None, description="Hours that the sweep runs, pauses between starts left out.")


class Earlier(Section):
    """What earlier runs, found by an MLflow filter, tell the search."""

    runs: str = Field(description="MLflow search filter, such as \"tags.`cosa_ray.sweep` = 'first'\".")
    experiment: str | None = Field(None, description="MLflow experiment of the runs; null is the base's own.")
    best: CountOrZero = Field(0, description="So many of the best of them are run again first.")
    learn: bool = Field(True, description="Tell the search their settings and scores without running them again.")


class Sweep(Section):
    """A sweep: a base experiment, what varies, how it is searched, and when a trial is given up."""

    base: str = Field(description="Experiment file, by path (from this file) or shipped name.")
    set: dict[str, Any] = Field(default_factory=dict, description="Overrides of the base, dotted keys.")
    space: dict[str, Dimension] = Field(
        description="Dotted setting -> uniform, loguniform, quniform, randint, lograndint, choice or same."
    )
    search: Literal["grid", "random", "tpe", "gp", "nsga2", "points"] = Field(
        "tpe",
        description="grid; random; Optuna's tpe (tree-structured Parzen estimator), gp (Gaussian process) or nsga2 "
        "(genetic, several metrics); points: those listed, and no others.",
    )
    search_seed: CountOrZero = Field(0, description="Seed of the search.")
    points: tuple[dict[str, Any], ...] = Field((), description="Settings that are tried first, dotted keys.")
    earlier: Earlier | None = Field(None, description="Earlier runs to start from.")
    trials: Count | None = Field(None, description="Configurations to try; null is all of a grid or of points, else 8.")
    repeats: Count = Field(1, description="Trials of every configuration, with seeds seed, seed + 1, ...")
    concurrency: Count | None = Field(None, description="Trials at a time; null fills the cluster.")
    metric: str | tuple[str, ...] | None = Field(
        None, description="Metric to order trials by; null is the base's own (val/miou). Several: a Pareto front."
    )
    mode: Mode | tuple[Mode, ...] = Field("max", description="Whether more or less of the metric is better, for each.")
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = Field(
        "none",
        description="asha, hyperband (asha in brackets), median: trials that fall behind end; pbt: they copy others.",
    )
    asha: Asha = Field(default_factory=Asha, description="Of scheduler: asha and hyperband.")
    median: Median = Field(default_factory=Median, description="Of scheduler: median.")
    pbt: Population = Field(default_factory=Population, description="Of scheduler: pbt.")
    budget: Budget = Field(default_factory=Budget)
    failures: Count = Field(5, description="So many trials that fail in a row end the sweep.")
    restarts: CountOrZero = Field(2, description="Times a trial whose process was killed is started again.")
    keep: Literal["best", "all"] = Field("best", description="Whose checkpoints stay when the sweep has finished.")

    @field_validator("points")
    @classmethod
    def _as_in_a_space(cls, points: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple({key: as_value(value) for key, value in point.items()} for point in points)

    @property
    def several(self) -> bool:
        """True when there is more than one metric."""
        return isinstance(self.metric, tuple) and len(self.metric) > 1

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The mode of every metric."""
        count = len(self.metric) if isinstance(self.metric, tuple) else 1
        return self.mode if isinstance(self.mode, tuple) else (self.mode,) * count

    @model_validator(mode="after")
    def _agrees(self) -> Sweep:
        metrics = self.metric if isinstance(self.metric, tuple) else (self.metric,)
        if not metrics or len(set(metrics)) != len(metrics):
            raise ValueError("metric needs at least one name, each once")
        if isinstance(self.mode, tuple) and len(self.mode) != len(metrics):
            raise ValueError(f"mode has {len(self.mode)} entries for {len(metrics)} metrics; give one for each, or one")
        if self.several and self.scheduler != "none":
            raise ValueError(f"scheduler {self.scheduler} orders trials by one metric, and there are {len(metrics)}")
        if self.repeats > 1 and self.scheduler != "none":
            raise ValueError(
                f"repeats: {self.repeats} and scheduler: {self.scheduler} do not mix, because the scheduler would end "
                "some seeds of a configuration and not others; sweep without repeats, then run `cosa-ray promote`"
            )
        if self.repeats > 1 and "seed" in self.space:
            raise ValueError("repeats give every configuration its seeds, so seed cannot be in the space too")
        if self.search == "points" and not self.points and not (self.earlier and self.earlier.best):
            raise ValueError("search: points needs points, or earlier.best")
        if self.search == "grid" and (self.points or self.earlier):
            raise ValueError("a grid tries its own points only and learns nothing, so leave points and earlier out")
        if self.search in ("random", "points") and self.earlier and not self.earlier.best:
            raise ValueError(
                f"search: {self.search} learns nothing from earlier runs; set earlier.best, or leave it out"
            )
        if self.budget.gpu_hours and self.budget.cpu_hours:
            raise ValueError("budget takes gpu_hours or cpu_hours, because a trial is charged in one of them")
        return self


def find_sweep(name: str | Path) -> Path:
    """Path of a sweep file given by path, or by the name of a shipped one (`shapes` is sweeps/shapes.yaml)."""
    path = Path(name)
    if path.is_file():
        return path.resolve()
    try:
        return find_experiment(Path("sweeps") / path)
    except UserError:
        return find_experiment(path)


def find_base(sweep: Sweep, path: Path) -> Path:
    """Path of the base experiment of a sweep whose file is `path` (sweeps/shapes.yaml is on top of shapes.yaml)."""
    file = find_experiment(sweep.base, path.parent)
    return file if file != path else find_experiment(sweep.base, path.parent.parent)


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
    rest = {key: value for key, value in given.items() if key not in own}
    if isinstance(own.get("space"), dict):
        content = {**content, "space": with_dimensions(content["space"], own.pop("space"))}
    where = str(path) + (" with --set" if own or "space" in given else "")
    try:
        sweep = Sweep.model_validate(merge(content, own))
    except ValidationError as error:
        raise UserError(explain(error, where, Sweep)) from None
    base = apply_overrides(load_config(find_base(sweep, path)), sweep.set, f"{path}: set")
    for key in rest:
        if key not in Config.model_fields:
            close = difflib.get_close_matches(key, [*Sweep.model_fields, *Config.model_fields], n=1)
            raise UserError(
                f"--set {key}: neither a key of a sweep file nor of an experiment"
                f"{f'; did you mean {close[0]}?' if close else '.'}"
            )
    return sweep, apply_overrides(base, rest, "--set") if rest else base


# What may change when a sweep is resumed: how far it goes and what is kept, not what a trial is.
RESUMABLE = ("trials", "concurrency", "budget", "failures", "restarts", "keep")


# What a copy may vary under population-based training, and what of it a checkpoint holds or gives its tensors shape.
_CHANGEABLE = (
    "losses.",
    "optimiser.",
    "contrastive.",
    "dense_energy.",
    "views.",
    "pseudo_labels.",
    "dynamic_threshold.",
)
_HELD = (
    "views.crop",
    "dynamic_threshold.enabled",
    "dynamic_threshold.batches",
    "dynamic_threshold.bins",
    *(f"pseudo_labels.{key}" for key in ("policy", "threshold", "low", "high", "low_aux", "high_aux")),
)


def check_sweep(sweep: Sweep, base: Config, where: str) -> None:
    """Refuse a sweep whose space can produce an invalid experiment, or whose schedule or budget cannot work."""
    check_space(sweep.space, base, where)
    if sweep.search == "grid":
        try:
            size = len(grid_points(sweep.space))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if sweep.trials not in (None, size):
            raise UserError(f"{where}: the grid has {size} points and trials is {sweep.trials}; leave trials out.")
    for place, point in enumerate(sweep.points):
        _check_point(sweep, base, point, f"{where}: points[{place}]")
    if sweep.scheduler in ("asha", "hyperband"):
        rungs(sweep, base, where)
    elif sweep.scheduler == "median":
        grace_steps(sweep, base, where)
    elif sweep.scheduler == "pbt":
        generations(sweep, base, where)
    on_gpu = base.resources.gpus_per_worker > 0
    if sweep.budget.gpu_hours and not on_gpu:
        raise UserError(f"{where}: budget.gpu_hours, but trials have no GPU; use budget.cpu_hours.")
    if sweep.budget.cpu_hours and on_gpu:
        raise UserError(f"{where}: budget.cpu_hours, but trials have GPUs; use budget.gpu_hours.")


def wanted(sweep: Sweep) -> int:
    """Configurations the sweep tries; with points from earlier runs only those are known before it starts."""
    if sweep.search == "grid":
        return len(grid_points(sweep.space))
    if sweep.trials is not None:
        return sweep.trials
    if sweep.search == "points":
        return len(sweep.points) + (sweep.earlier.best if sweep.earlier else 0)
    return 8


def complete(sweep: Sweep, base: Config, point: Mapping[str, Any], where: str = "point") -> dict[str, Any]:
    """A point with the base's values for settings it leaves out, tied and conditional ones as the space has them.

    Raises UserError, beginning with `where`, for a value that is not in the space.
    """
    own = base.model_dump(mode="json")

    def pick(key: str, dimension: Dimension) -> Any:
        value = point[key] if key in point else at(own, key)
        if not dimension.holds(value):
            says = "" if key in point else " (of the base experiment, because the point does not say)"
            raise UserError(f"{where}: {key}={value}{says} is not in the space; widen it, or mend the point.")
        return dimension.tidy(value)

    return sample(sweep.space, pick)


def _check_point(sweep: Sweep, base: Config, point: Mapping[str, Any], where: str) -> None:
    """Refuse a point with a setting that is not in the space or does not vary there."""
    for key in point:
        if key not in sweep.space:
            close = difflib.get_close_matches(key, list(sweep.space), n=1)
            raise UserError(
                f"{where}: {key} is no setting of the space{f'; did you mean {close[0]}?' if close else '.'}"
            )
    values = complete(sweep, base, point, where)
    for key, value in point.items():
        if key not in values:
            raise UserError(f"{where}: {key} does not vary there, because of its `when`; leave it out.")
        if sweep.space[key].same is not None and not alike(values[key], as_value(value)):
            raise UserError(f"{where}: {key} is tied to {sweep.space[key].same}, so it is {values[key]}; leave it out.")
    apply_overrides(base, values, where)


def grace_steps(sweep: Sweep, base: Config, where: str) -> int:
    """First step at which a trial is judged, checked against every length, warm-up and evaluation interval.

    Before warm-up has ended and co-training has run for one evaluation interval, mIoU is noise.
    """
    warmup, every, steps = _lengths(sweep, base)
    if warmup[0] >= steps[1]:  # classifier only: no mIoU is ever measured, and nothing is to be waited for
        warmup = (0.0, 0.0)
    earliest = round(warmup[1] + every[1])
    arithmetic = f"training.warmup_iters {warmup[1]:g} + evaluation.every {every[1]:g} = {earliest}"
    section = "median" if sweep.scheduler == "median" else "asha"
    given = getattr(sweep, section).grace_steps
    grace = earliest if given is None else given
    if grace < earliest:
        raise UserError(
            f"{where}: {section}.grace_steps {grace} puts the first rung before co-training has been evaluated "
            f"({arithmetic}), where the metric is noise; set it to {earliest} or more, or leave it out."
        )
    if grace >= steps[1]:
        raise UserError(
            f"{where}: the first rung at step {grace} ({arithmetic}) is not before training.steps {steps[1]:g}, "
            "so no trial would ever be given up; lengthen training, evaluate more often, or use scheduler: none."
        )
    return grace


def rungs(sweep: Sweep, base: Config, where: str = "sweep") -> list[int]:
    """Steps at which ASHA gives trials up. Raises UserError when brackets have no rung before the end."""
    last = _lengths(sweep, base)[2][1]
    at = [float(grace_steps(sweep, base, where))]
    while at[-1] * sweep.asha.reduction_factor < last:
        at.append(at[-1] * sweep.asha.reduction_factor)
    if sweep.scheduler == "hyperband" and sweep.asha.brackets > len(at):
        raise UserError(
            f"{where}: asha.brackets {sweep.asha.brackets} is more than the {len(at)} rungs there are (steps "
            f"{', '.join(f'{step:.0f}' for step in at)}); lower it to {len(at)}, or lengthen training."
        )
    return [round(step) for step in at]


def generations(sweep: Sweep, base: Config, where: str = "sweep") -> list[int]:
    """Steps at which a population copies and varies. Raises UserError when it never could."""
    for key in ("training.steps", "training.warmup_iters", "evaluation.every"):
        if key in sweep.space:
            raise UserError(f"{where}: with scheduler: pbt all trials go the same way, so {key} cannot vary.")
    for key, dimension in sweep.space.items():
        if not key.startswith(_CHANGEABLE) or key in _HELD:
            raise UserError(
                f"{where}: space.{key} cannot change while a trial runs, because weights, thresholds or data are made "
                "by it, so it is not for scheduler: pbt; set it under `set`."
            )
        if dimension.when:
            raise UserError(
                f"{where}: space.{key} is conditional, which scheduler: pbt does not take; leave out `when`."
            )
    training, every = base.training, base.evaluation.every
    step = sweep.pbt.every or every
    if step % every:
        raise UserError(f"{where}: pbt.every {step} is no multiple of evaluation.every {every}, so nobody has a score.")
    grace = 0 if training.warmup_iters >= training.steps else training.warmup_iters
    at = [number for number in range(step, training.steps, step) if number > grace]
    if not at:
        raise UserError(
            f"{where}: no generation of pbt.every {step} steps lies between training.warmup_iters "
            f"{training.warmup_iters} and training.steps {training.steps}; lower pbt.every."
        )
    if wanted(sweep) < 2:
        raise UserError(f"{where}: a population needs two trials or more; raise trials.")
    return at


def _lengths(sweep: Sweep, base: Config) -> list[tuple[float, float]]:
    """Smallest and largest warm-up, evaluation interval and length of the trials."""
    return [
        extremes(sweep.space, value, key)
        for key, value in (
            ("training.warmup_iters", base.training.warmup_iters),
            ("evaluation.every", base.evaluation.every),
            ("training.steps", base.training.steps),
        )
    ]


def dump_sweep(sweep: Sweep) -> str:
    """YAML of a sweep that load_sweep reads back to an equal one."""
    return yaml.safe_dump(
        sweep.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
        sort_keys=False,
        default_flow_style=None,
        width=120,
    )
