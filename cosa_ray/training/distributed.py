"""The workers of one run: who am I, on which device, and the few collectives the loop needs."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError

log = logging.getLogger(__name__)
_fresh: Any = torch.utils.deterministic  # a module whose one switch type checkers do not see
# glibc's mallopt, by the numbers of malloc.h: TRIM_THRESHOLD, TOP_PAD and MMAP_THRESHOLD at the most it takes.
_KEEP_FREED = {-1: 2**31 - 1, -2: 2**28, -3: 2**25}


@dataclass(frozen=True)
class Workers:
    """This worker's place among the workers of a run."""

    rank: int
    world: int
    device: torch.device

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all workers; exact for integers, same bits on every worker."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module under DDP, or as it is with one worker."""
        if self.world == 1:
            return module
        wrapped = DistributedDataParallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
        if self.device.type == "cpu" and self.world > 2:
            # A lambda, because DDP does not understand annotations that are strings.
            wrapped.register_comm_hook(self.world, lambda world, bucket: _mean_in_rank_order(world, bucket))
        return wrapped


def _mean_in_rank_order(world: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's mean of a bucket, every element added up in the order of the ranks.

    Gloo adds in an order that follows an element's place in the bucket, and DDP lays its buckets out anew after the
    first step of a process. So a resumed run would differ in the last bit; two addends have one order only.
    """
    mine = bucket.buffer()
    parts = [torch.empty_like(mine) for _ in range(world)]

    def mean(_gathered: torch.futures.Future[object]) -> Tensor:
        for part in parts[1:]:
            parts[0].add_(part)
        return parts[0].div_(world)

    gathered = dist.all_gather(parts, mine, async_op=True)
    return gathered.get_future().then(mean)


def join_workers(device: torch.device | None = None) -> Workers:
    """This process's place: from the process group that Ray Train or torchrun made, else alone.

    `device` is the one Ray gives the worker; without it, the GPU of the local rank where there are GPUs. Raises
    UserError when there are more processes here than GPUs.
    """
    if device is None:
        device = _local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Workers(rank, world, device)


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= gpus:
        raise UserError(
            f"process {rank} of this machine has no GPU: there are {gpus}; start at most one process a GPU."
        )
    return torch.device("cuda", rank)


@contextmanager
def torch_settings(config: Config, cpus: float | None, device: torch.device) -> Iterator[None]:
    """Torch as a run needs it, and afterwards as it was, because `--local` runs in the caller's process.

    The configured CPU threads, else as many as the CPUs this worker was lent; deterministic algorithms on the CPU.
    What the process frees stays with it from then on, for the next step to take.
    """
    if device.type == "cpu":
        keep_freed_memory()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only, fill = torch.is_deterministic_algorithms_warn_only_enabled(), _fresh.fill_uninitialized_memory
    wanted = config.training.threads or (max(1, round(cpus)) if cpus else None)
    if wanted:
        torch.set_num_threads(wanted)
    torch.use_deterministic_algorithms(device.type == "cpu")
    # Nobody reads what was not written; filling it was 3 % of the demo's step.
    _fresh.fill_uninitialized_memory = False
    try:
        yield
    finally:
        if wanted:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _fresh.fill_uninitialized_memory = fill


def keep_freed_memory() -> bool:
    """Have this process keep the memory it frees, up to 2 GiB a heap; False where its C library is not glibc (ours).

    By default most tensors of a step go back to the kernel and come as new pages, zeroed, in the next one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(setting, value) for setting, value in _KEEP_FREED.items())


class Agreed(NamedTuple):
    """What holds for all workers after a step: terms that were not finite, a wish to stop, a machine about to go."""

    step: int
    bad: list[str]
    stop: bool
    leaving: bool


class StepStatus:
    """What the workers agree on after a step: which loss terms (or the gradient) were not finite, and whether to stop.

    The sum over workers stays on the device; the host reads the one of the step before, so that no step waits for the
    device. Every worker reads the same numbers at the same step and acts alike.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._pending: tuple[int, list[str], Tensor, torch.cuda.Event | None] | None = None

    def share(self, step: int, values: Mapping[str, Tensor], stop: bool, leaving: bool = False) -> Tensor:
        """Sum this step's flags over the workers; 1.0 where every named value of every worker is finite, else 0.0."""
        flags = torch.stack([(~torch.isfinite(value)).any() for value in values.values()]).float()
        # Filled on the device: a copy of what lies here would wait for it.
        wishes = [torch.full((1,), float(wish), device=flags.device) for wish in (stop, leaving)]
        total = self._workers.sum(torch.cat([flags, *wishes]))
        finite = (total[:-2].sum() == 0).float()
        event = None
        host = total
        if total.device.type == "cuda":
            host = torch.empty_like(total, device="cpu", pin_memory=True)
            host.copy_(total, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (step, list(values), host, event)
        return finite

    def read(self) -> Agreed | None:
        """What was agreed at the last shared step; None when read already."""
        if self._pending is None:
            return None
        step, names, host, event = self._pending
        if event is not None:
            event.synchronize()
        counts = host.tolist()
        self._pending = None
        bad = [name for name, count in zip(names, counts[:-2], strict=True) if count]
        return Agreed(step, bad, counts[-2] > 0, counts[-1] > 0)
