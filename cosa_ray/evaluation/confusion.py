"""Confusion matrices and the scores read off them; a sweep over background thresholds in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE = 255
_SIDE = 256  # truth and prediction are bytes: one histogram over all pairs needs no mask and no clamp


@dataclass(frozen=True)
class Scores:
    """Segmentation scores in 0..1; `iou` has one entry per class, NaN for classes without ground-truth pixels."""

    miou: float
    iou: np.ndarray
    pixel_accuracy: float
    mean_accuracy: float


def confusion_matrix(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true and predicted class, leaving out those where either is 255 (method.md 6).

    truth, prediction: integer tensors of one shape, values 0..num_classes-1 or 255; num_classes K includes the
    background and is at most 255. Returns int64 (K, K) on their device, rows truth. Raises ValueError on other values.
    """
    pairs = truth.reshape(-1).to(torch.int64) * _SIDE + prediction.reshape(-1).to(torch.int64)
    counts = torch.bincount(pairs, minlength=_SIDE * _SIDE).reshape(_SIDE, _SIDE)
    matrix = counts[:num_classes, :num_classes]
    if int(matrix.sum() + counts[IGNORE].sum() + counts[:IGNORE, IGNORE].sum()) != pairs.numel():
        raise ValueError(f"a mask or a prediction holds values that are neither 0..{num_classes - 1} nor {IGNORE}")
    return matrix


def scores(matrix: Tensor | np.ndarray) -> Scores:
    """Scores of a confusion matrix (K, K), rows truth.

    mIoU and mean accuracy are means over the classes with ground-truth pixels (the release's `scores`); NaN when the
    matrix is empty. torchmetrics also counts classes that were only predicted, as 0.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    hits, truth, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    present = truth > 0
    if not present.any():
        return Scores(float("nan"), np.full(len(counts), np.nan), float("nan"), float("nan"))
    with np.errstate(invalid="ignore"):
        iou = np.where(present, hits / (truth + predicted - hits), np.nan)
        accuracy = hits[present] / truth[present]
    return Scores(float(np.nanmean(iou)), iou, float(hits.sum() / counts.sum()), float(accuracy.mean()))


@dataclass(frozen=True)
class SweepBest:
    """The threshold with the highest mIoU, and that mIoU."""

    threshold: float
    miou: float


class ThresholdSweep:
    """Confusion matrices of CAM labels for every background threshold of a grid, from one histogram.

    A pixel is labelled with its strongest class where that class's value reaches the threshold, else background. Only
    the true class, the strongest class and the number of thresholds reached matter, so these are counted, and every
    threshold's matrix is a sum over the counts: exact, with one argmax instead of one per threshold (ours).
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", steps: int = 100) -> None:
        """num_classes: K, background included. The grid is k/steps for k = 1..steps-1."""
        # Compared in float32, as the CAMs are: `value >= threshold` has one meaning then.
        self.thresholds = (np.arange(1, steps) / steps).astype(np.float32)
        infinity = np.array([np.inf], np.float32)
        self._edges = torch.from_numpy(np.concatenate([-infinity, self.thresholds, infinity])).to(device)
        self._shape = (num_classes, num_classes - 1, steps)
        self.counts = torch.zeros(self._shape, dtype=torch.int64, device=device)

    def bins(self, confidence: Tensor) -> Tensor:
        """Number of thresholds each value of 0..1 reaches: int64, 0..steps-1."""
        last = self._shape[2] - 1
        # The product is at most one bin off; looking at the two edges beside it makes it exact, and unlike a binary
        # search it costs a few passes over the map.
        guess = (confidence * (last + 1)).to(torch.int64).clamp_(0, last)
        guess -= (self._edges[guess] > confidence).to(torch.int64)
        return guess + (self._edges[guess + 1] <= confidence)

    def add(self, truth: Tensor, strongest: Tensor, bins: Tensor) -> None:
        """Count pixels: truth 0..K-1 or 255 (left out), strongest class 0..K-2 (no background), `bins`; one shape."""
        classes, values = self._shape[1:]
        size = self.counts.numel()
        index = (truth.to(torch.int64) * classes + strongest) * values + bins
        index = torch.where(truth == IGNORE, size, index)
        self.counts += torch.bincount(index.reshape(-1), minlength=size + 1)[:size].reshape(self._shape)

    def matrices(self) -> np.ndarray:
        """Confusion matrix of every threshold: int64 (T, K, K), rows truth."""
        counts = self.counts.cpu().numpy()
        # reached[..., k]: pixels whose value is at or above threshold k, i.e. with more than k thresholds reached.
        reached = counts[..., ::-1].cumsum(-1)[..., ::-1][..., 1:]
        below = counts.sum(axis=(1, 2))[:, None] - reached.sum(axis=1)
        return np.concatenate([below.T[..., None], np.moveaxis(reached, -1, 0)], axis=-1)

    def best(self) -> SweepBest:
        """The grid's best threshold (the lowest of equals); NaN where no pixel was counted."""
        mious = [scores(matrix).miou for matrix in self.matrices()]
        if np.isnan(mious[0]):
            return SweepBest(float("nan"), float("nan"))
        best = int(np.argmax(mious))
        return SweepBest(round(float(self.thresholds[best]), 6), mious[best])
