"""Evaluations beside a run, without Ray: the task's result, how the run comes by it, and what is kept until then."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed
from cosa_ray.training.driver import train
from cosa_ray.training.runs import find_run
from cosa_ray.training.storage import CheckpointStore, RunFolder
from cosa_ray.training.validating import FOLDER, RESULT, Awaited, read_result, validate

Make = Callable[..., Config]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture
def awaited(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Awaited]:
    monkeypatch.setattr("cosa_ray.training.validating._LOOK_SECONDS", 0.0)
    made = Awaited(folder)
    yield made
    made.close()


def leave(folder: RunFolder, step: int, **content: object) -> None:
    """A result, as the task leaves it."""
    whole = {"metrics": {"val/miou": step / 100}, "seconds": 1.0, "pictures": [], **content}
    folder.write_text(f"{FOLDER}/step_{step:08d}/{RESULT}", json.dumps(whole))


def looked(awaited: Awaited) -> list[int]:
    """Steps of what arrives within a second."""
    found, end = [], time.monotonic() + 1
    while time.monotonic() < end:
        found += [each.step for each in awaited.arrived()]
    return found


def test_the_task_gives_what_the_run_gave(tiny: Make) -> None:
    """On a run's last checkpoint: the metrics of its own evaluation, in the result and in what Ray is told."""
    config = tiny(evaluation__every=20)
    train(config, name="one", local=True, track=False)
    run = find_run("one", config.storage)
    (entry,) = run.checkpoints.entries()
    told = validate(None, folder=run.folder.uri, name=entry.name, step=entry.step, cpus=1.0, hang_seconds=600.0)
    found = read_result(run.folder, entry.step)
    assert found is not None
    assert found.metrics == told
    assert entry.metrics == told | {"train/loss": entry.metrics["train/loss"]}
    assert found.pictures.keys() == {"val/panel", "val/cam_confidence", "val/reliability"}
    assert found.pictures["val/panel"].width > 100
    assert found.seconds > 0


def test_a_task_that_fails_says_why(tiny: Make) -> None:
    config = tiny()
    train(config, name="one", local=True, track=False)
    run = find_run("one", config.storage)
    with pytest.raises(Exception, match="no trained model"):
        validate(None, folder=run.folder.uri, name="checkpoints/step_00000099", step=99, cpus=1.0, hang_seconds=600.0)
    with pytest.raises(RunFailed, match=r"evaluation of step 99 beside the run failed: .*no trained model"):
        read_result(run.folder, 99)


def test_results_arrive_once_and_in_order(folder: RunFolder, awaited: Awaited) -> None:
    assert not awaited
    for step in (30, 10, 20):
        awaited.ask(step)
    assert looked(awaited) == []
    leave(folder, 20)
    leave(folder, 10)
    leave(folder, 99)
    assert looked(awaited) == [10, 20]
    assert awaited, "30 is still to come"
    leave(folder, 30)
    assert looked(awaited) == [30]
    assert not awaited


def test_the_end_waits_for_the_rest(folder: RunFolder, awaited: Awaited) -> None:
    over, alive = threading.Event(), []
    awaited.ask(10)
    awaited.ask(20)
    leave(folder, 10)

    def end() -> None:
        time.sleep(0.3)
        leave(folder, 20)
        over.set()

    threading.Thread(target=end).start()
    rest = awaited.rest(lambda: over.wait(30) and None, lambda: alive.append(1))
    assert [each.step for each in rest] == [10, 20]
    assert [each.metrics["val/miou"] for each in rest] == [0.1, 0.2]
    assert alive
    assert not awaited


def test_an_evaluation_that_died_is_no_result(folder: RunFolder, awaited: Awaited) -> None:
    awaited.ask(10)
    awaited.ask(20)
    leave(folder, 20)
    with pytest.raises(RunFailed, match="evaluation of step 10 beside the run died; resume the run"):
        awaited.rest(lambda: None, lambda: None)
    leave(folder, 10, error="OutOfMemoryError: no room")
    with pytest.raises(RunFailed, match="step 10 beside the run failed: OutOfMemoryError: no room"):
        awaited.rest(lambda: None, lambda: None)


def test_a_failure_of_before_is_forgotten(folder: RunFolder, awaited: Awaited) -> None:
    leave(folder, 10, error="OutOfMemoryError: no room")
    leave(folder, 20)
    awaited.ask(10)
    awaited.ask(20)
    assert looked(awaited) == [20]
    leave(folder, 10)
    assert [each.step for each in awaited.rest(lambda: None, lambda: None)] == [10]


def test_a_checkpoint_is_kept_until_it_was_evaluated(folder: RunFolder, tmp_path: Path) -> None:
    store = CheckpointStore(folder, "val/miou")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").write_text("x")

    def register(step: int, score: float | None = None, *, awaited: bool = False) -> None:
        metrics = {} if score is None else {"val/miou": score}
        store.register(store.upload(tmp_path / "made", step), step, metrics, awaited=awaited)

    def kept() -> list[int]:
        steps = [entry.step for entry in store.entries()]
        assert [int(name.removeprefix("step_")) for name in folder.folders(store.FOLDER)] == steps
        return steps

    register(10, awaited=True)
    register(15)
    register(20, awaited=True)
    register(25)
    assert kept() == [10, 20, 25]
    register(20, 0.5)
    assert kept() == [10, 20, 25], "the best of those that were evaluated, and the one that has not been"
    register(10, 0.3)
    assert kept() == [20, 25]
    best, latest = store.best(), store.latest()
    assert best is not None
    assert latest is not None
    assert (best.step, latest.step) == (20, 25)
