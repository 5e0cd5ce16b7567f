"""One trial: a run like any other, whose settings the search chose and whose parent is the sweep's run."""

from __future__ import annotations

from collections.abc import Mapping
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

    def folder(self, trial_id: str) -> str:
        """Folder of a trial's run: beside those of other runs, under the name it has in MLflow."""
        return f"{self.config.storage.rstrip('/')}/{self.sweep}-{trial_id}"


def run_trial(trials: Trials, sampled: Mapping[str, Any], trial_id: str) -> None:
    """Run one trial to its end under Tune, or on from its last checkpoint; called in the trial's driver process.

    Raises RunFailed with the cause when it failed, Interrupted when the sweep is to stop.
    """
    import ray
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    name = f"{trials.sweep}-{trial_id}"
    if ray.get(trials.monitor.stop_wished.remote(name)):
        raise Interrupted(name)
    run = read_run(trials.folder(trial_id))
    if run is not None and (run.record.state == "finished" or is_given_up(run)):
        # Tune's snapshot was older than the run: what is done stays done, Tune only wants its last metrics.
        if (entry := run.checkpoints.best()) is not None and trials.metric in entry.metrics:
            tune.report({**entry.metrics, "step": entry.step})
        return
    run, job = open_trial(trials, sampled, trial_id, run)
    run = run.update(state="running")
    outcome = fit(job, trials.monitor, [TuneReportCallback()])
    end_trial(run, job, outcome)
    if outcome.state == "stopped" and not is_given_up(run):
        raise Interrupted(name)
    if outcome.state not in ("finished", "stopped"):
        raise RunFailed(f"trial {name} {outcome.state} at step {outcome.step}: {outcome.cause}")


def open_trial(trials: Trials, sampled: Mapping[str, Any], trial_id: str, run: Run | None) -> tuple[Run, Job]:
    """A trial's run and job, its MLflow run a child of the sweep's (by name where MLflow was away at first)."""
    return prepare(
        trials.trial_config(sampled),
        f"{trials.sweep}-{trial_id}",
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
    if outcome.state == "finished" or job.tracking is None:
        return
    from cosa_ray.tracking.tracker import open_tracker

    tracker = open_tracker(replace(job.tracking, description=None))
    if given_up:
        tracker.set_tags({STOPPED_BY: "asha"})
        tracker.finish("FINISHED")
    else:
        tracker.set_tags({"cosa_ray.cause": outcome.cause} if outcome.cause else {})
        tracker.finish("KILLED" if outcome.state == "stopped" else "FAILED")
    # A worker that failed at once may have left its MLflow run to this tracker.
    if run.record.mlflow_run_id is None:
        run.update(mlflow_run_id=tracker.run_id)


def end_killed(run: Run, trials: Trials, sampled: Mapping[str, Any], trial_id: str, interrupted: bool) -> Run:
    """Write down the end of a trial whose own process was killed; returns the run as it is now."""
    if run.record.state not in ("created", "running"):
        return run
    latest = run.checkpoints.latest()
    outcome = Outcome("stopped" if interrupted else "failed", latest.step if latest else 0)
    end_trial(*open_trial(trials, sampled, trial_id, run), outcome)
    return read_run(run.folder.uri) or run


def mark_given_up(folder: str) -> None:
    """Note in a run's folder that the scheduler gave it up, so that it is not taken for an interrupted one."""
    RunFolder(folder).write_text(GIVEN_UP, "asha\n")


def is_given_up(run: Run) -> bool:
    """True when the scheduler gave the run up."""
    return run.folder.exists(GIVEN_UP)
