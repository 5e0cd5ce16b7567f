"""Runs of before a sweep, found in MLflow: their settings and scores are points to start from."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from cosa_ray.config.load import nest
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.tracking.store import Store, filtered_runs, metric_course, tracking_uri
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.search import Known
from cosa_ray.tuning.space import Dimension, sample
from cosa_ray.tuning.sweepfile import Mode, Sweep
from cosa_ray.tuning.values import alike, as_value, at

log = logging.getLogger(__name__)
FILE = "earlier.json"
_MOST = 500


def earlier_runs(sweep: Sweep, base: Config, metrics: Mapping[str, Mode], folder: RunFolder, where: str) -> list[Known]:
    """What the filter of the sweep file finds, best first, kept in the sweep's folder so that it stays the same.

    Finished runs whose settings lie in the space and that have every metric of the sweep: of one metric its best value,
    of several the last. Raises UserError when MLflow cannot be asked, or there is no such run.
    """
    if sweep.earlier is None:
        return []
    if (kept := kept_earlier(folder)) is not None:
        return kept
    found = _search(sweep, base, metrics, where)
    sign = 1.0 if next(iter(metrics.values())) == "max" else -1.0
    return sorted(found, key=lambda known: -sign * known.scores[0])


def kept_earlier(folder: RunFolder) -> list[Known] | None:
    """What an earlier start of the sweep found, best first; None before there was one."""
    if (text := folder.read_text(FILE)) is None:
        return None
    return [
        Known(each["name"], {key: as_value(v) for key, v in each["values"].items()}, tuple(each["scores"]))
        for each in json.loads(text)
    ]


def keep_earlier(folder: RunFolder, known: list[Known]) -> None:
    """Write what was found into the sweep's folder."""
    folder.write_text(FILE, json.dumps([vars(each) for each in known], indent=1))


def _search(sweep: Sweep, base: Config, metrics: Mapping[str, Mode], where: str) -> list[Known]:
    assert sweep.earlier is not None
    store = Store(tracking_uri(base), sweep.earlier.experiment or base.tracking.experiment)
    runs = filtered_runs(store, sweep.earlier.runs, f"{where}: earlier.runs", most=_MOST, newest_first=True)
    client = store.client()
    known, outside = [], 0
    for run in runs:
        if run.info.status != "FINISHED" or "cosa_ray.stopped_by" in run.data.tags:
            continue
        if run.data.tags.get("cosa_ray.kind") == "sweep" or any(metric not in run.data.metrics for metric in metrics):
            continue
        values = _values(sweep, run.data.params)
        if values is None:
            outside += 1
            continue
        scores = [run.data.metrics[metric] for metric in metrics]
        if len(metrics) == 1:
            ((metric, mode),) = metrics.items()
            course = [value for _, value in metric_course(client, run.info.run_id, metric)]
            scores = [max(course) if mode == "max" else min(course)] if course else []
        if not scores or not all(map(math.isfinite, scores)):
            continue
        known.append(Known(run.info.run_name, values, tuple(scores)))
    log.info("%s: %s earlier runs to start from, %s outside the space", where, len(known), outside)
    if not known:
        raise UserError(
            f"{where}: earlier.runs finds no finished run with {', '.join(metrics)} and settings within the space "
            f"among {len(runs)} in experiment {store.experiment} of {store.shown}; change the filter or leave it out."
        )
    return known


def _values(sweep: Sweep, params: Mapping[str, str]) -> dict[str, Any] | None:
    """A run's settings as a point of the space; None where one is missing or outside, or tied ones are not."""
    read = nest({key: _read(text) for key, text in params.items()})

    class Outside(Exception):
        pass

    def pick(name: str, dimension: Dimension) -> Any:
        value = at(read, name, missing=...)
        if not dimension.holds(value):
            raise Outside
        return dimension.tidy(value)

    try:
        values = sample(sweep.space, pick)
    except Outside:
        return None
    tied = [name for name in values if sweep.space[name].same is not None]
    return values if all(alike(as_value(at(read, name)), values[name]) for name in tied) else None


def _read(text: str) -> Any:
    """A parameter as it was logged: JSON but for bare words."""
    try:
        return json.loads(text)
    except ValueError:
        return text
