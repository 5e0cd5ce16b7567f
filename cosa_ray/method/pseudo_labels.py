"""Pseudo-labels: CAM -> segmentation labels under three policies, and segmentation -> CAM targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cosa_ray.config.schema import PseudoLabels
from cosa_ray.method.assignment import resize
from cosa_ray.method.refinement import ROW_SUM, Affinity, pixel_affinity, refine
from cosa_ray.method.reliability import perplexity, reliability

IGNORED = 255
ABSENT = -1e5  # logit of a class that is not in the image (release)


class PseudoLabel(NamedTuple):
    """labels (B, H, W) int64, 0..C or 255; weights (B, H, W) or None where every labelled pixel weighs 1.

    regions (B, C+1) float32 or None: pixels of every label in every image, where each region weighs the same.
    counts (5,) float64: foreground pixels, background pixels, pixels in R, sum of the raw weights over R, foreground
    regions. They are sums: add them over micro-batches and workers before the loss divides by them.
    """

    labels: Tensor
    weights: Tensor | None
    counts: Tensor
    regions: Tensor | None = None


COUNTS = 5  # of a PseudoLabel


def inside_box(box: Tensor, crop: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """True where a location's centre lies in the image's valid area: boxes (B, 4) in pixels -> (B, h, w) bool.

    Args:
        box: (top, bottom, left, right) in the crop, ends excluded.
        crop, size: crop in pixels and map, (height, width).
    """
    rows, columns = (
        (torch.arange(n, device=box.device) + 0.5) * (side / n) for n, side in zip(size, crop, strict=True)
    )
    top, bottom, left, right = box.unbind(1)
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return in_rows[:, :, None] & in_columns[:, None, :]


def deciding_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Size of the maps on which CAMs are refined and compared: half the crop (release), or the loss's if smaller."""
    down = 2 if stride == 1 else 1
    return size[0] // down, size[1] // down


def pseudo_label(
    cam: Tensor,
    image_labels: Tensor,
    inside: Tensor,
    thresholds: Mapping[str, Tensor],
    settings: PseudoLabels,
    *,
    suffix: str = "",
    stride: int = 1,
    affinity: Affinity | None = None,
    shares: Tensor | None = None,
) -> PseudoLabel:
    """Pseudo-labels of a valid CAM under the policy of `settings` (method.md 4.2; paper 3.3, release for two).

    Args:
        cam: valid CAM (B, C, H, W).
        image_labels: (B, C).
        inside: (B, H, W) bool, see `inside_box`.
        thresholds: by name: background, or low and high; with `suffix` ("_aux") appended.
        stride: pixels of the crop per location of the CAM.
        affinity: of the images at `deciding_size`; refines shares (two_threshold) or the CAM before it is cut.
        shares: AN's probabilities (B, C+1, H, W) where `agreement` weighs pixels by that of their label.
    """
    trust: Tensor | None = None
    iterations = settings.refinement_iterations
    if settings.policy == "two_threshold":
        high, low = thresholds["high" + suffix], thresholds["low" + suffix]
        labels = two_threshold_labels(
            cam, image_labels, inside, high, low, down=2 if stride == 1 else 1, affinity=affinity, iterations=iterations
        )
    else:
        if affinity is not None:
            cam = refined_cam(cam, affinity, iterations, stride=stride)
        threshold = thresholds["background" + suffix]
        labels, confidence = threshold_labels(cam, inside, threshold)
        if settings.policy == "reliability":
            value = perplexity(confidence, threshold, settings.perplexity_scale, settings.perplexity_exponent)
            trust = value.reciprocal()
    if shares is not None:
        agreed = agreement(shares, labels, settings.agreement)
        trust = agreed if trust is None else trust * agreed
    weights = None if trust is None else reliability(trust, inside, settings.reliability_over)
    background = (labels == 0).sum()
    ignored = (labels == IGNORED).sum()
    raw = inside.sum() if weights is None else weights.sum(dtype=torch.float64)
    foreground, regions = labels.numel() - ignored - background, None
    found = [foreground, background, inside.sum(), raw]
    if settings.foreground_over == "regions":
        regions = pixels_of(labels, cam.shape[1] + 1)
        found.append((regions[:, 1:] > 0).sum())
    else:
        found.append(torch.zeros_like(background))
    return PseudoLabel(labels, weights, torch.stack(found).double(), regions)


def agreement(shares: Tensor, labels: Tensor, exponent: float) -> Tensor:
    """AN's probability (B, C+1, H, W) of every pixel's label (B, H, W), to a power; 1 where 255 (ours)."""
    known = labels != IGNORED
    share = shares.gather(1, torch.where(known, labels, 0)[:, None])[:, 0]
    return torch.where(known, share.clamp(min=1e-4) ** exponent, 1.0)


