"""Evaluation of both networks, inside a run and on its own: every image once, on any number of workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cosa_ray.config.protocol import in_run_protocol
from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import Split
from cosa_ray.errors import UserError
from cosa_ray.evaluation.figures import confidence_histogram, reliability_curve
from cosa_ray.evaluation.naming import protocol_prefix
from cosa_ray.evaluation.panels import Tile, panel
from cosa_ray.evaluation.scorer import Scorer
from cosa_ray.method.network import Network

if TYPE_CHECKING:
    from PIL.Image import Image

_ORDER_SEED = 20240217  # of the subset and the panel: the same images for every run, whatever its own seed


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
    sum_over_workers: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    each_batch: Callable[[], None] = lambda: None,
) -> EvaluationResult:
    """Evaluate both networks by the protocol of `config.evaluation` (method.md 6); every rank calls it.

    Every image counts once over all ranks, whatever their number; sums are of integers, so any number of ranks gives
    the same scores (up to what a batch's size changes in the last bit of a logit).

    classes: names without background. thresholds: those of the pseudo-labels in force, by name (background, or low and
    high). segment: False before the decoder is trained, leaves out what needs it. palette: RGB of background and every
    class. sum_over_workers: sums a tensor over the ranks. autocast: dtype of mixed precision, None for fp32.
    each_batch: called after every batch.
    Raises UserError for a split without masks.
    """
    check_masks(split)
    protocol = in_run_protocol(config)
    scorer = Scorer(
        online, assignment, protocol, config, thresholds=thresholds, segment=segment, device=device, autocast=autocast
    )
    order, shown = evaluation_order(len(split), protocol.subset, config.evaluation.panel_images, world)
    was_training = online.training
    mine = order[rank::world]
    tally = scorer.tally(per_image=False)
    tiles: dict[int, Tile] = {}
    places = range(rank, len(order), world)
    wanted = shown if rank == 0 else []
    for _ in scorer.count(tally, split, mine, places, tiles=tiles, wanted=wanted, each_batch=each_batch):
        raise AssertionError("an evaluation inside a run has no CRF")
    online.train(was_training)
    tally.share(sum_over_workers or _alone, len(order))
    prefix = protocol_prefix(protocol, split.name, len(split))
    return EvaluationResult(
        metrics={f"{prefix}/{name}": value for name, value in tally.metrics(classes, segment=segment).items()},
        prefix=prefix,
        images=len(order),
        confusion=tally.matrices["miou"].cpu().numpy(),
        confidence=tally.outcomes.sum(1).cpu().numpy(),
        outcomes=tally.outcomes.cpu().numpy(),
        thresholds=main_thresholds(thresholds),
        classes=("background", *classes),
        palette=palette,
        tiles=[tiles[index] for index in shown if index in tiles],
    )


def main_thresholds(thresholds: Mapping[str, float]) -> dict[str, float]:
    """Those of the main CAM, which are drawn into the figures."""
    return {name: float(value) for name, value in thresholds.items() if not name.endswith("_aux")}


def check_masks(split: Split) -> None:
    """Raise UserError for a split that cannot be scored."""
    if not split.has_masks:
        raise UserError(f"split {split.name} has images without masks; evaluate on a split where every image has one")


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


def _alone(tensor: Tensor) -> Tensor:
    return tensor
