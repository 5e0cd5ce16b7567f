"""Files and folders anywhere: local paths, pyarrow.fs and fsspec URIs, and the once-a-node cache of remote ones."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from cosa_ray.errors import UserError

_PIECE = 1 << 22
# By what fsspec's file systems tell one content of a file from another; each knows some of these.
_TIMES = ("LastModified", "Last-Modified", "last_modified", "mtime", "modified", "updated", "created", "generation")
_SUMS = ("ETag", "etag", "Content-MD5", "content_md5", "md5Hash", "md5", "Digest")

log = logging.getLogger(__name__)


class NotThere(UserError):
    """Nothing is there, or it cannot be reached: a copy made earlier may serve instead."""


def leaves(name: str) -> bool:
    """True for a name of a file of a folder that would lead out of it; names come out of files that people hand in."""
    return ".." in re.split(r"[/\\]", name)


@dataclass(frozen=True)
class Place:
    """A file or folder on any file system; `uri` is how the user wrote it."""

    uri: str
    filesystem: Any
    path: str

    @property
    def local(self) -> Path | None:
        """The path on this machine, None for a remote place."""
        return Path(self.path) if self.filesystem.type_name == "local" else None

    def child(self, name: str) -> Place:
        """The file or folder `name` inside this folder. Raises UserError for a name that leads out of it."""
        if leaves(name):
            raise UserError(f"{name!r} leads out of {self.uri}: give a name inside this folder")
        base, query, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return Place(f"{base.rstrip('/')}/{name}{query}{options}", self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def exists(self) -> bool:
        """True for a file or a folder."""
        return self._type() != "NotFound"

    def is_folder(self) -> bool:
        """True for a folder."""
        return self._type() == "Directory"

    def _type(self) -> str:
        return str(self.filesystem.get_file_info(self.path).type.name)

    def size(self) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        info = self.filesystem.get_file_info(self.path)
        if info.type.name != "File":
            raise FileNotFoundError(self.uri)
        return int(info.size)

    def names(self, recursive: bool = False) -> list[str]:
        """Sorted paths, relative to this folder, of the files in it; empty for no folder."""
        root = self.path.strip("/")
        found = (path.strip("/") for path, kind in self._listed(recursive) if kind == "File")
        return sorted(path[len(root) :].lstrip("/") for path in found)

    def folders(self) -> list[str]:
        """Sorted names of the folders in this folder."""
        return sorted(path.rstrip("/").rpartition("/")[2] for path, kind in self._listed(False) if kind == "Directory")

    def _listed(self, recursive: bool) -> list[tuple[str, str]]:
        from pyarrow.fs import FileSelector

        selector = FileSelector(self.path, recursive=recursive, allow_not_found=True)
        try:
            return [(info.path, info.type.name) for info in self.filesystem.get_file_info(selector)]
        except UnicodeDecodeError as error:
            strange = error.object.decode(errors="backslashreplace").rpartition("/")[2]
            raise UserError(f"{self.uri} holds a name that is not UTF-8 ({strange}): rename that file") from None

    def stamps(self) -> dict[str, str]:
        """What changes when a file does (size, time, checksum, as far as the file system knows them), by relative name.

        A file's own name is empty. Raises FileNotFoundError when nothing is there.
        """
        from pyarrow.fs import FileSelector

        own = getattr(getattr(self.filesystem, "handler", None), "fs", None)  # of fsspec
        if own is not None:
            own.invalidate_cache()  # listings are kept, for hours
        kind = self._type()
        if kind == "NotFound":
            raise FileNotFoundError(self.uri)
        if own is not None:
            listed = own.find(self.path, detail=True) if kind == "Directory" else {self.path: own.info(self.path)}
            stamps = {
                path: [info.get("size"), *(info.get(key) for key in (*_TIMES, *_SUMS))] for path, info in listed.items()
            }
        else:
            selector = FileSelector(self.path, recursive=True) if kind == "Directory" else [self.path]
            files = [info for info in self.filesystem.get_file_info(selector) if info.type.name == "File"]
            stamps = {info.path: [info.size, info.mtime_ns] for info in files}
        root = self.path.strip("/")
        named = {path.strip("/")[len(root) :].lstrip("/"): str(stamp) for path, stamp in stamps.items()}
        return {name: stamp for name, stamp in named.items() if name or kind != "Directory"}

    def read(self) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        local = self.local
        if local is not None:
            return local.read_bytes()
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write(self, data: bytes) -> None:
        """Replace the file: atomically on a local disk (object stores are so by themselves)."""
        with self.writer() as stream:
            stream.write(data)

    def writer(self) -> _Writer:
        """A context that writes the file and hashes it on the way; a local file appears complete or not at all."""
        return _Writer(self)

    def make_folder(self) -> None:
        """Make this folder and those above it."""
        self.filesystem.create_dir(self.path, recursive=True)

    def delete(self) -> None:
        """Delete a file or a folder, if there is one."""
        kind = self._type()
        if kind == "Directory":
            self.filesystem.delete_dir(self.path)
        elif kind == "File":
            self.filesystem.delete_file(self.path)


class _Writer:
    """Writes, hashes and counts; see Place.writer."""

    def __init__(self, target: Place) -> None:
        self._target = target
        self._hash = hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def __enter__(self) -> _Writer:
        local = self._target.local
        self._part = None if local is None else local.with_name(f".{local.name}.{uuid.uuid4().hex}.part")
        self._stream: IO[bytes] | Any
        if self._part is not None:
            self._stream = open(self._part, "wb")
        else:
            self._stream = self._target.filesystem.open_output_stream(self._target.path)
        return self

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._hash.update(view)
        self._stream.write(view)
        self.bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Bytes written; part of the file protocol that pyarrow expects, as are flush and close."""
        return self.bytes

    def flush(self) -> None:
        """Nothing to do before the end."""

    def close(self) -> None:
        """The end of the context closes the file, when it knows whether all went well."""

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        return self._hash.hexdigest()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._part is not None:
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
            self._stream.close()
            if kind is None:
                os.replace(self._part, self._target.path)
            else:
                self._part.unlink(missing_ok=True)
        else:
            self._stream.close()
            if kind is not None:  # closing made an object of what had been written
                with contextlib.suppress(OSError):
                    self._target.delete()


