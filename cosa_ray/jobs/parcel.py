"""What a job is sent: one resolved experiment file and the package, nothing else of the sender's disk.

An allow-list instead of the project folder with exclusions: no `.env`, credential, dataset or run can leave the
machine by being forgotten in a list, and a parcel stays far below Ray's limit of 100 MiB.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cosa_ray
from cosa_ray.config.load import apply_overrides
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError

# Ray's Jobs API refuses more than its largest gRPC message (RAY_max_grpc_message_size).
LIMIT_BYTES = 100 * 1024 * 1024
_SOURCE = (".py", ".yaml")  # what the package consists of: data or keys that lie inside it stay here
_NAMED = 3  # of the largest files of a parcel that is too large
_PACKAGE = Path(cosa_ray.__file__).resolve().parent


@dataclass(frozen=True)
class Packed:
    """Size of a parcel: files and bytes."""

    files: int
    bytes: int


def pack(folder: Path, files: Mapping[str, str], *, package: bool) -> Packed:
    """Write a job's files into an empty folder, with the package `cosa_ray` beside them when asked.

    Raises UserError naming the largest files when the parcel is over Ray's limit.
    """
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    if package:
        for file in sorted(_PACKAGE.rglob("*")):
            inside = file.relative_to(_PACKAGE)
            hidden = any(part.startswith(".") for part in inside.parts)
            if not hidden and (file.name == "py.typed" or file.suffix in _SOURCE):
                target = folder / _PACKAGE.name / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    size = sum(sizes.values())
    if size > LIMIT_BYTES:
        largest = sorted(sizes, key=lambda file: -sizes[file])[:_NAMED]
        named = ", ".join(f"{file.relative_to(folder)} ({sizes[file] / 2**20:.1f} MiB)" for file in largest)
        raise UserError(
            f"the job's parcel is {size / 2**20:.0f} MiB and Ray takes at most {LIMIT_BYTES // 2**20} MiB; largest: "
            f"{named}; make them smaller, or install cosa-ray on the cluster and use --installed."
        )
    return Packed(len(sizes), size)


def for_cluster(config: Config, folder: str, *, tracking_from_environment: bool) -> Config:
    """The same experiment with its relative paths made absolute under `folder`, a folder on the cluster.

    A job runs in a temporary folder that Ray deletes: whatever stayed relative (runs, mlflow.db) would go with it.
    """
    root = PurePosixPath(folder)
    if not root.is_absolute():
        raise UserError(f"--folder {folder}: expected an absolute folder on the cluster.")

    def absolute(path: str) -> str:
        # `~` is the home folder of whoever runs the job there.
        return path if "://" in path or path.startswith("~") else str(root / path)

    changes: dict[str, object] = {"storage": absolute(config.storage), "data.dataset": absolute(config.data.dataset)}
    if config.model.checkpoint:
        changes["model.checkpoint"] = absolute(config.model.checkpoint)
    for key in ("init_from", "continue_from"):
        if (run := getattr(config, key)) and "/" in run:  # a bare name is looked up in `storage`
            changes[key] = absolute(run)
    if not tracking_from_environment:
        changes["tracking.uri"] = absolute_tracking(config.tracking.uri or "sqlite:///mlflow.db", folder)
    return apply_overrides(config, changes, "the job's paths")


def absolute_tracking(uri: str, folder: str) -> str:
    """A tracking URI whose SQLite file does not depend on the working folder; servers stay as they are."""
    scheme = "sqlite:///"
    if uri.startswith(scheme) and not uri.startswith((f"{scheme}/", f"{scheme}~")):
        return f"{scheme}{PurePosixPath(folder) / uri.removeprefix(scheme)}"
    return uri
