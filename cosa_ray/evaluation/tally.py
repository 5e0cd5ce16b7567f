"""The integer counts of an evaluation: they add up over batches, workers and tasks, and give its metrics at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cosa_ray.evaluation.confusion import (
    IGNORE,
    ThresholdSweep,
    bootstrap_interval,
    confusion_matrix,
    scores,
    totals_of,
)
from cosa_ray.evaluation.naming import tracked_names

WRONG, RIGHT, IGNORED = range(3)  # what a pseudo-label can be


class Tally:
    """Counts of one evaluation, or of a part of it.

    matrices: confusion matrix int64 (K, K), rows truth, by the name of the mIoU that it gives. main, aux: threshold
    sweeps of the CAMs. context: background pixels where what mostly comes with a class lies, and how many of them were
    called foreground, int64 (2, 2): by the plain segmentation, by the pseudo-labels. outcomes: pixels (bins, 3) by CAM
    confidence and WRONG, RIGHT, IGNORED pseudo-label. class_scores: class logits and labels (2, C) by an image's place
    in the order. per_image: pixels right, true and predicted (3, K) by an image's index and the name of the mIoU, or
    None where they are not kept.
    """

    def __init__(
        self, num_classes: int, names: Sequence[str], *, device: torch.device | str = "cpu", per_image: bool = False
    ) -> None:
        """num_classes: C, without background. names: see `matrices`."""
        size = num_classes + 1
        self.size = size
        self.matrices = {name: torch.zeros(size, size, dtype=torch.int64, device=device) for name in names}
        self.main, self.aux = ThresholdSweep(size, device), ThresholdSweep(size, device)
        self.outcomes = torch.zeros(self.main.counts.shape[-1], 3, dtype=torch.int64, device=device)
        self.context = torch.zeros(2, 2, dtype=torch.int64, device=device)
        self.images = torch.zeros(1, dtype=torch.int64, device=device)
        self.class_scores: dict[int, Tensor] = {}
        self.per_image: dict[int, dict[str, np.ndarray]] | None = {} if per_image else None

    def add_prediction(self, name: str, indices: Sequence[int], truth: Tensor, prediction: Tensor) -> None:
        """Count predictions (B, H, W) of the images `indices` under a name of `matrices`."""
        if self.per_image is None:
            self.matrices[name] += confusion_matrix(truth, prediction, self.size)
            return
        for index, true, predicted in zip(indices, truth, prediction, strict=True):
            self.add_matrix(name, index, confusion_matrix(true, predicted, self.size))

    def add_matrix(self, name: str, index: int, matrix: Tensor) -> None:
        """Add one image's confusion matrix (K, K)."""
        self.matrices[name] += matrix
        if self.per_image is not None:
            self.per_image.setdefault(index, {})[name] = totals_of(matrix.cpu().numpy())

    def add_pseudo_labels(self, indices: Sequence[int], truth: Tensor, confidence: Tensor, pseudo: Tensor) -> None:
        """Count pseudo-labels (B, H, W), 255 where undecided, by the CAM's maximum at each pixel."""
        self.add_prediction("pseudo_miou", indices, truth, pseudo)
        outcome = torch.where(pseudo == IGNORE, IGNORED, (pseudo == truth).long())
        index = torch.where(truth == IGNORE, self.outcomes.numel(), self.main.bins(confidence) * 3 + outcome).flatten()
        self.outcomes += torch.bincount(index, minlength=self.outcomes.numel() + 1)[:-1].view_as(self.outcomes)

    def add_context(self, context: Tensor, segmentation: Tensor | None, pseudo: Tensor) -> None:
        """Count what was made of context (B, H, W) bool: labels (B, H, W) of the segmentation, if any, and pseudo."""
        for row, labels in zip(self.context, (segmentation, pseudo), strict=True):
            if labels is not None:
                foreground = context & (labels > 0) & (labels != IGNORE)
                row += torch.stack([context.sum(), foreground.sum()])

    def counts(self) -> list[Tensor]:
        """Every tensor of counts, in a fixed order."""
        return [*self.matrices.values(), self.main.counts, self.aux.counts, self.outcomes, self.context, self.images]

    def share(self, sum_over_workers: Callable[[Tensor], Tensor], images: int) -> None:
        """Add up the ranks' counts; every rank takes part, also one without images. images: over all ranks."""
        counts = self.counts()
        total = sum_over_workers(torch.cat([count.flatten() for count in counts]))
        for count, part in zip(counts, total.split([count.numel() for count in counts]), strict=True):
            count.copy_(part.view_as(count))
        # Each row is one rank's and zero on the others: a sum in floating point is exact too.
        table = torch.zeros(images, 2, self.size - 1, device=self.images.device)
        for place, row in self.class_scores.items():
            table[place] = row.to(table)
        self.class_scores = dict(enumerate(sum_over_workers(table).cpu()))

    def merge(self, other: Tally) -> None:
        """Add the counts of another part of the same evaluation."""
        for mine, theirs in zip(self.counts(), other.counts(), strict=True):
            mine += theirs.to(mine.device)
        self.class_scores |= other.class_scores
        if self.per_image is not None and other.per_image is not None:
            self.per_image |= other.per_image

    def on_cpu(self) -> Tally:
        """The same with every tensor on the CPU, to be sent to another process."""
        sent = Tally(self.size - 1, list(self.matrices), per_image=self.per_image is not None)
        sent.merge(self)
        return sent

    def totals(self, name: str) -> np.ndarray:
        """Pixels right, true and predicted (N, 3, K) of every image under a name, in the order of the indices."""
        assert self.per_image is not None
        return np.stack([self.per_image[index][name] for index in sorted(self.per_image)])

    def metrics(self, classes: Sequence[str], *, segment: bool = True) -> dict[str, float]:
        """Metrics without their prefix; those that are not defined (a class without pixels, say) are left out.

        classes: names without background. segment: False leaves out those of the segmentation, which is not trained.
        """
        found: dict[str, float] = {}
        for name, matrix in self.matrices.items():
            if not segment and name.startswith("miou"):
                continue
            found[name] = scores(matrix.cpu()).miou
            if self.per_image is not None:
                found[f"{name}_ci_low"], found[f"{name}_ci_high"] = bootstrap_interval(self.totals(name))
        if segment and "miou" in self.matrices:
            plain = scores(self.matrices["miou"].cpu())
            found["pixel_accuracy"] = plain.pixel_accuracy
            if self.per_image is not None:
                found |= {"mean_precision": plain.mean_precision, "mean_recall": plain.mean_recall}
            names = tracked_names(("background", *classes))
            found |= {f"iou/{name}": float(iou) for name, iou in zip(names, plain.iou, strict=True)}
        for prefix, sweep in (("cam", self.main), ("cam_aux", self.aux)):
            best = sweep.best()
            found |= {
                f"{prefix}_miou_best": best.miou,
                f"{prefix}_best_threshold": best.threshold,
                f"{prefix}_miou_held_out": sweep.held_out(),
            }
        outcomes = self.outcomes.sum(0).tolist()
        found["pseudo_coverage"] = 1 - outcomes[IGNORED] / max(1, sum(outcomes))
        for name, (pixels, foreground) in zip(
            ("context_foreground", "pseudo_context_foreground"), self.context.tolist(), strict=True
        ):
            if pixels:
                found[name] = foreground / pixels
        if self.class_scores:
            rows = torch.stack([self.class_scores[place] for place in sorted(self.class_scores)])
            found["map"] = mean_average_precision(rows[:, 0].numpy(), rows[:, 1].numpy())
        found["images"] = float(self.images.item())
        return {name: value for name, value in found.items() if math.isfinite(value)}


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes with positives of the area under precision-recall, without interpolation.

    scores, labels (0 or 1): (N, C). As scikit-learn's average_precision_score, equal scores counted together; NaN when
    no class has a positive.
    """
    found = []
    for score, label in zip(scores.T, labels.T, strict=True):
        if not label.any():
            continue
        order = np.argsort(-score, kind="stable")
        ranked = score[order]
        last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # last place of every distinct score
        hits = np.cumsum(label[order] > 0)[last]
        recall = np.diff(hits, prepend=0) / hits[-1]
        found.append(float((recall * hits / (last + 1)).sum()))
    return float(np.mean(found)) if found else float("nan")


def per_class(matrix: np.ndarray, classes: Sequence[str]) -> list[dict[str, float | str]]:
    """IoU, precision, recall and ground-truth pixels of every class of a confusion matrix; background first."""
    found = scores(matrix)
    truth = matrix.sum(1)
    rows: list[dict[str, float | str]] = []
    for number, name in enumerate(("background", *classes)):
        values: Mapping[str, float] = {
            "iou": float(found.iou[number]),
            "precision": float(found.precision[number]),
            "recall": float(found.recall[number]),
        }
        rows.append({"class": name, **values, "pixels": int(truth[number])})
    return rows
