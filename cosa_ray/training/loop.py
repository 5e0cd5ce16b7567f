"""The worker loop: the same function under Ray Train, inside a Tune trial, and in one bare process."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosa_ray.config.protocol import NetworkName
from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.loader import TrainingBatch, training_batches
from cosa_ray.evaluation.description import Description
from cosa_ray.evaluation.evaluate import evaluate
from cosa_ray.evaluation.naming import best_metric, metric_prefix
from cosa_ray.method.step import StepOutput
from cosa_ray.tracking.tracker import Tracking, open_tracker
from cosa_ray.training.distributed import Agreed, Workers, join_workers, torch_settings
from cosa_ray.training.keeping import CheckpointWriter
from cosa_ray.training.lease import check_held
from cosa_ray.training.session import Progress, Session
from cosa_ray.training.state import TrainState
from cosa_ray.training.stepping import Stepper
from cosa_ray.training.storage import CheckpointEntry, CheckpointStore, RunFolder, patiently
from cosa_ray.training.validating import Awaited, Validated

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)
PROGRESS_SECONDS = 1.0
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "paused": "RUNNING"}


@dataclass(frozen=True)
class Job:
    """What a worker is handed: picklable, resolved, with absolute paths.

    `pause_at`: step to pause at, if any. `lease`: token of the lease on the folder, None where nobody else can come.
    """

    name: str
    folder: str
    config: Config
    tracking: Tracking | None
    cpus_per_worker: float | None = None
    init_from: str | None = None
    continue_from: str | None = None
    pause_at: int | None = None
    lease: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How the loop ended, and after how many steps.

    `finished`, `paused` (at the step it was told to), `stopped` (on request), `diverged` or `failed` (with the cause).
    """

    state: str
    step: int
    cause: str | None = None


def run_worker(job: Job, session: Session, device: torch.device | None = None) -> Outcome:
    """Train from the last registered checkpoint, or from the start, until the end, a stop or a non-finite loss.

    Every worker of the run calls it; rank 0 alone writes. `device`: as for `join_workers`. Wrong input raises
    UserError, nearly always before the first step.
    """
    workers = join_workers(device)
    with torch_settings(job.config, job.cpus_per_worker, workers.device):
        return _Run(job, session, workers).train()


