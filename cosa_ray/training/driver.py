"""From a config to a finished run: check everything first, then train under Ray Train or in this process."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cosa_ray.config.load import apply_overrides
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.training.autoscaler import to_come
from cosa_ray.training.lease import check_held, hold
from cosa_ray.training.loop import Job, Outcome, run_worker
from cosa_ray.training.ray_train import fit, ray_cluster
from cosa_ray.training.room import alive_nodes, cpus_per_worker, shape, slots
from cosa_ray.training.runs import Run, check_free, check_name, create_run, find_run, resume_run
from cosa_ray.training.session import LocalSession, Progress, start_monitor
from cosa_ray.training.storage import RunFolder

log = logging.getLogger(__name__)
POLL_SECONDS = 0.5
DELIVERY_SECONDS = 20.0


@dataclass(frozen=True)
class RunResult:
    """How a run ended and where everything of it is."""

    name: str
    folder: str
    mlflow_run_id: str | None
    tracking_uri: str | None
    state: str
    step: int
    cause: str | None
    metric: str
    best_metrics: dict[str, float]
    last_metrics: dict[str, float]
    best_checkpoint: str | None
    last_checkpoint: str | None

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


def train(
    config: Config,
    *,
    name: str | None = None,
    resume: bool = False,
    local: bool = False,
    track: bool = True,
    show: Callable[[Progress], None] | None = None,
) -> RunResult:
    """Train a config to its end and return where the results are; the function behind `cosa-ray train`.

    `local` trains in this process without Ray; `track=False` without MLflow. Ctrl-C and SIGTERM write a checkpoint and
    end the run as `stopped`. Raises UserError before anything expensive when something is wrong, RunFailed when the
    run did not end well.
    """
    name = check_name(name or time.strftime("run-%Y%m%d-%H%M%S"))
    if local and config.least_workers > 1:
        raise UserError(f"--local is one process, but workers is at least {config.least_workers}; add --set workers=1.")
    if local and config.evaluation.asynchronous:
        raise UserError(
            "--local is one process, and evaluation.asynchronous needs Ray's for a second; set it to false."
        )
    config = resolve(config, track)
    run = resume_run(name, config) if resume else None
    if run is None:
        check_free(name, config)
    elif run.record.state == "finished":
        log.warning("run %s is finished already; nothing to do", name)
        if track:
            run = _deliver_rest(run, config)
        return summary(run, Outcome("finished", run.step))
    preflight(config, initialise=not resume and config.init_from is None and config.continue_from is None)
    show = show or (lambda progress: log.info("%s", progress.line()))
    with hold(RunFolder(f"{config.storage.rstrip('/')}/{name}"), f"run {name}") as lease:
        # Once more: whoever held the name until now may have made or changed the run.
        run = resume_run(name, config) if resume else None
        if run is None:
            check_free(name, config)
        # In this order: ray.init puts signal handlers of its own in place.
        with contextlib.nullcontext() if local else ray_cluster(), catch_stop() as stop:
            run, job = prepare(config, name, run, track=track, lease=lease.token, local=local)
            outcome = run_worker(job, LocalSession(show, stop)) if local else _fit_and_show(job, stop, show)
            check_held(run.folder, lease.token, f"run {name}")
            result = conclude(run, job, outcome)
    if result.state in ("failed", "diverged"):
        raise RunFailed(f"run {name} {result.state} at step {result.step}: {result.cause} (folder {result.folder}).")
    return result


def resolve(config: Config, track: bool = True) -> Config:
    """The config with every local path absolute, because workers do not share this folder."""

    def absolute(path: str) -> str:
        return path if "://" in path or "::" in path else str(Path(path).expanduser().resolve())

    changes: dict[str, Any] = {"storage": absolute(config.storage), "data.dataset": absolute(config.data.dataset)}
    if config.model.checkpoint:
        changes["model.checkpoint"] = absolute(config.model.checkpoint)
    if track:
        from cosa_ray.tracking.store import sqlite_path, tracking_uri

        # A server's address may come from the environment with a password in it, which no file may hold.
        if sqlite_path(uri := tracking_uri(config)):
            changes["tracking.uri"] = uri
    return apply_overrides(config, changes, "resolved config")


def preflight(config: Config, *, initialise: bool = True) -> tuple[int, int]:
    """Find the user's mistakes before anything starts: dataset, splits, weights, backbone, evaluation masks.

    Returns the bytes of a checkpoint, whole and of its weights alone.
    """
    import torch

    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.training.state import TrainState

    dataset = open_dataset(config.data.dataset)
    train_split, val_split = dataset.split(config.data.train_split), dataset.split(config.data.val_split)
    if not len(train_split):
        raise UserError(f"split {config.data.train_split} of {config.data.dataset} is empty; import images into it.")
    if not val_split.has_masks:
        raise UserError(
            f"split {config.data.val_split} of {config.data.dataset} has no masks to evaluate on; "
            "set data.val_split to a split with masks."
        )
    state = TrainState(config, dataset.num_classes, torch.device("cpu"), initialise=initialise)
    if config.init_from is not None:
        source = find_run(config.init_from, config.storage)
        with source.folder.local_copy(source.best().name) as folder:
            state.start_from(folder)
    if config.continue_from is not None:
        source = find_run(config.continue_from, config.storage)
        with source.folder.local_copy(source.last().name) as folder:
            state.load(folder)
        if state.step >= config.last_step:
            raise UserError(
                f"continue_from={config.continue_from}: its last checkpoint is of step {state.step}, and this run ends "
                f"at {config.last_step}; raise training.steps, or continue from an earlier run."
            )
    return state.checkpoint_bytes()


def prepare(
    config: Config,
    name: str,
    run: Run | None = None,
    *,
    track: bool = True,
    parent_run_id: str | None = None,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
    lease: str | None = None,
    local: bool = False,
) -> tuple[Run, Job]:
    """Check what the cluster offers, open the tracking store, and make the run's folder (unless `run` is continued).

    `config` is resolved and preflighted. A sweep names its parent run. `lease`: token of the lease on the
    folder, when it is held. `local`: no cluster has a part in it. Raises UserError, with nothing left behind.
    """
    nodes = 1
    if not local and "ray" in sys.modules and sys.modules["ray"].is_initialized():
        alive = alive_nodes()
        coming = to_come(alive)
        each, workers = cpus_per_worker(config, alive, coming, training=True), config.least_workers
        if slots(alive, each, config.resources.gpus_per_worker) < workers:
            have = f"{shape([node.cpus for node in alive])} CPUs, {shape([node.gpus for node in alive])} GPUs"
            log.warning("%d workers have no room yet (%s); waiting for the autoscaler's machines", workers, have)
        nodes = len(alive) + len(coming)
    init_from = continue_from = None
    if config.init_from is not None:
        source = find_run(config.init_from, config.storage)
        init_from = f"{source.folder.uri}/{source.best().name}"
    if config.continue_from is not None:
        source = find_run(config.continue_from, config.storage)
        continue_from = f"{source.folder.uri}/{source.last().name}"
    folder = run.folder if run is not None else check_free(name, config)
    tracking = None
    if track:
        from cosa_ray.tracking.store import check_reachable, open_store

        tracking = open_store(
            config, run_name=name, folder=folder.uri, parent_run_id=parent_run_id, parent=parent, tags=tags
        )
        check_reachable(tracking, nodes)
    if run is None:
        from cosa_ray.data.dataset import open_dataset
        from cosa_ray.evaluation.naming import best_metric, metric_prefix

        images = len(open_dataset(config.data.dataset).split(config.data.val_split))
        run = create_run(name, config, best_metric(config, metric_prefix(config, images)))
    if tracking is not None:
        run = run.update(tracking_uri=tracking.uri, parent_run_id=parent_run_id)
    cpus = config.resources.cpus_per_worker
    return run, Job(name, run.folder.uri, config, tracking, cpus, init_from, continue_from, lease=lease)


def conclude(run: Run, job: Job, outcome: Outcome) -> RunResult:
    """Write down how the run ended, in MLflow too, drop full states nobody asked for, and sum it up."""
    mlflow_run_id = None
    if job.tracking is not None:
        from cosa_ray.tracking.store import find_run_id
        from cosa_ray.tracking.tracker import open_tracker

        if outcome.state not in ("finished", "stopped"):
            # Workers that died could not say so: their MLflow run would stay RUNNING.
            tracker = open_tracker(replace(job.tracking, description=None))
            tracker.set_tags({"cosa_ray.cause": outcome.cause} if outcome.cause else {})
            tracker.finish("FAILED")
        mlflow_run_id = find_run_id(job.tracking)
    run = run.update(state=outcome.state, cause=outcome.cause, mlflow_run_id=mlflow_run_id)
    if outcome.state == "finished" and not job.config.checkpoint.keep_full_state:
        run.checkpoints.drop_full_states()
    return summary(run, outcome)


def summary(run: Run, outcome: Outcome) -> RunResult:
    """What a run's folder says, as a result."""
    best, last = run.checkpoints.best(), run.checkpoints.latest()
    return RunResult(
        name=run.record.name,
        folder=run.folder.uri,
        mlflow_run_id=run.record.mlflow_run_id,
        tracking_uri=run.record.tracking_uri,
        state=outcome.state,
        step=outcome.step,
        cause=outcome.cause,
        metric=run.record.metric,
        best_metrics=best.metrics if best else {},
        last_metrics=last.metrics if last else {},
        best_checkpoint=f"{run.folder.uri}/{best.name}" if best else None,
        last_checkpoint=f"{run.folder.uri}/{last.name}" if last else None,
    )


