"""Whether what a sweep file says can work: its space, its points, when its trials are judged, its budget."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from cosa_ray.config.load import apply_overrides
from cosa_ray.config.schema import Config, Elastic
from cosa_ray.errors import UserError
from cosa_ray.tuning.space import Dimension, check_space, extremes, grid_points, sample
from cosa_ray.tuning.sweepfile import Sweep
from cosa_ray.tuning.values import alike, as_value, at

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
    check_space(sweep.space, base, where, drawn=sweep.search != "points")
    if isinstance(base.workers, Elastic):
        raise UserError(
            f"{where}: workers is a range, which is for single runs (a sweep divides the cluster among its trials); "
            "set workers to a number."
        )
    if base.evaluation.asynchronous:
        raise UserError(
            f"{where}: evaluation.asynchronous is for single runs (a sweep judges a trial when it is evaluated); "
            "set it to false."
        )
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


def wanted(sweep: Sweep, earlier: int | None = None) -> int:
    """Configurations the sweep tries; `earlier`: how many earlier runs there are, None before it is known."""
    if sweep.search == "grid":
        return len(grid_points(sweep.space))
    if sweep.search == "points":  # only those there are, however many were asked for
        best = sweep.earlier.best if sweep.earlier else 0
        there = len(sweep.points) + (best if earlier is None else min(best, earlier))
        return there if sweep.trials is None else min(sweep.trials, there)
    return 8 if sweep.trials is None else sweep.trials


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
            f"{where}: the first rung at step {grace} ({arithmetic}) is not before the last step {steps[1]:g}, "
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
    for key in ("training.steps", "training.stop_at", "training.warmup_iters", "evaluation.every"):
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
    grace = 0 if training.warmup_iters >= base.last_step else training.warmup_iters
    at = [number for number in range(step, base.last_step, step) if number > grace]
    if not at:
        raise UserError(
            f"{where}: no generation of pbt.every {step} steps lies between training.warmup_iters "
            f"{training.warmup_iters} and the last step {base.last_step}; lower pbt.every."
        )
    if wanted(sweep) < 2:
        raise UserError(f"{where}: a population needs two trials or more; raise trials.")
    return at


def _lengths(sweep: Sweep, base: Config) -> list[tuple[float, float]]:
    """Smallest and largest warm-up, evaluation interval and step that a trial ends at."""
    warmup, every, length = (
        extremes(sweep.space, value, key)
        for key, value in (
            ("training.warmup_iters", base.training.warmup_iters),
            ("evaluation.every", base.evaluation.every),
            ("training.steps", base.training.steps),
        )
    )
    if base.training.stop_at is not None or "training.stop_at" in sweep.space:
        stop = extremes(sweep.space, base.last_step, "training.stop_at")
        length = min(length[0], stop[0]), min(length[1], stop[1])
    return [warmup, every, length]
