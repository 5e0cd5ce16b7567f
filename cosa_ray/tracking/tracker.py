"""What a run logs, on rank 0: nothing here blocks a step or ends a run, and every point arrives in MLflow once."""

from __future__ import annotations

import base64
import functools
import io
import json
import logging
import re
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from cosa_ray.config.credentials import redacted
from cosa_ray.tracking.delivery import Delivery
from cosa_ray.tracking.describe import RunDescription, environment
from cosa_ray.tracking.lane import Lane
from cosa_ray.tracking.spool import Record, Spool
from cosa_ray.tracking.store import Tracking
from cosa_ray.tracking.views import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

log = logging.getLogger(__name__)
METRICS, ARTIFACTS = "metrics", "artifacts"
GATHER_SECONDS = 0.5
RETRY_SECONDS = (1.0, 30.0)  # first and longest pause while the server is away
THUMBNAIL = 256
_Method = TypeVar("_Method", bound=Callable[..., Any])


class NoTracker:
    """A tracker that tracks nothing (`--no-track`, and every rank but 0)."""

    run_id: str | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...
    def log_params(self, params: Mapping[str, str]) -> None: ...
    def set_tags(self, tags: Mapping[str, str]) -> None: ...
    def describe(self, description: RunDescription) -> None: ...
    def log_image(self, key: str, image: Image, step: int) -> None: ...
    def log_figure(self, path: str, figure: Figure) -> None: ...
    def log_text(self, path: str, text: str) -> None: ...
    def log_dict(self, path: str, value: Mapping[str, Any]) -> None: ...
    def log_bytes(self, path: str, data: bytes) -> None: ...
    def offer_view(self, view: View) -> None: ...
    def flush(self, timeout: float = 1.0) -> bool:
        return True

    def finish(self, status: str, timeout: float = 15.0) -> None: ...


def open_tracker(tracking: Tracking | None) -> Tracker | NoTracker:
    """The run's tracker, started, with its description and this process's environment logged; for None, none."""
    if tracking is None:
        return NoTracker()
    tracker = Tracker(tracking)
    if tracking.description is not None:
        tracker.describe(tracking.description)
        tracker.log_dict("environment.json", environment())
    return tracker


def deliver(tracking: Tracking, timeout: float = 60.0) -> bool:
    """Deliver what a run that has ended left on its spool, without changing its state; True when nothing is left."""
    delivery, spool = Delivery(tracking), Spool(tracking.spool)
    lanes = [Lane(name, "", spool) for name in (METRICS, ARTIFACTS)]
    deadline, pause = time.monotonic() + timeout, RETRY_SECONDS[0]
    while True:
        try:
            for lane in lanes:
                lane.take_over()
                lane.deliver(delivery)
            return True
        except Exception as error:
            if time.monotonic() + pause > deadline:
                log.warning("the spool %s is not delivered yet: %s", tracking.spool, tracking.store.said(error))
                return False
        time.sleep(pause)
        pause = min(2 * pause, RETRY_SECONDS[1])


