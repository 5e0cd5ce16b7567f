"""A server that makes a run and whose answer is lost: one of the two runs has everything, and is found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosa_ray.tracking.store import Store, Tracking, find_run_id
from cosa_ray.tracking.tracker import Tracker


def test_a_run_made_twice_is_gone_on_with_where_its_points_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request is carried out after its client has given up and asked anew, as an overloaded server does."""
    from mlflow import MlflowClient

    store = Store(f"sqlite:///{tmp_path}/mlflow.db", "tests")
    experiment = store.experiment_id(store.client())
    make, late = MlflowClient.create_run, []

    def lost(self: MlflowClient, *given: object, **more: object) -> object:
        if not late:
            late.append((given, more))
            raise ConnectionError("timed out")
        return make(self, *given, **more)

    monkeypatch.setattr(MlflowClient, "create_run", lost)
    folder = str(tmp_path / "run")
    target = Tracking(store, "twice", folder, f"{folder}/spool")
    first = Tracker(target)
    first.log({"a": 1.0}, 1)
    assert first.flush(0.1)
    first.finish("FAILED", 60)
    used = first.run_id
    # Older than the other by its start, so that age alone would choose it.
    ((given, more),) = late
    made = make(store.client(), *given, **{**more, "start_time": 1})
    assert find_run_id(target) == used != made.info.run_id
    again = Tracker(target)
    again.log({"a": 2.0}, 1)
    again.log({"a": 3.0}, 2)
    again.finish("FINISHED", 60)
    client = store.client()
    assert [(point.step, point.value) for point in client.get_metric_history(used, "a")] == [(1, 1.0), (2, 3.0)]
    assert client.get_metric_history(made.info.run_id, "a") == []
    assert len(client.search_runs([experiment])) == 2
