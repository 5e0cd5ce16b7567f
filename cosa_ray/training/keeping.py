"""Checkpoints are written by a thread while the run goes on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from cosa_ray.config.protocol import NetworkName
from cosa_ray.config.schema import Config
from cosa_ray.data.card import DatasetCard
from cosa_ray.evaluation.description import Description
from cosa_ray.training.state import Snapshot
from cosa_ray.training.storage import CheckpointStore, patiently

_LOOK_SECONDS = 1.0


class CheckpointWriter:
    """Writes one checkpoint at a time, in two parts: the state at once, and what makes it count when that is known.

    A part that storage refuses is tried again (`patiently`); when it fails for good, so does what follows it, and the
    next `begin` or `wait` raises its error.

    Args:
        guard: called before every part, to raise where nothing may be written any more.
        flush: called last before a checkpoint counts.
        alive: called while somebody waits here, for every try that storage was given: one that never ends is a hang.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: Config,
        card: DatasetCard,
        *,
        guard: Callable[[], None],
        flush: Callable[[], object],
        alive: Callable[[], None],
    ) -> None:
        self._store, self._config, self._card = store, config, card
        self._guard, self._flush, self._alive = guard, flush, alive
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._uploaded: Future[str] | None = None
        self._pending: list[Future[str]] = []
        self._tries = 0

    def begin(self, snapshot: Snapshot) -> None:
        """Start to upload a state, once the checkpoint before it counts."""
        self.wait()
        self._uploaded = self._start(lambda _: self._upload(snapshot), f"the checkpoint of step {snapshot.step}")

    def complete(self, description: Description, metrics: dict[str, float], *, awaited: bool = False) -> None:
        """Have the checkpoint that was begun described and registered, and return.

        awaited: it is kept until `revise` brings the metrics of an evaluation beside the run.
        """
        uploaded = self._uploaded
        assert uploaded is not None
        self._start(
            lambda name: self._register(name, description, metrics, awaited),
            f"registering the checkpoint of step {description.step}",
            uploaded,
        )

    def revise(self, name: str, better: NetworkName, metrics: dict[str, float]) -> None:
        """Have the metrics of a registered checkpoint added to its description and to the index, and return."""

        def add(_name: str) -> str:
            with self._store.folder.local_copy(name) as local:
                said = Description.read(local)
            said = replace(said, metrics=said.metrics | metrics, better_network=better)
            return self._register(name, said, said.metrics, False)

        self._start(add, f"the metrics of {name}")

    def wait(self) -> None:
        """Return once all that was started counts. Raises what went wrong."""
        seen = -1
        while wait(self._pending, _LOOK_SECONDS).not_done:
            if self._tries != seen:
                seen = self._tries
                self._alive()
        done, self._pending = self._pending, []
        for each in done:
            each.result()

    def failed(self) -> bool:
        """True when something went wrong that the next `wait` raises; never waits."""
        return any(each.done() and each.exception() is not None for each in self._pending)

    def close(self) -> None:
        """Let what was started come to its end, whatever that is."""
        wait(self._pending)
        self._thread.shutdown()

    def _start(self, action: Callable[[str], str], what: str, after: Future[str] | None = None) -> Future[str]:
        """Have an action done with the name that `after` gave; it fails at once where that has failed."""

        def work() -> str:
            name = after.result() if after is not None else ""
            return patiently(lambda: action(name), what, self._tried)

        self._pending.append(self._thread.submit(work))
        return self._pending[-1]

    def _tried(self) -> None:
        self._tries += 1

    def _upload(self, snapshot: Snapshot) -> str:
        self._guard()
        with tempfile.TemporaryDirectory(prefix="cosa-ray-checkpoint-") as temporary:
            snapshot.write(Path(temporary), self._config, self._card)
            return self._store.upload(Path(temporary), snapshot.step)

    def _register(self, name: str, description: Description, metrics: dict[str, float], awaited: bool) -> str:
        self._guard()
        with tempfile.TemporaryDirectory(prefix="cosa-ray-checkpoint-") as temporary:
            description.write(Path(temporary))
            self._store.upload(Path(temporary), description.step)
        self._flush()
        self._guard()
        self._store.register(name, description.step, metrics, awaited=awaited)
        return name
