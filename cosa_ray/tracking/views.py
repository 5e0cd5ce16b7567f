"""Prepared views of MLflow's run table: which columns and charts, in which order; MLflow keeps a view as a tag.

The tag of an experiment holds a view's name and its state as JSON, read from the pages of MLflow 3.17. What a later
version does not know in it, it leaves out; the test of the pages opens every view in a browser.
"""

from __future__ import annotations

import base64
import json
import logging
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
PREFIX = "mlflow.sharedViewState."
RUNS, BEST, SWEEP = "cosa-ray-runs", "cosa-ray-best", "cosa-ray-sweep-"
NOTE = "mlflow.note.content"
# Raised when the views below change. An experiment that has had them is left alone: a view that somebody deleted
# stays away.
_MARK, _VERSION = "cosa_ray.views", 1
SWEEPS_KEPT = 10  # MLflow's pages save no view of their own past 40
METRICS = ("val/miou", "val/miou_labels_given", "val/cam_miou_best", "cost/gpu_hours", "cost/cpu_hours")
SETTINGS = ("training.steps", "model.backbone", "losses.cam_to_seg", "losses.seg_to_cam", "losses.contrastive", "seed")
TAGS = ("cosa_ray.kind", "cosa_ray.state", "cosa_ray.stopped_by", "cosa_ray.failure", "cosa_ray.cause")
_OVERVIEW = "overview"
_SECTIONS = (_OVERVIEW, "val", "threshold", "train", "val/iou", "cost", "perf")
_NOTE = """Runs of cosa-ray. Views (right, above the runs) has prepared columns and charts: runs and sweeps, the best, \
each sweep.

Their charts, with the pictures of every evaluation, are behind the chart button. `val/miou` is plain; \
`val/miou_labels_given` uses the images' true labels at test time. `cosa-ray compare A B` compares runs in depth."""


@dataclass(frozen=True)
class View:
    """A view by its key in a page's address, its name in the menu, and its state."""

    key: str
    name: str
    state: dict[str, Any]

    @property
    def tag(self) -> str:
        """Key of the experiment's tag that holds it."""
        return PREFIX + self.key

    def value(self) -> str:
        """Content of the tag, with the state compressed as MLflow's pages do."""
        packed = base64.b64encode(zlib.compress(json.dumps(self.state, separators=(",", ":")).encode())).decode()
        return json.dumps({"name": self.name, "createdAt": int(time.time() * 1000), "state": f"deflate;{packed}"})


def experiment_views() -> list[View]:
    """The views of every experiment: runs with their sweeps folded, newest first; and all runs by `val/miou`."""
    charts = [_line("val/miou"), _line("train/loss"), _line("threshold/background"), *_pictures()]
    columns = _table(METRICS, SETTINGS, TAGS)
    # MLflow folds trials under their sweep only while it sorts by the start and filters nothing.
    return [
        View(RUNS, "cosa-ray: runs and sweeps", columns | _sorted("attributes.start_time") | _charts(charts)),
        View(
            BEST, "cosa-ray: best val/miou first", columns | _sorted(_column("metrics", METRICS[0])) | _charts(charts)
        ),
    ]


def sweep_view(sweep: str, metrics: Mapping[str, str], settings: Sequence[str], steps: int) -> View:
    """The view of a sweep's trials, best first: the settings it varies, and a plot of them against its metrics.

    metrics: name -> "max" or "min", the first sorts. steps: those of a whole trial, at which the pictures are shown.
    """
    shown = [*metrics, *(name for name in METRICS if name not in metrics)]
    first, mode = next(iter(metrics.items()))
    charts = [_line(name) for name in dict.fromkeys([*metrics, "threshold/background"])] + _pictures(steps)
    if settings:
        card = {"selectedParams": list(settings), "selectedMetrics": list(metrics), "showAllRuns": True}
        charts.insert(0, _card("parallel", "PARALLEL", runsCountToCompare=100, **card))
    state = _table(shown, settings, TAGS[1:]) | _sorted(_column("metrics", first), mode) | _charts(charts)
    state["searchFilter"] = f"tags.`cosa_ray.sweep` = '{sweep}' and tags.`cosa_ray.kind` = 'trial'"
    return View(SWEEP + sweep, f"sweep {sweep}", state)


