"""A run's workers under Ray Train: the cluster, what a worker is given, and how a run of them ends."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from cosa_ray.config.credentials import keep_token_private
from cosa_ray.config.schema import Config, Elastic
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.training.autoscaler import to_come
from cosa_ray.training.loop import Job, Outcome, run_worker
from cosa_ray.training.room import alive_nodes, cpus_per_worker
from cosa_ray.training.runs import read_run
from cosa_ray.training.session import RaySession, sentence_of
from cosa_ray.training.storage import RunFolder
from cosa_ray.training.validating import validate

# Read by Ray Train when a run starts: workers keep the folder they are in, print once, and are looked at often.
RAY_TRAIN_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
}
# On a cluster of one machine, which nobody takes away: one process less a run.
LOCAL_SETTINGS = {**RAY_TRAIN_SETTINGS, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}

_GIVEN = frozenset(os.environ)  # settings of the user are left alone
_CONNECT_SECONDS = 10.0
# Of five minutes each, without room for the workers of a run: a day for machines to come back.
_START_ATTEMPTS = 288
_START_SECONDS = 120.0  # that workers have at least, from their processes to the first word of them: imports take long


@contextlib.contextmanager
def ray_cluster() -> Iterator[None]:
    """An attached Ray cluster (RAY_ADDRESS, or the one this process is in), else a fresh local one for the block."""
    import ray

    if ray.is_initialized():
        yield
        return
    given = os.environ.get("RAY_ADDRESS")
    started = given in (None, "", "local")
    if given and not started:
        check_address(given)
    for key, value in (LOCAL_SETTINGS if started else RAY_TRAIN_SETTINGS).items():
        os.environ.setdefault(key, value)
    if started:
        keep_token_private()
    # The dashboard stays on: without it Ray leaks the placement groups of stopped trials. Processes of a cluster that
    # is started here have this environment; said once more, it would make each of them import Ray twice.
    try:
        ray.init(
            address="local" if started else None,
            include_dashboard=True if started else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env=None if started else {"env_vars": RAY_TRAIN_SETTINGS},
        )
    except (RuntimeError, ConnectionError) as error:
        if started:
            raise
        raise UserError(f"RAY_ADDRESS={given}: {not_attached(str(error))}") from error
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """UserError for a RAY_ADDRESS that a driver cannot go to: Ray itself would try for minutes."""
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS={address} is where jobs are sent (cosa-ray submit); to run from here, unset it, or set it to "
            "HOST:6379 of a cluster that this machine is a node of."
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # auto, and whatever else Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: no connection ({error.strerror or error}); start Ray there, or unset RAY_ADDRESS "
            "to run on this machine alone."
        ) from error


def not_attached(message: str) -> str:
    """Ray's reasons for not letting a driver in, as the rest of a sentence."""
    told = re.findall(r"^ *(Ray|Python): (\S+)", message, re.MULTILINE)
    if "Version mismatch" in message and len(told) == 4:
        there, here = (" and ".join(" ".join(words) for words in pair) for pair in (told[:2], told[2:]))
        return f"the cluster runs {there}, and this side {here}; use the same versions on both."
    return f"Ray did not attach ({' '.join(message.split())[:200]})."


def needs_ray(config: Config) -> bool:
    """True when a job of this config cannot be done in this process: several workers, GPUs, or a cluster to go to."""
    attached = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    asked = config.most_workers > 1 or config.resources.gpus_per_worker > 0
    return asked or attached or bool(os.environ.get("RAY_ADDRESS"))


def fit(job: Job, monitor: Any, callbacks: Sequence[Any] = ()) -> Outcome:
    """Run a job's workers under Ray Train and wait; also what a Tune trial calls. Never raises for a failed run."""
    import ray
    import ray.train
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    from cosa_ray.training.failures import GiveUp, StartInTime, count_failure, failures_of

    config = job.config
    os.environ.update({key: value for key, value in _settings(config).items() if key not in _GIVEN})
    alive = alive_nodes()
    job = replace(job, cpus_per_worker=cpus_per_worker(config, alive, to_come(alive), training=True))
    storage, _, name = job.folder.rpartition("/")
    limit = config.resources.max_failures
    # Neither the job nor its outcome passes through the controller as an object of ours: it would import all of torch
    # and of this project to read it, for seconds and half a gigabyte.
    trainer = partial(
        _trainer(config),
        partial(_work, job, monitor),
        scaling_config=ray.train.ScalingConfig(
            **_number_of_workers(config),
            use_gpu=config.resources.gpus_per_worker > 0,
            resources_per_worker={"CPU": job.cpus_per_worker, "GPU": config.resources.gpus_per_worker},
        ),
        validation_config=_validation(job) if config.evaluation.asynchronous else None,
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            callbacks=[
                *callbacks,
                GiveUp(job.name, job.folder, limit, monitor),
                StartInTime(max(_START_SECONDS, _silence(config))),
            ],
            failure_config=ray.train.FailureConfig(
                max_failures=-1, max_preemption_failures=-1, controller_failure_limit=_START_ATTEMPTS
            ),
        ),
    )
    outcome: Outcome | None = None
    mistake: str | None = None
    cause = "the workers returned nothing"
    while outcome is None and mistake is None:
        try:
            if (returned := trainer().fit().return_value) is None:
                break
            outcome = Outcome(**returned)
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            # Ray starts workers again that fail while they work, but not those that fail while they start, nor itself.
            cause = _cause(error)
            if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                break
            count_failure(job.name, job.folder, limit, monitor, cause)
        mistake = ray.get(monitor.kept.remote(sentence_of(job.name)))
    if mistake is not None:
        cause = mistake
    for key in (sentence_of(job.name), failures_of(job.name)):
        ray.get(monitor.keep.remote(key, None))  # the run may be continued
    if outcome is None or outcome.state == "failed":
        run = read_run(job.folder)
        return Outcome("failed", run.step if run else 0, cause)
    return outcome


