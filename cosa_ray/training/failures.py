"""When a run that keeps failing is given up: after so many failures without a new checkpoint in between.

Read by Ray's controller, so nothing here imports torch.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.train import UserCallback

from cosa_ray.training.session import sentence_of
from cosa_ray.training.storage import CheckpointStore, RunFolder


class GiveUp(UserCallback):
    """Counts the failures of a run's workers; once it is given up, the workers that start next are told to end."""

    def __init__(self, run: str, folder: str, limit: int, monitor: Any) -> None:
        self._run, self._folder, self._limit, self._monitor = run, folder, limit, monitor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by the controller when workers have failed or died, before it starts them again."""
        count_failure(self._run, self._folder, self._limit, self._monitor, cause_of(worker_exceptions))


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
