"""One trial: a run like any other, whose settings the search chose and whose parent is the sweep's run."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from cosa_ray.config.load import apply_overrides, dump_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.evaluation.description import DESCRIPTION, Description
from cosa_ray.training.driver import conclude, fit, prepare
from cosa_ray.training.loop import Job, Outcome
from cosa_ray.training.runs import CONFIG, Run, read_run
from cosa_ray.training.storage import CheckpointEntry, RunFolder
from cosa_ray.tuning.journal import Entry
from cosa_ray.tuning.values import as_value

STOPPED_BY = "cosa_ray.stopped_by"
KIND = "cosa_ray.failure"
GIVEN_UP = "given_up"
BUDGET = "budget"  # as the one that gave a trial up: it can go on when there is more
STORE = "tracking store"  # under which the monitor keeps the URI of the sweep's MLflow store
POLL_SECONDS = 0.5
# Ray says of every process that was killed that the OOM killer may have been it: those words count for nothing.
_PERHAPS = re.compile(r"Some common causes include.*", re.I | re.S)
_DIED = re.compile(r"was killed|has died|died unexpectedly|ActorDied|WorkerCrashed|NodeDied", re.I)
_NO_MEMORY = re.compile(
    r"out.of.memory|OutOfMemory|can(?:'t|not) allocate memory|unable to allocate|memory running low|low on memory"
    r"|\bOOM\b|MemoryError",
    re.I,
)


class _Interrupted(Exception):
    """The sweep was asked to stop: the trial is not done, and goes on when the sweep is resumed."""


@dataclass(frozen=True)
class Trials:
    """What all trials of a sweep share; picklable. `pauses`: steps at which a population stands still."""

    sweep: str
    config: Config
    metric: str
    monitor: Any
    track: bool
    parent_run_id: str | None
    pauses: tuple[int, ...] = ()

    def trial_config(self, values: Mapping[str, Any], seed: int | None = None) -> Config:
        """The experiment of a trial."""
        return apply_overrides(self.config, {**values, **({} if seed is None else {"seed": seed})}, "trial")

    def name(self, number: str) -> str:
        """Name of a trial's run, in its folder and in MLflow."""
        return f"{self.sweep}-{number}"

    def folder(self, number: str) -> str:
        """Folder of a trial's run, beside those of other runs."""
        return f"{self.config.storage.rstrip('/')}/{self.name(number)}"


def run_trial(trials: Trials, given: Mapping[str, Any]) -> None:
    """Run one trial to its end under Tune, or on from its last checkpoint; called in the trial's driver process.

    Returns also where the trial failed or was stopped: how it ended is in its run's record, and what kept it from
    having one is left with the monitor. So Tune starts again only what was killed.
    """
    import ray

    number: str = given["trial"]
    try:
        _run(trials, number, given["values"], given["seed"])
    except _Interrupted:
        return
    except (UserError, RunFailed) as error:
        ray.get(trials.monitor.keep.remote(cause_of(number), str(error)))
    except Exception as error:
        ray.get(trials.monitor.keep.remote(cause_of(number), f"{type(error).__name__}: {error}"))


def cause_of(number: str) -> str:
    """Under what the monitor keeps why a trial came to nothing."""
    return f"cause of trial {number}"


def _run(trials: Trials, number: str, values: Mapping[str, Any], seed: int | None) -> None:
    import ray

    name, monitor = trials.name(number), trials.monitor
    if ray.get(monitor.stop_wished.remote(name)):
        raise _Interrupted
    run = read_run(trials.folder(number))
    if run is not None and (run.record.state == "finished" or given_up_by(run.folder.uri) not in (None, BUDGET)):
        # The journal was behind the run: what is done stays done, the sweep only wants its metrics.
        for entry in run.checkpoints.entries():
            _report_again(trials, run, entry)
        return
    if trials.track and (uri := ray.get(monitor.kept.remote(STORE))):
        # This process has its machine's environment, which may name another store than the sweep's. The URI may
        # hold a password: it goes from memory to memory, and into no file.
        os.environ["MLFLOW_TRACKING_URI"] = uri
    RunFolder(trials.folder(number)).remove(GIVEN_UP)
    while True:
        values = _past_generations(trials, number, values, run)
        with _slot(monitor, name):
            run, job = open_trial(trials, number, values, seed, run)
            run = run.update(state="running", cause=None)
            pause_at = next((step for step in trials.pauses if step > run.step), None)
            outcome = fit(replace(job, pause_at=pause_at), monitor, [reports(trials.metric)])
            if outcome.state != "paused":
                end_trial(run, job, outcome)
                return
        run = read_run(run.folder.uri)