@contextlib.contextmanager
def catch_stop() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the yielded event once; a second one acts as usual. Outside the main thread: no change."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: object) -> None:
        log.warning("%s: writing a checkpoint, then ending (again to end at once)", signal.Signals(number).name)
        stop.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _deliver_rest(run: Run, config: Config) -> Run:
    """Deliver what a finished run left on its spool, if its server takes it now; never fails."""
    from cosa_ray.tracking.store import find_run_id, open_store
    from cosa_ray.tracking.tracker import deliver

    try:
        if run.folder.exists("spool"):
            record = run.record
            tracking = open_store(
                config, run_name=record.name, folder=run.folder.uri, parent_run_id=record.parent_run_id
            )
            deliver(tracking, timeout=DELIVERY_SECONDS)
            if run.record.mlflow_run_id is None:  # the server was away when the run ended
                run = run.update(mlflow_run_id=find_run_id(tracking))
    except Exception as error:
        log.warning("what run %s left on its spool is not delivered yet: %s", run.record.name, error)
    return run


def _fit_and_show(job: Job, stop: threading.Event, show: Callable[[Progress], None]) -> Outcome:
    """Fit in a thread, so that this one shows progress and passes a wish to stop on to the workers."""
    import ray

    monitor = start_monitor()
    outcomes: list[Outcome | BaseException] = []

    def work() -> None:
        try:
            outcomes.append(fit(job, monitor))
        except BaseException as error:  # handed to the main thread below
            outcomes.append(error)

    thread = threading.Thread(target=work, name="fit")
    thread.start()
    shown: dict[str, Any] | None = None
    asked = False
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        if stop.is_set() and not asked:
            ray.get(monitor.stop.remote())
            asked = True
        latest = ray.get(monitor.latest.remote()).get(job.name)
        if latest is not None and latest != shown:
            shown = latest
            show(Progress(**latest))
    (outcome,) = outcomes
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
