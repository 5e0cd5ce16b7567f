"""One optimiser step of a run on one worker: from a batch to new weights, EMA and thresholds, without a host wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosa_ray.data.loader import TrainingBatch
from cosa_ray.evaluation.inference import autocast_dtype
from cosa_ray.method.schedule import phase
from cosa_ray.method.step import MicroBatch, StepOutput, classification_step, cotraining_step, fill_step
from cosa_ray.training.distributed import Agreed, StepStatus, Workers
from cosa_ray.training.state import TrainState


class Taken(NamedTuple):
    """A step that was taken: what it gave, the gradient's norm, and what the workers agreed on after the one before."""

    output: StepOutput
    norm: Tensor
    before: Agreed | None


class Stepper:
    """Takes the steps of a run, whichever phase they belong to, with the networks compiled and wrapped as it wants."""

    def __init__(self, state: TrainState, workers: Workers) -> None:
        self.state, self.workers, self.config = state, workers, state.config
        self.autocast = autocast_dtype(self.config, workers.device)
        self._status = StepStatus(workers)
        self._wrapped: tuple[str, torch.nn.Module] | None = None
        if self.config.training.compile != "none":
            # Every input size is compiled on its own: three scales of AN, with and without its decoder, are over 8.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            state.assignment.compile()

    def phase(self, step: int) -> str:
        """Phase of a step, counted from 0: warmup, filling or cotraining."""
        dynamic = self.config.dynamic_threshold
        return phase(self.config.training, step, dynamic.batches if dynamic.enabled else 0)

    def agreed(self) -> Agreed | None:
        """What the workers agreed on after the step last taken; None when it was read already."""
        return self._status.read()

    def take(self, batch: TrainingBatch, wishes: Callable[[], tuple[bool, bool]] = lambda: (False, False)) -> Taken:
        """Take the state's next step with this worker's part of the batch; the weights stay where it is not finite.

        Args:
            batch: views as bytes, on the CPU.
            wishes: what this worker would have the others know at the end of the step: (stop, its machine leaves).
        """
        config, state, workers = self.config, self.state, self.workers
        step = state.step
        now = self.phase(step)
        micro_batches = self._micro_batches(batch)
        common: dict[str, Any] = {
            "global_batch": config.training.batch_size,
            "world": workers.world,
            "autocast": self.autocast,
        }
        if now == "cotraining":
            output = cotraining_step(
                self._wrap("cotraining", state.online),
                state.assignment,
                micro_batches,
                state.thresholds,
                config,
                step,
                sum_over_workers=workers.sum,
                **common,
            )
        else:
            classification = self._wrap("warmup", state.online.classification)
            output = classification_step(classification, micro_batches, **common)
            if now == "filling":
                filled = fill_step(
                    state.assignment,
                    micro_batches,
                    state.thresholds,
                    config,
                    sum_over_workers=workers.sum,
                    autocast=self.autocast,
                )
                output = output._replace(proposal=filled)
            if config.training.decoder_in_warmup:
                for parameter in state.online.decoder_parameters():
                    parameter.grad = torch.zeros_like(parameter)
        before = self._status.read()
        norm = state.gradient_norm()
        finite = self._status.share(step + 1, output.losses | {"gradient": norm}, *wishes())
        state.optimise(finite, norm)
        if output.proposal is not None:
            state.thresholds.commit(output.proposal, finite)
        return Taken(output, norm, before)

    def _wrap(self, name: str, module: torch.nn.Module) -> torch.nn.Module:
        """The module under DDP, rebuilt when co-training starts so that no parameter ever lacks a gradient."""
        if self._wrapped is None or self._wrapped[0] != name:
            if self.config.training.compile == "both":
                module.compile()
            self._wrapped = (name, self.workers.wrap(module))
        return self._wrapped[1]

    def _micro_batches(self, batch: TrainingBatch) -> list[MicroBatch]:
        device, network = self.workers.device, self.state.online
        weak, strong = (network.normalise(view.to(device, non_blocking=True)) for view in (batch.weak, batch.strong))
        whole = (
            weak,
            strong,
            *(part.to(device, non_blocking=True) for part in (batch.labels, batch.box, batch.position)),
        )
        pieces = [part.tensor_split(self.config.training.accumulate) for part in whole]
        return [MicroBatch(*piece) for piece in zip(*pieces, strict=True)]
