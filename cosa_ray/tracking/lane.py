"""Records on their way to MLflow, in order: first the segments on the spool, then those in memory."""

from __future__ import annotations

import threading
from collections import deque

from cosa_ray.tracking.delivery import Delivery
from cosa_ray.tracking.spool import Record, Spool, session_of


class Lane:
    """One lane of a run's records (metrics and what goes with them, or artifacts), used by two threads."""

    def __init__(self, name: str, session: str, spool: Spool) -> None:
        """session: this start of the run, under which records go to the spool."""
        self.name = name
        self._session = session
        self._spool = spool
        self._lock = threading.Lock()
        self._segments: list[str] = []
        self._memory: deque[Record] = deque()

    def add(self, record: Record) -> None:
        """Append a record."""
        with self._lock:
            self._memory.append(record)

    @property
    def in_memory(self) -> int:
        """Records that are neither delivered nor on the spool."""
        return len(self._memory)

    @property
    def empty(self) -> bool:
        """True when everything is delivered."""
        return not self._memory and not self._segments

    def take_over(self) -> None:
        """Put what earlier sessions left on the spool before one's own."""
        with self._lock:
            self._segments = self._spool.segments(self.name)

    def spill(self) -> None:
        """Move everything in memory to the spool."""
        with self._lock:
            if self._memory:
                self._segments.append(self._spool.write(self._session, self.name, self._memory))
                self._memory.clear()

    def deliver(self, delivery: Delivery) -> None:
        """Send everything, oldest first; raises when the server is away, with nothing lost."""
        while True:
            # One look decides, or records spilled in between would be overtaken by younger ones in memory.
            with self._lock:
                segment = self._segments[0] if self._segments else None
                batch = list(self._memory) if segment is None else []
            if segment is not None:
                delivery.send(self._spool.read(segment), self.name, session_of(segment))
                self._spool.remove(segment)
                with self._lock:
                    self._segments.remove(segment)
            elif batch:
                delivery.send(batch, self.name, self._session)
                with self._lock:
                    # Unless a flush has spilled the batch meanwhile; sending it again later changes nothing.
                    if self._memory and self._memory[0] is batch[0]:
                        for _ in batch:
                            self._memory.popleft()
            else:
                return
