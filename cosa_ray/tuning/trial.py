"""One trial: a run like any other, whose settings the search chose and whose parent is the sweep's run."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cosa_ray.config.load import apply_overrides
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed
from cosa_ray.training.driver import conclude, fit, prepare
from cosa_ray.training.loop import Job, Outcome
from cosa_ray.training.runs import Run, read_run
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.space import Dimension

STOPPED_BY = "cosa_ray.stopped_by"
GIVEN_UP = "given_up"
STORE = "tracking store"  # under which the monitor keeps the URI of the sweep's MLflow store
POLL_SECONDS = 0.5


class Interrupted(Exception):
    """The sweep was asked to stop: the trial is not done, and goes on when the sweep is resumed."""


@dataclass(frozen=True)
class Trials:
    """What all trials of a sweep share; picklable."""

    sweep: str
    config: Config
    space: Mapping[str, Dimension]
    metric: str
    monitor: Any
    track: bool
    parent_run_id: str | None

    def trial_config(self, sampled: Mapping[str, Any]) -> Config:
        """The experiment of a trial."""
        values = {key: self.space[key].tidy(value) for key, value in sampled.items()}
        return apply_overrides(self.config, values, "trial")

    def name(self, trial_id: str) -> str:
        """Name of a trial's run, in its folder and in MLflow."""
        return f"{self.sweep}-{trial_id}"

    def folder(self, trial_id: str) -> str:
        """Folder of a trial's run, beside those of other runs."""
        return f"{self.config.storage.rstrip('/')}/{self.name(trial_id)}"


def run_trial(trials: Trials, sampled: Mapping[str, Any], trial_id: str) -> None:
    """Run one trial to its end under Tune, or on from its last checkpoint; called in the trial's driver process.

    Raises RunFailed with the cause when it failed, Interrupted when the sweep is to stop.
    """
    import ray
    from ray import tune

    name = trials.name(trial_id)
    if ray.get(trials.monitor.stop_wished.remote(name)):
        raise Interrupted(name)
    run = read_run(trials.folder(trial_id))
    if run is not None and (run.record.state == "finished" or is_given_up(run)):
        # Tune's snapshot was older than the run: what is done stays done, Tune only wants its last metrics.
        if (entry := run.checkpoints.best()) is not None and trials.metric in entry.metrics:
            tune.report({**entry.metrics, "step": entry.step})
        return
    with _slot(trials.monitor, name):
        if trials.track and (uri := ray.get(trials.monitor.kept.remote(STORE))):
            # This process has its machine's environment, which may name another store than the sweep's. The URI may
            # hold a password: it goes from memory to memory, and into no file.
            os.environ["MLFLOW_TRACKING_URI"] = uri
        run, job = open_trial(trials, sampled, trial_id, run)
        run = run.update(state="running")
        outcome = fit(job, trials.monitor, [reports(trials.metric)])
        end_trial(run, job, outcome)
    if outcome.state == "stopped" and not is_given_up(run):
        raise Interrupted(name)
    if outcome.state not in ("finished", "stopped"):
        raise RunFailed(f"trial {name} {outcome.state} at step {outcome.step}: {outcome.cause}")


@contextlib.contextmanager
def _slot(monitor: Any, name: str) -> Iterator[None]:
    """Wait for one of the places the cluster was divided into, and hold it for the block.

    A resumed sweep has more drivers than places: Tune starts what was interrupted beside what the search suggests.
    Raises Interrupted when the sweep is asked to stop meanwhile.
    """
    import ray

    while not ray.get(monitor.acquire.remote(name)):
        if ray.get(monitor.stop_wished.remote(name)):
            raise Interrupted(name)
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


def open_trial(trials: Trials, sampled: Mapping[str, Any], trial_id: str, run: Run | None) -> tuple[Run, Job]:
    """A trial's run and job, its MLflow run a child of the sweep's (by name where MLflow was away at first)."""
    return prepare(
        trials.trial_config(sampled),
        trials.name(trial_id),
        run,
        track=trials.track,
        parent_run_id=trials.parent_run_id,
        parent=trials.sweep,
        tags={"cosa_ray.kind": "trial", "cosa_ray.sweep": trials.sweep, "cosa_ray.trial": trial_id},
    )


def end_trial(run: Run, job: Job, outcome: Outcome) -> None:
    """Write down how a trial ended, in its folder and in MLflow, where no run may stay RUNNING."""
    conclude(run, job, outcome)
    run = read_run(run.folder.uri) or run
    given_up = outcome.state == "stopped" and is_given_up(run)
    if given_up:
        run.checkpoints.drop_full_states()
    if outcome.state != "stopped" or job.tracking is None:
        return
    from cosa_ray.tracking.tracker import open_tracker

    tracker = open_tracker(replace(job.tracking, description=None))
    if given_up:
        tracker.set_tags({STOPPED_BY: "asha"})
    tracker.finish("FINISHED" if given_up else "KILLED")
    # A worker that was killed at once may have left its MLflow run to this tracker.
    if run.record.mlflow_run_id is None:
        run.update(mlflow_run_id=tracker.run_id)


def end_killed(run: Run, trials: Trials, sampled: Mapping[str, Any], trial_id: str, interrupted: bool) -> Run:
    """Write down the end of a trial whose own process was killed; returns the run as it is now."""
    if run.record.state not in ("created", "running"):
        return run
    latest = run.checkpoints.latest()
    outcome = Outcome("stopped" if interrupted or is_given_up(run) else "failed", latest.step if latest else 0)
    end_trial(*open_trial(trials, sampled, trial_id, run), outcome)
    return read_run(run.folder.uri) or run


def end_open(trials: Trials, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Write down the end of every trial (id -> settings) that was left open because Tune itself broke down."""
    for trial_id, sampled in values.items():
        with contextlib.suppress(Exception):  # what broke Tune may break this too, and is what must be told
            if (run := read_run(trials.folder(trial_id))) is not None:
                end_killed(run, trials, sampled, trial_id, interrupted=True)


def mark_given_up(folder: str) -> None:
    """Note in a run's folder that the scheduler gave it up, so that it is not taken for an interrupted one."""
    RunFolder(folder).write_text(GIVEN_UP, "asha\n")


def is_marked(folder: str) -> bool:
    """True when the scheduler gave the run in this folder up."""
    return RunFolder(folder).exists(GIVEN_UP)


def is_given_up(run: Run) -> bool:
    """True when the scheduler gave the run up."""
    return is_marked(run.folder.uri)
