"""Which attention a pass of the encoder takes: torch's fused kernel, or plain matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# On a CPU in bf16 the backward pass of the fused kernel costs more than its forward pass saves: plain products took
# 0.66 to 0.86 of its time up to 785 tokens (docs/performance.md). In float32 the fused one was hardly ever slower. By
# number, not by a trial at the start: a run that is resumed has to take the same kernels to give the same bits.
PLAIN_TOKENS = 784


def plain_is_faster(images: Tensor, tokens: int) -> bool:
    """True for a pass, as it would begin here, over images (B, 3, H, W) of so many tokens each (ours)."""
    if images.device.type != "cpu" or tokens > PLAIN_TOKENS or torch.compiler.is_compiling():
        return False
    bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    return bf16 and torch.is_grad_enabled()


@contextmanager
def plain_attention(encoder: nn.Module) -> Iterator[None]:
    """Every attention layer of a timm encoder multiplies its matrices plainly inside."""
    layers = [layer for layer in encoder.modules() if getattr(layer, "fused_attn", False)]
    for layer in layers:
        layer.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.fused_attn = True  # type: ignore[assignment]
