"""Contrastive separation of coexisting classes in CAM space (paper 3.5) [reconstructed].

The idea is the paper's: the auxiliary CAM is less prone to coexistence, so its labels decide which pixels belong
together. Its exact symbols could not be checked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_ray.method.reliability import perplexity


class Sample(NamedTuple):
    """Pixels that take part: pixel (B, P) into the flattened grid, label (B, P), taken (B, P) bool.

    positive, negative (B, P, P) bool: ordered pairs of pixels taken, none with itself. both (B,) bool: the image has
    pairs of either kind. Their sum over micro-batches and workers is what the loss divides by.
    """

    pixel: Tensor
    label: Tensor
    taken: Tensor
    positive: Tensor
    negative: Tensor
    both: Tensor


def draws(seed: int, step: int, position: Tensor, count: int) -> Tensor:
    """Random int64 in [0, 2^32) of shape (B, count), a pure function of (seed, step, position, index) (ours).

    A counter-based hash (two rounds of a 64-bit finaliser), computed on the device: the same whichever worker holds
    the sample.
    """
    index = torch.arange(count, device=position.device)
    key = _mix(position + _wrap(seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03))
    return _mix(key[:, None] + index * _wrap(0xBF58476D1CE4E5B9)) & 0xFFFFFFFF


def sample_pixels(
    cam_aux: Tensor,
    inside: Tensor,
    threshold: Tensor | float,
    random: Tensor,
    *,
    max_perplexity: float,
    budget: int,
    perplexity_scale: float,
    perplexity_exponent: float,
) -> Sample:
    """Choose the pixels that are compared: confident ones in the box, at most `budget` an image, labels balanced.

    Balanced means that every label present gives its pixels in turn, so none is starved by a larger one.

    Args:
        cam_aux: AN's valid auxiliary CAM on the grid of the vectors, (B, C, h, w).
        inside: (B, h, w) bool.
        threshold: background threshold xi of the pairs' labels.
        random: (B, h*w) from `draws`.
    """
    confidence, best = cam_aux.flatten(2).max(1)
    label = torch.where(confidence >= threshold, best + 1, 0)
    value = perplexity(confidence, threshold, perplexity_scale, perplexity_exponent)
    candidate = (value < max_perplexity) & inside.flatten(1)
    pixels, classes = label.shape[1], cam_aux.shape[1] + 1
    if pixels <= budget:
        index = torch.arange(pixels, device=label.device).expand_as(label)
        return _sample(index, label, candidate)
    group = torch.where(candidate, label, classes)
    order = ((group << 32) | random).argsort(1)
    sizes = torch.zeros(len(label), classes + 1, dtype=torch.int64, device=label.device)
    sizes.scatter_add_(1, group, torch.ones_like(group))
    start = sizes.cumsum(1) - sizes
    grouped = group.gather(1, order)
    rank = torch.arange(pixels, device=label.device) - start.gather(1, grouped)  # place within its label
    turn = torch.where(grouped == classes, pixels, rank)
    chosen = ((turn << 32) | random.gather(1, order)).topk(budget, dim=1, largest=False).indices
    index = order.gather(1, chosen)
    return _sample(index, label.gather(1, index), candidate.gather(1, index))


def contrastive_loss(vectors: Tensor, sample: Sample, temperature: float, images: Tensor) -> Tensor:
    """InfoNCE over pairs within one image, as a share of the global average.

    -log(e^{s_ij} / (e^{s_ij} + sum_{k negative to i} e^{s_ik})) of cosine similarities / temperature, averaged over
    ordered positive pairs, then over the images that have both kinds.

    Args:
        vectors: ON's CAM logits or features, (B, K, h, w).
        sample: of these images.
        images: images with both kinds in the global batch, 0-dim.
    """
    index = sample.pixel[:, None].expand(-1, vectors.shape[1], -1)
    chosen = F.normalize(vectors.flatten(2).gather(2, index), dim=1)
    similarity = chosen.transpose(1, 2) @ (chosen / temperature)
    similarity = similarity - similarity.detach().amax(2, keepdim=True)  # keeps the exponentials in range
    grown = similarity.exp()
    others = (grown * sample.negative).sum(2, keepdim=True)
    pair = ((grown + others).clamp(min=torch.finfo(grown.dtype).tiny).log() - similarity) * sample.positive
    mean = pair.sum((1, 2)) / sample.positive.sum((1, 2)).clamp(min=1)
    return (mean * sample.both).sum() / images.to(mean.dtype).clamp(min=1)


def _sample(pixel: Tensor, label: Tensor, taken: Tensor) -> Sample:
    """Sample with its pairs."""
    left = torch.where(taken, label, -1)[:, :, None]  # two sentinels: pixels not taken equal nothing
    right = torch.where(taken, label, -2)[:, None, :]
    same = left == right
    negative = ((left >= 0) & (right >= 0)).logical_xor(same)
    same.diagonal(dim1=1, dim2=2).fill_(False)
    return Sample(pixel, label, taken, same, negative, same.flatten(1).any(1) & negative.flatten(1).any(1))


def _mix(x: Tensor) -> Tensor:
    """A 64-bit finaliser (multiply and xor-shift); int64 wraps around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift(x, shift)) * _wrap(factor)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    """The signed 64-bit integer with the same bits."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value
