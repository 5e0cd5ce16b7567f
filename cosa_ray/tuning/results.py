"""What a sweep came to: how each trial ended, which was best, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cosa_ray.config.load import apply_overrides, dump_config
from cosa_ray.config.schema import Config
from cosa_ray.tuning.journal import Entry
from cosa_ray.tuning.search import trial_scores
from cosa_ray.tuning.sweepfile import Mode
from cosa_ray.tuning.values import as_value

if TYPE_CHECKING:
    from cosa_ray.training.storage import RunFolder
    from cosa_ray.tuning.trial import Trials

BEST_FILE, RESULT_FILE = "best.yaml", "sweep.json"


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended: state is finished, stopped_early, failed (with kind and cause) or interrupted.

    `score` is the sweep's (first) metric at the trial's best evaluation, `scores` all of the sweep's metrics (of
    several: at its last evaluation together), `step` the optimiser steps it took, `metrics` those of the checkpoint its
    run calls best, `hours` what it cost, of GPUs or CPU threads. `values` are the settings that were sampled, `config`
    is all of them. Trials of one `configuration` differ in their `seed` only. `stopped_by`: who ended it early.
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
    scores: dict[str, float] = field(default_factory=dict)
    kind: str | None = None
    stopped_by: str | None = None
    hours: float = 0.0
    configuration: int = 0
    seed: int = 0
    origin: str = "search"
    lineage: list[dict[str, Any]] = field(default_factory=list)

    @property
    def succeeded(self) -> bool:
        """True when its score counts: it came to its end, or a scheduler or the budget ended it."""
        return self.state in ("finished", "stopped_early") or (self.state == "interrupted" and bool(self.stopped_by))


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended, its trials, and the best of them.

    `state` is finished, failed (none succeeded, or too many failed in a row: `cause`), or stopped before all had ended.
    `metrics` are those it orders by, with their modes; `metric` and `mode` the first. `best` is the first trial of the
    best configuration, its repeats averaged; `front` are the numbers of the trials that no other beats in every metric.
    `hours` are of GPUs or CPU threads (`hours_of`), `seconds` wall time, both of all starts of the sweep.
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
    metrics: dict[str, Mode] = field(default_factory=dict)
    front: list[str] = field(default_factory=list)
    cause: str | None = None
    hours: float = 0.0
    hours_of: str = "cpu"
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)

    def with_trials(self, trials: list[TrialResult]) -> SweepResult:
        """The same result with other records of the same trials."""
        best = next((trial for trial in trials if self.best is not None and trial.id == self.best.id), None)
        return replace(self, trials=trials, best=best)

    def ranked(self) -> list[TrialResult]:
        """Trials best first; those without a score last."""
        sign = -1.0 if self.mode == "max" else 1.0
        return sorted(self.trials, key=lambda trial: (trial.score is None, sign * (trial.score or 0.0), trial.id))


def write_result(folder: RunFolder, result: SweepResult) -> None:
    """Write a sweep's result into its folder."""
    folder.write_text(RESULT_FILE, json.dumps(result.as_json(), indent=1, default=str))


def read_result(folder: RunFolder) -> SweepResult | None:
    """The result in a sweep's folder; None where the sweep has not come to one."""
    content = folder.read_text(RESULT_FILE)
    if content is None:
        return None
    said = json.loads(content)
    best = _read(said.pop("best")) if said["best"] else said.pop("best")
    trials = [_read(trial) for trial in said.pop("trials")]
    return SweepResult(**said, trials=[], best=best).with_trials(trials)


def _read(said: dict[str, Any]) -> TrialResult:
    return TrialResult(**{**said, "values": {key: as_value(value) for key, value in said["values"].items()}})


def trial_result(entry: Entry, trials: Trials, metrics: Mapping[str, Mode]) -> TrialResult:
    """What a trial came to, by the journal and its run."""
    from cosa_ray.training.runs import read_run

    run = read_run(trials.folder(entry.id))
    best = run.checkpoints.best() if run is not None else None
    scores = trial_scores(entry, metrics) or ()
    config = trials.trial_config(entry.values, entry.seed)
    return TrialResult(
        id=entry.id,
        name=trials.name(entry.id),
        state="interrupted" if entry.state in ("pending", "running") else entry.state,
        values=entry.values,
        step=entry.step,
        score=scores[0] if scores else None,
        metrics=best.metrics if best else {},
        folder=trials.folder(entry.id),
        mlflow_run_id=run.record.mlflow_run_id if run else None,
        cause=entry.cause,
        config=config.model_dump(mode="json"),
        scores=dict(zip(metrics, scores, strict=False)),
        kind=entry.kind,
        stopped_by=entry.ended_by,
        hours=entry.hours,
        configuration=entry.configuration,
        seed=config.seed,
        origin=entry.origin,
        lineage=list(entry.lineage),
    )


def grouped(trials: Iterable[TrialResult]) -> dict[int, list[TrialResult]]:
    """Trials by their configuration."""
    groups: dict[int, list[TrialResult]] = {}
    for trial in trials:
        groups.setdefault(trial.configuration, []).append(trial)
    return groups


def best_trial(trials: Sequence[TrialResult], metrics: Mapping[str, Mode]) -> TrialResult | None:
    """The first trial of the configuration whose repeats have the best mean score; None when none has a score."""
    metric, mode = next(iter(metrics.items()))
    groups = grouped(trial for trial in trials if trial.succeeded and metric in trial.scores)
    sign = 1.0 if mode == "max" else -1.0
    means = {number: sign * float(np.mean([t.scores[metric] for t in group])) for number, group in groups.items()}
    return groups[max(means, key=lambda number: (means[number], -number))][0] if means else None


def pareto_front(trials: Sequence[TrialResult], metrics: Mapping[str, Mode]) -> list[TrialResult]:
    """Trials of which no other is as good in every metric and better in one (Pareto); by number."""
    scored = [trial for trial in trials if trial.succeeded and len(trial.scores) == len(metrics)]
    if not scored:
        return []
    signs = np.array([1.0 if mode == "max" else -1.0 for mode in metrics.values()])
    points = np.array([[trial.scores[metric] for metric in metrics] for trial in scored]) * signs
    beaten = [((points >= point).all(1) & (points > point).any(1)).any() for point in points]
    return [trial for trial, worse in zip(scored, beaten, strict=True) if not worse]


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
    """Delete the losers' checkpoints; their metrics stay in MLflow and in the sweep's result.

    Kept are those of the best trial, of the other seeds of its configuration and of the front, and of trials that can
    still go on.
    """
    from cosa_ray.training.storage import CheckpointStore, RunFolder

    best = result.best.configuration if result.best is not None else None
    for trial in result.trials:
        if trial.configuration != best and trial.id not in result.front and trial.state != "interrupted":
            folder = RunFolder(trial.folder)
            folder.remove(CheckpointStore.INDEX)
            folder.remove(CheckpointStore.FOLDER)
