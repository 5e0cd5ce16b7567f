"""What Ray's controller does for a run beyond its own: give up what keeps failing, end workers that never start.

Nothing here imports torch: the controller would spend seconds on it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import ray
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from cosa_ray.training.session import sentence_of
from cosa_ray.training.storage import CheckpointStore, RunFolder


class GiveUp(UserCallback):
    """Counts the failures of a run's workers; once it is given up, the workers that start next are told to end."""

    def __init__(self, run: str, folder: str, limit: int, monitor: Any) -> None:
        self._run, self._folder, self._limit, self._monitor = run, folder, limit, monitor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by the controller when workers have failed or died, before it starts them again."""
        count_failure(self._run, self._folder, self._limit, self._monitor, cause_of(worker_exceptions))


class StartInTime(WorkerGroupCallback, ControllerCallback):
    """Ends workers that take longer than so many seconds from their making to their first answer about the run.

    Ray asks workers for their health only once all have started, and waits without limit for one that froze before.
    Ended, they fail the start, and it is tried again. Their room is freed here: Ray forgets that of workers which it
    has made and could not hand the run, until the job ends.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timer: threading.Timer | None = None
        self._room: Any = None  # of workers that have not begun

    def before_init_train_context(self, workers: Sequence[Any]) -> dict[str, list[Any]]:
        """Called by the controller when the workers' processes are there; nothing of the run is in them yet."""
        self._stop()
        self._timer = threading.Timer(self._seconds, _end, [[worker.actor for worker in workers]])
        self._timer.daemon = True
        self._timer.start()
        return {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called when the workers are ready, and before the run is handed to them."""
        self._room = worker_group.get_worker_group_state().placement_group_handle

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Called when the run was handed to all workers: from here on Ray frees their room."""
        self._room = None

    async def before_controller_shutdown(self) -> None:
        """Called when the controller gives up, for one because workers died when they were handed the run."""
        self._stop()
        if self._room is not None:
            self._room.shutdown()
            self._room = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Called when all workers have answered, or failed to: from here on Ray sees a worker that is silent."""
        self._stop()

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Called before the workers are ended."""
        self._stop()

    def before_worker_group_abort(self, worker_group_context: Any) -> None:
        """Called before the workers are ended without being asked."""
        self._stop()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _end(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


def count_failure(run: str, folder: str, limit: int, monitor: Any, cause: str) -> None:
    """Count a failure of a run; over the limit without a new checkpoint, keep the sentence that ends it.

    Ray's own limit counts over the whole run, and over days machines come and go more often than any limit that still
    finds a mistake soon.
    """
    key = failures_of(run)
    before, count = ray.get(monitor.kept.remote(key)) or (None, 0)
    at = before
    with contextlib.suppress(Exception):  # the storage may be what failed
        latest = CheckpointStore(RunFolder(folder), "").latest()
        at = latest.step if latest is not None else 0
    count = count + 1 if at == before else 1
    ray.get(monitor.keep.remote(key, (at, count)))
    if count > limit:
        often = f" ({count} failures at the checkpoint of step {at or 0})" if limit else ""
        ray.get(monitor.keep_first.remote(sentence_of(run), f"{cause}{often}"))


def failures_of(run: str) -> str:
    """Under what the monitor keeps (step of the last checkpoint, failures since)."""
    return f"failures of {run}"


def cause_of(failures: dict[int, Exception]) -> str:
    """The message of the first worker that failed by itself, on one line."""
    error: BaseException = next(iter(failures.values()))
    cause = getattr(error, "cause", None) or error
    return " ".join(str(cause).strip().splitlines()[-1:]) or type(cause).__name__