def pixels_of(labels: Tensor, classes: int) -> Tensor:
    """Pixels (B, classes), float32, of every label in every image; ignored ones count nowhere."""
    flat = labels.flatten(1)
    counts = torch.zeros(len(flat), IGNORED + 1, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat))[:, :classes].float()


def policy_labels(
    cam: Tensor, image_labels: Tensor, thresholds: Mapping[str, float], settings: PseudoLabels, images: Tensor
) -> Tensor:
    """Labels (B, H, W) that a run's policy and thresholds give a whole image's valid CAM (B, C, H, W), without a loss.

    images: (B, 3, h, w) of any scale and size, looked at only where the policy refines.
    """
    size = (cam.shape[-2], cam.shape[-1])
    inside = torch.ones_like(cam[:, 0], dtype=torch.bool)
    affinity, iterations = None, settings.refinement_iterations
    if settings.refinement == "pixel_adaptive":
        affinity = pixel_affinity(resize(images, deciding_size(size, 1)), settings.refinement_dilations)
    if settings.policy == "two_threshold":
        high, low = thresholds["high"], thresholds["low"]
        return two_threshold_labels(cam, image_labels, inside, high, low, affinity=affinity, iterations=iterations)
    if affinity is not None:
        cam = refined_cam(cam, affinity, iterations)
    return threshold_labels(cam, inside, thresholds["background"])[0]


def refined_cam(cam: Tensor, affinity: Affinity, iterations: int, *, stride: int = 1) -> Tensor:
    """A valid CAM (B, C, H, W) refined at `deciding_size` and brought back bilinearly; constant maps stay as they are.

    For policies with one threshold (ours: the release refines the two-threshold shares only).
    """
    size = (cam.shape[-2], cam.shape[-1])
    small = refine(resize(cam, deciding_size(size, stride)), affinity, iterations)
    return resize(small / ROW_SUM**iterations, size)


def threshold_labels(cam: Tensor, inside: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """(labels, confidence v) of a valid CAM: argmax + 1 where v >= xi, else 0; 255 outside the box."""
    confidence, best = cam.max(1)
    labels = torch.where(confidence >= threshold, best + 1, 0)
    return torch.where(inside, labels, IGNORED), confidence


def two_threshold_labels(
    cam: Tensor,
    image_labels: Tensor,
    inside: Tensor,
    high: Tensor | float,
    low: Tensor | float,
    *,
    down: int = 2,
    affinity: Affinity | None = None,
    iterations: int = 10,
) -> Tensor:
    """The release's two-threshold labels (`refine_cams_with_bkg`): (B, H, W) int64.

    A constant background channel is appended, the maps go to 1/down of their size, through a softmax over background
    and present classes, through the refinement if an affinity at that size is given, back bilinearly, and to the
    argmax: once with each threshold. Foreground where the high one says so, background where both do, 255 between and
    outside the box.
    """
    size = (cam.shape[-2], cam.shape[-1])
    small = resize(cam, (size[0] // down, size[1] // down))
    small = small.masked_fill(image_labels[:, :, None, None] == 0, -torch.inf)

    def labels(threshold: Tensor | float) -> Tensor:
        background = torch.zeros_like(small[:, :1]) + threshold
        shares = torch.cat([background, small], 1).softmax(1)
        if affinity is not None:
            shares = refine(shares, affinity, iterations)
        return resize(shares, size).argmax(1)

    sure, either = labels(high), labels(low)
    result = torch.where(sure > 0, sure, torch.where(either > 0, IGNORED, 0))
    return torch.where(inside, result, IGNORED)


def segmentation_target(seg: Tensor, image_labels: Tensor, temperature: float) -> Tensor:
    """Segmentation pseudo-label SPL (method.md 4.5): softmax (B, C+1, H, W), absent classes at -1e5 before it."""
    absent = (image_labels == 0)[:, :, None, None]
    logits = torch.cat([seg[:, :1], seg[:, 1:].masked_fill(absent, ABSENT)], 1)
    return (logits / temperature).softmax(1)


def guided_cam_target(seg: Tensor, image_labels: Tensor, temperature: float, size: tuple[int, int]) -> Tensor:
    """Soft targets (B, C, h, w) of the CAMs: foreground channels of SPL, bilinear to the CAM grid (release)."""
    return resize(segmentation_target(seg, image_labels, temperature)[:, 1:], size)
