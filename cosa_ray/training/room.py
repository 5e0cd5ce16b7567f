"""What room machines have for workers: arithmetic done before anything starts, because Ray would wait for ever."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cosa_ray.config.schema import Config, Elastic
from cosa_ray.errors import UserError

SMALLEST_SHARE = 0.01
DRIVER_CPUS = 0.1  # of every machine, for whatever a run has beside its workers
# Ray counts resources in ten-thousandths.
GRAIN = 1e-4 / 2


@dataclass(frozen=True)
class Node:
    """Logical CPUs and GPUs of one machine of a cluster."""

    cpus: float
    gpus: float = 0.0


def slots(cluster: Sequence[Node], cpus: float, gpus: float = 0.0, *, reserved: float = 0.0) -> int:
    """Workers of so many CPUs and GPUs that have room, `reserved` CPUs of every machine left out."""
    total = 0
    for node in cluster:
        room = max(0, math.floor((node.cpus - reserved + GRAIN) / cpus))
        total += min(room, gpu_slots(node, gpus)) if gpus > 0 else room
    return total


def gpu_slots(node: Node, gpus: float) -> int:
    """Workers for which a machine has GPUs; a fraction never spans two of them."""
    if gpus < 1:
        return math.floor(node.gpus) * math.floor(1 / gpus + 1e-9)
    return math.floor(node.gpus / gpus + 1e-9)


def largest_share(cluster: Sequence[Node], workers: int, gpus: float = 0.0, *, reserved: float = 0.0) -> float | None:
    """The most CPUs that each of so many workers can get, to a hundredth; None when not even the smallest share fits.

    A worker never spans machines.
    """
    shares = {
        math.floor((node.cpus - reserved) / count * 100 + 1e-6) / 100
        for node in cluster
        for count in range(1, workers + 1)
    }
    for share in sorted(shares, reverse=True):
        if share >= SMALLEST_SHARE and slots(cluster, share, gpus, reserved=reserved) >= workers:
            return share
    return None


def shape(amounts: Sequence[float]) -> str:
    """'2' for one machine, '4 + 4' for two."""
    return " + ".join(f"{amount:g}" for amount in amounts) or "0"


def alive_nodes() -> list[Node]:
    """The machines of the cluster that this process is attached to."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in alive]


def cpus_per_worker(
    config: Config, cluster: Sequence[Node], coming: Sequence[Node] = (), *, training: bool = False
) -> float:
    """Logical CPUs a worker: as configured, else the cluster's shared out evenly with a little left for drivers.

    `coming`: machines that an autoscaler may add; only workers of a stated size are sure to fit them. `training`: an
    evaluation beside the run has to fit as well, where it is wished. Raises UserError with the arithmetic when the
    fewest workers of the run cannot fit, instead of waiting for ever.
    """
    beside = training and config.evaluation.asynchronous
    workers, gpus = config.least_workers + beside, config.resources.gpus_per_worker
    each = config.resources.cpus_per_worker
    if each is not None:
        if slots([*cluster, *coming], each, gpus) >= workers:
            return each
    elif isinstance(config.workers, Elastic):
        # As many as there are GPUs for, wherever; the range is on GPUs, or it states the CPUs.
        shares = [(node.cpus - DRIVER_CPUS) / count for node in cluster if (count := gpu_slots(node, gpus))]
        if shares and min(shares) >= SMALLEST_SHARE:
            each = math.floor(min(shares) * 100) / 100
            if slots(cluster, each, gpus, reserved=DRIVER_CPUS) >= workers:
                return each
    elif (share := largest_share(cluster, workers, gpus, reserved=DRIVER_CPUS)) is not None:
        return share
    raise _no_room(config, cluster, coming, each, beside)


def _no_room(
    config: Config, cluster: Sequence[Node], coming: Sequence[Node], each: float | None, beside: bool
) -> UserError:
    workers, gpus = config.least_workers + beside, config.resources.gpus_per_worker
    if each is None and coming:
        return UserError(
            f"{workers} workers do not fit the {shape([node.cpus for node in cluster])} CPUs that are up, and machines "
            "that are still to come cannot be shared out; set resources.cpus_per_worker."
        )
    there = [*cluster, *coming]
    short = bool(gpus) and sum(gpu_slots(node, gpus) for node in there) < workers
    if short:
        need = f"{workers} workers x {gpus:g} GPUs = {workers * gpus:g} do not fit the cluster's "
        have, lower = f"{shape([node.gpus for node in there])} GPUs", "resources.gpus_per_worker"
    else:
        size = SMALLEST_SHARE if each is None else each
        need = f"{workers} workers x {size:g} CPUs = {workers * size:g} do not fit the cluster's "
        have, lower = f"{shape([node.cpus for node in there])} CPUs", "resources.cpus_per_worker"
    one = " (one evaluates beside the run: evaluation.asynchronous)" if beside else ""
    return UserError(f"{need}{have}{one}; lower workers or {lower}.")


def without_cpus(cluster: Sequence[Node], cpus: float) -> list[Node]:
    """The machines with so many CPUs of the largest one left out."""
    ordered = sorted(cluster, key=lambda node: -node.cpus)
    return [replace(node, cpus=max(0.0, node.cpus - cpus)) if node is ordered[0] else node for node in ordered]
