"""Whose a run's or a sweep's folder is: a lease that its driver renews, so that a second driver of one name is refused.

A driver that was killed leaves its lease. Where its process can be asked for (the same machine) the lease is free at
once; elsewhere it is free when nobody has renewed it for a while, counted on the watcher's own clock, so that clocks
that differ or jump do no harm. A driver that slept through that finds its lease gone and writes nothing more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cosa_ray.errors import RunFailed, UserError
from cosa_ray.training.storage import RunFolder

log = logging.getLogger(__name__)
LEASE = ".lease.json"
BEAT_SECONDS = 10.0
SILENT_SECONDS = 45.0
_SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class Holder:
    """Who holds a folder: a token that is drawn anew each time, the machine and process, how often it was renewed."""

    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    machine: str = field(default_factory=lambda: _machine())
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    born: str = field(default_factory=lambda: _born(os.getpid()) or "")
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """A lease that is held; renewed by a thread until `release`."""

    def __init__(self, folder: RunFolder, mine: Holder) -> None:
        self._folder = folder
        self._mine = mine
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def token(self) -> str:
        """What the folder's lease says while it is ours."""
        return self._mine.token

    def _renew(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            try:
                if token_in(self._folder) not in (None, self.token):
                    return
                self._mine = replace(self._mine, beat=self._mine.beat + 1)
                _write(self._folder, self._mine)
            except Exception as error:  # the storage is away: the next beat tries again
                log.debug("the lease of %s was not renewed: %s", self._folder.uri, error)

    def release(self) -> None:
        """Give the folder back, unless somebody has taken it over."""
        self._closed.set()
        self._thread.join(BEAT_SECONDS)
        with contextlib.suppress(Exception):
            if token_in(self._folder) == self.token:
                self._folder.remove(LEASE)


@contextlib.contextmanager
def hold(folder: RunFolder, what: str) -> Iterator[Lease]:
    """Hold a folder for the block. Raises UserError when another driver, which is alive, holds it."""
    mine = Holder()
    made = [each for each in (Path(folder.path), *Path(folder.path).parents) if folder.is_local and not each.exists()]
    while not _create(folder, mine):
        other = _read(folder)
        if other is None or other.token == mine.token:
            continue
        if _alive(folder, other, what):
            raise UserError(
                f"{what} ({folder.uri}) is being worked on by {other}: wait for it, stop it, or choose another --name; "
                "nothing was changed."
            )
        _write(folder, mine)
        time.sleep(_SETTLE_SECONDS)  # whoever took it over at the same moment wrote last
        if token_in(folder) == mine.token:
            break
    lease = Lease(folder, mine)
    try:
        yield lease
    finally:
        lease.release()
        with contextlib.suppress(OSError):  # what is refused after all leaves nothing behind
            for each in made:
                each.rmdir()


def check_held(folder: RunFolder, token: str | None, what: str) -> None:
    """RunFailed when another driver has taken the folder over from the one with this token (None: nobody asks)."""
    if token is None:
        return
    other = _read(folder)
    if other is not None and other.token != token:
        raise RunFailed(f"{what} was taken over by {other}, so this one ends and leaves it alone.")


def token_in(folder: RunFolder) -> str | None:
    """Token of whoever holds the folder, None when nobody does."""
    holder = _read(folder)
    return holder.token if holder is not None else None


def _create(folder: RunFolder, mine: Holder) -> bool:
    """Write the lease where there is none; False where there is one."""
    content = json.dumps(asdict(mine)).encode()
    target = folder.join(LEASE)
    if not folder.is_local:
        try:
            folder.fs.pipe_file(target, content, mode="create")
        except FileExistsError:
            return False
        time.sleep(_SETTLE_SECONDS)  # a store that lets two create it keeps the last
        return token_in(folder) == mine.token
    folder.fs.makedirs(folder.path, exist_ok=True)
    # Whole from the start, and never over another: a link, which fails where the name is taken.
    temporary = f"{target}.{mine.token}"
    try:
        Path(temporary).write_bytes(content)
        os.link(temporary, target)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return True


def _read(folder: RunFolder) -> Holder | None:
    text = folder.read_text(LEASE)
    try:
        return Holder(**json.loads(text)) if text else None
    except (ValueError, TypeError):
        return None


def _write(folder: RunFolder, holder: Holder) -> None:
    folder.write_text(LEASE, json.dumps(asdict(holder)))


def _alive(folder: RunFolder, other: Holder, what: str) -> bool:
    """True when the holder lives: by its process here, by its next beat elsewhere."""
    if other.machine == _machine():
        return _born(other.pid) == other.born
    log.warning("%s was held by %s; waiting up to %.0f s to see whether it still is", what, other, SILENT_SECONDS)
    end = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < end:
        time.sleep(_SETTLE_SECONDS)
        now = _read(folder)
        if now is None:
            return False
        if now != other:
            return True
    return False


def _machine() -> str:
    """What tells apart where process ids mean something: a start of a machine, and a container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _born(pid: int) -> str | None:
    """When a process of this machine began, None when there is none: process ids are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return ""
    return ""
