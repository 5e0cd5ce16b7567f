"""From a config to a finished run: check everything first, then train under Ray Train or in this process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cosa_ray.config.load import apply_overrides
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.training.loop import Job, Outcome, run_worker
from cosa_ray.training.runs import Run, check_free, check_name, create_run, find_run, read_run, resume_run
from cosa_ray.training.session import LocalSession, Progress, RaySession, start_monitor

log = logging.getLogger(__name__)
POLL_SECONDS = 0.5

# Read by Ray Train when a run starts: workers keep the folder they are in, print once, and are looked at often.
RAY_TRAIN_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
}


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
    if local and config.workers > 1:
        raise UserError(f"--local is one process, but workers is {config.workers}; add --set workers=1.")
    config = resolve(config, track)
    run = resume_run(name, config) if resume else None
    if run is None:
        check_free(name, config)
    elif run.record.state == "finished":
        log.warning("run %s is finished already; nothing to do", name)
        return summary(run, Outcome("finished", _last_step(run)))
    preflight(config, initialise=not resume and config.init_from is None)
    show = show or (lambda progress: log.info("%s", progress.line()))
    if local:
        run, job = prepare(config, name, run, track=track)
        with catch_stop() as stop:
            result = conclude(run, job, run_worker(job, LocalSession(show, stop)))
    else:
        # In this order: ray.init puts signal handlers of its own in place.
        with ray_cluster(), catch_stop() as stop:
            run, job = prepare(config, name, run, track=track)
            result = conclude(run, job, _fit_and_show(job, stop, show))
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


def preflight(config: Config, *, initialise: bool = True) -> None:
    """Find the user's mistakes before anything starts: dataset, splits, weights, backbone, evaluation masks."""
    import torch

    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.method.losses import DENSE_ENERGY_READY
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
    if config.losses.dense_energy > 0 and not DENSE_ENERGY_READY:
        log.warning(
            "notice: losses.dense_energy is %g, but the dense energy is not built yet; this runs with 0",
            config.losses.dense_energy,
        )


def prepare(
    config: Config,
    name: str,
    run: Run | None = None,
    *,
    track: bool = True,
    parent_run_id: str | None = None,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> tuple[Run, Job]:
    """Check what the cluster offers, open the tracking store, and make the run's folder (unless `run` is continued).

    `config` is resolved and preflighted. A sweep names its parent run. Raises UserError, with nothing left behind.
    """
    nodes = 1
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        ray = sys.modules["ray"]
        nodes = sum(node["Alive"] for node in ray.nodes())
        cpus_per_worker(config, ray.cluster_resources())
    init_from = None
    if config.init_from is not None:
        source = find_run(config.init_from, config.storage)
        init_from = f"{source.folder.uri}/{source.best().name}"
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
        from cosa_ray.evaluation.evaluate import best_metric, metric_prefix

        images = len(open_dataset(config.data.dataset).split(config.data.val_split))
        run = create_run(name, config, best_metric(config, metric_prefix(config, images)))
    if tracking is not None:
        run = run.update(tracking_uri=tracking.uri, parent_run_id=parent_run_id)
    return run, Job(name, run.folder.uri, config, tracking, config.resources.cpus_per_worker, init_from)


def conclude(run: Run, job: Job, outcome: Outcome) -> RunResult:
    """Write down how the run ended, drop full states nobody asked for, and sum it up."""
    mlflow_run_id = None
    if job.tracking is not None:
        from cosa_ray.tracking.store import find_run_id

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


def fit(job: Job, monitor: Any, callbacks: Sequence[Any] = ()) -> Outcome:
    """Run a job's workers under Ray Train and wait; also what a Tune trial calls. Never raises for a failed run."""
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    config = job.config
    os.environ.update({key: os.environ.get(key, value) for key, value in RAY_TRAIN_SETTINGS.items()})
    job = replace(job, cpus_per_worker=cpus_per_worker(config, ray.cluster_resources()))
    storage, _, name = job.folder.rpartition("/")

    def worker(handed: dict[str, Any]) -> Outcome:
        session = RaySession(handed["monitor"], handed["job"].name, ray.train.get_context().get_world_rank())
        try:
            return run_worker(handed["job"], session)
        except UserError as error:
            # Starting again would meet the same mistake.
            return Outcome("failed", 0, str(error))

    trainer = TorchTrainer(
        worker,
        train_loop_config={"job": job, "monitor": monitor},
        torch_config=TorchConfig(backend="nccl" if config.resources.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.resources.gpus_per_worker > 0,
            resources_per_worker={"CPU": job.cpus_per_worker, "GPU": config.resources.gpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(
                max_failures=config.resources.max_failures, controller_failure_limit=3
            ),
        ),
    )
    try:
        outcome = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        return Outcome("failed", _last_step(read_run(job.folder)), _cause(error))
    return outcome or Outcome("failed", _last_step(read_run(job.folder)), "the workers returned nothing")


def cpus_per_worker(config: Config, cluster: dict[str, float]) -> float:
    """Logical CPUs a worker: as configured, else the cluster's shared out evenly with a little left for drivers.

    Raises UserError with the arithmetic when the workers cannot fit, instead of waiting for ever.
    """
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    each = config.resources.cpus_per_worker
    if each is None:
        each = int(max(0.01, (cpus - 0.1) / config.workers) * 100) / 100
    if config.workers * each > cpus:
        raise UserError(
            f"{config.workers} workers x {each} CPUs = {config.workers * each:g} do not fit the cluster's {cpus:g} "
            "CPUs; lower workers or resources.cpus_per_worker."
        )
    if config.workers * config.resources.gpus_per_worker > gpus:
        raise UserError(
            f"{config.workers} workers x {config.resources.gpus_per_worker} GPUs = "
            f"{config.workers * config.resources.gpus_per_worker:g} do not fit the cluster's {gpus:g} GPUs; "
            "lower workers or resources.gpus_per_worker."
        )
    return each


@contextlib.contextmanager
def ray_cluster() -> Iterator[None]:
    """An attached Ray cluster (RAY_ADDRESS, or the one this process is in), else a fresh local one for the block."""
    import ray

    if ray.is_initialized():
        yield
        return
    for key, value in RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(key, value)
    started = not os.environ.get("RAY_ADDRESS")
    # The dashboard stays on: without it Ray leaks the placement groups of stopped trials.
    ray.init(
        address="local" if started else None,
        include_dashboard=True if started else None,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": RAY_TRAIN_SETTINGS},
    )
    try:
        yield
    finally:
        ray.shutdown()


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


def _last_step(run: Run | None) -> int:
    entry = run.checkpoints.latest() if run else None
    return entry.step if entry else 0


def _cause(error: BaseException) -> str:
    """The innermost message of a training failure, on one line."""
    failures = getattr(error, "worker_failures", None) or {}
    inner: BaseException = next(iter(failures.values()), error)
    cause = getattr(inner, "cause", None) or inner
    return " ".join(str(cause).strip().splitlines()[-1:]) or type(cause).__name__
