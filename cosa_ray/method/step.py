"""One training step: assignments, thresholds, counts over the global batch, losses, gradients.

Nothing here asks the host for a value. Every average over the batch is a sum divided by a count over the global
batch (all micro-batches, all workers), so the step does not depend on how the batch is split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cosa_ray.config.schema import Config
from cosa_ray.method.assignment import assign, resize, valid_cam
from cosa_ray.method.contrastive import Sample, contrastive_loss, draws, sample_pixels
from cosa_ray.method.dense_energy import dense_energy
from cosa_ray.method.losses import cam_to_seg_loss, classification_loss, seg_to_cam_loss
from cosa_ray.method.network import Network, Outputs, mixed_precision
from cosa_ray.method.pseudo_labels import (
    COUNTS,
    PseudoLabel,
    deciding_size,
    guided_cam_target,
    inside_box,
    pseudo_label,
    segmentation_target,
)
from cosa_ray.method.refinement import pixel_affinity
from cosa_ray.method.schedule import contrastive_weight
from cosa_ray.method.threshold import DynamicThresholds, Proposal, named

LOSS_NAMES = (
    "loss",
    "loss_cls",
    "loss_cls_aux",
    "loss_cam_to_seg",
    "loss_cam_to_seg_aux",
    "loss_seg_to_cam",
    "loss_contrastive",
    "loss_dense_energy",
)


class MicroBatch(NamedTuple):
    """Part of a worker's slice: weak and strong views (B, 3, S, S), normalised; labels (B, C); box (B, 4) int64;
    position (B,) int64, the sample's place in the global batch."""

    weak: Tensor
    strong: Tensor
    labels: Tensor
    box: Tensor
    position: Tensor


class StepOutput(NamedTuple):
    """losses: detached 0-dim shares of this worker by name (their sum over workers is the loss of the global batch;
    terms unweighted, "loss" the weighted sum). statistics: 0-dim, of the global batch already. proposal: thresholds
    to commit once the step is known to be finite."""

    losses: dict[str, Tensor]
    statistics: dict[str, Tensor]
    proposal: Proposal | None


class _Held(NamedTuple):
    """What a micro-batch keeps of AN: valid CAMs at crop/loss_stride, the targets of ON's CAMs, and class shares."""

    cam: Tensor
    cam_aux: Tensor
    target: Tensor | None
    shares: Tensor | None
    grid: tuple[int, int]


class _Plan(NamedTuple):
    """What a micro-batch is trained towards, before anything of ON is known."""

    main: PseudoLabel
    aux: PseudoLabel
    target: Tensor | None
    sample: Sample | None
    grid: tuple[int, int]


def classification_step(
    online: nn.Module,
    micro_batches: Sequence[MicroBatch],
    *,
    global_batch: int,
    world: int = 1,
    autocast: torch.dtype | None = None,
) -> StepOutput:
    """A step of warm-up: both classification losses on the strong view, forward and backward.

    Args:
        online: `Network.classification`, or DDP around it.
        global_batch: images of the step over all workers and micro-batches.
        world: number of workers; gradients are multiplied by it because DDP averages them.
        autocast: dtype of the forward pass, None for float32.
    """
    totals: dict[str, Tensor] = {}
    for index, micro in enumerate(micro_batches):
        with _synchronised(online, index == len(micro_batches) - 1):
            with mixed_precision(micro.strong.device, autocast):
                cls, cls_aux = online(micro.strong)
            terms = {
                "loss_cls": classification_loss(cls.float(), micro.labels, global_batch),
                "loss_cls_aux": classification_loss(cls_aux.float(), micro.labels, global_batch),
            }
            loss = terms["loss_cls"] + terms["loss_cls_aux"]
            (loss * world).backward()
        _add(totals, terms, loss)
    return StepOutput(totals, {}, None)


def fill_step(
    assignment: Network,
    micro_batches: Sequence[MicroBatch],
    thresholds: DynamicThresholds,
    config: Config,
    *,
    sum_over_workers: Callable[[Tensor], Tensor],
    autocast: torch.dtype | None = None,
) -> Proposal:
    """The assignment network's part of warm-up's last steps: its CAMs enter the ring, the thresholds stay."""
    held = [_assign(assignment, micro, config, autocast, segment=False) for micro in micro_batches]
    histograms = sum_over_workers(_histograms(held, thresholds, config))
    return thresholds.propose(histograms, move=False)


