"""What a plain ViT does before its first block: the convolutional stem, and position embeddings on any grid."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn


class ConvolutionalStem(PatchEmbed):
    """Patch embedding by four 3x3 convolutions, GroupNorm and GELU between them; total stride = patch size (ours).

    From scratch it learns much faster than one linear patch embedding. Widths D/8, D/4, D/2, D as in the stems of
    Xiao et al. 2021; strides 2,2,2,1 (patch 8) or 2,2,2,2 (16).
    """

    def __init__(self, *args: Any, patch_size: int = 16, embed_dim: int = 768, **kwargs: Any) -> None:
        super().__init__(*args, patch_size=patch_size, embed_dim=embed_dim, **kwargs)
        strides = {8: (2, 2, 2, 1), 16: (2, 2, 2, 2)}[int(self.patch_size[0])]
        widths = (3, *(max(8, embed_dim // share) for share in (8, 4, 2)), embed_dim)
        layers: list[nn.Module] = []
        for index, stride in enumerate(strides):
            inner = index < len(strides) - 1
            layers.append(nn.Conv2d(widths[index], widths[index + 1], 3, stride, padding=1, bias=not inner))
            if inner:
                groups = next(g for g in (8, 4, 2, 1) if widths[index + 1] % g == 0)
                layers += [nn.GroupNorm(groups, widths[index + 1]), nn.GELU()]
        self.proj = nn.Sequential(*layers)


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """Position embeddings (1, prefix + h*w, D) on another grid: bicubic, no antialias, in float32 (release)."""
    if old == new:
        return positions
    grid = positions[:, prefix:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(positions.dtype)
    return torch.cat([positions[:, :prefix], grid], dim=1)


def position_tokens(self: Any, x: Tensor) -> Any:
    """timm's `_pos_embed` of plain ViTs and EVA/DINOv3, with the release's interpolation kernel.

    timm resizes with antialias, another kernel. x is (B, h, w, D); EVA also returns its rotary embedding.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height * width, channels)
    tokens = (getattr(self, name, None) for name in ("cls_token", "dist_token", "reg_token"))
    prefix = [token.expand(batch, -1, -1) for token in tokens if token is not None]
    positions = None
    if self.pos_embed is not None:
        count = 0 if self.no_embed_class else self.num_prefix_tokens
        positions = resize_positions(self.pos_embed, tuple(self.patch_embed.grid_size), (height, width), count)
    if positions is not None and self.no_embed_class:
        x = x + positions
    if prefix:
        x = torch.cat([*prefix, x], dim=1)
    if positions is not None and not self.no_embed_class:
        x = x + positions
    if not hasattr(self, "rope"):
        return x
    return x, self.rope.get_embed(shape=(height, width)) if self.rope is not None else None
