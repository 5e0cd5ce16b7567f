"""How a worker talks to whoever started the run: progress and metrics out, a wish to stop in; with Ray and without."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from cosa_ray.training.watchdog import Watchdog

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Progress:
    """Where a run is: shown in the progress line and in a sweep's table. `hours`: of GPUs or CPU threads, so far."""

    run: str
    step: int
    steps: int
    phase: str
    loss: float | None = None
    miou: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    hours: float | None = None

    def line(self) -> str:
        """One plain line for logs and terminals without a cursor."""
        parts = [f"{self.run}: step {self.step}/{self.steps} {self.phase}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.miou is not None:
            parts.append(f"mIoU {self.miou:.3f}")
        if self.images_per_second is not None:
            parts.append(f"{self.images_per_second:.1f} images/s")
        if self.seconds_left is not None:
            minutes, seconds = divmod(round(self.seconds_left), 60)
            parts.append(f"{minutes}:{seconds:02d} left")
        return "  ".join(parts)


class Session(Protocol):
    """What the worker loop needs of its surroundings."""

    def progress(self, progress: Progress) -> None:
        """Show where the run is; never blocks."""

    def report(self, metrics: dict[str, float]) -> None:
        """Hand an evaluation's metrics to the scheduler; every worker calls it."""

    def validate(self, name: str, step: int) -> None:
        """Have a registered checkpoint evaluated beside the run; every worker calls it."""

    def validated(self) -> None:
        """Return once no evaluation runs beside the run any more."""

    def stop_wished(self) -> bool:
        """True when somebody asked the run to stop."""

    def leaving(self) -> bool:
        """True once when a machine of the run is told to go, while there is time for a checkpoint."""

    def alive(self) -> None:
        """There was progress: a step, or a batch of an evaluation."""

    def close(self) -> None:
        """Release what the session holds."""


class LocalSession:
    """One process, no Ray: progress goes to a function, the wish to stop is an event."""

    def __init__(self, show: Callable[[Progress], None], stop: threading.Event) -> None:
        self._show = show
        self._stop = stop

    def progress(self, progress: Progress) -> None:
        self._show(progress)

    def report(self, metrics: dict[str, float]) -> None:
        pass

    def validate(self, name: str, step: int) -> None:
        raise NotImplementedError("without Ray nothing runs beside a run")

    def validated(self) -> None:
        pass

    def stop_wished(self) -> bool:
        return self._stop.is_set()

    def leaving(self) -> bool:
        return False

    def alive(self) -> None:
        pass

    def close(self) -> None:
        pass


class RaySession:
    """A Ray Train worker: talks to the driver through the run's monitor actor, to Tune through `ray.train.report`."""

    def __init__(self, monitor: Any, run: str, rank: int, hang_seconds: float) -> None:
        self._monitor = monitor
        self._watchdog = Watchdog(hang_seconds)
        self._going: set[str] = set()
        self._run = run
        self._wish = threading.Event()
        self._closed = threading.Event()
        # Rank 0 alone listens; the loop's all-reduce tells the others at the same step.
        self._thread = threading.Thread(target=self._listen, name="stop-wish", daemon=True) if rank == 0 else None
        if self._thread:
            self._thread.start()

    def progress(self, progress: Progress) -> None:
        self._monitor.post.remote(asdict(progress))

    def report(self, metrics: dict[str, float]) -> None:
        import ray.train

        ray.train.report(metrics)

    def validate(self, name: str, step: int) -> None:
        import ray.train
        from ray.train import CheckpointUploadMode, ValidationTaskConfig

        context = ray.train.get_context()
        storage, checkpoint = context.get_storage(), None
        if context.get_world_rank() == 0:
            path = f"{storage.experiment_fs_path}/{name}"
            checkpoint = ray.train.Checkpoint(path, filesystem=storage.storage_filesystem)
        ray.train.report(
            {},
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            validation=ValidationTaskConfig(fn_kwargs={"name": name, "step": step}) if checkpoint else False,
        )

    def validated(self) -> None:
        import ray.train

        ray.train.get_all_reported_checkpoints()

    def stop_wished(self) -> bool:
        return self._wish.is_set()

    def leaving(self) -> bool:
        going = _machines_going()
        new = going - self._going
        self._going |= going
        return bool(new)

    def alive(self) -> None:
        self._watchdog.alive()

    def close(self) -> None:
        self._watchdog.close()
        self._closed.set()
        if self._thread:
            self._thread.join(timeout=2 * POLL_SECONDS)

    def _listen(self) -> None:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        while not self._closed.wait(POLL_SECONDS):
            try:
                if ray.get(self._monitor.stop_wished.remote(self._run), timeout=5):
                    self._wish.set()
                    return
            except GetTimeoutError:
                continue
            except RayError:
                # The driver and its monitor are gone; the run itself is Ray's to end.
                return


def _machines_going() -> set[str]:
    """Nodes of this run's workers that Ray is draining, as its watcher has told this worker.

    Ray's own `get_preemption_info` asks all workers to meet; the loop has them meet each step anyway.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    return set() if info is None else set(info.preempted_node_ids)


class Monitor:
    """Actor beside the driver: the latest progress of every run, who is asked to stop, and who may run at once.

    Its calls run in several threads, so what one call reads and writes together it does under the lock.
    """

    def __init__(self, slots: int | None = None) -> None:
        """`slots`: how many runs may hold one at once, None for any number."""
        self._latest: dict[str, dict[str, Any]] = {}
        self._stop: set[str] = set()
        self._stop_all = False
        self._slots = slots
        self._holders: set[str] = set()
        self._kept: dict[str, Any] = {}
        self._lock = threading.Lock()

    def post(self, progress: dict[str, Any]) -> None:
        """Keep a run's newest progress."""
        self._latest[progress["run"]] = progress

    def latest(self) -> dict[str, dict[str, Any]]:
        """Newest progress by run."""
        return self._latest

    def stop(self, run: str | None = None) -> None:
        """Ask one run, or all, to write a checkpoint and end."""
        if run is None:
            self._stop_all = True
        else:
            self._stop.add(run)

    def stop_wished(self, run: str) -> bool:
        """True when this run was asked to end."""
        return self._stop_all or run in self._stop

    def acquire(self, run: str) -> bool:
        """Give the run a slot and say True, also when it holds one already; False while none is free."""
        with self._lock:
            if run not in self._holders and self._slots is not None and len(self._holders) >= self._slots:
                return False
            self._holders.add(run)
            return True

    def release(self, run: str) -> None:
        """Take the run's slot back, if it holds one."""
        with self._lock:
            self._holders.discard(run)

    def keep(self, key: str, value: Any) -> None:
        """Remember a value as long as the monitor lives; None forgets it."""
        with self._lock:
            if value is None:
                self._kept.pop(key, None)
            else:
                self._kept[key] = value

    def keep_first(self, key: str, value: Any) -> None:
        """Remember a value unless one is kept under the key already."""
        with self._lock:
            self._kept.setdefault(key, value)

    def kept(self, key: str) -> Any:
        """The value kept under a key, None when there is none."""
        with self._lock:
            return self._kept.get(key)


def sentence_of(run: str) -> str:
    """Under what the monitor keeps the sentence that ends a run."""
    return f"mistake of {run}"


def start_monitor(slots: int | None = None) -> Any:
    """Start the monitor actor of this driver; it ends with the driver, or when the handle is dropped."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Zero CPUs, so that it never takes a worker's place; on the driver's machine, which other machines outlive or not.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_concurrency=4, scheduling_strategy=here)(Monitor).remote(slots)


def end_monitor(monitor: Any) -> None:
    """End a monitor that others may hold a handle of, as Tune does of what its trials are given."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(monitor)
