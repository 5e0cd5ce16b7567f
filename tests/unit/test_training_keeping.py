"""Checkpoints written while the run goes on: what is written is the state of its step, and no error is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import cosa_ray.training.loop as loop
import cosa_ray.training.storage as storage
from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import open_dataset
from cosa_ray.evaluation.description import Description
from cosa_ray.training.driver import train
from cosa_ray.training.keeping import CheckpointWriter
from cosa_ray.training.runs import find_run
from cosa_ray.training.session import Progress
from cosa_ray.training.state import TrainState
from cosa_ray.training.storage import CheckpointStore, RunFolder
from tests.conftest import history
from tests.unit.test_training_state import everything, step

Make = Callable[..., Config]
PATIENCE = 60.0


class Gated(CheckpointStore):
    """A store whose uploads wait for a gate, and fail as often as it is told."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(folder, "val/miou")
        self.gate, self.errors = threading.Event(), 0

    def upload(self, source: Path, step: int) -> str:
        assert self.gate.wait(PATIENCE)
        if self.errors:
            self.errors -= 1
            raise OSError("storage is away")
        return super().upload(source, step)


@pytest.fixture
def state(tiny: Make) -> TrainState:
    made = TrainState(tiny(), 3, torch.device("cpu"))
    step(made, 1.0, 0.5)
    return made


@pytest.fixture
def store(tmp_path: Path) -> Gated:
    return Gated(RunFolder(str(tmp_path / "run")))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def writer(state: TrainState, store: Gated, said: list[str]) -> Iterator[CheckpointWriter]:
    made = CheckpointWriter(
        store,
        state.config,
        open_dataset(state.config.data.dataset).card,
        guard=lambda: said.append("guard"),
        flush=lambda: said.append("flush"),
        alive=lambda: None,
    )
    yield made
    store.gate.set()
    made.close()


def described(step: int) -> Description:
    return Description("run", step, ["a", "b", "c"], {}, "assignment", 1.0, {})


def test_steps_taken_meanwhile_are_not_in_it(
    state: TrainState, store: Gated, writer: CheckpointWriter, tmp_path: Path
) -> None:
    before = everything(state)
    writer.begin(state.snapshot())
    for _ in range(3):
        step(state, 1.0, 0.5)
    writer.complete(described(1), {"val/miou": 0.5})
    step(state, 1.0, 0.5)
    assert store.entries() == [], "nothing counts before it is there"
    store.gate.set()
    writer.wait()
    (entry,) = store.entries()
    assert (entry.step, entry.metrics) == (1, {"val/miou": 0.5})
    restored = TrainState(state.config, 3, torch.device("cpu"))
    restored.load(tmp_path / "run" / entry.name)
    assert restored.step == 1
    after = everything(restored)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert any(not torch.equal(after[name], value) for name, value in everything(state).items())


def test_it_writes_what_saving_at_once_writes(
    state: TrainState, store: Gated, writer: CheckpointWriter, tmp_path: Path
) -> None:
    store.gate.set()
    writer.begin(state.snapshot())
    writer.complete(described(1), {})
    writer.wait()
    (tmp_path / "at_once").mkdir()
    state.save(tmp_path / "at_once", open_dataset(state.config.data.dataset).card, described(1))
    written = {file.name: file.read_bytes() for file in (tmp_path / "run" / store.entries()[0].name).iterdir()}
    assert written == {file.name: file.read_bytes() for file in (tmp_path / "at_once").iterdir()}


