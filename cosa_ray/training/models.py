"""A trained model by whatever names one: a run, a checkpoint's folder, or a model in MLflow's registry."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.evaluation.description import DESCRIPTION
from cosa_ray.training.runs import Run, find_run
from cosa_ray.training.storage import CheckpointEntry, RunFolder

if TYPE_CHECKING:
    from cosa_ray.tracking.registry import Registered

_REGISTERED = "models:/"


@dataclass(frozen=True)
class ModelReference:
    """Where a trained model is; picklable, so that every worker opens it for itself."""

    uri: str
    tracking_uri: str | None = field(default=None, repr=False)  # may carry credentials

    @contextlib.contextmanager
    def open(self) -> Iterator[Path]:
        """The model's folder on this machine, for the time of the block. Raises UserError when there is none."""
        if self.tracking_uri is not None:
            from cosa_ray.tracking.registry import open_registered

            with open_registered(self.uri, self.tracking_uri) as folder:
                yield folder
            return
        with RunFolder(self.uri).local_copy("") as folder:
            yield folder


def find_model(given: str, *, which: str = "best", storage: str = "runs") -> ModelReference:
    """The model of a run (name, folder or MLflow run id: its `best` or `last` checkpoint), of a checkpoint's folder, or
    of `models:/name@alias`. Raises UserError when there is none."""
    if given.startswith(_REGISTERED):
        from cosa_ray.tracking.store import tracking_uri

        return ModelReference(given, tracking_uri(Config()))
    folder = RunFolder(given)
    if folder.exists(DESCRIPTION):
        return ModelReference(folder.uri)
    found = find_run(given, storage)
    return ModelReference(f"{found.folder.uri}/{choose_checkpoint(found, which).name}")


def choose_checkpoint(found: Run, which: str) -> CheckpointEntry:
    """A run's `best` or `last` checkpoint. Raises UserError for another word, and for a run that has none."""
    if which not in ("best", "last"):
        raise UserError(f"--checkpoint {which}: choose best or last.")
    best = found.best()
    return best if which == "best" else found.checkpoints.latest() or best


def register_run(
    run: str, *, name: str, aliases: Sequence[str] = (), which: str = "best", storage: str = "runs"
) -> Registered:
    """Register a run's checkpoint in MLflow's registry under a name, with aliases; the function of the verb.

    Raises UserError when the run has no checkpoint or is not in MLflow.
    """
    from cosa_ray.tracking.registry import check_names, register
    from cosa_ray.tracking.store import Store, tracking_uri

    check_names(name, aliases)
    found = find_run(run, storage)
    entry = choose_checkpoint(found, which)
    config = found.config()
    store = Store(tracking_uri(config), config.tracking.experiment)
    with found.folder.local_copy(entry.name) as folder:
        return register(
            store,
            folder,
            run=found.record.name,
            run_folder=found.folder.uri,
            run_id=found.record.mlflow_run_id,
            name=name,
            aliases=aliases,
        )
