"""What can be compared: runs, sweeps, groups of seeds, and what an MLflow filter finds."""

from __future__ import annotations

import fnmatch
import itertools
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cosa_ray.config.load import flatten
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.training.runs import RESUMABLE, Run, find_run, read_run
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.folder import SWEEP_FILE
from cosa_ray.tuning.results import RESULT_FILE, read_result

LIMIT = 20  # sides of one comparison
FILTER = "mlflow:"
_WILD = "*?["
# Where a run lies and is logged changes no result.
_PLACES = ("storage", "tracking.")


@dataclass(frozen=True)
class Side:
    """One thing that is compared. kind: run, sweep (its best trial, all seeds of it) or seeds (runs that differ so)."""

    letter: str
    name: str
    kind: str
    runs: tuple[Run, ...]
    note: str = ""

    @property
    def shown(self) -> str:
        """Its letter and name."""
        return f"{self.letter} ({self.name})"

    def settings(self) -> dict[str, Any]:
        """Dotted key -> value of everything in its config that can change a result; the seeds of a group as a list."""
        found = settings_of(self.runs[0])
        if self.kind == "seeds" or len(self.runs) > 1:
            found["seed"] = [run.config().seed for run in self.runs]
        return found


def settings_of(run: Run) -> dict[str, Any]:
    """Dotted key -> value of a run's config, without the places where it lies and is logged."""
    return {key: value for key, value in flatten(run.config()).items() if not key.startswith(_PLACES)}


def find_sides(
    names: Sequence[str], *, storage: str = "runs", experiment: str | None = None
) -> tuple[list[Side], list[str]]:
    """What the words of a comparison name, in their order, and notes on what was left out.

    A word is a run (name, folder, MLflow run id), a sweep (name or folder), a pattern with `*`, `?` or `[...]` for runs
    that differ in their seed only, or `mlflow:FILTER` for every run of the experiment that a filter finds. Raises
    UserError for a word that names nothing, and for fewer than two or more than twenty sides.
    """
    found: list[tuple[str, str, tuple[Run, ...], str]] = []
    notes: list[str] = []
    for word in names:
        if word.startswith(FILTER):
            runs, said = _filtered(word, experiment or Config().tracking.experiment)
            named = {run.folder.uri for _, _, group, _ in found for run in group}
            found += [(run.record.name, "run", (run,), "") for run in runs if run.folder.uri not in named]
            notes += said
        elif any(sign in word for sign in _WILD):
            group = _seeds(word, storage)
            found.append((word, "seeds", group, f"{len(group)} run{'s' * (len(group) != 1)}, each with a seed"))
        elif (best := _best_trials(word, storage)) is not None:
            found.append((word.rstrip("/").rpartition("/")[2], "sweep", *best))
        else:
            run = find_run(word, storage)
            found.append((run.record.name, "run", (run,), ""))
    if len(found) < 2:
        raise UserError(f"{' '.join(names)}: names {len(found)} run, and a comparison takes two or more; name another.")
    if len(found) > LIMIT:
        raise UserError(f"{len(found)} runs are too many to put side by side; name at most {LIMIT}.")
    sides = [Side(letter, *each) for letter, each in zip(string.ascii_uppercase, found, strict=False)]
    return sides, notes


def _best_trials(word: str, storage: str) -> tuple[tuple[Run, ...], str] | None:
    """The runs of a sweep's best configuration, by seed, and what they are; None where the word names no sweep."""
    for uri in (word, f"{storage.rstrip('/')}/{word}"):
        folder = RunFolder(uri)
        result = read_result(folder)
        if result is None:
            if folder.exists(SWEEP_FILE):
                raise UserError(f"sweep {word} ({folder.uri}) has come to no result yet ({RESULT_FILE}); let it end.")
            continue
        best = result.best
        if best is None:
            raise UserError(f"sweep {word} ({folder.uri}) has no best trial, because none succeeded; run it again.")
        alike = [
            each for each in result.trials if (each.configuration, each.values) == (best.configuration, best.values)
        ]
        runs = []
        for trial in sorted((each for each in alike if each.succeeded), key=lambda trial: trial.seed):
            # A sweep's runs lie beside it, wherever both were moved to.
            run = read_run(trial.folder) or read_run(f"{folder.uri.rpartition('/')[0]}/{trial.name}")
            if run is None:
                raise UserError(f"the best trial of sweep {word}, {trial.folder}, is not there; was it moved?")
            runs.append(run)
        return tuple(runs), f"best trial: {best.name}" + (f" and its {len(runs)} seeds" if len(runs) > 1 else "")
    return None


def _seeds(word: str, storage: str) -> tuple[Run, ...]:
    """The runs a pattern names, by seed. Raises UserError when they differ in what changes a result beyond that."""
    folder, _, pattern = word.rpartition("/")
    place = RunFolder(folder or storage)
    there = [name for name in place.folders("") if fnmatch.fnmatchcase(name, pattern)]
    runs = [run for name in there if (run := read_run(f"{place.uri}/{name}")) is not None]
    if not runs:
        raise UserError(f"{word}: no run in {place.uri} has such a name; see what there is with `ls {place.uri}`.")
    runs.sort(key=lambda run: run.config().seed)
    for before, run in itertools.pairwise(runs):
        names, seed = f"{before.record.name} and {run.record.name}", run.config().seed
        if before.config().seed == seed:
            raise UserError(f"{word}: {names} have the same seed, {seed}; narrow the pattern.")
        first, second = settings_of(before), settings_of(run)
        for key, value in second.items():
            if key != "seed" and not key.startswith(RESUMABLE) and first.get(key) != value:
                raise UserError(
                    f"{word}: a pattern names runs that differ in their seed only, but {names} differ in {key} "
                    f"({first.get(key)} and {value}); name them one by one."
                )
    return tuple(runs)


def _filtered(word: str, experiment: str) -> tuple[list[Run], list[str]]:
    """The runs an MLflow filter finds, oldest first, and what was left out."""
    from cosa_ray.tracking.store import FOLDER_TAG, Store, filtered_runs, tracking_uri

    store = Store(tracking_uri(Config()), experiment)
    listed = filtered_runs(store, word.removeprefix(FILTER), word)
    runs, gone = [], []
    for each in listed:
        tags = each.data.tags
        if tags.get("cosa_ray.kind") == "sweep":
            continue
        run = read_run(tags[FOLDER_TAG]) if FOLDER_TAG in tags else None
        if run is not None:
            runs.append(run)
        else:
            gone.append(str(each.info.run_name))
    if not runs:
        raise UserError(f"{word}: finds no run in experiment {experiment} of {store.shown}; try another filter.")
    notes = []
    if gone:
        notes.append(f"Left out, because their folders are not here: {some(gone)}.")
    if len(runs) > LIMIT:
        notes.append(f"The filter finds {len(runs)} runs; these are the {LIMIT} oldest.")
    return runs[:LIMIT], notes


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first few of many names."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