def _never_raises(method: _Method) -> _Method:
    """A tracker failure never ends a run: it becomes a warning, once per method."""

    @functools.wraps(method)
    def guarded(self: Tracker, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            said = self._tracking.store.said(error)
            self.warn_once(method.__name__, f"tracking: {method.__name__} failed: {said}")
            return False

    return guarded  # type: ignore[return-value]


class Tracker:
    """Logs one run through a background thread.

    Restarting a run under the same name reattaches to its MLflow run and sets it RUNNING. Whatever an earlier session
    left on the spool goes first; points the earlier session has already are not logged twice.
    """

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking
        self._spool = Spool(tracking.spool)
        session = uuid.uuid4().hex[:8]
        self._lanes = {name: Lane(name, session, self._spool) for name in (METRICS, ARTIFACTS)}
        self._delivery = Delivery(tracking)
        self._warned: set[str] = set()
        self._wake = threading.Condition()
        self._hurry = False
        self._away = False
        self._closed = False
        self._abandoned = False
        self._add(METRICS, {"kind": "status", "status": "RUNNING"})
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the server has answered."""
        return self._delivery.run_id

    @_never_raises
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics at a step; returns at once. A metric's time is now, also when it is delivered later."""
        self._add(METRICS, {"kind": "metrics", "step": int(step), "values": {k: float(v) for k, v in metrics.items()}})

    @_never_raises
    def log_params(self, params: Mapping[str, str]) -> None:
        """Log parameters; those a resumed run changed become tags, because MLflow never changes a parameter."""
        self._add(METRICS, {"kind": "params", "values": {key: str(value) for key, value in params.items()}})

    @_never_raises
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._add(METRICS, {"kind": "tags", "values": {key: str(value) for key, value in tags.items()}})

    @_never_raises
    def describe(self, description: RunDescription) -> None:
        """Log what the run is: parameters, tags, artifacts, datasets."""
        self.log_params(description.params)
        self.set_tags(description.tags)
        for dataset in description.datasets:
            self._add(METRICS, {"kind": "dataset", **dataset})
        for path, data in description.artifacts.items():
            self.log_bytes(path, data)

    @_never_raises
    def log_image(self, key: str, image: Image, step: int) -> None:
        """Log a picture at a step, shown by MLflow as a series under its key (letters, digits, `_-./` and space)."""
        # The names are those MLflow's own log_image gives, which its pages look for.
        key = re.sub(r"[^A-Za-z0-9_\-. ]", "~", key)
        name = f"images/{key}+step+{step}+timestamp+{time.time_ns() // 1_000_000}+{uuid.uuid4()}"
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        files = {
            f"{name}.png": _encoded(image, "PNG", compress_level=3),
            f"{name}+compressed.webp": _encoded(small, "WEBP"),
        }
        self._add(ARTIFACTS, {"kind": "artifact", "image": key, "step": int(step), "files": files})
        if "image tag" not in self._warned:
            self._warned.add("image tag")
            self.set_tags({"mlflow.loggedImages": "true"})

    @_never_raises
    def log_figure(self, path: str, figure: Figure) -> None:
        """Log a matplotlib figure as an artifact; the path's ending gives the format."""
        stream = io.BytesIO()
        figure.savefig(stream, format=path.rpartition(".")[2])
        self.log_bytes(path, stream.getvalue())

    @_never_raises
    def log_text(self, path: str, text: str) -> None:
        """Log a text file as an artifact."""
        self.log_bytes(path, text.encode())

    @_never_raises
    def log_dict(self, path: str, value: Mapping[str, Any]) -> None:
        """Log a JSON file as an artifact."""
        self.log_bytes(path, json.dumps(value, indent=2, default=str).encode())

    @_never_raises
    def log_bytes(self, path: str, data: bytes) -> None:
        """Log a file as an artifact; logging the same path again replaces it."""
        self._add(ARTIFACTS, {"kind": "artifact", "files": {path: base64.b64encode(data).decode()}})

    @_never_raises
    def offer_view(self, view: View) -> None:
        """Add a view to those of the experiment's pages, in place of an earlier one of its key."""
        self._add(METRICS, {"kind": "view", "view": asdict(view)})

    @_never_raises
    def flush(self, timeout: float = 1.0) -> bool:
        """Return once everything logged so far is delivered or on the spool.

        Waits up to `timeout` seconds for the server, not at all while it is away, then writes to the spool itself.
        False when that failed too; a warning says why.
        """
        deadline = time.monotonic() + timeout
        with self._wake:
            self._hurry = True
            self._wake.notify_all()
            while not self._away and any(lane.in_memory for lane in self._lanes.values()):
                left = deadline - time.monotonic()
                if left <= 0 or not self._thread.is_alive():
                    break
                self._wake.wait(min(left, 0.05))
        for lane in self._lanes.values():
            lane.spill()
        return True

    @_never_raises
    def finish(self, status: str, timeout: float = 15.0) -> None:
        """End the run as FINISHED, FAILED or KILLED; what is not delivered in `timeout` seconds stays on the spool."""
        if self._closed:
            return
        self._add(METRICS, {"kind": "status", "status": status})
        with self._wake:
            self._closed = self._hurry = True
            self._wake.notify_all()
        self._thread.join(timeout)
        with self._wake:
            self._abandoned = True
            self._wake.notify_all()
        for lane in self._lanes.values():
            lane.spill()
        if not self._idle():
            log.warning(
                "run %s: not everything is in MLflow yet; it waits in %s and is delivered when the run is next started",
                self._tracking.run,
                self._tracking.spool,
            )

    def warn_once(self, topic: str, message: str) -> None:
        """Log a warning the first time its topic comes up."""
        if topic not in self._warned:
            self._warned.add(topic)
            log.warning(message)

    def _add(self, lane: str, record: Record) -> None:
        if self._closed:
            return
        self._lanes[lane].add({"time": time.time_ns() // 1_000_000, **record})
        with self._wake:
            self._wake.notify_all()

    def _idle(self) -> bool:
        return all(lane.empty for lane in self._lanes.values())

    def _work(self) -> None:
        """The background thread: gather, deliver, and while the server is away spool and try again."""
        pause = 0.0
        taken_over = False
        while True:
            with self._wake:
                if pause:
                    self._wake.wait_for(lambda: self._abandoned or self._hurry, pause)
                else:
                    self._wake.wait_for(lambda: self._closed or not self._idle())
                    self._wake.wait_for(lambda: self._closed or self._hurry, GATHER_SECONDS)
                self._hurry = False
                if self._abandoned or (self._closed and self._idle()):
                    return
            try:
                if not taken_over:
                    for lane in self._lanes.values():
                        lane.take_over()
                    taken_over = True
                failed = self._deliver()
            except Exception as error:
                failed = error
            if failed is None:
                if self._away:
                    log.info("MLflow at %s answers again", self._tracking.store.shown)
                pause = 0.0
            else:
                pause = min(2 * pause, RETRY_SECONDS[1]) if pause and not self._closed else RETRY_SECONDS[0]
                self._spill(failed)
            self._away = failed is not None
            with self._wake:
                self._wake.notify_all()

    def _deliver(self) -> Exception | None:
        """Try every lane, so that a broken artifact store does not hold up the metrics; returns the first failure."""
        failed = None
        for lane in self._lanes.values():
            try:
                lane.deliver(self._delivery)
            except Exception as error:
                failed = failed or error
        return failed

    def _spill(self, cause: Exception) -> None:
        store = self._tracking.store
        # Not as exc_info: the lines of a traceback may hold the store's password.
        log.debug("MLflow delivery failed: %s", redacted("".join(traceback.format_exception(cause)), store.uri))
        if not self._away:
            log.warning(
                "MLflow at %s does not take records (%s); the run goes on, they wait in %s and are delivered later",
                store.shown,
                store.said(cause)[:200],
                self._tracking.spool,
            )
        try:
            for lane in self._lanes.values():
                lane.spill()
        except Exception as error:
            self.warn_once("spool", f"tracking: {self._tracking.spool} cannot be written: {store.said(error)}")


def _encoded(image: Image, kind: str, **options: Any) -> str:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return base64.b64encode(stream.getvalue()).decode()
