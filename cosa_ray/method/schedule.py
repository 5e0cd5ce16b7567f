"""Learning rate, phases, EMA momentum and the weight of CSC over a run, as pure functions of the step."""

from __future__ import annotations

from typing import Literal

from cosa_ray.config.schema import Config, Optimiser, Training

Phase = Literal["warmup", "filling", "cotraining"]


def learning_rate(optimiser: Optimiser, total_steps: int, step: int) -> float:
    """Factor on every group's lr for the optimiser step `step` (0-based): linear warm-up, then polynomial decay.

    Step t < warmup_steps: 1 - (1 - t / warmup_steps) * (1 - warmup_ratio); afterwards (1 - t / T) ** power
    (method.md 5; release `PolyWarmupAdamW`).
    """
    if step < optimiser.warmup_steps:
        return 1.0 - (1.0 - step / optimiser.warmup_steps) * (1.0 - optimiser.warmup_ratio)
    return max(0.0, 1.0 - step / total_steps) ** optimiser.power


def phase(training: Training, step: int, ring_batches: int) -> Phase:
    """What step `step` (0-based) does.

    "warmup": classification losses only. "filling": the same, and the assignment network's CAMs fill the ring of
    histograms; the last `ring_batches` steps of warm-up (0 when thresholds are fixed; none when no co-training
    follows). "cotraining": all losses, from step `warmup_iters` on; the release's option `decoder_in_warmup` counts
    that step as warm-up too.
    """
    start = _cotraining_from(training)
    if step >= start:
        return "cotraining"
    return "filling" if start - ring_batches <= step and start < training.steps else "warmup"


def contrastive_weight(config: Config, step: int) -> float:
    """Weight of contrastive separation at co-training step `step` (0-based, of the run): constant, or fading (ours).

    With `contrastive.fade` it falls linearly from `losses.contrastive` at the first step of co-training to 0 after that
    share of it.
    """
    weight, fade = config.losses.contrastive, config.contrastive.fade
    if fade is None:
        return weight
    start = _cotraining_from(config.training)
    done = (step - start) / (config.training.steps - start)
    return weight * max(0.0, 1.0 - done / fade)


def ema_momentum(config: Config, step: int) -> float:
    """Momentum of the assignment network's average after step `step` (0-based): constant, of its own in warm-up.

    With `assignment.ramp` (ours) it rises from 0.1 at the first step of co-training, so that what the average holds of
    a decoder as it was initialised is gone at once, not after some 1 / (1 - momentum) steps.
    """
    assignment = config.assignment
    done = step - _cotraining_from(config.training)
    if done < 0 and assignment.warmup_momentum is not None:
        return assignment.warmup_momentum
    return min(assignment.momentum, (1 + done) / (10 + done)) if assignment.ramp and done >= 0 else assignment.momentum


def _cotraining_from(training: Training) -> int:
    return training.warmup_iters + (1 if training.decoder_in_warmup else 0)
