"""A trial waits for its turn, tracks where the sweep tracks, and reports only what a search can read."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from cosa_ray.errors import RunFailed
from cosa_ray.training.loop import Outcome
from cosa_ray.training.session import Monitor
from cosa_ray.tuning import trial as trial_module
from cosa_ray.tuning.trial import STORE, Interrupted, Trials, reports, run_trial

ray = pytest.importorskip("ray")


class Handle:
    """The real monitor, called as an actor would be but in this process."""

    def __init__(self, slots: int | None = None) -> None:
        self.monitor = Monitor(slots)

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.monitor, name))


@pytest.fixture
def trials(tiny, monkeypatch: pytest.MonkeyPatch):
    """Make the trials of a sweep with so many slots; what would train is replaced by `work`, called with the name."""
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(trial_module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(trial_module, "reports", lambda metric: metric)

    def make(slots: int | None, work: Any) -> Trials:
        run = SimpleNamespace(update=lambda **changes: run, folder=SimpleNamespace(uri=str(os.getpid())))
        monkeypatch.setattr(trial_module, "open_trial", lambda trials, sampled, name, run_: (run, name))
        monkeypatch.setattr(trial_module, "fit", lambda name, monitor, callbacks: work(name))
        monkeypatch.setattr(trial_module, "end_trial", lambda run, job, outcome: None)
        monkeypatch.setattr(trial_module, "is_given_up", lambda run: False)
        return Trials("s", tiny(), {}, "val/miou", Handle(slots), True, None)

    return make


def test_no_more_trials_run_at_once_than_there_are_places(trials) -> None:
    """Seven drivers, as after a resume, on a cluster that was divided for two."""
    inside, most, done = 0, 0, []
    lock = threading.Lock()

    def work(name: str) -> Outcome:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.03)
        with lock:
            inside -= 1
        done.append(name)
        return Outcome("finished", 20)

    made = trials(2, work)
    drivers = [threading.Thread(target=run_trial, args=(made, {}, f"t{n}")) for n in range(7)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(20)
    assert sorted(done) == [f"t{n}" for n in range(7)]
    assert most == 2


def test_a_place_is_given_back_however_a_trial_ends(trials) -> None:
    def work(name: str) -> Outcome:
        if name == "raises":
            raise OSError("disk full")
        return Outcome("failed" if name == "fails" else "finished", 3, "not finite")

    made = trials(1, work)
    with pytest.raises(OSError, match="disk full"):
        run_trial(made, {}, "raises")
    with pytest.raises(RunFailed, match="s-fails failed at step 3: not finite"):
        run_trial(made, {}, "fails")
    run_trial(made, {}, "last")


def test_a_trial_that_waits_ends_when_the_sweep_is_to_stop(trials) -> None:
    made = trials(1, lambda name: Outcome("finished", 20))
    assert made.monitor.monitor.acquire("somebody")
    caught: list[BaseException] = []

    def drive() -> None:
        try:
            run_trial(made, {}, "t")
        except Interrupted as error:
            caught.append(error)

    driver = threading.Thread(target=drive)
    driver.start()
    time.sleep(0.1)
    assert driver.is_alive()
    made.monitor.monitor.stop()
    driver.join(10)
    assert len(caught) == 1


def test_a_trial_tracks_where_the_sweep_does(trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own machine names another store, or none; the sweep's address comes through the monitor."""
    from cosa_ray.tracking.store import tracking_uri

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    seen: list[str] = []
    made = trials(None, lambda name: seen.append(tracking_uri(made.config)) or Outcome("finished", 20))
    made.monitor.monitor.keep(STORE, "http://me:secret@sweep:5000")
    run_trial(made, {}, "t")
    assert seen == ["http://me:secret@sweep:5000"]
    assert "secret" not in repr(made)


def test_an_evaluation_without_the_metric_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.integration.ray_train import TuneReportCallback

    got: list[dict[str, float]] = []
    monkeypatch.setattr(TuneReportCallback, "__init__", lambda self: None)
    monkeypatch.setattr(
        TuneReportCallback, "after_report", lambda self, context, metrics, checkpoint: got.append(metrics[0])
    )
    callback = reports("val/iou/disc")
    callback.after_report(None, [{"val/miou": 0.1}], None)
    callback.after_report(None, [{"val/miou": 0.2, "val/iou/disc": 0.3}], None)
    assert got == [{"val/miou": 0.2, "val/iou/disc": 0.3}]
