"""Pixel-adaptive refinement (PAR; Ru et al. 2022): maps are averaged over neighbours that look alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SHARPNESS = 0.3  # neighbours are compared in units of 0.3 standard deviations
_POSITION_SHARE = 0.01
_STEPS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
ROW_SUM = 1 + _POSITION_SHARE
"""What an affinity's weights of a pixel sum to: every iteration multiplies a constant map by it."""


class Affinity(NamedTuple):
    """weights (B, 8 * dilations, H, W) of a pixel's neighbours, and the dilations they belong to."""

    weights: Tensor
    dilations: tuple[int, ...]


@torch.no_grad()
def pixel_affinity(images: Tensor, dilations: Sequence[int]) -> Affinity:
    """How alike a pixel and its 8 neighbours at every dilation are, in colour and place.

    softmax(-mean_channels (|dI| / std / 0.3)^2) + 0.01 softmax of the same of the distances, std over the neighbours.
    Differences are in units of their own deviation, so a channel's scale and offset do not matter: 0..1, 0..255 and
    normalised images give the same.

    Args:
        images: (B, 3, H, W); beyond the border its pixels are repeated.
        dilations: distances of the neighbours, pixels.
    """
    reach, images = max(dilations), images.float()
    neighbours = _neighbours(F.pad(images, [reach] * 4, mode="replicate"), dilations)
    count = len(_STEPS) * len(dilations)
    # Differences to the pixel itself: the same deviation, and exactly 0 where the image is flat.
    mean = sum((neighbours(k) - images for k in range(count)), torch.zeros_like(images)) / count
    variance = torch.zeros_like(images)
    for k in range(count):
        variance += (neighbours(k) - images - mean).square()
    unit = _SHARPNESS * ((variance / (count - 1)).sqrt() + 1e-8)
    likeness = torch.stack([-((neighbours(k) - images) / unit).square().mean(1) for k in range(count)], 1)
    distances = torch.tensor([dilation * math.hypot(*step) for dilation in dilations for step in _STEPS])
    nearness = (-(distances / (_SHARPNESS * (distances.std() + 1e-8))).square()).softmax(0)
    nearness = nearness.to(images.device, non_blocking=True)[:, None, None]
    return Affinity(likeness.softmax(1).add_(_POSITION_SHARE * nearness), tuple(dilations))


@torch.no_grad()
def refine(maps: Tensor, affinity: Affinity, iterations: int) -> Tensor:
    """Average maps over their neighbours, again and again; a constant grows by ROW_SUM each time, as in the release.

    Args:
        maps: (B, K, h, w); brought to the affinity's size bilinearly with aligned corners first.
        iterations: 0 or more.
    """
    weights, dilations = affinity
    size = (weights.shape[-2], weights.shape[-1])
    maps = maps.float()
    if tuple(maps.shape[-2:]) != size:
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
    for _ in range(iterations):
        neighbours = _neighbours(F.pad(maps, [max(dilations)] * 4, mode="replicate"), dilations)
        maps = torch.zeros_like(maps)
        for k in range(weights.shape[1]):
            maps.addcmul_(neighbours(k), weights[:, k : k + 1])
    return maps


def _neighbours(padded: Tensor, dilations: Sequence[int]) -> Callable[[int], Tensor]:
    """The k-th neighbour of every pixel, as a view of maps padded by the greatest dilation: no copy of them all."""
    reach = max(dilations)
    height, width = padded.shape[-2] - 2 * reach, padded.shape[-1] - 2 * reach

    def neighbour(k: int) -> Tensor:
        dilation, (down, right) = dilations[k // len(_STEPS)], _STEPS[k % len(_STEPS)]
        top, left = reach + down * dilation, reach + right * dilation
        return padded[..., top : top + height, left : left + width]

    return neighbour
