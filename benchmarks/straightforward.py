"""What a step looks like without care for its time: the same numbers, made one pass and one parameter at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cosa_ray.method.assignment import Assignment, min_max_, resize
from cosa_ray.method.network import Network, mixed_precision, scaled_size


@torch.no_grad()
def assign_one_by_one(
    network: Network,
    images: Tensor,
    scales: Sequence[float],
    flip: bool,
    *,
    stride: int = 1,
    segment: bool = True,
    autocast: torch.dtype | None = None,
) -> Assignment:
    """As `assign`, with a pass of its own for each flip, and every map at the output size before it is fused."""
    network.eval()
    height, width = images.shape[-2:]
    size = (height // stride, width // stride)
    fused: list[list[Tensor]] = [[], [], []]
    for scale in scales:
        view = resize(images, scaled_size(network, height, width, scale))
        maps: list[list[Tensor]] = [[], [], []]
        for turned in (False, True) if flip else (False,):
            with mixed_precision(images.device, autocast):
                outputs = network(view.flip(-1) if turned else view, segment=segment)
            for kind, logits in enumerate((outputs.cam, outputs.cam_aux, outputs.seg)):
                if logits is not None:
                    large = resize(logits.float(), size)
                    maps[kind].append(large.flip(-1) if turned else large)
        for kind in (0, 1):
            fused[kind].append(torch.stack(maps[kind]).amax(0).relu())
        fused[2] += maps[2]
    cam, cam_aux = (min_max_(torch.stack(fused[kind]).sum(0)) for kind in (0, 1))
    return Assignment(cam, cam_aux, torch.stack(fused[2]).sum(0) if segment else None)


class AverageByParameter:
    """As `MovingAverage`, parameter by parameter."""

    def __init__(self, assignment: nn.Module, online: nn.Module) -> None:
        self._assignment, self._online = assignment, online

    @torch.no_grad()
    def update(self, momentum: float, finite: Tensor) -> None:
        """One step, unless `finite` is 0."""
        for theirs, ours in zip(self._assignment.parameters(), self._online.parameters(), strict=True):
            theirs.copy_(torch.where(finite != 0, momentum * theirs + (1 - momentum) * ours, theirs))
        for mine, source in zip(self._assignment.buffers(), self._online.buffers(), strict=True):
            mine.copy_(torch.where(finite != 0, source, mine))


class PlainAdamW(torch.optim.AdamW):
    """AdamW over one parameter after the other, which asks the host whether the step was finite; clips beforehand."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, foreach=False, fused=False)

    def step(self, closure: Any = None) -> None:
        """One step, unless a run's `found_inf` says that it is not finite."""
        found = self.__dict__.pop("found_inf", None)
        scale = self.__dict__.pop("grad_scale", None)
        if found is None or not found.item():
            for group in self.param_groups if scale is not None else ():
                for parameter in group["params"]:
                    parameter.grad.div_(scale)
            super().step(closure)
