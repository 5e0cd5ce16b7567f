"""Evaluation of both networks, inside a run and on its own: every image once, on any number of workers."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import Split
from cosa_ray.data.loader import EvaluationBatch, evaluation_batches
from cosa_ray.errors import UserError
from cosa_ray.evaluation.confusion import IGNORE, ThresholdSweep, confusion_matrix, scores
from cosa_ray.evaluation.inference import Inference, infer
from cosa_ray.evaluation.panels import Tile, confidence_histogram, panel, reliability_curve
from cosa_ray.method.assignment import valid_cam
from cosa_ray.method.network import Network
from cosa_ray.method.pseudo_labels import ABSENT, two_threshold_labels

if TYPE_CHECKING:
    from PIL.Image import Image

_ORDER_SEED = 20240217  # of the subset and the panel: the same images for every run, whatever its own seed
WRONG, RIGHT, IGNORED = range(3)  # what a pseudo-label can be


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics by their tracked names; the same on every rank. Pictures are drawn when asked for, on rank 0."""

    metrics: dict[str, float]
    prefix: str
    images: int
    confusion: np.ndarray = field(repr=False)  # AN's plain one, int64 (K, K), rows truth; zeros while not segmenting
    confidence: np.ndarray = field(repr=False)  # pixels per hundredth of the valid CAM's maximum, int64 (100,)
    outcomes: np.ndarray = field(repr=False)  # the same pixels by WRONG, RIGHT, IGNORED pseudo-label, int64 (100, 3)
    thresholds: dict[str, float]
    classes: tuple[str, ...]  # background first
    palette: Sequence[tuple[int, int, int]] | None = field(repr=False)
    tiles: list[Tile] = field(repr=False)

    def pictures(self) -> dict[str, Image]:
        """Panel, CAM-confidence histogram and reliability curve by tracked name; none on ranks above 0."""
        if not self.tiles:
            return {}
        return {
            f"{self.prefix}/panel": panel(self.tiles, self.classes, self.palette),
            f"{self.prefix}/cam_confidence": confidence_histogram(self.confidence, self.thresholds),
            f"{self.prefix}/reliability": reliability_curve(self.outcomes, self.thresholds),
        }


def metric_prefix(config: Config, images: int, split: str | None = None) -> str:
    """What the metrics' names begin with: the split's name, with `_subset_<n>` where not all images are used."""
    subset = config.evaluation.subset
    name = _plain(split or config.data.val_split)
    return name if subset is None or subset >= images else f"{name}_subset_{subset}"


def best_metric(config: Config, prefix: str) -> str:
    """The metric that says which checkpoint is best: AN's plain mIoU, the best CAM mIoU in a classifier-only run."""
    trains_decoder = config.training.warmup_iters < config.training.steps
    return f"{prefix}/{'miou' if trains_decoder else 'cam_miou_best'}"


def evaluate(
    online: Network,
    assignment: Network,
    split: Split,
    config: Config,
    *,
    classes: Sequence[str],
    thresholds: Mapping[str, float],
    segment: bool = True,
    palette: Sequence[tuple[int, int, int]] | None = None,
    rank: int = 0,
    world: int = 1,
    sum_over_workers: Callable[[Tensor], Tensor] = _alone,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
) -> EvaluationResult:
    """Evaluate both networks by the protocol of `config.evaluation` (method.md 6); every rank calls it.

    Every image counts once over all ranks, whatever their number; sums are of integers, so any number of ranks gives
    the same scores (up to what a batch's size changes in the last bit of a logit).

    classes: names without background. thresholds: those of the pseudo-labels in force, by name (background, or low and
    high). segment: False before the decoder is trained, leaves out what needs it. palette: RGB of background and every
    class. sum_over_workers: sums a tensor over the ranks. autocast: dtype of mixed precision, None for fp32.
    Raises UserError for a split without masks.
    """
    if not split.has_masks:
        raise UserError(f"split {split.name} has images without masks; evaluate on a split where every image has one")
    tally = _Tally(len(classes), config, thresholds, segment, torch.device(device))
    order, shown = evaluation_order(len(split), config.evaluation.subset, config.evaluation.panel_images, world)
    tally.expect(len(order))
    tiles: dict[int, Tile] = {}
    was_training = online.training
    mine = order[rank::world]
    position = rank
    batches = evaluation_batches(
        split,
        mine,
        size=config.evaluation.size or config.views.crop,
        batch_size=config.evaluation.batch_size,
        processes=config.data.loader_processes,
    )
    run = partial(infer, scales=config.evaluation.scales, flip=config.evaluation.flip, autocast=autocast)
    with torch.no_grad():
        for batch in batches:
            images = assignment.normalise(batch.images.to(device, non_blocking=True))
            maps = run(assignment, images, segment=segment)
            online_seg = run(online, images).seg if segment else None
            tally.add_scores(torch.arange(len(images)) * world + position, maps.cls, batch.labels)
            for where, seen in tally.add(batch, maps, online_seg):
                if batch.index[where] in shown and rank == 0:
                    tiles[batch.index[where]] = _tile(batch, where, seen)
            position += len(images) * world
    online.train(was_training)
    tally.share(sum_over_workers)
    prefix = metric_prefix(config, len(split), split.name)
    return EvaluationResult(
        metrics={f"{prefix}/{name}": value for name, value in tally.metrics(classes).items()},
        prefix=prefix,
        images=len(order),
        confusion=tally.plain.cpu().numpy(),
        confidence=tally.outcomes.sum(1).cpu().numpy(),
        outcomes=tally.outcomes.cpu().numpy(),
        thresholds={name: float(value) for name, value in thresholds.items() if not name.endswith("_aux")},
        classes=("background", *classes),
        palette=palette,
        tiles=[tiles[index] for index in shown if index in tiles],
    )


