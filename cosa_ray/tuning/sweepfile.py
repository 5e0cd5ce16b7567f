"""The sweep file: what it may say, and whether what it says can work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cosa_ray.config.load import dump_section, merge
from cosa_ray.config.onbase import OnBase, find_on_base, load_on_base
from cosa_ray.config.schema import Config
from cosa_ray.config.section import Count, CountOrZero, Fraction, Positive, Section
from cosa_ray.tuning.space import Dimension, with_dimensions
from cosa_ray.tuning.values import as_value

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


class Sweep(OnBase):
    """A sweep: a base experiment, what varies, how it is searched, and when a trial is given up."""

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
    return find_on_base(name, "sweeps")


def load_sweep(file: str | Path, overrides: Sequence[str] = ()) -> tuple[Sweep, Config]:
    """A sweep and its base experiment, both with `key=value` overrides: a sweep's own keys first, else the base's.

    Raises UserError naming the key, the file and the nearest valid key.
    """
    says = "a sweep names a base experiment and a space (an experiment is run with `cosa-ray train`)"
    return load_on_base(Sweep, find_sweep(file), overrides, kind="sweep", says=says, lay=_with_space)


def _with_space(content: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A sweep file with overrides, of which those of its space replace whole dimensions."""
    if isinstance(own.get("space"), dict):
        own = {**own, "space": with_dimensions(content["space"], own["space"])}
        content = {key: value for key, value in content.items() if key != "space"}
    return merge(content, own)


# What may change when a sweep is resumed: how far it goes and what is kept, not what a trial is.
RESUMABLE = ("trials", "concurrency", "budget", "failures", "restarts", "keep")


def dump_sweep(sweep: Sweep) -> str:
    """YAML of a sweep that load_sweep reads back to an equal one."""
    return dump_section(sweep)
