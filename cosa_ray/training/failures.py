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
    """Counts the failures of a run's workers at one checkpoint; over the limit, the next ones are told to end.

    Ray's own limit counts over the whole run, and over days machines come and go more often than any limit that still
    finds a mistake soon.
    """

    def __init__(self, run: str, folder: str, limit: int, monitor: Any) -> None:
        self._run, self._folder, self._limit, self._monitor = run, folder, limit, monitor
        self._at: int | None = None
        self._count = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by the controller when workers have failed or died, before it starts them again."""
        at = self._at
        with contextlib.suppress(Exception):  # the storage may be what failed
            latest = CheckpointStore(RunFolder(self._folder), "").latest()
            at = latest.step if latest is not None else 0
        self._count = self._count + 1 if at == self._at else 1
        self._at = at
        if self._count > self._limit:
            sentence = f"{cause_of(worker_exceptions)}"
            if self._limit:
                sentence += f" ({self._count} failures at the checkpoint of step {at or 0})"
            ray.get(self._monitor.keep_first.remote(sentence_of(self._run), sentence))


def cause_of(failures: dict[int, Exception]) -> str:
    """The message of the first worker that failed by itself, on one line."""
    error: BaseException = next(iter(failures.values()))
    cause = getattr(error, "cause", None) or error
    return " ".join(str(cause).strip().splitlines()[-1:]) or type(cause).__name__
