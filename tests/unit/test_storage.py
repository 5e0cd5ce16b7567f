"""A run's folder on disk and in an object store: atomic writes, registered checkpoints, leftovers of a kill."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from cosa_ray.training.storage import FULL_STATE, CheckpointStore, RunFolder

METRIC = "val/miou"


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights").write_bytes(b"w")
    (source / FULL_STATE).write_bytes(b"s")
    return source


def save(store: CheckpointStore, files: Path, step: int, miou: float | None) -> None:
    store.register(store.upload(files, step), step, {} if miou is None else {METRIC: miou})


def test_last_and_best_are_kept(folder: RunFolder, files: Path) -> None:
    store = CheckpointStore(folder, METRIC)
    for step, miou in ((10, 0.2), (20, 0.5), (30, 0.4), (40, None)):
        save(store, files, step, miou)
    assert [entry.step for entry in store.entries()] == [20, 40]
    assert folder.folders("checkpoints") == ["step_00000020", "step_00000040"]
    best, latest = store.best(), store.latest()
    assert best is not None
    assert latest is not None
    assert (best.step, latest.step) == (20, 40)


def test_an_unregistered_upload_does_not_count_and_is_swept(folder: RunFolder, files: Path) -> None:
    store = CheckpointStore(folder, METRIC)
    save(store, files, 10, miou=0.1)
    store.upload(files, 20)  # killed before it was registered
    latest = store.latest()
    assert latest is not None
    assert latest.step == 10
    assert store.sweep_orphans() == ["checkpoints/step_00000020"]
    assert folder.folders("checkpoints") == ["step_00000010"]


def test_checkpoint_comes_back_byte_for_byte(folder: RunFolder, files: Path) -> None:
    store = CheckpointStore(folder, METRIC)
    save(store, files, 10, miou=0.1)
    with folder.local_copy(store.entries()[0].name) as local:
        assert {file.name: file.read_bytes() for file in local.iterdir()} == {"weights": b"w", FULL_STATE: b"s"}


def test_full_states_can_be_dropped(folder: RunFolder, files: Path) -> None:
    store = CheckpointStore(folder, METRIC)
    save(store, files, 10, miou=0.1)
    store.drop_full_states()
    with folder.local_copy(store.entries()[0].name) as local:
        assert [file.name for file in local.iterdir()] == ["weights"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.write_text("a.json", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        folder.write_text("a.json", "new")
    assert folder.read_text("a.json") == "old"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["a.json"], "no half-written file is left"


def test_missing_things_are_none_or_empty(folder: RunFolder) -> None:
    assert folder.read_text("nothing.json") is None
    assert folder.folders("nothing") == []
    assert not folder.exists()
    assert CheckpointStore(folder, METRIC).latest() is None


def test_a_checkpoint_is_on_the_disk_before_the_index_names_it(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of it and every folder on the way, then the index, then the folder that names the index."""
    folder = tmp_path / "run"
    store = CheckpointStore(RunFolder(str(folder)), METRIC)
    done: list[int | str] = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(os.fstat(handle).st_ino)
        sync(handle)

    def replaced(source: str, target: str) -> None:
        replace(source, target)
        done.append("index")

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", replaced)
    save(store, files, 10, miou=0.1)
    at = done.index("index")
    checkpoint = folder / "checkpoints" / "step_00000010"
    before = [checkpoint / "weights", checkpoint / FULL_STATE, checkpoint, checkpoint.parent, folder]
    assert {path.stat().st_ino for path in before} <= set(done[:at])
    assert (folder / CheckpointStore.INDEX).stat().st_ino in done[:at], "its content, before it takes its name"
    assert folder.stat().st_ino in done[at:]
