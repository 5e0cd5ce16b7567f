"""The assignment network follows the online network by an exponential moving average."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MovingAverage:
    """theta' <- m theta' + (1-m) theta over parameters; buffers are copied (method.md 1; release `ema_update`).

    Two networks of one architecture, not wrapped, on one device. Their tensors are looked up once: finding them in
    the modules takes as long as averaging a small network does.
    """

    def __init__(self, assignment: nn.Module, online: nn.Module) -> None:
        self._theirs: list[Tensor] = list(assignment.parameters())
        self._ours: list[Tensor] = list(online.parameters())
        self._buffers = list(zip(assignment.buffers(), online.buffers(), strict=True))

    @torch.no_grad()
    def update(self, momentum: float, finite: Tensor | None = None) -> None:
        """Take one step of momentum m.

        `finite`: 0-dim tensor on their device; where it is 0 the assignment network stays as it is. None is 1.
        """
        theirs, ours = self._theirs, self._ours
        if finite is not None and finite.device.type == "cpu":  # free to ask there, and one pass in place of three
            if not finite:
                return
            finite = None
        if finite is None:
            torch._foreach_lerp_(theirs, ours, 1.0 - momentum)
        else:  # skipped without asking the host: a step of weight 0
            weight = (1.0 - momentum) * (finite != 0).to(theirs[0].dtype)
            change = list(torch._foreach_sub(ours, theirs))
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(theirs, change)
        for mine, source in self._buffers:
            mine.copy_(source if finite is None else torch.where(finite != 0, source, mine))
