"""What could not be delivered yet, on the run's storage: segments of JSON lines, each written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import posixpath
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from cosa_ray.data.remote import file_system

log = logging.getLogger(__name__)
Record = dict[str, Any]
_ENDING = ".jsonl"


class Spool:
    """A folder (path or fsspec URI) of segments, named so that sorting gives the order of writing.

    A name is `<nanoseconds>-<session>-<lane>.jsonl`: a session is one start of the run, a lane keeps metrics and
    artifacts apart.
    """

    def __init__(self, uri: str) -> None:
        self._fs, self._path = file_system(uri)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._last = 0

    def segments(self, lane: str) -> list[str]:
        """Names of a lane's segments, oldest first."""
        self._fs.invalidate_cache()
        try:
            found = [posixpath.basename(str(entry)) for entry in self._fs.ls(self._path, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(name for name in found if name.endswith(f"-{lane}{_ENDING}") and not name.startswith("."))

    def write(self, session: str, lane: str, records: Iterable[Record]) -> str:
        """Write a segment atomically (object stores put whole objects anyway); returns its name."""
        self._last = max(self._last + 1, time.time_ns())
        name = f"{self._last:020d}-{session}-{lane}{_ENDING}"
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        if not self._local:
            self._fs.pipe_file(posixpath.join(self._path, name), content)
            return name
        os.makedirs(self._path, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=self._path)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, posixpath.join(self._path, name))
        return name

    def read(self, name: str) -> list[Record]:
        """Records of a segment, none when another process has delivered it; damaged lines are left out."""
        records: list[Record] = []
        try:
            content = self._fs.cat_file(posixpath.join(self._path, name))
        except FileNotFoundError:
            return records
        for line in content.splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                log.warning("a damaged line in %s was left out", name)
        return records

    def remove(self, name: str) -> None:
        """Delete a delivered segment, unless another process has."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(posixpath.join(self._path, name))


def session_of(segment: str) -> str:
    """The session that wrote a segment."""
    return segment.split("-")[1]