def new_experiment_tags() -> dict[str, str]:
    """Tags that an experiment is created with: its views, and a note."""
    return {**missing_views({}), NOTE: _NOTE}


def missing_views(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags to set on an experiment that has these, for it to have the views; none where it has had them before."""
    had = tags.get(_MARK, "")
    if had.isdigit() and int(had) >= _VERSION:
        return {}
    return {**{view.tag: view.value() for view in experiment_views()}, _MARK: str(_VERSION)}


def offer_views(client: MlflowClient, experiment_id: str, views: Iterable[View] = ()) -> None:
    """Give an experiment its views, and these; the oldest of sweeps are dropped past SWEEPS_KEPT.

    A convenience, so nothing is raised: a server may not let everybody change an experiment.
    """
    try:
        tags = dict(client.get_experiment(experiment_id).tags)
        wanted = missing_views(tags) | {view.tag: view.value() for view in views}
        for key, value in wanted.items():
            client.set_experiment_tag(experiment_id, key, value)
        of_sweeps = [(key, value) for key, value in (tags | wanted).items() if key.startswith(PREFIX + SWEEP)]
        for key, _ in sorted(of_sweeps, key=_created)[:-SWEEPS_KEPT]:
            client.delete_experiment_tag(experiment_id, key)
    except Exception as error:
        log.debug("experiment %s is left without prepared views: %s", experiment_id, type(error).__name__)


def _created(tag: tuple[str, str]) -> int:
    try:
        return int(json.loads(tag[1])["createdAt"])
    except (ValueError, KeyError, TypeError):
        return 0


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"


def _table(metrics: Sequence[str], settings: Sequence[str], tags: Sequence[str]) -> dict[str, Any]:
    """The table's columns, from left to right; MLflow leaves out those that no run has."""
    kinds = (("metrics", metrics), ("tags", tags[:1]), ("params", settings), ("tags", tags[1:]))
    chosen = {_column(kind, name): max(100, 7 * len(name) + 30) for kind, names in kinds for name in names}
    models, dataset = _column("attributes", "Models"), _column("attributes", "Dataset")
    # Start and duration go by other names here than everywhere else. They and the name are always shown.
    widths = {_column("attributes", "Run Name"): 260, "runDateAndNestInfo": 130, "duration": 90, **chosen}
    widths |= {models: 160, dataset: 220}
    return {"selectedColumns": [*chosen, models, dataset], "columnOrder": list(widths), "columnWidths": widths}


def _sorted(key: str, mode: str = "max") -> dict[str, Any]:
    return {"orderByKey": key, "orderByAsc": mode == "min"}


def _charts(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Chosen cards in a section of their own, above those MLflow makes of every metric."""
    sections = [
        {"uuid": f"cosa-ray-{name}", "name": name, "display": True, "isReordered": False, "deleted": False}
        | {"isGenerated": name != _OVERVIEW}
        for name in _SECTIONS
    ]
    return {"compareRunCharts": list(cards), "compareRunSections": sections, "isAccordionReordered": True}


def _card(name: str, kind: str, **more: Any) -> dict[str, Any]:
    card = {"uuid": f"cosa-ray-{name}", "type": kind, "metricSectionId": f"cosa-ray-{_OVERVIEW}", "deleted": False}
    return card | {"isGenerated": False, "runsCountToCompare": 10} | more


def _line(metric: str) -> dict[str, Any]:
    axes = {"xAxisKey": "step", "selectedXAxisMetricKey": "", "xAxisScaleType": "linear", "useGlobalXaxisKey": True}
    axes |= {"yAxisKey": "metric", "yAxisExpressions": [], "scaleType": "linear", "range": {}}
    smoothing = {"lineSmoothness": 0, "useGlobalLineSmoothing": True, "ignoreOutliers": False}
    return _card(f"line-{metric}", "LINE", metricKey=metric, displayName=metric, **axes, **smoothing)


def _pictures(step: int = 0) -> list[dict[str, Any]]:
    """The pictures of an evaluation. Left to itself MLflow prints every parameter of the run above each."""
    names = ("val/panel", "val/cam_confidence", "val/reliability")
    return [_card(f"image-{name}", "IMAGE", imageKeys=[name], step=step, showRunParams=False) for name in names]