def place(uri: str | os.PathLike[str]) -> Place:
    """The place a path or URI names. Raises UserError for a URI that nothing here reads, NotThere when it is away."""
    import pyarrow as pa
    from pyarrow import fs

    text = os.fspath(uri)
    if "://" not in text:
        return Place(text, fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text)))
    try:
        filesystem, path = fs.FileSystem.from_uri(text)  # file, s3, gs, abfs, hdfs: without further packages
        return Place(text, filesystem, path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    except OSError as error:
        raise _away(text, error) from None
    try:
        import fsspec

        with reaching(text, but=(ImportError, ValueError)):
            filesystem, path = fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open {text} ({error}): use a local path or install what reads this kind of URI") from (
            None
        )
    return Place(text, fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path)


def file_system(uri: str) -> tuple[Any, str]:
    """(file system with fsspec's methods, path in it) of a path or URI, for whoever writes many small files.

    Object stores are read by pyarrow, as everywhere here: s3fs and its like pin packages that others pin too.
    """
    import fsspec

    if uri.partition("://")[0] not in ("s3", "gs", "gcs", "abfs", "abfss"):
        filesystem, path = fsspec.core.url_to_fs(uri)
        return filesystem, str(path).rstrip("/")
    from fsspec.implementations.arrow import ArrowFSWrapper

    found = place(uri)
    return ArrowFSWrapper(found.filesystem), found.path.rstrip("/")


