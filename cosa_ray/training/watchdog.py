"""Ends a worker that makes no progress, so that Ray starts it again: a hang raises nothing by itself."""

from __future__ import annotations

import logging
import os
import threading
import time

log = logging.getLogger(__name__)
HUNG = 75  # exit code: try again (EX_TEMPFAIL of sysexits.h)


class Watchdog:
    """A thread that ends this process when `alive` was not called for so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def alive(self) -> None:
        """There was progress; costs nothing."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(5.0, self._seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self._seconds:
                log.error("no step for %.0f s (resources.hang_seconds); this worker ends and is started again", silent)
                # Not an exception: the thread that hangs would not see it.
                os._exit(HUNG)
