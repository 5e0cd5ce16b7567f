"""The sweep's own MLflow run, of which its trials are the children."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cosa_ray.config.schema import Config
from cosa_ray.tuning.journal import Entry
from cosa_ray.tuning.report import FOLDER, log_report, tags, totals
from cosa_ray.tuning.results import SweepResult
from cosa_ray.tuning.sweepfile import Sweep, dump_sweep

if TYPE_CHECKING:
    from cosa_ray.tracking.store import Store, Tracking
    from cosa_ray.tracking.tracker import NoTracker, Tracker

_ANSWER_SECONDS = 20.0
_REST_SECONDS = 10.0
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


@dataclass
class Parent:
    """The open parent run; `run_id` is None without tracking, and while the server is away.

    `store` and `sweep` are what its report is made of; without them there is none.
    """

    tracker: Tracker | NoTracker
    uri: str | None
    run_id: str | None
    ended: bool = False
    store: Store | None = None
    sweep: Sweep | None = None

    def finish(self, result: SweepResult, entries: Sequence[Entry] = ()) -> SweepResult:
        """Log what the sweep came to, with the report, and end the run; returns the result with the run's id."""
        self.tracker.set_tags(tags(result))
        # At the steps of all trials together: a sweep that is resumed goes on from there, so that no point hides a
        # later one, and none is logged twice.
        self.tracker.log(totals(result), sum(trial.step for trial in result.trials))
        self.tracker.log_text(f"{FOLDER}/sweep.json", json.dumps(result.as_json(), indent=1, default=str))
        if self.store is not None and self.sweep is not None:
            log_report(self.tracker, self.store, self.sweep, result, entries)
        self.tracker.finish(_STATUS[result.state])
        self.ended = True
        return replace(result, parent_run_id=self.tracker.run_id or self.run_id)


def parent_tracking(config: Config, name: str, folder: str, track: bool) -> Tracking | None:
    """How the sweep's run is tracked, with the store opened; None without tracking. Raises what open_store raises."""
    if not track:
        return None
    from cosa_ray.tracking.store import open_store

    return open_store(config, run_name=name, folder=folder, tags={"cosa_ray.kind": "sweep", "cosa_ray.sweep": name})


@contextlib.contextmanager
def parent_run(tracking: Tracking | None, sweep: Sweep) -> Iterator[Parent]:
    """Open the parent run (again, when the sweep is resumed); it ends as FAILED when the block raises."""
    from cosa_ray.tracking.tracker import open_tracker

    tracker = open_tracker(tracking)
    if tracking is None:
        yield Parent(tracker, None, None)
        return
    tracker.log_text(f"{FOLDER}/sweep.yaml", dump_sweep(sweep))
    # Trials name their parent by id; where MLflow is away, by name.
    tracker.flush(_ANSWER_SECONDS)
    parent = Parent(tracker, tracking.uri, tracker.run_id, store=tracking.store, sweep=sweep)
    try:
        yield parent
    finally:
        if not parent.ended:
            tracker.finish("FAILED")


def deliver_rest(tracking: Tracking | None, result: SweepResult) -> SweepResult:
    """Deliver what the sweep and its trials left on their spools because MLflow was away when they ended.

    Returns the result with the ids of runs that reached MLflow only now. A server that is still away is a warning.
    """
    if tracking is None:
        return result
    from cosa_ray.tracking.spool import Spool
    from cosa_ray.tracking.store import find_run_id
    from cosa_ray.tracking.tracker import ARTIFACTS, METRICS, deliver
    from cosa_ray.training.runs import read_run

    def rest(target: Tracking) -> bool:
        spool = Spool(target.spool)
        return any(spool.segments(lane) for lane in (METRICS, ARTIFACTS))

    tracking = replace(tracking, description=None)
    if rest(tracking) and not deliver(tracking, _REST_SECONDS):
        return result
    trials = list(result.trials)
    for index, trial in enumerate(trials):
        if (run := read_run(trial.folder)) is None:
            continue
        child = replace(
            tracking,
            run=trial.name,
            folder=run.folder.uri,
            spool=f"{run.folder.uri}/spool",
            parent=tracking.run,
            parent_run_id=run.record.parent_run_id,
        )
        if not rest(child):
            continue
        if not deliver(child, _REST_SECONDS):
            break
        if trial.mlflow_run_id is None:
            trials[index] = replace(trial, mlflow_run_id=find_run_id(child))
            run.update(mlflow_run_id=trials[index].mlflow_run_id)
    if result.parent_run_id is None:
        result = replace(result, parent_run_id=find_run_id(tracking))
    return result.with_trials(trials)
