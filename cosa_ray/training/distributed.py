"""The workers of one run: who am I, on which device, and the few collectives the loop needs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cosa_ray.config.schema import Config

log = logging.getLogger(__name__)


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
        return DistributedDataParallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def join_workers() -> Workers:
    """This process's place: from the process group that Ray Train or torchrun made, else alone.

    The device is the worker's GPU when it was given one.
    """
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return Workers(rank, world, device)


def set_threads(config: Config, cpus: float | None) -> None:
    """Give torch the configured CPU threads, else as many as the CPUs this worker was lent."""
    threads = config.training.threads or (max(1, round(cpus)) if cpus else None)
    if threads:
        torch.set_num_threads(threads)


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, None for fp32. `auto` takes bf16 only where the hardware has it."""
    wanted = config.training.precision
    if wanted == "auto":
        wanted = "bf16" if _has_bf16(device) else "fp32"
    return torch.bfloat16 if wanted == "bf16" else None


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)


class StepStatus:
    """What the workers agree on after a step: which loss terms (or the gradient) were not finite, and whether to stop.

    The sum over workers stays on the device; the host reads the one of the step before, so that no step waits for the
    device. Every worker reads the same numbers at the same step and acts alike.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._pending: tuple[int, list[str], Tensor, torch.cuda.Event | None] | None = None

    def share(self, step: int, values: Mapping[str, Tensor], stop: bool) -> Tensor:
        """Sum this step's flags over the workers; 1.0 where every named value of every worker is finite, else 0.0."""
        flags = torch.stack([(~torch.isfinite(value)).any() for value in values.values()]).float()
        wish = torch.full((1,), float(stop), device=flags.device)
        total = self._workers.sum(torch.cat([flags, wish]))
        finite = (total[:-1].sum() == 0).float()
        event = None
        host = total
        if total.device.type == "cuda":
            host = torch.empty_like(total, device="cpu", pin_memory=True)
            host.copy_(total, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (step, list(values), host, event)
        return finite

    def read(self) -> tuple[int, list[str], bool] | None:
        """(step, names of terms that were not finite, stop wished) of the last shared step; None when read already."""
        if self._pending is None:
            return None
        step, names, host, event = self._pending
        if event is not None:
            event.synchronize()
        counts = host.tolist()
        self._pending = None
        return step, [name for name, count in zip(names, counts[:-1], strict=True) if count], counts[-1] > 0
