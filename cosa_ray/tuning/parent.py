"""The sweep's own MLflow run, of which its trials are the children."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cosa_ray.config.schema import Config
from cosa_ray.tuning.results import SweepResult
from cosa_ray.tuning.sweepfile import Sweep, dump_sweep

if TYPE_CHECKING:
    from cosa_ray.tracking.tracker import NoTracker, Tracker

_ANSWER_SECONDS = 20.0


@dataclass
class Parent:
    """The open parent run; `run_id` is None without tracking, and while the server is away."""

    tracker: Tracker | NoTracker
    uri: str | None
    run_id: str | None
    ended: bool = False

    def finish(self, result: SweepResult) -> SweepResult:
        """Log what the sweep came to and end the run; returns the result with the run's id."""
        best = result.best
        if best is not None and best.score is not None:
            self.tracker.log({result.metric: best.score}, best.step)
            self.tracker.set_tags({"cosa_ray.best_trial": best.name})
        self.tracker.log_text("sweep.json", json.dumps(result.as_json(), indent=1, default=str))
        self.tracker.finish("FINISHED" if result.state == "finished" else "KILLED")
        self.ended = True
        return replace(result, parent_run_id=self.tracker.run_id or self.run_id)


@contextlib.contextmanager
def parent_run(config: Config, sweep: Sweep, name: str, folder: str, track: bool) -> Iterator[Parent]:
    """Open the parent run (again, when the sweep is resumed); it ends as FAILED when the block raises."""
    from cosa_ray.tracking.tracker import open_tracker

    if not track:
        yield Parent(open_tracker(None), None, None)
        return
    import ray

    from cosa_ray.tracking.store import check_reachable, open_store

    tracking = open_store(config, run_name=name, folder=folder, tags={"cosa_ray.kind": "sweep", "cosa_ray.sweep": name})
    check_reachable(tracking, len([node for node in ray.nodes() if node["Alive"]]))
    tracker = open_tracker(tracking)
    tracker.log_text("sweep.yaml", dump_sweep(sweep))
    # Trials name their parent by id; where MLflow is away, by name.
    tracker.flush(_ANSWER_SECONDS)
    parent = Parent(tracker, tracking.uri, tracker.run_id)
    try:
        yield parent
    finally:
        if not parent.ended:
            tracker.finish("FAILED")
