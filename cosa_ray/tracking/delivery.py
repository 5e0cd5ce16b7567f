"""Hand records to MLflow so that each arrives once, whatever was lost, repeated or replayed on the way.

MLflow keys a point by metric, step, timestamp and value, so a record that is sent again with its stored timestamp
changes nothing. A restarted run replays steps with new timestamps: these are dropped up to the last step that is
already delivered, or waiting in an earlier session's part of the spool.
"""

from __future__ import annotations

import base64
import logging
import posixpath
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa_ray.tracking.spool import Record
from cosa_ray.tracking.store import FOLDER_TAG, RUN_TAG, Tracking, find_run
from cosa_ray.tracking.views import NOTE, View, offer_views

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)
_METRICS_A_REQUEST = 500  # MLflow allows 1000, and a megabyte
_PAIRS_A_REQUEST = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 5000  # MLflow 3 allows 8000, older servers 5000
_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")
_IMAGE = re.compile(r"images/(?P<key>.+)\+step\+(?P<step>\d+)\+timestamp\+\d+\+[^+]+\+compressed\.webp$")


class ParentMissing(Exception):
    """The parent run is not there yet: its own tracker has still to deliver it."""


class Delivery:
    """One run's connection to MLflow, used by one thread at a time; `send` raises when it should be tried again."""

    def __init__(self, tracking: Tracking) -> None:
        self.run_id: str | None = None
        self._tracking = tracking
        self._client: MlflowClient
        self._experiment: str
        self._params: dict[str, str] = {}
        # Per metric: up to which step earlier sessions have it (delivered or in the spool), and how far the session
        # being delivered has come. Lanes are delivered side by side, so each is in a session of its own.
        self._floor: dict[str, int] = {}
        self._reached: dict[str, dict[str, int]] = {}
        self._session: dict[str, str] = {}
        self._lane = ""
        self._knows_images = True
        self._deleted = False
        self._warned: set[str] = set()

    def send(self, records: list[Record], lane: str, session: str) -> None:
        """Deliver records of one lane and session, in order; what MLflow refuses for good is dropped with a warning."""
        if not records or self._deleted:
            return
        if self.run_id is None:
            self._open(min(record["time"] for record in records))
        if session != self._session.get(lane):
            for key, step in self._reached.get(lane, {}).items():
                self._floor[key] = max(step, self._floor.get(key, step))
            self._session[lane], self._reached[lane] = session, {}
        self._lane = lane
        for kind, group in _runs_of(records):
            getattr(self, f"_send_{kind}")(group)

    def _open(self, started: int) -> None:
        """Find the run by its tags, or create it, and read which step of each metric has arrived."""
        tracking = self._tracking
        client = tracking.store.client()
        experiment = tracking.store.experiment_id(client)
        run_id = find_run(client, experiment, tracking.run, tracking.folder)
        if run_id is None:
            tags = {RUN_TAG: tracking.run, FOLDER_TAG: tracking.folder}
            if (parent := self._parent(client, experiment)) is not None:
                tags["mlflow.parentRunId"] = parent
            if tracking.description is not None and tracking.description.note:
                tags[NOTE] = tracking.description.note  # once: people write their own
            run_id = client.create_run(experiment, start_time=started, tags=tags, run_name=tracking.run).info.run_id
        else:
            run = client.get_run(run_id)
            self._params = dict(run.data.params)
            self._floor = {metric.key: metric.step for metric in run.to_proto().data.metrics}
            self._knows_images = False
        self._client, self._experiment, self.run_id = client, experiment, run_id

    def _parent(self, client: MlflowClient, experiment: str) -> str | None:
        tracking = self._tracking
        if tracking.parent_run_id is not None or tracking.parent is None:
            return tracking.parent_run_id
        parent = find_run(client, experiment, tracking.parent)
        if parent is None:
            raise ParentMissing(f"the parent run {tracking.parent} is not in MLflow yet")
        return parent

    def _is_new(self, key: str, step: int) -> bool:
        reached = self._reached[self._lane]
        reached[key] = max(step, reached.get(key, step))
        return key not in self._floor or step > self._floor[key]

    def _send_metrics(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(key, value, record["time"], record["step"])
            for record in records
            for key, value in record["values"].items()
            if self._is_new(key, record["step"])
        ]
        for start in range(0, len(points), _METRICS_A_REQUEST):
            self._send_points(points[start : start + _METRICS_A_REQUEST])

    def _send_points(self, points: list[Metric]) -> None:
        """Log points; when MLflow refuses them, halve until the refused one alone is dropped."""

        def log_them() -> None:
            self._client.log_batch(self.run_id, metrics=points)

        if (
            not self._accepted(log_them, points[0].key if len(points) == 1 else None)
            and len(points) > 1
            and not self._deleted
        ):
            middle = len(points) // 2
            self._send_points(points[:middle])
            self._send_points(points[middle:])

    def _send_params(self, records: list[Record]) -> None:
        from mlflow.entities import Param

        wanted = {key: value[:_PARAM_LENGTH] for record in records for key, value in record["values"].items()}
        changed = {key: value for key, value in wanted.items() if self._params.get(key, value) != value}
        new = [Param(key, value) for key, value in wanted.items() if key not in self._params]
        for start in range(0, len(new), _PAIRS_A_REQUEST):
            chunk = new[start : start + _PAIRS_A_REQUEST]
            self._accepted(partial(self._client.log_batch, self.run_id, params=chunk), "parameters")
        self._params.update({param.key: param.value for param in new})
        if changed:
            # MLflow never changes a parameter; what a resumed run changed is kept as tags.
            tags = {f"cosa_ray.changed.{key}": value for key, value in changed.items()}
            self._send_tags([{"values": tags}])

    def _send_tags(self, records: list[Record]) -> None:
        from mlflow.entities import RunTag

        values = {key: value[:_TAG_LENGTH] for record in records for key, value in record["values"].items()}
        tags = [RunTag(key, value) for key, value in values.items()]
        for start in range(0, len(tags), _PAIRS_A_REQUEST):
            chunk = tags[start : start + _PAIRS_A_REQUEST]
            self._accepted(partial(self._client.log_batch, self.run_id, tags=chunk), "tags")

    def _send_view(self, records: list[Record]) -> None:
        offer_views(self._client, self._experiment, [View(**record["view"]) for record in records])

    def _send_dataset(self, records: list[Record]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(**record["dataset"]),
                [InputTag("mlflow.data.context", record["context"])],
            )
            for record in records
        ]
        self._accepted(lambda: self._client.log_inputs(self.run_id, datasets=inputs), "datasets")

    def _send_status(self, records: list[Record]) -> None:
        for record in records:
            if record["status"] == "RUNNING":
                change = partial(self._client.update_run, self.run_id, status="RUNNING")
            else:
                change = partial(self._client.set_terminated, self.run_id, record["status"], record["time"])
            self._accepted(change, "status")

    def _send_artifact(self, records: list[Record]) -> None:
        if not self._knows_images:
            # Not when the run is opened: an artifact store that is down must not hold up the metrics.
            self._find_images()
        for record in records:
            if "image" in record and not self._is_new(f"image:{record['image']}", record["step"]):
                continue
            for path, data in record["files"].items():
                self._upload(path, base64.b64decode(data))

    def _find_images(self) -> None:
        for file in self._client.list_artifacts(self.run_id, "images"):
            if match := _IMAGE.match(file.path):
                key, step = f"image:{match['key']}", int(match["step"])
                self._floor[key] = max(step, self._floor.get(key, step))
        self._knows_images = True

    def _upload(self, path: str, data: bytes) -> None:
        folder, name = posixpath.split(path)
        with tempfile.TemporaryDirectory(prefix="cosa-ray-") as temporary:
            local = Path(temporary) / name
            local.write_bytes(data)
            self._accepted(lambda: self._client.log_artifact(self.run_id, str(local), folder or None), path)

    def _accepted(self, call: Callable[[], Any], what: str | None) -> bool:
        """Make a request; False when MLflow refused it for good (named once in a warning), raises otherwise."""
        from mlflow.exceptions import MlflowException

        try:
            call()
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                self.run_id = None  # erased from the store: the next attempt makes the run anew
            if error.error_code not in _REFUSED:
                raise
            if "'active' state" in str(error):
                self._deleted = True
                what = "further records (the run was deleted)"
            if what is not None and what not in self._warned:
                self._warned.add(what)
                said = self._tracking.store.said(error)
                log.warning("MLflow refuses %s of run %s: %s", what, self._tracking.run, said)
            return False
        return True


def _runs_of(records: Iterable[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Consecutive records of one kind together, in order."""
    group: list[Record] = []
    for record in records:
        if group and record["kind"] != group[0]["kind"]:
            yield group[0]["kind"], group
            group = []
        group.append(record)
    if group:
        yield group[0]["kind"], group
