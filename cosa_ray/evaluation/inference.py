"""Multi-scale inference of one network: the fused maps and the class scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosa_ray.config.schema import Config
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
