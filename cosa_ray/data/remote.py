"""Files and folders anywhere: local paths, pyarrow.fs and fsspec URIs, and the once-a-node cache of remote ones."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cosa_ray.errors import UserError

_PIECE = 1 << 22


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
        """The file or folder `name` inside this folder."""
        base, query, options = self.uri.partition("?")
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
        from pyarrow.fs import FileSelector

        selector = FileSelector(self.path, recursive=recursive, allow_not_found=True)
        root = self.path.strip("/")
        found = (info.path.strip("/") for info in self.filesystem.get_file_info(selector) if info.type.name == "File")
        return sorted(path[len(root) :].lstrip("/") for path in found)

    def folders(self) -> list[str]:
        """Sorted names of the folders in this folder."""
        from pyarrow.fs import FileSelector

        selector = FileSelector(self.path, allow_not_found=True)
        return sorted(
            info.base_name for info in self.filesystem.get_file_info(selector) if info.type.name == "Directory"
        )

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


def place(uri: str | os.PathLike[str]) -> Place:
    """The place a path or URI names. Raises UserError for a URI that nothing here can read."""
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
        raise UserError(f"cannot reach {text} ({error}): check the address, the credentials and the network") from None
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open {text} ({error}): use a local path or install what reads this kind of URI") from (
            None
        )
    return Place(text, fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path)


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
    listed, and is verified. Raises UserError when there is nothing at `uri`, or what arrives is not what was promised.
    """
    from filelock import FileLock

    source = place(uri)
    if source.local is not None:
        if not source.local.exists():
            raise UserError(f"there is nothing at {uri}: check the path")
        return source.local
    wanted = _wanted(source, files)
    fingerprint = hashlib.sha256(repr(sorted(wanted.items())).encode()).hexdigest()[:16]
    folder = _cache_of(uri)
    folder.mkdir(parents=True, exist_ok=True)
    complete = folder / fingerprint
    result = complete / source.path.rstrip("/").rpartition("/")[2] if "" in wanted else complete
    if complete.is_dir():
        return result
    with FileLock(folder / f"{fingerprint}.lock"):
        if complete.is_dir():
            return result
        part = folder / f"{fingerprint}.part"
        for name, promised in wanted.items():
            origin = source.child(name) if name else source
            target = part / (name or result.name)
            if not target.exists() or (files is not None and file_sha256(target) != promised):
                _copy(origin, target, promised if files is not None else None)
        os.replace(part, complete)
    return result


def cached(uri: str) -> Path | None:
    """The newest complete copy of `uri` on this node, for when the remote cannot be reached."""
    folder = _cache_of(uri)
    copies = [path for path in folder.glob("*") if path.is_dir() and path.suffix != ".part"]
    return max(copies, key=lambda path: path.stat().st_mtime, default=None)


def _cache_of(uri: str) -> Path:
    return cache_folder() / hashlib.sha256(uri.encode()).hexdigest()[:16]


def _wanted(source: Place, files: Mapping[str, str] | None) -> dict[str, str]:
    if files is not None:
        return dict(files)
    if not source.exists():
        raise UserError(f"there is nothing at {source.uri}: check the address")
    if source.is_folder():
        return {name: str(source.child(name).size()) for name in source.names(recursive=True)}
    info = source.filesystem.get_file_info(source.path)
    return {"": f"{info.size} {info.mtime_ns}"}


def _copy(origin: Place, target: Path, promised: str | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with place(target).writer() as out, origin.filesystem.open_input_stream(origin.path) as stream:
        while piece := stream.read(_PIECE):
            out.write(piece)
        if promised is not None and out.sha256 != promised:
            raise UserError(
                f"{origin.uri} does not have the checksum its card says: it is damaged or half written, import it again"
            )