def evaluation_order(images: int, subset: int | None, panel_images: int, world: int) -> tuple[list[int], list[int]]:
    """(indices in the order they are dealt out to the ranks, indices of the panel).

    Both are the same for every run: the first of a shuffle with a fixed seed. Rank r takes order[r::world]; the
    panel's images stand where rank 0 finds them (as many of them as rank 0 has images).
    """
    shuffled = np.random.default_rng(_ORDER_SEED).permutation(images).tolist()
    chosen = shuffled[: images if subset is None else subset]
    shown = chosen[: min(panel_images, -(-len(chosen) // world))]
    rest = iter(sorted(set(chosen) - set(shown)))
    order = [
        shown[place // world] if place % world == 0 and place // world < len(shown) else next(rest)
        for place in range(len(chosen))
    ]
    return order, shown


@dataclass
class _Seen:
    """What was found on one image, at its own size, on the device."""

    segmentation: Tensor | None
    confidence: Tensor
    pseudo: Tensor


class _Tally:
    """Integer counts of one evaluation, summed over the ranks at its end."""

    def __init__(
        self, num_classes: int, config: Config, thresholds: Mapping[str, float], segment: bool, device: torch.device
    ) -> None:
        self.config, self.thresholds, self.segment, self.device = config, thresholds, segment, device
        self.two = config.pseudo_labels.policy == "two_threshold"
        size = num_classes + 1
        self.classes = size

        def matrix() -> Tensor:
            return torch.zeros(size, size, dtype=torch.int64, device=device)

        self.plain, self.online, self.given, self.fixed, self.pseudo = (matrix() for _ in range(5))
        self.main, self.aux = ThresholdSweep(size, device), ThresholdSweep(size, device)
        self.outcomes = torch.zeros(self.main.counts.shape[-1], 3, dtype=torch.int64, device=device)
        self.images = torch.zeros(1, dtype=torch.int64, device=device)
        self.ignored = torch.zeros(1, dtype=torch.int64, device=device)

    def expect(self, images: int) -> None:
        """Make room for the class scores of this many images."""
        self.scores = torch.zeros(images, 2, self.classes - 1, device=self.device)

    def add_scores(self, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Keep class logits and labels (B, C) in the rows of their images; the other ranks' rows stay zero."""
        self.scores[rows.to(self.device)] = torch.stack([logits, labels.to(logits)], 1)

    def add(self, batch: EvaluationBatch, maps: Inference, online_seg: Tensor | None) -> Iterator[tuple[int, _Seen]]:
        """Count a batch at each image's own size; yields (position in the batch, what was found) per image."""
        labels = batch.labels.to(self.device)
        cam, cam_aux = valid_cam(maps.cam, labels), valid_cam(maps.cam_aux, labels)
        for where, masks in _by_shape(batch.masks).items():
            rows = torch.tensor(where, device=self.device)
            truth = torch.from_numpy(np.stack(masks)).to(self.device)
            size = (truth.shape[1], truth.shape[2])

            def own(whole: Tensor, rows: Tensor = rows, size: tuple[int, int] = size) -> Tensor:
                part = whole if len(rows) == len(whole) else whole[rows]
                if part.shape[-2:] == size:
                    return part
                return F.interpolate(part, size=size, mode="bilinear", align_corners=False)

            segmentation = None
            if maps.seg is not None and online_seg is not None:
                segmentation = self._segmentations(truth, own(maps.seg), own(online_seg), labels[rows])
            confidence, pseudo = self._cams(truth, own(cam), own(cam_aux), labels[rows])
            self.images += len(where)
            for row, position in enumerate(where):
                seen = None if segmentation is None else segmentation[row]
                yield position, _Seen(seen, confidence[row], pseudo[row])

    def _segmentations(self, truth: Tensor, seg: Tensor, online: Tensor, labels: Tensor) -> Tensor:
        found = _argmax(seg)
        self.plain += confusion_matrix(truth, found, self.classes)
        self.online += confusion_matrix(truth, _argmax(online), self.classes)
        absent = F.pad(labels == 0, (1, 0))[:, :, None, None]
        self.given += confusion_matrix(truth, _argmax(seg.masked_fill(absent, ABSENT)), self.classes)
        return found

    def _cams(self, truth: Tensor, cam: Tensor, cam_aux: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        confidence, strongest = cam.max(1)
        bins = self.main.bins(confidence)
        self.main.add(truth, strongest, bins)
        at_fixed = torch.where(confidence >= self.config.evaluation.cam_threshold, strongest + 1, 0)
        self.fixed += confusion_matrix(truth, at_fixed, self.classes)
        confidence_aux, strongest_aux = cam_aux.max(1)
        self.aux.add(truth, strongest_aux, self.aux.bins(confidence_aux))
        if self.two:
            inside = torch.ones_like(truth, dtype=torch.bool)
            high, low = self.thresholds["high"], self.thresholds["low"]
            pseudo = two_threshold_labels(cam, labels, inside, high, low)
        else:
            pseudo = torch.where(confidence >= self.thresholds["background"], strongest + 1, 0)
        self.pseudo += confusion_matrix(truth, pseudo, self.classes)
        outcome = torch.where(pseudo == IGNORE, IGNORED, (pseudo == truth).long())
        index = torch.where(truth == IGNORE, self.outcomes.numel(), bins * 3 + outcome).flatten()
        self.outcomes += torch.bincount(index, minlength=self.outcomes.numel() + 1)[:-1].view_as(self.outcomes)
        return confidence, pseudo

    def share(self, sum_over_workers: Callable[[Tensor], Tensor]) -> None:
        """Add up the ranks' counts; every rank takes part, also one without images."""
        counts = [self.plain, self.online, self.given, self.fixed, self.pseudo]
        counts += [self.main.counts, self.aux.counts, self.outcomes, self.images]
        total = sum_over_workers(torch.cat([count.flatten() for count in counts]))
        for count, part in zip(counts, total.split([count.numel() for count in counts]), strict=True):
            count.copy_(part.view_as(count))
        # Each row is one rank's and zero on the others: a sum in floating point is exact too.
        self.scores = sum_over_workers(self.scores)

    def metrics(self, classes: Sequence[str]) -> dict[str, float]:
        """Metrics without their prefix; those that are not defined (a class without pixels, say) are left out."""
        found: dict[str, float] = {}
        if self.segment:
            plain = scores(self.plain.cpu())
            found |= {
                "miou": plain.miou,
                "miou_online": scores(self.online.cpu()).miou,
                "miou_labels_given": scores(self.given.cpu()).miou,
                "pixel_accuracy": plain.pixel_accuracy,
            }
            names = tracked_names(("background", *classes))
            found |= {f"iou/{name}": float(iou) for name, iou in zip(names, plain.iou, strict=True)}
        best, best_aux = self.main.best(), self.aux.best()
        pseudo = scores(self.pseudo.cpu())
        outcomes = self.outcomes.sum(0).tolist()
        logits, labels = self.scores.cpu().unbind(1)
        found |= {
            f"cam_miou_at_{self.config.evaluation.cam_threshold:g}": scores(self.fixed.cpu()).miou,
            "cam_miou_best": best.miou,
            "cam_best_threshold": best.threshold,
            "cam_aux_miou_best": best_aux.miou,
            "cam_aux_best_threshold": best_aux.threshold,
            "pseudo_miou": pseudo.miou,
            "pseudo_coverage": 1 - outcomes[IGNORED] / max(1, sum(outcomes)),
            "map": mean_average_precision(logits.numpy(), labels.numpy()),
            "images": float(self.images.item()),
        }
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


def tracked_names(classes: Sequence[str]) -> list[str]:
    """Class names as they appear in metric names: letters, digits and `_-. :` only, and no two alike."""
    names: list[str] = []
    for name in map(_plain, classes):
        number = 2
        unique = name
        while unique in names:
            unique = f"{name}_{number}"
            number += 1
        names.append(unique)
    return names


def _plain(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_\-. :]", "_", name).strip()
    return plain if plain.strip(".") else "_"  # "." and ".." would name folders


def _argmax(logits: Tensor) -> Tensor:
    return logits.max(1).indices  # on the CPU several times faster than argmax


def _by_shape(masks: Sequence[np.ndarray | None]) -> dict[tuple[int, ...], list[np.ndarray]]:
    """Masks of one shape together, by their positions."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, mask in enumerate(masks):
        assert mask is not None  # the split has masks
        groups[mask.shape].append(position)
    return {tuple(where): [m for p in where if (m := masks[p]) is not None] for where in groups.values()}


def _tile(batch: EvaluationBatch, where: int, seen: _Seen) -> Tile:
    from PIL import Image

    truth = batch.masks[where]
    assert truth is not None
    pixels = Image.fromarray(batch.images[where].permute(1, 2, 0).numpy())
    return Tile(
        name=batch.ids[where],
        image=np.asarray(pixels.resize((truth.shape[1], truth.shape[0]), Image.Resampling.BILINEAR)),
        truth=truth,
        segmentation=None if seen.segmentation is None else seen.segmentation.cpu().numpy(),
        cam=seen.confidence.cpu().numpy(),
        pseudo=seen.pseudo.cpu().numpy(),
    )