def cotraining_step(
    online: nn.Module,
    assignment: Network,
    micro_batches: Sequence[MicroBatch],
    thresholds: DynamicThresholds,
    config: Config,
    step: int,
    *,
    global_batch: int,
    world: int = 1,
    sum_over_workers: Callable[[Tensor], Tensor],
    autocast: torch.dtype | None = None,
) -> StepOutput:
    """A co-training step (paper 3; method.md 4): swap assignments, forward and backward, micro-batch by micro-batch.

    Gradients are added to; the optimiser, the EMA and `thresholds.commit` are the caller's, once it knows that the
    step was finite.

    Args:
        online: a Network, or DDP around it.
        assignment: AN; evaluation mode, no gradient, weak views.
        step: with `config.seed` and a sample's position, the key of every random draw.
        sum_over_workers: adds a tensor up over the workers (two calls a step).
    """
    segment = config.losses.seg_to_cam > 0 or config.pseudo_labels.agreement > 0
    held = [_assign(assignment, micro, config, autocast, segment=segment) for micro in micro_batches]

    proposal, values = None, thresholds.values
    if config.dynamic_threshold.enabled:
        proposal = thresholds.propose(sum_over_workers(_histograms(held, thresholds, config)))
        values = named(thresholds.names, proposal.values)

    separation = contrastive_weight(config, step)
    separated = separation > 0
    plans = [
        _plan(micro, part, values, config, step, separated) for micro, part in zip(micro_batches, held, strict=True)
    ]
    del held  # full-size CAMs: their room is needed for ON's forward pass
    counts = sum_over_workers(torch.stack([_counts(plan) for plan in plans]).sum(0))

    totals: dict[str, Tensor] = {}
    for index, (micro, plan) in enumerate(zip(micro_batches, plans, strict=True)):
        with _synchronised(online, index == len(micro_batches) - 1):
            with mixed_precision(micro.strong.device, autocast):
                outputs = online(micro.strong)
            terms = _terms(outputs, micro, plan, counts, config, global_batch, assignment.denormalise)
            loss = terms["loss_cls"] + terms["loss_cls_aux"]
            share, weight = config.pseudo_labels.auxiliary_share, config.losses.cam_to_seg
            loss = loss + weight * (1 - share) * terms["loss_cam_to_seg"]
            loss = loss + weight * share * terms["loss_cam_to_seg_aux"]
            loss = loss + config.losses.seg_to_cam * terms["loss_seg_to_cam"]
            loss = loss + separation * terms["loss_contrastive"]
            loss = loss + config.losses.dense_energy * terms["loss_dense_energy"]
            (loss * world).backward()
        _add(totals, terms, loss)
    return StepOutput(totals, _statistics(counts, proposal), proposal)


def _assign(
    assignment: Network, micro: MicroBatch, config: Config, autocast: torch.dtype | None, *, segment: bool
) -> _Held:
    """AN on a weak view; its segmentation is turned into the CAMs' targets at once, to hold less."""
    settings, stride = config.assignment, config.training.loss_stride
    maps = assign(
        assignment, micro.weak, settings.scales, settings.flip, stride=stride, segment=segment, autocast=autocast
    )
    grid, target, shares = assignment.grid(*micro.weak.shape[-2:]), None, None
    if maps.seg is not None and config.losses.seg_to_cam > 0:
        target = guided_cam_target(maps.seg, micro.labels, config.losses.seg_to_cam_temperature, grid)
    if maps.seg is not None and config.pseudo_labels.agreement > 0:
        shares = segmentation_target(maps.seg, micro.labels, 1.0)
    return _Held(valid_cam(maps.cam, micro.labels), valid_cam(maps.cam_aux, micro.labels), target, shares, grid)


def _histograms(held: Sequence[_Held], thresholds: DynamicThresholds, config: Config) -> Tensor:
    crop = config.views.crop
    return torch.stack([thresholds.histogram((part.cam, part.cam_aux), crop) for part in held]).sum(0)


def _plan(
    micro: MicroBatch, held: _Held, values: dict[str, Tensor], config: Config, step: int, separated: bool
) -> _Plan:
    """Labels, weights and sampled pixels of a micro-batch, from AN's assignments and the thresholds in force."""
    labels, stride, crop = config.pseudo_labels, config.training.loss_stride, _size(micro.weak)
    inside = inside_box(micro.box, crop, _size(held.cam))
    affinity = None
    if labels.refinement == "pixel_adaptive":
        small = resize(micro.weak, deciding_size(_size(held.cam), stride))
        affinity = pixel_affinity(small, labels.refinement_dilations)
    common: dict[str, Any] = {"stride": stride, "affinity": affinity, "shares": held.shares}
    main = pseudo_label(held.cam, micro.labels, inside, values, labels, **common)
    aux = pseudo_label(held.cam_aux, micro.labels, inside, values, labels, suffix="_aux", **common)
    sample, grid = None, held.grid
    if separated:
        settings = config.contrastive
        sample = sample_pixels(
            resize(held.cam_aux, grid),
            inside_box(micro.box, crop, grid),
            values["background_aux"] if settings.threshold is None else settings.threshold,
            draws(config.seed, step, micro.position, grid[0] * grid[1]),
            max_perplexity=settings.max_perplexity,
            budget=settings.pixels,
            perplexity_scale=labels.perplexity_scale,
            perplexity_exponent=labels.perplexity_exponent,
        )
    return _Plan(main, aux, held.target, sample, grid)


