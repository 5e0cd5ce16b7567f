"""What a sweep came to: how each trial ended, which was best, and what is kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cosa_ray.config.load import apply_overrides, dump_config
from cosa_ray.config.schema import Config
from cosa_ray.tuning.watch import Watch

if TYPE_CHECKING:
    from cosa_ray.training.storage import RunFolder
    from cosa_ray.tuning.trial import Trials

BEST_FILE, RESULT_FILE = "best.yaml", "sweep.json"


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended: state is finished, stopped_early (by the scheduler), failed (with the cause) or interrupted.

    `score` is the sweep's metric at the trial's best evaluation, `step` the optimiser steps it took, `metrics` those
    of the checkpoint its run calls best. `values` are the settings that were sampled, `config` is all of them.
    """

    id: str
    name: str
    state: str
    values: dict[str, Any]
    step: int
    score: float | None
    metrics: dict[str, float]
    folder: str
    mlflow_run_id: str | None
    cause: str | None
    config: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended, its trials, and the best of them.

    `state` is finished, failed (all trials ended, none succeeded), or stopped before all had ended.
    """

    name: str
    folder: str
    state: str
    metric: str
    mode: str
    parent_run_id: str | None
    tracking_uri: str | None
    trials: list[TrialResult]
    best: TrialResult | None
    best_file: str | None

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)

    def with_trials(self, trials: list[TrialResult]) -> SweepResult:
        """The same result with other records of the same trials."""
        best = next((trial for trial in trials if self.best is not None and trial.id == self.best.id), None)
        return replace(self, trials=trials, best=best)


def write_result(folder: RunFolder, result: SweepResult) -> None:
    """Write a sweep's result into its folder."""
    folder.write_text(RESULT_FILE, json.dumps(result.as_json(), indent=1, default=str))


def read_result(folder: RunFolder) -> SweepResult | None:
    """The result in a sweep's folder; None where the sweep has not come to one."""
    content = folder.read_text(RESULT_FILE)
    if content is None:
        return None
    said = json.loads(content)
    best = TrialResult(**said.pop("best")) if said["best"] else said.pop("best")
    trials = [TrialResult(**trial) for trial in said.pop("trials")]
    return SweepResult(**said, trials=[], best=best).with_trials(trials)


def trial_result(trial: Any, trials: Trials, watch: Watch) -> TrialResult:
    """What a Tune trial came to, by its run's own record; Tune's word counts only where the run wrote none.

    Tune alone is not enough: a trial whose workers never started ends without an error and without metrics.
    """
    from cosa_ray.training.runs import read_run
    from cosa_ray.tuning.trial import end_killed, is_given_up

    run = read_run(trials.folder(trial.trial_id))
    state, cause, step = "interrupted" if watch.interrupted else "failed", None, 0
    metrics: dict[str, float] = {}
    score: float | None = trial.metric_analysis.get(trials.metric, {}).get(watch.mode)
    if run is None:
        cause = None if watch.interrupted else _last_line(trial) or "it never started"
    else:
        run = end_killed(run, trials, trial.config, trial.trial_id, watch.interrupted)
        best, last = run.checkpoints.best(), run.checkpoints.latest()
        metrics, step = (best.metrics if best else {}), (last.step if last else 0)
        if run.record.state == "finished":
            state = "finished"
        elif run.record.state == "stopped":
            state = "stopped_early" if is_given_up(run) else "interrupted"
        else:
            state, cause = "failed", run.record.cause or _last_line(trial) or "it ended without a result"
    return TrialResult(
        id=trial.trial_id,
        name=trials.name(trial.trial_id),
        state=state,
        values={key: trials.space[key].tidy(value) for key, value in trial.config.items()},
        step=step or int(trial.last_result.get("step", 0)),
        score=metrics.get(trials.metric) if score is None else float(score),
        metrics=metrics,
        folder=trials.folder(trial.trial_id),
        mlflow_run_id=run.record.mlflow_run_id if run else None,
        cause=cause,
        config=trials.trial_config(trial.config).model_dump(mode="json"),
    )


def write_best(folder: RunFolder, base: Config, name: str, metric: str, best: TrialResult) -> str:
    """Write the best trial's experiment as a file that `cosa-ray train` takes, with the base's own paths."""
    path = folder.join(BEST_FILE)
    head = (
        f"# Purpose:  the best of sweep {name}, its trial {best.id}.\n"
        f"# Expected: {metric} {best.score:.4f}.\n"
        f"# Command:  cosa-ray train {path}\n"
    )
    folder.write_text(BEST_FILE, head + dump_config(apply_overrides(base, best.values, "best trial")))
    return path


def prune(result: SweepResult) -> None:
    """Delete the losers' checkpoints; their metrics stay in MLflow and in the sweep's result."""
    from cosa_ray.training.storage import CheckpointStore, RunFolder

    for trial in result.trials:
        if trial is not result.best and trial.state != "interrupted":
            folder = RunFolder(trial.folder)
            folder.remove(CheckpointStore.INDEX)
            folder.remove(CheckpointStore.FOLDER)


def _last_line(trial: Any) -> str | None:
    """The last line of the error Tune noted for a trial."""
    text = str(trial.get_error() or "").strip()
    return text.splitlines()[-1].strip() if text else None