def _validation(job: Job) -> Any:
    """How Ray Train evaluates beside the workers: on as much as one worker has, again when its process dies.

    Ray's list of what it has still to do is written for one Ray version and of no use: the run asks again.
    """
    import ray.train

    RunFolder(job.folder).remove("checkpoint_manager_snapshot.json")
    resources = job.config.resources
    given = {"folder": job.folder, "cpus": job.cpus_per_worker, "hang_seconds": resources.hang_seconds}
    return ray.train.ValidationConfig(
        fn=validate,
        task_config=ray.train.ValidationTaskConfig(fn_kwargs=given),
        ray_remote_kwargs={
            "num_cpus": job.cpus_per_worker,
            "num_gpus": resources.gpus_per_worker,
            "max_retries": resources.max_failures,
        },
    )


def _settings(config: Config) -> dict[str, str]:
    """Settings of Ray Train for a run."""
    settings = dict(RAY_TRAIN_SETTINGS)
    settings["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{_silence(config):g}"
    if isinstance(config.workers, Elastic):
        # Room is waited for before; what has none after that was counted on a machine that had just gone.
        settings["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "30"
    return settings


def _silence(config: Config) -> float:
    """Seconds after which a worker that does not answer is taken for dead."""
    return min(600.0, config.resources.hang_seconds)


def _number_of_workers(config: Config) -> dict[str, Any]:
    """How many workers, as Ray Train's scaling has it."""
    workers = config.workers
    if isinstance(workers, int):
        return {"num_workers": workers}
    return {"num_workers": (workers.min, workers.max), "elastic_resize_monitor_interval_s": workers.look_every}


def _trainer(config: Config) -> Any:
    """What makes the Ray Train trainer: with a process group of torch where there are workers to join.

    One worker on CPUs needs none, and without it Ray's controller does not import torch.
    """
    if config.most_workers == 1 and not config.resources.gpus_per_worker:
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        return _without_datasets(DataParallelTrainer)
    from ray.train.torch import TorchConfig, TorchTrainer

    backend = "nccl" if config.resources.gpus_per_worker else "gloo"
    torch_config = TorchConfig(backend=backend, timeout_s=max(1, round(config.resources.hang_seconds)))
    return partial(_without_datasets(TorchTrainer), torch_config=torch_config)


def _without_datasets(trainer: Any) -> Any:
    """A Ray Train trainer without the process that each run starts for its Ray Data sets: there are none.

    The hook is undocumented; a Ray without it starts the process again, and nothing else changes.
    """

    class Trainer(trainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [each for each in super()._create_default_callbacks() if type(each).__name__ != "DatasetsCallback"]

    return Trainer


def _work(job: Job, monitor: Any) -> dict[str, Any]:
    """What every worker runs; returns the fields of its outcome.

    A mistake of the user that one worker alone meets would leave the others waiting in a collective: the worker tells
    the monitor and fails, Ray ends the group, and the group that it starts again reads the sentence and returns.
    """
    import ray
    import ray.train

    context = ray.train.get_context()
    if (sentence := ray.get(monitor.kept.remote(sentence_of(job.name)))) is not None:
        return asdict(Outcome("failed", 0, sentence))
    session = RaySession(monitor, job.name, context.get_world_rank(), job.config.resources.hang_seconds)
    try:
        return asdict(run_worker(job, session, worker_device(job.config)))
    except (UserError, RunFailed) as error:
        session.close()
        ray.get(monitor.keep.remote(sentence_of(job.name), str(error)))
        if context.get_world_size() > 1:
            raise
        return asdict(Outcome("failed", 0, str(error)))


def worker_device(config: Config) -> torch.device:
    """The GPU that Ray gives this worker; the CPU when none was asked for, because Ray does not hide GPUs then."""
    if config.resources.gpus_per_worker == 0:
        return torch.device("cpu")
    import ray.train.torch

    return ray.train.torch.get_device()


def _cause(error: BaseException) -> str:
    """The innermost message of a training failure, on one line."""
    failures = getattr(error, "worker_failures", None) or {}
    inner: BaseException = next(iter(failures.values()), error)
    cause = getattr(inner, "cause", None) or inner
    return " ".join(str(cause).strip().splitlines()[-1:]) or type(cause).__name__