def _report_again(trials: Trials, run: Run, entry: CheckpointEntry) -> None:
    """Report the evaluation of a checkpoint as the worker did when it was made, with what the run had cost by then."""
    from ray import tune

    if trials.metric not in entry.metrics:
        return
    metrics = {**entry.metrics, "step": float(entry.step)}
    if (text := run.folder.read_text(f"{entry.name}/{DESCRIPTION}")) is not None:
        unit = "gpu" if trials.config.resources.gpus_per_worker else "cpu"
        metrics[f"cost/{unit}_hours"] = Description.parse(text).worker_seconds / 3600
    tune.report(metrics)


def _past_generations(trials: Trials, number: str, values: Mapping[str, Any], run: Run | None) -> Mapping[str, Any]:
    """The settings to go on with; where the trial stands still with its population, wait for the decision first."""
    import ray

    if run is None:
        return values
    # A driver that Tune starts again has the settings of before a copy.
    for step in (step for step in trials.pauses if step < run.step):
        values = _decided(ray.get(trials.monitor.kept.remote(generation(step))) or {}, number, values)
    if run.step not in trials.pauses:
        return values
    # After a kill the sweep may not have heard of the evaluation it is waiting for.
    if (entry := run.checkpoints.latest()) is not None:
        _report_again(trials, run, entry)
    while True:
        plan = ray.get(trials.monitor.kept.remote(generation(run.step)))
        if plan is not None:
            return _decided(plan, number, values)
        if ray.get(trials.monitor.stop_wished.remote(trials.name(number))):
            raise _Interrupted
        time.sleep(POLL_SECONDS)