class _Run:
    """One worker's run, in reading order: set up, train, one step, evaluate, checkpoint."""

    def __init__(self, job: Job, session: Session, workers: Workers) -> None:
        config = job.config
        self.job, self.config, self.session, self.workers = job, config, session, workers
        self.dataset = open_dataset(config.data.dataset)
        self.train_split = self.dataset.split(config.data.train_split)
        self.val_split = self.dataset.split(config.data.val_split)
        self.folder = RunFolder(job.folder)
        self.prefix = metric_prefix(config, len(self.val_split))
        self.checkpoints = CheckpointStore(self.folder, best_metric(config, self.prefix))
        entries = patiently(self.checkpoints.entries, "the list of checkpoints", session.alive)
        latest = max(entries, key=lambda entry: entry.step, default=None)
        self._asked = [entry for entry in entries if entry.awaited]
        fresh = latest is None and job.init_from is None and job.continue_from is None
        self.state = TrainState(config, self.dataset.num_classes, workers.device, initialise=fresh)
        self.metrics: dict[str, float] = {}
        self._seconds_before = 0.0
        self._kept = latest.step if latest is not None else None
        self._restore(latest)
        self.tracker = open_tracker(job.tracking if workers.rank == 0 else None)
        self.stepper = Stepper(self.state, workers)
        self.writer = CheckpointWriter(
            self.checkpoints,
            config,
            self.dataset.card,
            guard=lambda: check_held(self.folder, job.lease, f"run {job.name}"),
            flush=self.tracker.flush,
            alive=session.alive,
        )
        self.awaited = Awaited(self.folder)
        self._marks: list[tuple[float, int]] = [(time.perf_counter(), self.state.step)]
        self._waited = 0.0
        self._shown = 0.0
        self._started = time.perf_counter()

    def train(self) -> Outcome:
        """Run to the end, a stop, or a non-finite loss; the tracker is told how it ended."""
        outcome = Outcome("failed", self.state.step, "the worker was interrupted")
        try:
            outcome = self._steps()
            if self.awaited and outcome.state in ("finished", "paused"):
                self._take(self.awaited.rest(self.session.validated, self.session.alive))
            self.writer.wait()
            return outcome
        except Exception as error:
            outcome = Outcome("failed", self.state.step, f"{type(error).__name__}: {error}")
            raise
        finally:
            self.awaited.close()
            self.writer.close()
            self.tracker.finish(_STATUS.get(outcome.state, "FAILED"))
            self.session.close()

    def _steps(self) -> Outcome:
        config, state = self.config, self.state
        total = config.last_step if self.job.pause_at is None else self.job.pause_at
        ended = "finished" if total >= config.last_step else "paused"
        # A restart: killed between its checkpoint and its report, an evaluation has not reached the scheduler, or what
        # was to be evaluated beside the run has not been.
        self._report()
        for entry in self._asked:
            self._ask_for_evaluation(entry.name, entry.step)
        if state.step >= total:
            return Outcome(ended, state.step)
        with closing(self._batches(total)) as batches:
            while state.step < total:
                before = time.perf_counter()
                batch = next(batches)
                self._waited += time.perf_counter() - before
                flags = [self._step(batch)]
                milestone = state.step % config.evaluation.every == 0 or state.step == total
                keep = milestone or state.step % config.checkpoint.every == 0
                if keep or (flags[0] is not None and (flags[0].stop or flags[0].leaving)):
                    # The step just taken has flags of its own: a checkpoint must not hold what nobody has read.
                    flags.append(self.stepper.agreed())
                agreed = [each for each in flags if each is not None]
                for each in agreed:
                    if each.bad:
                        return Outcome("diverged", state.step, f"{', '.join(each.bad)} not finite at step {each.step}")
                stop = any(each.stop for each in agreed)
                leaving = any(each.leaving for each in agreed)
                keep = keep or leaving
                self._show()
                writing = (keep or stop) and self._begin_checkpoint()
                beside = milestone and config.evaluation.asynchronous
                if milestone and not beside:
                    self._evaluate()
                if writing:
                    metrics = self._trained() if beside else self.metrics
                    self._complete_checkpoint(metrics if milestone else {}, awaited=beside)
                if milestone or leaving:
                    self.writer.wait()  # a scheduler goes on from what it is told of, a machine will not be there
                if beside:
                    self._ask_for_evaluation(self.checkpoints.name(state.step), state.step)
                elif milestone:
                    self._report()
                if stop and state.step < total:
                    return Outcome("stopped", state.step)
        return Outcome(ended, state.step)

    def _batches(self, stop_step: int) -> Generator[TrainingBatch, None, None]:
        config = self.config
        yield from training_batches(
            self.train_split,
            seed=config.seed,
            views=config.views,
            batch_size=config.training.batch_size,
            start_step=self.state.step,
            stop_step=stop_step,
            sampling=config.data.sampling,
            rank=self.workers.rank,
            world=self.workers.world,
            processes=config.data.loader_processes,
        )

    def _step(self, batch: TrainingBatch) -> Agreed | None:
        """One optimiser step; returns what the workers agreed on after the step before."""
        session = self.session
        session.alive()
        if self.writer.failed():
            self.writer.wait()
        self._take(self.awaited.arrived())
        taken = self.stepper.take(batch, lambda: (session.stop_wished(), session.leaving()))
        if self.state.step % self.config.tracking.log_every == 0:
            self._log(taken.output, taken.norm)
        return taken.before

    def _log(self, output: StepOutput, norm: Tensor) -> None:
        """Log a step: the only place where a step waits for the device."""
        state, config = self.state, self.config
        shares = self.workers.sum(torch.stack([loss.double() for loss in output.losses.values()]))
        metrics = {f"train/{name}": value for name, value in zip(output.losses, shares.tolist(), strict=True)}
        metrics["train/grad_norm"] = norm.item()
        metrics |= {f"train/{name}": value.item() for name, value in output.statistics.items()}
        metrics |= {f"threshold/{name}": value for name, value in state.threshold_values().items()}
        metrics["train/lr"] = state.optimiser.param_groups[0]["lr"]
        self.metrics["train/loss"] = metrics["train/loss"]
        if (rate := self._rate()) is not None:
            metrics["perf/images_per_second"] = rate
            metrics["perf/step_seconds"] = config.training.batch_size / rate
            elapsed = time.perf_counter() - self._started
            metrics["perf/data_wait_share"] = self._waited / elapsed
        metrics[self._cost] = self._worker_seconds() / 3600
        self._marks.append((time.perf_counter(), state.step))
        del self._marks[:-20]
        self.tracker.log(metrics, state.step)

    def _rate(self) -> float | None:
        """Images a second over the last logged intervals, evaluations left out."""
        (start, first), (end, last) = self._marks[0], (time.perf_counter(), self.state.step)
        return (last - first) * self.config.training.batch_size / (end - start) if last > first else None

    @property
    def _cost(self) -> str:
        """Name of the metric of what the run has cost."""
        return f"cost/{'gpu' if self.workers.device.type == 'cuda' else 'cpu'}_hours"

    def _worker_seconds(self) -> float:
        """Seconds this run has cost, earlier attempts included: wall time x workers x (GPUs each, or CPU threads)."""
        gpus = self.config.resources.gpus_per_worker or 1.0
        units = gpus if self.workers.device.type == "cuda" else torch.get_num_threads()
        return self._seconds_before + self.workers.world * units * (time.perf_counter() - self._started)

    def _show(self, force: bool = False) -> None:
        if self.workers.rank or (time.perf_counter() - self._shown < PROGRESS_SECONDS and not force):
            return
        self._shown = time.perf_counter()
        rate, total = self._rate(), self.config.last_step
        remaining = (total - self.state.step) * self.config.training.batch_size
        self.session.progress(
            Progress(
                run=self.job.name,
                step=self.state.step,
                steps=total,
                phase=self.stepper.phase(max(0, self.state.step - 1)),
                loss=self.metrics.get("train/loss"),
                miou=self.metrics.get(self.checkpoints.metric),
                images_per_second=rate,
                seconds_left=remaining / rate if rate else None,
                hours=self._worker_seconds() / 3600,
            )
        )

    def _evaluate(self) -> None:
        """Evaluate both networks on all workers; rank 0 logs metrics and pictures."""
        began = time.perf_counter()
        # Not compiled: it has sizes of its own, and compiling them would take longer than it saves.
        with torch.compiler.set_stance("force_eager") if self.config.training.compile != "none" else nullcontext():
            result = evaluate(
                self.state.online,
                self.state.assignment,
                self.val_split,
                self.config,
                classes=self.dataset.classes,
                palette=self.dataset.card.palette,
                thresholds=self.state.threshold_values(),
                segment=self.state.step > self.config.training.warmup_iters,
                rank=self.workers.rank,
                world=self.workers.world,
                sum_over_workers=self.workers.sum,
                device=self.workers.device,
                autocast=self.stepper.autocast,
                each_batch=self.session.alive,
            )
        pictures = result.pictures() if self.job.tracking is not None else {}  # nobody else looks at them
        self._log_evaluation(result.metrics, time.perf_counter() - began, pictures, self.state.step)
        # Evaluations are no training time: leave them out of the rate.
        self._marks = [(time.perf_counter(), self.state.step)]
        self._show(force=True)

    def _begin_checkpoint(self) -> bool:
        """Start to upload this step's state, on rank 0; False where it is kept already."""
        if self.workers.rank or self._kept == self.state.step:
            return False
        self._kept = self.state.step
        self.writer.begin(self.state.snapshot())
        return True

    def _complete_checkpoint(self, metrics: dict[str, float], *, awaited: bool) -> None:
        """Register what was begun; everything logged so far is safe before it counts."""
        description = Description(
            run=self.job.name,
            step=self.state.step,
            classes=list(self.dataset.classes),
            metrics=metrics,
            better_network=self._better(metrics),
            worker_seconds=self._worker_seconds(),
            thresholds=self.state.threshold_values(),
        )
        self.writer.complete(description, metrics, awaited=awaited)

    def _better(self, metrics: dict[str, float]) -> NetworkName:
        online, assignment = (metrics.get(f"{self.prefix}/{name}", 0.0) for name in ("miou_online", "miou"))
        return "online" if online > assignment else "assignment"

    def _ask_for_evaluation(self, name: str, step: int) -> None:
        """Have a checkpoint evaluated beside the run; every worker calls it."""
        if self.workers.rank == 0:
            self.awaited.ask(step)
        self.session.validate(name, step)

    def _take(self, evaluations: Sequence[Validated]) -> None:
        """Log what evaluations beside the run have given, at the step of their checkpoint."""
        for done in evaluations:
            self._log_evaluation(done.metrics, done.seconds, done.pictures, done.step)
            self.writer.revise(self.checkpoints.name(done.step), self._better(done.metrics), done.metrics)
            self._show(force=True)

    def _trained(self) -> dict[str, float]:
        """Of the metrics in force, those of training."""
        return {name: value for name, value in self.metrics.items() if name.startswith("train/")}

    def _log_evaluation(self, metrics: dict[str, float], seconds: float, pictures: dict[str, Image], step: int) -> None:
        """The metrics in force are now these; they and their pictures are logged."""
        self.metrics = {**self._trained(), **metrics}
        self.tracker.log({**metrics, "perf/evaluation_seconds": seconds}, step)
        if self.job.tracking is not None:  # nobody else looks at pictures
            for name, picture in pictures.items():
                self.tracker.log_image(name, picture, step)

    def _report(self) -> None:
        """Hand the newest evaluation to the scheduler; evaluations without the metric it orders by are left out."""
        if self.checkpoints.metric in self.metrics:
            hours = {self._cost: self._worker_seconds() / 3600}
            self.session.report({**self.metrics, **hours, "step": self.state.step})

    def _restore(self, latest: CheckpointEntry | None) -> None:
        """Go on from the last registered checkpoint, else start from another run's weights, else afresh."""
        patiently(lambda: self._read_state(latest), "what the run goes on from", self.session.alive)

    def _read_state(self, latest: CheckpointEntry | None) -> None:
        if self.workers.rank == 0:
            self.checkpoints.sweep_orphans()
        if latest is not None:
            with self.folder.local_copy(latest.name) as local:
                self.state.load(local)
                self._seconds_before = Description.read(local).worker_seconds
            self.metrics = dict(latest.metrics)
        elif self.job.continue_from is not None:
            with RunFolder(self.job.continue_from).local_copy("") as local:
                self.state.load(local)
        elif self.job.init_from is not None:
            with RunFolder(self.job.init_from).local_copy("") as local:
                self.state.start_from(local)