def test_it_is_guarded_and_flushed_before_it_counts(
    state: TrainState, store: Gated, writer: CheckpointWriter, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    register = store.register
    monkeypatch.setattr(store, "register", lambda *given, **named: (said.append("register"), register(*given, **named)))
    store.gate.set()
    writer.begin(state.snapshot())
    writer.complete(described(1), {})
    writer.wait()
    assert said == ["guard", "guard", "flush", "guard", "register"]


def test_one_at_a_time(state: TrainState, store: Gated, writer: CheckpointWriter) -> None:
    """The second begins once the first counts, however long that takes."""
    writer.begin(state.snapshot())
    writer.complete(described(1), {})
    step(state, 1.0, 0.5)
    begun = threading.Event()

    def second() -> None:
        writer.begin(state.snapshot())
        begun.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not begun.wait(0.3)
    store.gate.set()
    thread.join(PATIENCE)
    assert begun.is_set()
    assert [entry.step for entry in store.entries()] == [1]
    writer.complete(described(2), {})
    writer.wait()
    assert store.latest().step == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("errors", [1, 1000])
def test_storage_that_refuses_is_tried_again_until_patience_ends(
    errors: int,
    state: TrainState,
    store: Gated,
    writer: CheckpointWriter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 2.0)
    store.gate.set()
    writer.begin(state.snapshot())
    writer.complete(described(1), {})
    writer.wait()
    kept = store.entries()
    step(state, 1.0, 0.5)
    store.errors = errors
    writer.begin(state.snapshot())
    writer.complete(described(2), {})
    if errors == 1:
        writer.wait()
        assert store.latest().step == 2  # type: ignore[union-attr]
        return
    with pytest.raises(OSError, match="storage is away"):
        writer.wait()
    assert "the checkpoint of step 2 failed" in caplog.text
    assert "registering" not in caplog.text, "what follows it fails at once, instead of being tried for as long again"
    assert store.entries() == kept, "the one before is what it was"


def test_a_write_that_never_ends_is_no_progress(
    state: TrainState, store: Gated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Storage that refuses is tried again, which is progress; one that hangs must look like a hang to the watchdog."""
    monkeypatch.setattr("cosa_ray.training.keeping._LOOK_SECONDS", 0.05)
    alive: list[int] = []
    card = open_dataset(state.config.data.dataset).card
    writer = CheckpointWriter(
        store, state.config, card, guard=lambda: None, flush=lambda: None, alive=lambda: alive.append(1)
    )
    writer.begin(state.snapshot())
    threading.Timer(1.0, store.gate.set).start()
    writer.wait()
    assert len(alive) == 1, "twenty looks at one try"
    store.errors = 2
    writer.begin(state.snapshot())
    writer.wait()
    assert len(alive) > 2
    writer.close()


def test_a_failure_is_seen_without_waiting(state: TrainState, store: Gated, writer: CheckpointWriter) -> None:
    def taken_over() -> None:
        raise storage.RunFailed("another process took over")

    writer._guard = taken_over
    writer.begin(state.snapshot())
    writer.complete(described(1), {})
    writer._thread.submit(lambda: None).result(PATIENCE)
    assert writer.failed()
    with pytest.raises(storage.RunFailed, match="took over"):
        writer.begin(state.snapshot())
    assert not writer.failed()


def test_a_run_takes_steps_while_its_checkpoint_is_written(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload of step 5 ends once step 8 was taken; a run that goes on from it is the one that nobody disturbed."""
    config = tiny(training__steps=10, evaluation__every=10)
    undisturbed = train(config, name="undisturbed", local=True)
    reached, upload = threading.Event(), CheckpointStore.upload

    def slow(self: CheckpointStore, source: Path, step: int) -> str:
        if step == 5:
            assert reached.wait(PATIENCE), "no step was taken meanwhile"
        if step == 10:
            raise storage.RunFailed("killed before its last checkpoint")
        return upload(self, source, step)

    def show(progress: Progress) -> None:
        if progress.step >= 8:
            reached.set()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "PROGRESS_SECONDS", 0.0)
        patch.setattr(CheckpointStore, "upload", slow)
        with pytest.raises(storage.RunFailed, match="before its last checkpoint"):
            train(config, name="slow", local=True, show=show)
    latest = find_run("slow", config.storage).checkpoints.latest()
    assert latest is not None
    assert latest.step == 5
    resumed = train(config, name="slow", resume=True, local=True)
    assert resumed.state == "finished"
    uri = config.tracking.uri or ""
    curves = [history(uri, run.mlflow_run_id or "", "train/loss") for run in (undisturbed, resumed)]
    assert [point for point, _ in curves[0]] == list(range(1, 11))
    assert curves[0] == curves[1]
