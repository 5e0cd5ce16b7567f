"""Answers of MLflow that are lost on the way, and that come in pages."""

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


def test_a_filter_finds_more_runs_than_fit_into_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, by their start, and no more than asked for."""
    from cosa_ray.tracking import store as module

    monkeypatch.setattr(module, "_PAGE", 3)
    store = Store(f"sqlite:///{tmp_path}/mlflow.db", "tests")
    client = store.client()
    experiment = store.experiment_id(client)
    for number in range(8):
        client.create_run(experiment, start_time=number + 1, run_name=f"r{number}", tags={"even": str(number % 2 == 0)})

    def names(words: str, **more: int) -> list[str | None]:
        return [run.info.run_name for run in module.filtered_runs(store, words, "here", **more)]

    assert names("") == [f"r{number}" for number in range(8)]
    assert names("", most=4) == ["r0", "r1", "r2", "r3"]
    assert names("tags.even = 'True'") == ["r0", "r2", "r4", "r6"]
