"""The loss terms, each as this micro-batch's share of the global batch's average.

A share is a sum over the samples at hand divided by a count over the global batch, so shares add up over
micro-batches and workers to the loss of one big batch. All in float32 (or float64), never in bf16. Two have files of
their own: `contrastive` and `dense_energy`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_ray.method.pseudo_labels import IGNORED, PseudoLabel


def classification_loss(logits: Tensor, image_labels: Tensor, global_batch: int) -> Tensor:
    """Multilabel soft-margin loss (method.md 4.1): logits, image_labels (B, C); mean over classes and global batch."""
    total = F.binary_cross_entropy_with_logits(logits, image_labels.to(logits.dtype), reduction="sum")
    return total / (global_batch * logits.shape[1])


def cam_to_seg_loss(
    log_probabilities: Tensor, pseudo: PseudoLabel, counts: Tensor, foreground_share: float, *, batch_weights: bool
) -> Tensor:
    """CAM -> segmentation (method.md 4.2): cross-entropy, foreground and background averaged apart, then mixed.

    Args:
        log_probabilities: log-softmax of ON's segmentation logits, (B, C+1, H, W).
        pseudo: labels and weights of this micro-batch; with `regions`, each region weighs the same in the foreground.
        counts: (5,) of PseudoLabel, summed over micro-batches and workers.
        foreground_share: alpha; the background's mean gets 1 - alpha.
        batch_weights: reliability weights are raw, to be scaled by |R| / sum_R over the global batch.
    """
    pixel = F.nll_loss(log_probabilities, pseudo.labels, ignore_index=IGNORED, reduction="none")
    foreground, background, region, raw, regions = counts.to(pixel.dtype).unbind()
    is_foreground = (pseudo.labels > 0) & (pseudo.labels != IGNORED)
    if pseudo.regions is None:
        weights = is_foreground * (foreground_share / foreground.clamp(min=1))
    else:
        each = foreground_share / (pseudo.regions.clamp(min=1) * regions.clamp(min=1))
        own = torch.where(is_foreground, pseudo.labels, 0).flatten(1)
        weights = is_foreground * each.to(pixel.dtype).gather(1, own).view_as(pixel)
    weights = weights + (pseudo.labels == 0) * ((1 - foreground_share) / background.clamp(min=1))
    if pseudo.weights is not None:
        weights = weights * pseudo.weights
        if batch_weights:
            weights = weights * (region / raw.clamp(min=1e-12))
    return (pixel * weights).sum()


def seg_to_cam_loss(cam: Tensor, target: Tensor, global_batch: int) -> Tensor:
    """Segmentation -> CAM (method.md 4.5): multilabel soft margin of ReLU(CAM) against soft targets (B, C, h, w).

    Every location is one sample: mean over classes, locations and the global batch.
    """
    total = F.binary_cross_entropy_with_logits(F.relu(cam), target, reduction="sum")
    return total / (global_batch * cam[0].numel())
