"""Datasets and files elsewhere: copied once a node, anew when they change, and served from the copy when away."""

from __future__ import annotations

import http.server
import os
import threading

import pytest
from tiny_sets import numbered_source, tiny_dataset

from cosa_ray.data.check import check_dataset
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.importing import write_dataset
from cosa_ray.data.remote import fetch, place
from cosa_ray.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COSA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory():
    import fsspec

    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def test_a_dataset_lives_at_a_uri_and_is_copied_once(tmp_path, cache, memory):
    tiny_dataset(tmp_path / "local", train=5)
    write_dataset(numbered_source(5), "memory://bucket/set", local=True, shard_images=4)
    remote = open_dataset("memory://bucket/set")
    here = open_dataset(str(tmp_path / "local"))
    assert remote.folder.is_relative_to(cache)
    for split in ("train", "val"):
        for index in range(len(here.split(split))):
            first, second = (dataset.split(split)[index] for dataset in (remote, here))
            assert (first.id, first.image, first.mask) == (second.id, second.image, second.mask)
    stamps = {path: path.stat().st_mtime_ns for path in remote.folder.glob("*.arrow")}
    again = open_dataset("memory://bucket/set")
    assert {path: path.stat().st_mtime_ns for path in again.folder.glob("*.arrow")} == stamps
    with pytest.raises(UserError, match="already holds a complete dataset"):
        write_dataset(numbered_source(5), "memory://bucket/set", local=True, shard_images=4)
    assert check_dataset("memory://bucket/set").ok


def test_a_changed_remote_is_copied_anew_and_a_lying_one_refused(cache, memory):
    write_dataset(numbered_source(5), "memory://bucket/set", local=True)
    first = open_dataset("memory://bucket/set")
    memory.rm("/bucket/set", recursive=True)
    write_dataset(numbered_source(7), "memory://bucket/set", local=True)
    second = open_dataset("memory://bucket/set")
    assert second.folder != first.folder
    assert (len(first.split("train")), len(second.split("train"))) == (5, 7)
    memory.rm("/bucket/set", recursive=True)
    write_dataset(numbered_source(6), "memory://bucket/set", local=True)
    memory.pipe_file("/bucket/set/train-00000.arrow", b"something else")
    with pytest.raises(UserError, match="does not have the checksum its card says"):
        open_dataset("memory://bucket/set")