@contextlib.contextmanager
def reaching(uri: str, but: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around what asks the file system of `uri`: its failures become NotThere, except those of the kinds `but`."""
    try:
        yield
    except UserError:
        raise
    except but:
        raise
    except FileNotFoundError:
        # Over HTTP, a server that does not answer looks like this too.
        raise NotThere(f"there is nothing at {uri}, or it cannot be reached: check the address and the network") from (
            None
        )
    except Exception as error:
        # Every kind of store has exceptions of its own (aiohttp's, botocore's, ...), many of which are no OSError.
        raise _away(uri, error) from None


def _away(uri: str, error: Exception) -> NotThere:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return NotThere(f"cannot reach {uri} ({said}): check the address, the credentials and the network")


def cache_folder() -> Path:
    """Where remote files are kept on this node: COSA_CACHE, else the user's cache folder."""
    chosen = os.environ.get("COSA_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(chosen) if chosen else Path(base) / "cosa-ray"


def file_sha256(path: Path) -> str:
    """SHA-256 of a local file, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(uri: str, files: Mapping[str, str] | None = None) -> Path:
    """Local path of a file or folder: itself when local, else a copy made once a node.

    Processes of a node wait for the one that copies; a copy appears complete or not at all, and an interrupted one goes
    on at the file where it stopped. `files` (name -> SHA-256) says what the folder holds, for places that cannot be
    listed, and is verified; without it, the newest copy of this node serves when the remote cannot be reached. Raises
    NotThere when there is nothing at `uri` and no copy, UserError when what arrives is not what was promised.
    """
    if files is not None:
        return _fetched(place(uri), files, verified=True)
    try:
        source = place(uri)
        if source.local is not None:
            if not source.local.exists():
                raise UserError(f"there is nothing at {uri}: check the path")
            return source.local
        with reaching(uri):
            wanted = source.stamps()
        return _fetched(source, wanted, verified=False)
    except NotThere as error:
        copy = cached(uri)
        if copy is None:
            raise
        say_copy(uri, str(error), copy)
        return copy


def _fetched(source: Place, wanted: Mapping[str, str], verified: bool) -> Path:
    """The folder or file of the cache with the files `wanted` (name -> SHA-256, or stamp), copied if need be."""
    from filelock import FileLock

    if source.local is not None:
        return source.local
    fingerprint = hashlib.sha256(repr(sorted(wanted.items())).encode()).hexdigest()[:16]
    folder = _cache_of(source.uri)
    folder.mkdir(parents=True, exist_ok=True)
    complete = folder / fingerprint
    result = complete / _last(source.uri) if "" in wanted else complete
    if complete.is_dir():
        return result
    with FileLock(folder / f"{fingerprint}.lock"):
        if complete.is_dir():
            return result
        part = folder / f"{fingerprint}.part"
        for name, promised in wanted.items():
            origin = source.child(name) if name else source
            target = part / (name.lstrip("/") or result.name)
            if not target.exists() or (verified and file_sha256(target) != promised):
                _copy(origin, target, promised if verified else None)
        os.replace(part, complete)
    return result


def cached(uri: str, having: str = "") -> Path | None:
    """The newest complete copy of `uri` on this node that holds the file `having`; None when there is none."""
    copies = [path for path in _cache_of(uri).glob("*") if path.suffix != ".part" and (path / having).exists()]
    copies = [path for path in copies if path.is_dir()]
    newest = max(copies, key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None and os.listdir(newest) == [_last(uri)] and (newest / _last(uri)).is_file():
        return newest / _last(uri)
    return newest


@lru_cache(maxsize=64)  # said once a process, however often the same thing is opened
def say_copy(uri: str, reason: str, copy: Path) -> None:
    """Log that a copy serves instead of the remote."""
    log.warning("%s; using the copy of this node, %s", reason, copy)


def _last(uri: str) -> str:
    name = uri.partition("?")[0].rstrip("/").rpartition("/")[2]
    return name if name.strip(".") else "file"  # "." and ".." would name folders


def _cache_of(uri: str) -> Path:
    return cache_folder() / hashlib.sha256(uri.encode()).hexdigest()[:16]


def _copy(origin: Place, target: Path, promised: str | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with place(target).writer() as out:
        for piece in _pieces(origin):
            out.write(piece)
        if promised is not None and out.sha256 != promised:
            raise UserError(
                f"{origin.uri} does not have the checksum its card says: it is damaged or half written, import it again"
            )


def _pieces(origin: Place) -> Iterator[bytes]:
    """The file in pieces; what goes wrong with them at the receiver's end stays an error of the receiver."""
    with reaching(origin.uri), origin.filesystem.open_input_stream(origin.path) as stream:
        while piece := stream.read(_PIECE):
            yield piece
