"""Confusion matrices and the scores read off them; a sweep over background thresholds in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE = 255
_SIDE = 256  # truth and prediction are bytes: one histogram over all pairs needs no mask and no clamp


@dataclass(frozen=True)
class Scores:
    """Segmentation scores in 0..1, per class (K,) or over classes.

    iou and recall are NaN for classes without ground-truth pixels, precision for classes that were never predicted.
    """

    miou: float
    iou: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    pixel_accuracy: float

    @property
    def mean_recall(self) -> float:
        """Mean over the classes with ground-truth pixels (the release's mean accuracy)."""
        return _mean(self.recall)

    @property
    def mean_precision(self) -> float:
        """Mean over the classes that are both true and predicted somewhere."""
        return _mean(self.precision[~np.isnan(self.recall)])


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

    mIoU is the mean over the classes with ground-truth pixels (the release's `scores`); NaN when the matrix is empty.
    torchmetrics also counts classes that were only predicted, as 0.
    """
    totals = totals_of(np.asarray(matrix, dtype=np.float64))
    hits, truth, predicted = totals
    iou = ious(totals)
    with np.errstate(invalid="ignore", divide="ignore"):
        pixel_accuracy = float(hits.sum() / truth.sum())
        return Scores(_mean(iou), iou, hits / predicted, hits / truth, pixel_accuracy)


def ious(totals: np.ndarray) -> np.ndarray:
    """IoU by class (..., K) from pixels right, true and predicted (..., 3, K); NaN where no pixel is true."""
    hits, truth, predicted = np.moveaxis(np.asarray(totals, np.float64), -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(truth > 0, hits / (truth + predicted - hits), np.nan)


def totals_of(matrix: np.ndarray) -> np.ndarray:
    """Pixels right, true and predicted by class (..., 3, K) of confusion matrices (..., K, K), rows truth."""
    return np.stack([np.diagonal(matrix, axis1=-2, axis2=-1), matrix.sum(-1), matrix.sum(-2)], axis=-2)


def bootstrap_interval(
    totals: np.ndarray, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of mIoU over images: totals (N, 3, K) per image, as `totals_of` gives them.

    Images are drawn with replacement, and the mIoU of each resample is that of the summed counts, over the classes
    with ground-truth pixels in it. NaN for no image (ours; the percentile interval of Efron 1979).
    """
    if not len(totals):
        return float("nan"), float("nan")
    return middle(resampled_mious([totals], resamples, seed)[0], level)


def paired_intervals(
    sides: Sequence[np.ndarray], *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> list[tuple[float, float]]:
    """Percentile bootstrap intervals of the mIoU of every further side less that of the first, over shared images.

    sides: totals (N, 3, K) per image, or (R, N, 3, K) of R runs, whose mIoUs are averaged; row n is the same image in
    all of them, and a resample draws the same images for all. The runs themselves are not resampled: the intervals say
    nothing about seeds. NaN for no image (ours; the paired percentile bootstrap of Efron 1979).
    """
    groups = [totals[None] if totals.ndim == 3 else totals for totals in sides]
    if not groups[0].shape[1]:
        return [(float("nan"), float("nan"))] * (len(sides) - 1)
    found = iter(resampled_mious([run for group in groups for run in group], resamples, seed))
    first, *others = [np.mean([next(found) for _ in group], axis=0) for group in groups]
    return [middle(other - first, level) for other in others]


def resampled_mious(runs: Sequence[np.ndarray], resamples: int, seed: int) -> np.ndarray:
    """mIoU of runs' totals (N, 3, K) in resamples of the images, the same for every run: (runs, resamples)."""
    images = len(runs[0])
    rng = np.random.default_rng(seed)
    tables = [totals.reshape(images, -1).astype(np.float64) for totals in runs]
    found: list[np.ndarray] = []
    for start in range(0, resamples, 100):  # a part at a time: COCO's 40,137 images take 32 MB each
        count = min(100, resamples - start)
        times = rng.multinomial(images, np.full(images, 1 / images), size=count).astype(np.float64)
        mious = [
            np.nanmean(ious((times @ table).reshape(count, *totals.shape[1:])), axis=-1)
            for table, totals in zip(tables, runs, strict=True)
        ]
        found.append(np.stack(mious))
    return np.concatenate(found, axis=1)


def middle(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The quantiles between which the middle share `level` of the values lies."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


@dataclass(frozen=True)
class SweepBest:
    """The threshold with the highest mIoU, and that mIoU."""

    threshold: float
    miou: float


class ThresholdSweep:
    """Confusion matrices of CAM labels for every background threshold of a grid, from one histogram.

    A pixel is labelled with its strongest class where that class's value reaches the threshold, else background. Only
    the true class, the strongest class and the number of thresholds reached matter, so these are counted, and every
    threshold's matrix is a sum over the counts: exact, with one argmax instead of one per threshold (ours). The two
    halves of the images are counted apart, so that a threshold chosen on one can be scored on the other.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", steps: int = 100) -> None:
        """num_classes: K, background included. The grid is k/steps for k = 1..steps-1."""
        # Compared in float32, as the CAMs are: `value >= threshold` has one meaning then.
        self.thresholds = (np.arange(1, steps) / steps).astype(np.float32)
        infinity = np.array([np.inf], np.float32)
        self._edges = torch.from_numpy(np.concatenate([-infinity, self.thresholds, infinity])).to(device)
        self._shape = (2, num_classes, num_classes - 1, steps)
        self.counts = torch.zeros(self._shape, dtype=torch.int64, device=device)

    def bins(self, confidence: Tensor) -> Tensor:
        """Number of thresholds each value of 0..1 reaches: int64, 0..steps-1."""
        last = self._shape[-1] - 1
        # The product is at most one bin off; looking at the two edges beside it makes it exact, and unlike a binary
        # search it costs a few passes over the map.
        guess = (confidence * (last + 1)).to(torch.int64).clamp_(0, last)
        guess -= (self._edges[guess] > confidence).to(torch.int64)
        return guess + (self._edges[guess + 1] <= confidence)

    def add(self, truth: Tensor, strongest: Tensor, bins: Tensor, half: Tensor) -> None:
        """Count pixels (B, H, W): truth 0..K-1 or 255 (left out), strongest class 0..K-2 (no background), `bins`.

        half: (B,), 0 or 1, the half each image belongs to.
        """
        _, rows, classes, values = self._shape
        size = self.counts.numel()
        index = ((half[:, None, None] * rows + truth.to(torch.int64)) * classes + strongest) * values + bins
        index = torch.where(truth == IGNORE, size, index)
        self.counts += torch.bincount(index.reshape(-1), minlength=size + 1)[:size].reshape(self._shape)

    def matrices(self, half: int | None = None) -> np.ndarray:
        """Confusion matrix of every threshold, over both halves or one of them: int64 (T, K, K), rows truth."""
        both = self.counts.cpu().numpy()
        counts = both.sum(0) if half is None else both[half]
        # reached[..., k]: pixels whose value is at or above threshold k, i.e. with more than k thresholds reached.
        reached = counts[..., ::-1].cumsum(-1)[..., ::-1][..., 1:]
        below = counts.sum(axis=(1, 2))[:, None] - reached.sum(axis=1)
        return np.concatenate([below.T[..., None], np.moveaxis(reached, -1, 0)], axis=-1)

    def curve(self, half: int | None = None) -> np.ndarray:
        """mIoU at every threshold of the grid: (T,), NaN where no pixel was counted."""
        return _curve(self.matrices(half))

    def best(self) -> SweepBest:
        """The grid's best threshold (the lowest of equals); NaN where no pixel was counted."""
        curve = self.curve()
        if np.isnan(curve[0]):
            return SweepBest(float("nan"), float("nan"))
        best = int(np.argmax(curve))
        return SweepBest(round(float(self.thresholds[best]), 6), float(curve[best]))

    def held_out(self) -> float:
        """mIoU where each half is cut at the threshold that is best on the other, both halves pooled.

        What choosing the threshold on the scored images themselves (`best`) flatters is left out. NaN when a half has
        no pixels.
        """
        pooled = 0
        for half in (0, 1):
            curve = self.curve(1 - half)
            if np.isnan(curve[0]):
                return float("nan")
            pooled = pooled + self.matrices(half)[int(np.argmax(curve))]
        return scores(np.asarray(pooled)).miou


def _curve(matrices: np.ndarray) -> np.ndarray:
    return np.array([scores(matrix).miou for matrix in matrices])