@pytest.fixture
def web(tmp_path):
    """A web server on this machine: its address, the folder it serves, and what stops it."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *key):
            super().__init__(*key, directory=str(tmp_path / "web"))

        def end_headers(self):
            self.send_header("Accept-Ranges", "none")
            super().end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def stop():
        server.shutdown()
        server.server_close()
        thread.join()

    yield f"http://127.0.0.1:{server.server_port}", tmp_path / "web", stop
    stop()


def test_a_remote_that_is_away_is_served_from_the_copy(cache, web, caplog):
    address, folder, stop = web
    tiny_dataset(folder / "set", train=5)
    tiny_dataset(folder / "other", train=5)
    (folder / "net.safetensors").write_bytes(b"weights")
    first = open_dataset(f"{address}/set")
    weights = fetch(f"{address}/net.safetensors")
    # Of another set there are the shards, but the process was killed before the card.
    (open_dataset(f"{address}/other").folder / "dataset.json").unlink()
    assert caplog.records == []
    stop()
    for _ in range(2):
        again = open_dataset(f"{address}/set")
        assert again.folder == first.folder
        assert again.split("train").ids() == first.split("train").ids()
        assert fetch(f"{address}/net.safetensors") == weights
    assert weights.read_bytes() == b"weights"
    for record, copy in zip(caplog.records, (first.folder, weights), strict=True):  # one line each, said once
        assert "cannot be reached: make one" in record.message or "cannot be reached: check" in record.message
        assert record.message.endswith(f"; using the copy of this node, {copy}")
    for missing in (f"{address}/other", f"{address}/third"):
        with pytest.raises(UserError, match=r"no dataset at http://127.*, or it cannot be reached") as caught:
            open_dataset(missing)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"there is nothing at http://127.*, or it cannot be reached: check"):
        fetch(f"{address}/another.safetensors")


def test_a_remote_that_fails_while_it_is_opened_or_copied_is_served_from_the_copy(cache, memory, monkeypatch, caplog):
    """Stores fail by errors of their own, at the first question (S3 looks up the region) or in the middle of a file."""
    import fsspec

    write_dataset(numbered_source(5), "memory://bucket/set", local=True)
    memory.pipe_file("/bucket/net.safetensors", b"weights")
    first = open_dataset("memory://bucket/set").folder
    weights = fetch("memory://bucket/net.safetensors")

    class StoreError(Exception):
        pass

    write_dataset(numbered_source(6), "memory://bucket/new", local=True)
    memory.rm("/bucket/set", recursive=True)
    memory.mv("/bucket/new", "/bucket/set", recursive=True)
    real = type(memory)._open

    def cut(self, path, *key, **keys):
        if path.endswith(".arrow"):
            raise StoreError("connection reset")
        return real(self, path, *key, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "_open", cut)
        assert open_dataset("memory://bucket/set").folder == first
        assert len(open_dataset("memory://bucket/set").split("train")) == 5

    def away(uri):
        raise StoreError("When resolving region: no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(fsspec.core, "url_to_fs", away)
        assert open_dataset("memory://bucket/set").folder == first
        assert fetch("memory://bucket/net.safetensors") == weights
        with pytest.raises(UserError, match=r"^cannot reach memory://bucket/third \(When resolving"):
            open_dataset("memory://bucket/third")
    assert len(open_dataset("memory://bucket/set").split("train")) == 6
    assert len(caplog.records) == 3


def test_a_full_disk_is_not_taken_for_a_remote_that_is_away(cache, memory, monkeypatch):
    from cosa_ray.data import remote

    write_dataset(numbered_source(5), "memory://bucket/set", local=True)
    open_dataset("memory://bucket/set")
    memory.rm("/bucket/set", recursive=True)
    write_dataset(numbered_source(6), "memory://bucket/set", local=True)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote._Writer, "write", full)
    with pytest.raises(OSError, match="No space left"):
        open_dataset("memory://bucket/set")


def test_a_changed_checkpoint_of_the_same_size_is_copied_anew(cache, memory, web):
    address, folder, _ = web
    folder.mkdir()
    for uri, write in (
        ("memory://bucket/net", lambda data: memory.pipe_file("/bucket/net", data)),
        (f"{address}/net", (folder / "net").write_bytes),
    ):
        write(b"first")
        os.utime(folder / "net", (1, 1)) if (folder / "net").exists() else None
        first = fetch(uri)
        assert fetch(uri) == first
        write(b"other")
        assert fetch(uri).read_bytes() == b"other"
    memory.pipe_file("/bucket/run/net", b"first")
    fetch("memory://bucket/run")
    memory.pipe_file("/bucket/run/net", b"other")
    assert (fetch("memory://bucket/run") / "net").read_bytes() == b"other"


def test_a_local_path_may_hold_a_question_mark(tmp_path):
    tiny_dataset(tmp_path / "what?no", train=3)
    assert place(tmp_path / "what?no").child("dataset.json").uri == f"{tmp_path}/what?no/dataset.json"
    assert open_dataset(str(tmp_path / "what?no")).folder == tmp_path / "what?no"


def test_file_uris_are_local(tmp_path):
    tiny_dataset(tmp_path / "a", train=3)
    assert open_dataset((tmp_path / "a").as_uri()).folder == tmp_path / "a"
    assert fetch(str(tmp_path / "a")) == tmp_path / "a"
    with pytest.raises(UserError, match="there is nothing at"):
        fetch(str(tmp_path / "b"))


def test_single_files_and_folders_are_fetched(cache, memory):
    memory.pipe_file("/bucket/weights/net.safetensors", b"weights")
    memory.pipe_file("/bucket/weights/more/readme.txt", b"read")
    file = fetch("memory://bucket/weights/net.safetensors")
    assert (file.name, file.read_bytes()) == ("net.safetensors", b"weights")
    folder = fetch("memory://bucket/weights")
    assert (folder / "more/readme.txt").read_bytes() == b"read"
    with pytest.raises(UserError, match="there is nothing at memory://bucket/none"):
        fetch("memory://bucket/none")


def test_a_scheme_that_nothing_reads_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot open carrier-pigeon://a/b"):
        open_dataset("carrier-pigeon://a/b")


def test_many_processes_make_one_copy(cache, memory, monkeypatch):
    """The lock: ten threads ask at once, the copying is done once."""
    from cosa_ray.data import remote

    card = write_dataset(numbered_source(5, val=2), "memory://bucket/set", local=True)
    shards = {shard.file: shard.sha256 for split in card.splits.values() for shard in split.shards}
    copied = []
    real = remote._copy
    monkeypatch.setattr(remote, "_copy", lambda *key: copied.append(key[1].name) or real(*key))
    folders = []
    # Not by open_dataset: the store in memory has one read position for all who read the card.
    threads = [
        threading.Thread(target=lambda: folders.append(remote.fetch("memory://bucket/set", shards))) for _ in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 10
    assert sorted(copied) == ["train-00000.arrow", "val-00000.arrow"]
