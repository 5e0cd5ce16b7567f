"""A run's folder on local disk or any fsspec URI, and the checkpoints in it.

Ray Train's own checkpoint book is not used: its snapshot is overwritten in place and readable by one Ray version
only. Here a checkpoint exists once the index names it, the index is replaced atomically, and a run reads the same
with and without Ray.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import posixpath
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from fsspec.implementations.local import LocalFileSystem

from cosa_ray.data.remote import file_system, leaves
from cosa_ray.errors import RunFailed, UserError

FULL_STATE = "state.pt"
PATIENCE_SECONDS = 300.0
T = TypeVar("T")
log = logging.getLogger(__name__)


def patiently(action: Callable[[], T], what: str, alive: Callable[[], None] = lambda: None) -> T:
    """The action's result, tried again for `PATIENCE_SECONDS` while storage refuses; then its error is raised.

    Full disks are emptied, servers come back, credentials are renewed. A mistake of the user, a run that was taken
    over, a file that is not there and a defect of ours are not waited for. `alive` is called before every try.
    """
    end, pause = time.monotonic() + PATIENCE_SECONDS, 1.0
    while True:
        alive()
        try:
            return action()
        except (UserError, RunFailed, FileNotFoundError, TypeError, ValueError, LookupError, AttributeError):
            raise
        except Exception as error:
            left = end - time.monotonic()
            if left <= 0:
                raise
            log.warning("storage: %s failed (%s: %s); trying again for %.0f s", what, type(error).__name__, error, left)
            time.sleep(min(pause, left))
            pause = min(2 * pause, 15.0)


class RunFolder:
    """A folder given by path or URI; every write of a small file is all or nothing."""

    def __init__(self, uri: str) -> None:
        self.fs, self.path = file_system(uri)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.uri = self.path if self.is_local else uri.rstrip("/")

    def join(self, name: str) -> str:
        """Path of a file of the folder, for `fs`. Raises UserError for a name that leads out of it."""
        if leaves(name) or name.startswith("/"):
            raise UserError(f"{name!r} leads out of {self.uri}; nothing was read or changed.")
        return posixpath.join(self.path, name)

    def exists(self, name: str = "") -> bool:
        """True when the file, or the folder itself, is there."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.join(name) if name else self.path))

    def read_text(self, name: str) -> str | None:
        """Content of a file, None when there is none."""
        self.fs.invalidate_cache()
        try:
            return self.fs.cat_file(self.join(name)).decode("utf-8")
        except FileNotFoundError:
            return None

    def write_text(self, name: str, content: str) -> None:
        """Replace a file atomically and durably (object stores put whole objects anyway)."""
        target = self.join(name)
        if not self.is_local:
            self.fs.pipe_file(target, content.encode("utf-8"))
            return
        os.makedirs(posixpath.dirname(target), exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{posixpath.basename(name)}.", dir=posixpath.dirname(target))
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
            _sync(posixpath.dirname(target))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def names(self) -> list[str]:
        """Names of everything in the folder; none when it is not there."""
        if not self.exists():
            return []
        return sorted(posixpath.basename(entry.rstrip("/")) for entry in self.fs.ls(self.path, detail=False))

    def folders(self, name: str) -> list[str]:
        """Names of the folders inside a folder."""
        self.fs.invalidate_cache()
        if not self.fs.exists(self.join(name)):
            return []
        return sorted(
            posixpath.basename(entry["name"].rstrip("/"))
            for entry in self.fs.ls(self.join(name), detail=True)
            if entry["type"] == "directory"
        )

    def put(self, source: Path, name: str) -> None:
        """Upload the files of a local folder into a folder of this one, durably before it returns."""
        target = self.join(name)
        if self.is_local:
            os.makedirs(target, exist_ok=True)
        for file in sorted(source.iterdir()):
            copy = posixpath.join(target, file.name)
            self.fs.put_file(str(file), copy)
            if self.is_local:
                _sync(copy)
        if self.is_local:
            for folder in (target, posixpath.dirname(target), self.path):
                _sync(folder)

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A folder of this one as a local path, downloaded for the time of the block when it is remote."""
        if self.is_local:
            yield Path(self.join(name))
            return
        with tempfile.TemporaryDirectory(prefix="cosa-ray-") as temporary:
            for entry in self.fs.ls(self.join(name), detail=False):
                self.fs.get_file(entry, posixpath.join(temporary, posixpath.basename(entry)))
            yield Path(temporary)

    def remove(self, name: str) -> None:
        """Delete a file or folder; nothing happens when it is gone or cannot be deleted."""
        with contextlib.suppress(OSError):
            self.fs.rm(self.join(name), recursive=True)


def _sync(path: str) -> None:
    """Wait until a local file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class CheckpointEntry:
    """One registered checkpoint: folder name, optimiser steps done, metrics of the evaluation at that step, if any.

    `awaited`: an evaluation beside the run has still to read it.
    """

    name: str
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    awaited: bool = False


class CheckpointStore:
    """Registered checkpoints of a run: the last one and the best one are kept.

    A checkpoint is first uploaded, then registered by replacing `checkpoints.json`, and only then are older ones
    deleted; so a kill at any moment leaves the last registered checkpoint whole. Folders the index does not name are
    leftovers of a kill, removed by `sweep_orphans`.
    """

    INDEX = "checkpoints.json"
    FOLDER = "checkpoints"

    def __init__(self, folder: RunFolder, metric: str) -> None:
        self.folder = folder
        self.metric = metric

    def entries(self) -> list[CheckpointEntry]:
        """Registered checkpoints, oldest first."""
        content = self.folder.read_text(self.INDEX)
        found = [CheckpointEntry(**entry) for entry in json.loads(content)["checkpoints"]] if content else []
        for entry in found:  # they are deleted by these names
            if not entry.name.startswith(f"{self.FOLDER}/") or leaves(entry.name):
                raise UserError(f"{self.folder.uri}/{self.INDEX} names {entry.name!r}, which is no checkpoint of it.")
        return found

    def latest(self) -> CheckpointEntry | None:
        """The registered checkpoint with the most steps."""
        return _latest(self.entries())

    def best(self) -> CheckpointEntry | None:
        """The registered checkpoint with the highest metric; the latest when none was evaluated."""
        return self._best(self.entries())

    def _best(self, entries: list[CheckpointEntry]) -> CheckpointEntry | None:
        scored = [entry for entry in entries if self.metric in entry.metrics]
        return max(scored, key=lambda entry: (entry.metrics[self.metric], entry.step), default=_latest(entries))

    def name(self, step: int) -> str:
        """Name of the checkpoint that the run itself writes at a step."""
        return f"{self.FOLDER}/step_{step:08d}"

    def upload(self, source: Path, step: int) -> str:
        """Copy a checkpoint's files to storage under a name of their own; not yet registered."""
        name = self.name(step)
        self.folder.put(source, name)
        return name

    def register(self, name: str, step: int, metrics: dict[str, float], *, awaited: bool = False) -> None:
        """Make an uploaded checkpoint count, then delete those no longer needed."""
        made = CheckpointEntry(name, step, metrics, awaited)
        entries = [entry for entry in self.entries() if entry.name != name] + [made]
        needed = [entry for entry in entries if entry.awaited or entry in (_latest(entries), self._best(entries))]
        ordered = [asdict(entry) for entry in sorted(needed, key=lambda entry: entry.step)]
        self.folder.write_text(self.INDEX, json.dumps({"checkpoints": ordered}, indent=1))
        for entry in entries:
            if entry not in needed:
                self.folder.remove(entry.name)

    def take_over(self, other: CheckpointStore, entry: CheckpointEntry, mark: str) -> None:
        """Make a copy of another run's registered checkpoint the only one; `mark` goes into its folder's name."""
        name = f"{self.FOLDER}/step_{entry.step:08d}_{mark}"
        with other.folder.local_copy(entry.name) as local:
            self.folder.put(local, name)
        before = [each.name for each in self.entries() if each.name != name]
        taken = asdict(CheckpointEntry(name, entry.step, entry.metrics))
        self.folder.write_text(self.INDEX, json.dumps({"checkpoints": [taken]}, indent=1))
        for each in before:
            self.folder.remove(each)

    def sweep_orphans(self) -> list[str]:
        """Delete uploaded folders that were never registered; returns their names."""
        known = {entry.name for entry in self.entries()}
        orphans = [f"{self.FOLDER}/{name}" for name in self.folder.folders(self.FOLDER)]
        orphans = [name for name in orphans if name not in known]
        for name in orphans:
            self.folder.remove(name)
        return orphans

    def drop_full_states(self) -> None:
        """Keep weights only: delete optimiser states and rings of every checkpoint (the run cannot be continued)."""
        for entry in self.entries():
            self.folder.remove(f"{entry.name}/{FULL_STATE}")


def _latest(entries: list[CheckpointEntry]) -> CheckpointEntry | None:
    return max(entries, key=lambda entry: entry.step, default=None)
