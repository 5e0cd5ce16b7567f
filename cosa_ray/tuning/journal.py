"""What a sweep knows of its trials, written down as it happens: the memory that outlives every process.

One small file per trial, replaced atomically, and written by the process that drives the sweep alone. The search, the
scheduler, the result and `cosa-ray status` are all made from these files; nothing of Tune's own is read back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cosa_ray.training.storage import RunFolder, patiently
from cosa_ray.tuning.values import as_value

FOLDER = "trials"
ENDED = ("finished", "stopped_early", "failed")


@dataclass(frozen=True)
class Report:
    """One evaluation of a trial: optimiser steps, metrics of the sweep by name, when (seconds since the epoch)."""

    step: int
    metrics: dict[str, float]
    at: float


@dataclass(frozen=True)
class Entry:
    """One trial. Its state is pending, running, interrupted, or how it ended: finished, stopped_early or failed.

    `number` counts trials; `configuration` is the number of the first trial with these settings, and `seed` is given
    where settings are repeated. `origin` says where they came from: search, a point of the file, or an earlier run.
    `kind` of a failure: diverged, out_of_memory, died or error. `ended_by`: the scheduler or the budget that ended it.
    `lineage`: under population-based training, the step, donor and settings of every copy. `memory`: what the search
    has to remember of it.
    """

    number: int
    values: dict[str, Any]
    configuration: int
    seed: int | None = None
    origin: str = "search"
    state: str = "pending"
    step: int = 0
    hours: float = 0.0
    started: float | None = None
    ended: float | None = None
    kind: str | None = None
    cause: str | None = None
    ended_by: str | None = None
    reports: tuple[Report, ...] = ()
    lineage: tuple[dict[str, Any], ...] = ()
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Its number as it stands in names: 007."""
        return f"{self.number:03d}"

    def own_reports(self) -> list[Report]:
        """The evaluations of the weights it has: those since it last copied another trial's."""
        since = self.lineage[-1]["step"] if self.lineage else 0
        return [report for report in self.reports if report.step >= since]


class Journal:
    """The entries of a sweep's folder, read once and then kept in step with it."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._entries: dict[int, Entry] = {}
        for name in RunFolder(f"{folder.uri}/{FOLDER}").names():
            if not name.startswith(".") and (text := folder.read_text(f"{FOLDER}/{name}")) is not None:
                entry = _read(json.loads(text))
                self._entries[entry.number] = entry

    def entries(self) -> list[Entry]:
        """All trials by number."""
        return [self._entries[number] for number in sorted(self._entries)]

    def __getitem__(self, number: int) -> Entry:
        return self._entries[number]

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, values: Mapping[str, Any], *, first: int | None = None, **known: Any) -> Entry:
        """Write a new trial down, before it starts; `first` is the first trial of its configuration."""
        number = max(self._entries, default=-1) + 1
        return self.put(Entry(number, dict(values), number if first is None else first, **known))

    def update(self, number: int, **changes: Any) -> Entry:
        """Write changes of a trial down."""
        entry = replace(self._entries[number], **changes)
        return entry if entry == self._entries[number] else self.put(entry)

    def report(self, number: int, step: int, metrics: Mapping[str, float], at: float | None = None) -> Entry:
        """Write an evaluation down; one of a step that is there already is left out."""
        entry = self._entries[number]
        if any(report.step == step for report in entry.reports):
            return entry
        report = Report(step, dict(metrics), time.time() if at is None else at)
        return self.update(number, reports=(*entry.reports, report), step=max(step, entry.step))

    def copied(self, number: int, donor: int, step: int, values: Mapping[str, Any]) -> Entry:
        """Note that a trial took weights and score of another at a step, and goes on with these settings."""
        taken = next(report for report in self._entries[donor].reports if report.step == step)
        entry = self._entries[number]
        reports = (*(report for report in entry.reports if report.step < step), taken)
        copy = {"step": step, "donor": donor, "values": dict(values)}
        return self.update(number, values=dict(values), reports=reports, lineage=(*entry.lineage, copy))

    def put(self, entry: Entry) -> Entry:
        """Write a trial as it is now down."""
        content = json.dumps(asdict(entry), default=list)
        patiently(
            lambda: self._folder.write_text(f"{FOLDER}/{entry.id}.json", content), f"the record of trial {entry.id}"
        )
        self._entries[entry.number] = entry
        return entry


def by_configuration(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    """Trials of every configuration, in the order of their seeds."""
    found: dict[int, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.number):
        found.setdefault(entry.configuration, []).append(entry)
    return found


def _read(said: dict[str, Any]) -> Entry:
    said["values"] = {key: as_value(value) for key, value in said["values"].items()}
    said["reports"] = tuple(Report(**report) for report in said["reports"])
    said["lineage"] = tuple(
        {**copy, "values": {key: as_value(value) for key, value in copy["values"].items()}} for copy in said["lineage"]
    )
    return Entry(**said)