def _decided(plan: Mapping[str, Any], number: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A trial's settings after a generation."""
    said = plan.get(str(int(number)))
    return {key: as_value(value) for key, value in said["values"].items()} if said is not None else values


def generation(step: int) -> str:
    """Under what the monitor keeps who copies whom at a step."""
    return f"generation {step}"


@contextmanager
def _slot(monitor: Any, name: str) -> Iterator[None]:
    """Wait for one of the places the cluster was divided into, and hold it for the block.

    There can be more drivers than places: a population has one for every member. Raises _Interrupted when the sweep is
    asked to stop meanwhile.
    """
    import ray

    while not ray.get(monitor.acquire.remote(name)):
        if ray.get(monitor.stop_wished.remote(name)):
            raise _Interrupted
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        ray.get(monitor.release.remote(name))


def reports(metric: str) -> Any:
    """Tune's report callback, without the evaluations in which the metric is undefined: no search can read them."""
    from ray.tune.integration.ray_train import TuneReportCallback

    class Reports(TuneReportCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if metric in metrics[0]:
                super().after_report(run_context, metrics, checkpoint)

    return Reports()


def open_trial(
    trials: Trials, number: str, values: Mapping[str, Any], seed: int | None, run: Run | None
) -> tuple[Run, Job]:
    """A trial's run and job, its MLflow run a child of the sweep's (by name where MLflow was away at first)."""
    return prepare(
        trials.trial_config(values, seed),
        trials.name(number),
        run,
        track=trials.track,
        parent_run_id=trials.parent_run_id,
        parent=trials.sweep,
        tags={"cosa_ray.kind": "trial", "cosa_ray.sweep": trials.sweep, "cosa_ray.trial": number},
    )


def copy_trial(trials: Trials, taker: Entry, donor: Entry, step: int, values: Mapping[str, Any]) -> None:
    """Give a trial that stands still another's checkpoint of that step, whole, and other settings.

    Both have stopped there; doing it twice does no harm.
    """
    source, run = read_run(trials.folder(donor.id)), read_run(trials.folder(taker.id))
    if source is None or run is None:
        raise RunFailed(f"trial {taker.id} cannot copy {donor.id}: a run's folder is gone.")
    entry = next((each for each in source.checkpoints.entries() if each.step == step), None)
    if entry is None:
        raise RunFailed(f"trial {taker.id} cannot copy {donor.id}: it has no checkpoint of step {step}.")
    run.folder.write_text(CONFIG, dump_config(trials.trial_config(values, taker.seed)))
    run.checkpoints.take_over(source.checkpoints, entry, f"from_{donor.id}")


def end_trial(run: Run, job: Job, outcome: Outcome) -> None:
    """Write down how a trial ended, in its folder and in MLflow, where no run may stay RUNNING."""
    conclude(run, job, outcome)
    run = read_run(run.folder.uri) or run
    by = given_up_by(run.folder.uri) if outcome.state == "stopped" else None
    if by is not None and by != BUDGET:
        run.checkpoints.drop_full_states()
    kind = failure_kind(outcome.state, outcome.cause)
    if job.tracking is None or (outcome.state != "stopped" and kind is None):
        return
    from cosa_ray.tracking.tracker import open_tracker

    tracker = open_tracker(replace(job.tracking, description=None))
    tracker.set_tags({STOPPED_BY: by} if by else {KIND: kind} if kind else {})
    tracker.finish("FAILED" if kind else "FINISHED" if by not in (None, BUDGET) else "KILLED")
    # A worker that was killed at once may have left its MLflow run to this tracker.
    if run.record.mlflow_run_id is None:
        run.update(mlflow_run_id=tracker.run_id)


def failure_kind(state: str, cause: str | None) -> str | None:
    """Of a run that failed: diverged, out_of_memory, died or error; None of one that did not."""
    if state == "diverged":
        return "diverged"
    if state not in ("failed", "error"):
        return None
    if cause and _NO_MEMORY.search(_PERHAPS.sub("", cause)):
        return "out_of_memory"
    return "died" if cause and _DIED.search(cause) else "error"


def settle(
    trials: Trials, entry: Entry, *, killed: bool, interrupted: bool, said: Callable[[str], str | None]
) -> Entry:
    """How a trial whose driver is gone ended, by its run's own record; Tune's word counts for nothing.

    A trial whose workers never started ends without an error and without metrics. `killed`: its process was, more
    often than it is started again. `said` knows what a trial that has no record left with the monitor.
    """
    run = read_run(trials.folder(entry.id))
    if run is not None and run.record.state in ("created", "running"):
        run = _end_killed(trials, entry, run, interrupted)
    left = said(cause_of(entry.id))
    by = given_up_by(trials.folder(entry.id))
    step = run.step if run is not None else 0
    state = run.record.state if run is not None else None
    if state == "finished":
        return replace(entry, state="finished", step=step)
    if state == "stopped" and by not in (None, BUDGET):
        return replace(entry, state="stopped_early", step=step, ended_by=by)
    if (state == "stopped" or (interrupted and state not in ("failed", "diverged"))) and left is None:
        return replace(entry, state="interrupted", step=step, ended_by=by)
    cause = left or (run.record.cause if run is not None else None)
    if cause is None:
        cause = "its process was killed" if killed else "it never started"
    kind = failure_kind("diverged" if state == "diverged" else "failed", cause)
    return replace(entry, state="failed", step=step, kind=kind, cause=cause)


def _end_killed(trials: Trials, entry: Entry, run: Run, interrupted: bool) -> Run:
    """Write down the end of a trial whose own process was killed."""
    stopped = interrupted or given_up_by(run.folder.uri) is not None
    cause = None if stopped else "its process was killed"
    outcome = Outcome("stopped" if stopped else "failed", run.step, cause)
    end_trial(*open_trial(trials, entry.id, entry.values, entry.seed, run), outcome)
    return read_run(run.folder.uri) or run


def mark_given_up(folder: str, by: str) -> None:
    """Note in a run's folder who gave it up, so that it is not taken for an interrupted one."""
    RunFolder(folder).write_text(GIVEN_UP, f"{by}\n")


def given_up_by(folder: str) -> str | None:
    """Who gave the run in this folder up: a scheduler, or the budget; None when nobody did."""
    text = RunFolder(folder).read_text(GIVEN_UP)
    return text.strip() if text is not None else None
