"""Multi-scale inference of one network: the fused maps and the class scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosa_ray.method.assignment import assign
from cosa_ray.method.network import Network


class Inference(NamedTuple):
    """CAMs (B, C, S, S) in [0, 1], segmentation logits (B, C+1, S, S) or None, class logits (B, C); float32."""

    cam: Tensor
    cam_aux: Tensor
    seg: Tensor | None
    cls: Tensor


def infer(
    network: Network,
    images: Tensor,
    scales: Sequence[float],
    flip: bool,
    *,
    segment: bool = True,
    autocast: torch.dtype | None = None,
) -> Inference:
    """Run a network on normalised images (B, 3, S, S) at every scale and flip, and fuse what it gives.

    Maps are fused as the assignment network's are (method.md 3, 6); class logits are the mean over the passes (ours:
    the paper does not score classification).
    """
    passes: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, outputs: Any) -> None:
        passes.append(outputs.cls.float().unflatten(0, (-1, len(images))))

    # `assign` fuses maps and drops the class logits of its passes: they are read here instead of computed again.
    with network.register_forward_hook(keep):
        maps = assign(network, images, scales, flip, segment=segment, autocast=autocast)
    return Inference(*maps, torch.cat(passes).mean(0))
