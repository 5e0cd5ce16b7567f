"""The assignment network follows the online network by an exponential moving average."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def ema_update(assignment: nn.Module, online: nn.Module, momentum: float, finite: Tensor | None = None) -> None:
    """theta' <- m theta' + (1-m) theta over parameters; buffers are copied (method.md 1; release `ema_update`).

    Args:
        assignment, online: two networks of one architecture, not wrapped, on one device.
        momentum: m.
        finite: 0-dim tensor on their device; where it is 0 the assignment network stays as it is. None is 1.
    """
    theirs: list[Tensor] = list(assignment.parameters())
    ours: list[Tensor] = list(online.parameters())
    if finite is None:
        torch._foreach_lerp_(theirs, ours, 1.0 - momentum)
    else:  # skipped without asking the host: a step of weight 0
        weight = (1.0 - momentum) * (finite != 0).to(theirs[0].dtype)
        change = list(torch._foreach_sub(ours, theirs))
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(theirs, change)
    for mine, source in zip(assignment.buffers(), online.buffers(), strict=True):
        mine.copy_(source if finite is None else torch.where(finite != 0, source, mine))
