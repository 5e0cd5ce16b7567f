"""Assignments of the assignment network: class activation maps and segmentation fused over scales and flips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_ray.method.network import Network, mixed_precision, scaled_size

EPSILON = 1e-5


class Assignment(NamedTuple):
    """Fused maps, float32: cam and cam_aux (B, C, h, w) in [0, 1], seg logits (B, C+1, h, w) or None."""

    cam: Tensor
    cam_aux: Tensor
    seg: Tensor | None


@torch.no_grad()
def assign(
    network: Network,
    images: Tensor,
    scales: Sequence[float],
    flip: bool,
    *,
    stride: int = 1,
    segment: bool = True,
    autocast: torch.dtype | None = None,
) -> Assignment:
    """Multi-scale assignments of normalised images (method.md 3; release `multi_scale_camsegv3`).

    CAMs: bilinear to the output size, maximum over the flip, ReLU, sum over scales, min-max normalised per image and
    class. Segmentation logits: bilinear, summed over flips and scales. The auxiliary CAM is fused like the main one
    (the release keeps the last scale's: a slip).

    Args:
        images: (B, 3, H, W).
        scales: input scales, times H and W (rounded to what the encoder takes).
        flip: add the horizontal flip of every scale.
        stride: output maps of H/stride x W/stride pixels; 1 is the images' own size.
        segment: False leaves the decoder out.
        autocast: dtype of the network's forward passes, None for float32; fusion is always float32.
    """
    if network.training:  # a walk over every module
        network.eval()
    height, width = images.shape[-2:]
    size = (height // stride, width // stride)
    cams: list[Tensor | None] = [None, None]
    seg: Tensor | None = None
    for scale in scales:
        scaled = scaled_size(network, height, width, scale)
        view = resize(images, scaled)
        batch = torch.cat([view, view.flip(-1)]) if flip else view
        with mixed_precision(images.device, autocast):
            outputs = network(batch, segment=segment)
        for index, logits in enumerate((outputs.cam, outputs.cam_aux)):
            fused = resize(logits.float(), size)
            if flip:
                plain, flipped = fused.chunk(2)
                fused = torch.maximum(plain, flipped.flip(-1))
            fused = fused.clamp_(min=0)
            total = cams[index]
            cams[index] = fused if total is None else total.add_(fused)
        if outputs.seg is not None:
            logits = outputs.seg.float()
            if flip:  # interpolation is linear and symmetric: sum first, resize once
                plain, flipped = logits.chunk(2)
                logits = plain + flipped.flip(-1)
            logits = resize(logits, size)
            seg = logits if seg is None else seg.add_(logits)
    cam, cam_aux = cams
    assert cam is not None
    assert cam_aux is not None
    return Assignment(min_max_(cam), min_max_(cam_aux), seg)


def min_max_(cam: Tensor) -> Tensor:
    """Min-max normalise (B, C, h, w) to [0, 1] per image and class, in place; constant maps become 0."""
    low, high = torch.aminmax(cam.flatten(2), dim=2, keepdim=True)
    flat = cam.flatten(2).sub_(low).div_(high - low + EPSILON)
    return flat.view_as(cam)


def valid_cam(cam: Tensor, labels: Tensor) -> Tensor:
    """CAM (B, C, h, w) times the image-level labels (B, C): absent classes are 0."""
    return cam * labels[:, :, None, None].to(cam.dtype)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of maps (B, C, h, w), no antialias, corners not aligned (release); same size: same tensor."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