def _counts(plan: _Plan) -> Tensor:
    """Everything a loss divides by that depends on the pseudo-labels: (2 COUNTS + 1,) float64, to be summed."""
    both = plan.main.counts.new_zeros(1) if plan.sample is None else plan.sample.both.sum().double()[None]
    return torch.cat([plan.main.counts, plan.aux.counts, both])


def _terms(
    outputs: Outputs,
    micro: MicroBatch,
    plan: _Plan,
    counts: Tensor,
    config: Config,
    global_batch: int,
    denormalise: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The unweighted loss terms of a micro-batch, as shares of the global batch; a term of weight 0 is 0."""
    assert outputs.seg is not None
    labels, stride = config.pseudo_labels, config.training.loss_stride
    nothing = outputs.cls.new_zeros((), dtype=torch.float32)
    terms = dict.fromkeys(LOSS_NAMES[1:], nothing)
    terms["loss_cls"] = classification_loss(outputs.cls.float(), micro.labels, global_batch)
    terms["loss_cls_aux"] = classification_loss(outputs.cls_aux.float(), micro.labels, global_batch)
    crop = _size(micro.strong)
    if config.losses.cam_to_seg > 0 or config.losses.dense_energy > 0:
        log_p = resize(outputs.seg.float(), (crop[0] // stride, crop[1] // stride)).log_softmax(1)
    else:  # the decoder must receive a gradient all the same (DDP waits for every parameter)
        terms["loss_cam_to_seg"] = 0.0 * outputs.seg.float().sum()
    if config.losses.cam_to_seg > 0:
        for suffix, pseudo, count, share in (
            ("", plan.main, counts[:COUNTS], 1 - labels.auxiliary_share),
            ("_aux", plan.aux, counts[COUNTS:-1], labels.auxiliary_share),
        ):
            if share > 0:
                terms["loss_cam_to_seg" + suffix] = cam_to_seg_loss(
                    log_p, pseudo, count, labels.foreground_share, batch_weights=labels.reliability_over == "batch"
                )
    if config.losses.dense_energy > 0:
        images, inside = denormalise(micro.strong), inside_box(micro.box, crop, crop)
        terms["loss_dense_energy"] = dense_energy(
            log_p.exp(), images, plan.main.labels, inside, global_batch, config.dense_energy
        )
    if plan.target is not None:
        terms["loss_seg_to_cam"] = seg_to_cam_loss(resize(outputs.cam.float(), plan.grid), plan.target, global_batch)
    if plan.sample is not None:
        vectors = outputs.cam if config.contrastive.on == "cam" else outputs.features
        terms["loss_contrastive"] = contrastive_loss(
            resize(vectors.float(), plan.grid), plan.sample, config.contrastive.temperature, counts[-1]
        )
    return terms


def _statistics(counts: Tensor, proposal: Proposal | None) -> dict[str, Tensor]:
    """What is worth a curve besides the losses; 0-dim tensors that hold for the whole global batch."""
    statistics: dict[str, Tensor] = {}
    for suffix, count in (("", counts[:COUNTS]), ("_aux", counts[COUNTS:-1])):
        foreground, background, region = count[:3].unbind()
        labelled = foreground + background
        statistics["foreground_share" + suffix] = foreground / labelled.clamp(min=1)
        statistics["ignored_share" + suffix] = 1 - labelled / region.clamp(min=1)
    statistics["contrastive_images"] = counts[-1]
    if proposal is not None:
        statistics["em_steps"], statistics["em_steps_aux"] = proposal.steps.unbind()
    return statistics


def _add(totals: dict[str, Tensor], terms: dict[str, Tensor], loss: Tensor) -> None:
    """Add a micro-batch's detached shares to the step's."""
    for name, value in ({"loss": loss} | terms).items():
        value = value.detach()
        totals[name] = totals[name] + value if name in totals else value


def _synchronised(online: nn.Module, last: bool) -> AbstractContextManager[object]:
    """DDP exchanges gradients with the last micro-batch only."""
    skip = getattr(online, "no_sync", None)
    return nullcontext() if last or skip is None else skip()


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]
