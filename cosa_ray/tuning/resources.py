"""How many trials fit a cluster at once, and what each worker gets: plain arithmetic, checked before anything starts.

A trial is a small driver process plus its workers. Drivers that hold the CPUs their own workers wait for are a
deadlock (seen on Ray 2.60: two drivers with one CPU each on two CPUs never start), so a driver takes a thousandth of a
CPU, and that thousandth is counted for every driver that can be alive, also for those that wait for their turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cosa_ray.errors import UserError
from cosa_ray.training.room import GRAIN, SMALLEST_SHARE, Node, gpu_slots, largest_share, shape, slots

DRIVER_CPUS = 0.001


@dataclass(frozen=True)
class Fit:
    """Trials at a time, and what each of their workers is given."""

    concurrency: int
    cpus_per_worker: float
    gpus_per_worker: float


def fit_resources(
    cluster: Sequence[Node],
    *,
    workers: int,
    trials: int,
    cpus_per_worker: float | None = None,
    gpus_per_worker: float = 0.0,
    concurrency: int | None = None,
    drivers: int | None = None,
) -> Fit:
    """Divide a cluster among the trials of a sweep so that all running at once are certain to start.

    `cpus_per_worker` None shares the CPUs out evenly (to a hundredth, downwards); `concurrency` None runs as many
    trials as the GPUs, or else the whole CPUs, have room for. A worker never spans machines. `drivers` is how many
    trials' drivers can be alive where it is more than run at once (a resumed sweep: it then runs fewer trials at once
    than asked for, where no more fit). Raises UserError with the arithmetic when a trial, or the asked-for number of
    trials, does not fit.
    """
    if gpus_per_worker > 0 and sum(gpu_slots(node, gpus_per_worker) for node in cluster) < workers:
        raise UserError(
            f"the sweep does not fit the cluster: a trial needs {workers} workers x {gpus_per_worker:g} GPUs = "
            f"{workers * gpus_per_worker:g}, and there are {shape([node.gpus for node in cluster])} GPUs; "
            "lower workers or resources.gpus_per_worker."
        )
    if cpus_per_worker is None:
        at_once = concurrency or _roomy(cluster, workers, trials, gpus_per_worker)
        at_once = min(at_once, trials)
        alive = max(at_once, drivers or 0)
        share = largest_share(cluster, workers * at_once, gpus_per_worker, reserved=alive * DRIVER_CPUS)
        if share is None:
            raise _too_many(cluster, workers, at_once, SMALLEST_SHARE, gpus_per_worker, alive)
        return Fit(at_once, share, gpus_per_worker)

    def fits(at_once: int) -> bool:
        return _fits(cluster, workers, at_once, cpus_per_worker, gpus_per_worker, max(at_once, drivers or 0))

    wanted = min(concurrency or trials, trials)
    at_once = max((n for n in range(1, wanted + 1) if fits(n)), default=0)
    if at_once == 0 or (concurrency is not None and at_once < wanted and drivers is None):
        asked = wanted if at_once else 1
        raise _too_many(cluster, workers, asked, cpus_per_worker, gpus_per_worker, max(asked, drivers or 0))
    return Fit(at_once, cpus_per_worker, gpus_per_worker)


def _fits(cluster: Sequence[Node], workers: int, trials: int, cpus: float, gpus: float, drivers: int) -> bool:
    return slots(cluster, cpus, gpus, reserved=drivers * DRIVER_CPUS) >= workers * trials


def _roomy(cluster: Sequence[Node], workers: int, trials: int, gpus: float) -> int:
    """Trials at a time when nobody said: as many as there are GPUs for, without GPUs a whole CPU a worker."""
    if gpus > 0:
        return max(1, min(trials, sum(gpu_slots(node, gpus) for node in cluster) // workers))
    return max(1, min(trials, sum(math.floor(node.cpus) for node in cluster) // workers))


def _too_many(cluster: Sequence[Node], workers: int, trials: int, cpus: float, gpus: float, drivers: int) -> UserError:
    """The arithmetic of a sweep that does not fit, in one sentence."""
    need = drivers * DRIVER_CPUS + trials * workers * cpus
    have = sum(node.cpus for node in cluster)
    if need <= have + GRAIN and gpus > 0:
        resource = f"{trials} x {workers} workers x {gpus:g} GPUs = {trials * workers * gpus:g} GPUs"
        there = f"{shape([node.gpus for node in cluster])} GPUs"
    else:
        plural = "driver" if drivers == 1 else "drivers"
        resource = f"{trials} x {workers} workers x {cpus:g} + {drivers} {plural} x {DRIVER_CPUS} = {need:g} CPUs"
        there = f"{shape([node.cpus for node in cluster])} CPUs"
    what = "a trial needs" if trials == 1 else f"{trials} trials at a time need"
    lower = (
        "workers or resources.cpus_per_worker" if trials == 1 else "concurrency, workers or resources.cpus_per_worker"
    )
    return UserError(f"the sweep does not fit the cluster: {what} {resource}, and there are {there}; lower {lower}.")
