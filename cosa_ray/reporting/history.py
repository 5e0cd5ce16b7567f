"""What MLflow remembers of runs: when they ran, and their metrics over the steps."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cosa_ray.reporting.subjects import Side
from cosa_ray.tracking.refusal import refusal
from cosa_ray.tracking.store import Store, find_run, metric_course, sqlite_path, tracking_uri
from cosa_ray.training.runs import Run

log = logging.getLogger(__name__)
POINTS = 240  # of a drawn curve; more are averaged in groups
# Drawn beside the thresholds: what is optimised, and what a run is judged by. Metrics under a protocol have one point.
_CURVES = re.compile(r"train/loss|[^/]+/(miou|miou_online|miou_labels_given|miou_labels_predicted|cam_miou_best|map)")


@dataclass(frozen=True)
class Tracked:
    """A run as MLflow has it, with the last (step, value) of every metric; empty where MLflow does not have it."""

    run_id: str | None = None
    wall_seconds: float | None = None
    points: dict[str, tuple[int, float]] = field(default_factory=dict)
    client: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Chart:
    """A metric over the steps: by the letter of a side, (step, value); averaged says over how many points at most."""

    metric: str
    lines: dict[str, list[tuple[int, float]]]
    averaged: int


class Histories:
    """Reads runs from their MLflow stores; a store that does not answer is asked once."""

    def __init__(self) -> None:
        self._away: set[str] = set()
        self._known: dict[str, Tracked] = {}
        self.notes: list[str] = []

    def of(self, run: Run) -> Tracked:
        """A run as its store has it."""
        if run.folder.uri not in self._known:
            self._known[run.folder.uri] = self._read(run)
        return self._known[run.folder.uri]

    def charts(self, sides: Sequence[Side], names: Sequence[str] | None = None) -> list[Chart]:
        """Metrics of the sides over their steps; of several runs, the mean where all have it.

        names: of the metrics; losses, scores and thresholds without it.
        """
        tracked = [[self.of(run) for run in side.runs] for side in sides]
        there = sorted({name for side in tracked for run in side for name in run.points})
        usual = [n for n in there if _CURVES.fullmatch(n)] + [n for n in there if n.startswith("threshold/")]
        charts = []
        for name in usual if names is None else names:
            lines, averaged = {}, 1
            for side, runs in zip(sides, tracked, strict=True):
                line = _mean([_points(run, name) for run in runs])
                if line:
                    averaged = max(averaged, -(-len(line) // POINTS))
                    lines[side.letter] = _thinned(line)
            if any(len(line) > 1 for line in lines.values()):
                charts.append(Chart(name, lines, averaged))
        return charts

    def points(self, run: Run, name: str) -> list[tuple[int, float]]:
        """A run's metric over its steps; empty where its store does not have it."""
        return _points(self.of(run), name)

    def _read(self, run: Run) -> Tracked:
        if run.record.tracking_uri is None:
            return Tracked()
        recorded = sqlite_path(run.record.tracking_uri)
        config = run.config()
        # What the record says holds no password: a server is asked by the address the environment gives.
        uri = run.record.tracking_uri if recorded is not None and recorded.exists() else tracking_uri(config)
        path = sqlite_path(uri)
        store = Store(uri, config.tracking.experiment)
        if uri in self._away:
            return Tracked()
        if path is not None and not path.exists():
            self._note(uri, f"the MLflow store {path} is not there")
            return Tracked()
        try:
            client = store.client()
            run_id = run.record.mlflow_run_id
            if run_id is None:
                place = client.get_experiment_by_name(store.experiment)
                run_id = find_run(client, place.experiment_id, run.record.name, run.folder.uri) if place else None
            if run_id is None:
                return Tracked()
            found = client.get_run(run_id)
        except Exception as error:
            log.debug("MLflow said: %s", store.said(error))
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                self.notes.append(f"The MLflow store {store.shown} does not have run {run.record.name}.")
            else:
                self._note(uri, str(refusal(store, error) or f"MLflow at {store.shown} does not answer"))
            return Tracked()
        start, end = found.info.start_time, found.info.end_time
        wall = (end - start) / 1000 if start and end else None
        points = {each.key: (each.step, each.value) for each in found.to_proto().data.metrics}
        return Tracked(run_id, wall, {k: p for k, p in points.items() if math.isfinite(p[1])}, client)

    def _note(self, uri: str, what: str) -> None:
        self._away.add(uri)
        self.notes.append(f"Wall times and curves are left out: {what}.")


def _points(tracked: Tracked, name: str) -> list[tuple[int, float]]:
    if tracked.run_id is None or name not in tracked.points:
        return []
    return metric_course(tracked.client, tracked.run_id, name)


def _mean(runs: Sequence[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean of several runs' points at the steps that all of them have."""
    tables = [dict(points) for points in runs]
    common = sorted(set(tables[0]).intersection(*tables[1:]))
    return [(step, float(np.mean([table[step] for table in tables]))) for step in common]


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `POINTS` points: the means of equal groups, each at its last step."""
    if len(points) <= POINTS:
        return points
    size = -(-len(points) // POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], float(np.mean([value for _, value in group]))) for group in groups]
