"""Runs by name, folder or MLflow run id: what is written down about one, and how it is found again."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace

from cosa_ray.config.load import check, dump_config, flatten, parse_yaml
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.training.storage import CheckpointEntry, CheckpointStore, RunFolder, patiently

RECORD, CONFIG = "run.json", "config.yaml"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
# What may differ when a run is continued: none of it changes a result beyond rounding.
RESUMABLE = ("workers", "storage", "resources", "tracking", "checkpoint", "data.loader_processes", "training.threads")


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` in a run's folder says."""

    name: str
    metric: str
    state: str = "created"
    mlflow_run_id: str | None = None
    tracking_uri: str | None = None
    parent_run_id: str | None = None
    cause: str | None = None


@dataclass(frozen=True)
class Run:
    """A run that exists: its folder, record and checkpoints."""

    folder: RunFolder
    record: RunRecord

    @property
    def checkpoints(self) -> CheckpointStore:
        """Its registered checkpoints, ordered by the metric it optimises."""
        return CheckpointStore(self.folder, self.record.metric)

    def config(self) -> Config:
        """The resolved config it was started with."""
        content = self.folder.read_text(CONFIG)
        if content is None:
            raise UserError(f"{self.folder.uri}: has no {CONFIG}; this is no run folder.")
        where = f"{self.folder.uri}/{CONFIG}"
        return check(parse_yaml(content, where), where)

    def update(self, **changes: str | None) -> Run:
        """Write changed fields of the record; returns the run with them."""
        record = replace(self.record, **changes)  # type: ignore[arg-type]
        content = json.dumps(asdict(record), indent=1)
        patiently(lambda: self.folder.write_text(RECORD, content), f"the record of run {record.name}")
        return Run(self.folder, record)

    @property
    def step(self) -> int:
        """Steps of its latest checkpoint, 0 when it has none."""
        latest = self.checkpoints.latest()
        return latest.step if latest else 0

    def best(self) -> CheckpointEntry:
        """Its best checkpoint; UserError when it has none yet."""
        entry = self.checkpoints.best()
        if entry is None:
            raise _none_yet(self)
        return entry

    def last(self) -> CheckpointEntry:
        """Its last checkpoint; UserError when it has none yet."""
        entry = self.checkpoints.latest()
        if entry is None:
            raise _none_yet(self)
        return entry


def _none_yet(run: Run) -> UserError:
    return UserError(f"run {run.record.name} ({run.folder.uri}) has no checkpoint yet; let it train first.")


def check_name(name: str) -> str:
    """The name, when it can be a folder, a Ray run and an MLflow tag; else UserError."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"run name {name!r}: use up to 100 letters, digits, '_', '.', '-', starting with a letter or digit."
        )
    return name


def read_run(uri: str) -> Run | None:
    """The run in a folder, None when the folder holds none."""
    folder = RunFolder(uri)
    content = folder.read_text(RECORD)
    return Run(folder, RunRecord(**json.loads(content))) if content else None


def check_free(name: str, config: Config) -> RunFolder:
    """The folder a new run of this name would have; UserError when the name is taken."""
    folder = RunFolder(f"{config.storage.rstrip('/')}/{check_name(name)}")
    # A kill while a run is made leaves its config, or a half-written file, and no record: that is no run.
    if any(name != CONFIG and not name.startswith(".") for name in folder.names()):
        raise UserError(
            f"run {name} exists already in {folder.uri}: continue it with --resume, or choose another --name; "
            "nothing was changed."
        )
    return folder


def create_run(name: str, config: Config, metric: str) -> Run:
    """Make the folder of a new run; UserError when the name is taken."""
    folder = check_free(name, config)
    folder.write_text(CONFIG, dump_config(config))
    return Run(folder, RunRecord(name, metric)).update()


def resume_run(name: str, config: Config) -> Run:
    """The run to continue; UserError when there is none or when a setting differs that would change its result."""
    run = read_run(f"{config.storage.rstrip('/')}/{check_name(name)}")
    if run is None:
        raise UserError(f"no run {name} in {config.storage} to resume; start it without --resume.")
    before, now = flatten(run.config()), flatten(config)
    for key, value in now.items():
        if before.get(key) != value and not key.startswith(RESUMABLE):
            raise UserError(
                f"run {name} was started with {key}={before.get(key)}, not {value}: resume it with the config in "
                f"{run.folder.uri}/{CONFIG}, or start a new run with init_from={name}."
            )
    return run


def find_run(given: str, storage: str = "runs") -> Run:
    """A run by name, folder or MLflow run id. Raises UserError naming the runs there are."""
    for uri in (given, f"{storage.rstrip('/')}/{given}"):
        run = read_run(uri)
        if run is not None:
            return run
    if re.fullmatch(r"[0-9a-f]{32}", given):
        from cosa_ray.tracking.store import folder_of_run

        folder = folder_of_run(given)
        run = read_run(folder) if folder else None
        if run is not None:
            return run
    near = RunFolder(storage)
    known = ", ".join(near.folders("")[-10:]) if near.exists() else ""
    raise UserError(
        f"no run {given}: not a run folder, not a name in {storage}"
        + (f" (there are {known})" if known else "")
        + ", and not an MLflow run id of the tracking store."
    )
