"""Send a job to a Ray head, follow its log, and learn how it ended."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cosa_ray.config.load import dump_config, find_experiment, load_config
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.jobs.head import connect, first_line, forwarded_environment, refuse_password
from cosa_ray.jobs.parcel import absolute_tracking, for_cluster, pack
from cosa_ray.tracking.describe import GIT_FILE, git_state_to_send

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

Verb = Literal["train", "tune"]
_LOST_AFTER_SECONDS = 60.0
_POLL_SECONDS = 0.5
# `ray job stop` kills after three seconds unless told otherwise; a run wants to write its checkpoint first.
_STOP_GENTLY = {"RAY_JOB_STOP_WAIT_TIME_S": "120"}


@dataclass(frozen=True)
class Job:
    """A submitted job: where it runs, its id, and the command it runs."""

    address: str
    id: str
    entrypoint: str


@dataclass(frozen=True)
class JobEnd:
    """How a job ended: Ray's status (SUCCEEDED, FAILED, STOPPED), the driver's exit code, Ray's message."""

    status: str
    exit_code: int
    message: str


def submit_job(
    verb: Verb,
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    address: str,
    arguments: Sequence[str] = (),
    folder: str | None = None,
    installed: bool = False,
    python: str = "python",
) -> Job:
    """Check an experiment or sweep file here, send it to the head at `address`, and start it there.

    `arguments` are further words of the verb's command line (--name, --resume). Relative paths of the experiment
    start at `folder` on the cluster (None: the working folder, as on a shared file system). `installed` uses the
    cluster's own cosa_ray instead of sending this one; `python` is the interpreter there. Raises UserError before
    anything is sent when the file or the connection is wrong.
    """
    environment = forwarded_environment(os.environ)
    root = folder or str(Path.cwd())
    if "MLFLOW_TRACKING_URI" in environment:
        environment["MLFLOW_TRACKING_URI"] = absolute_tracking(environment["MLFLOW_TRACKING_URI"], root)
    name, files = _files(verb, file, overrides, root, "MLFLOW_TRACKING_URI" in environment)
    if not installed and (state := git_state_to_send()) is not None:
        files[GIT_FILE] = state  # there is no repository where the job runs
    client = connect(address)
    # Ray refuses a job and a driver that both set a variable, and the driver sets Ray Train's: these go by the command.
    train = [f"{key}={environment.pop(key)}" for key in sorted(environment) if key.startswith("RAY_TRAIN_")]
    # Ray starts the command in the parcel's folder, so that `-m` finds the package that came with it.
    command = [python, "-m", "cosa_ray.cli.main", verb, name, *arguments]
    entrypoint = shlex.join([*(["env", *train] if train else []), *command])
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).stem).strip("-").lower()
    with tempfile.TemporaryDirectory(prefix="cosa-ray-job-") as parcel:
        pack(Path(parcel), files, package=not installed)
        try:
            job_id = client.submit_job(
                entrypoint=entrypoint,
                submission_id=f"{verb}-{stem}-{secrets.token_hex(4)}",
                runtime_env={"working_dir": parcel, "env_vars": {**_STOP_GENTLY, **environment}},
                metadata={"cosa_ray.verb": verb, "cosa_ray.file": name},
            )
        except Exception as error:  # whatever the head answers, it is one sentence here
            raise UserError(_not_taken(address, error)) from error
    return Job(address, job_id, entrypoint)


def follow(job: Job, write: Callable[[str], None]) -> JobEnd:
    """Pass the job's log to `write` as it comes until the job has ended.

    A broken connection is made again for a minute; then RunFailed says that the job may go on. KeyboardInterrupt
    passes through and leaves the job running.
    """
    return _follow(connect(job.address), job, write)


def _follow(client: JobSubmissionClient, job: Job, write: Callable[[str], None]) -> JobEnd:
    seen = 0
    away_since: float | None = None

    async def tail() -> None:
        nonlocal seen, away_since
        position = 0
        async for chunk in client.tail_job_logs(job.id):
            away_since = None
            # A new connection starts at the beginning of the log.
            if fresh := chunk[max(0, seen - position) :]:
                write(fresh)
            position += len(chunk)
            seen = max(seen, position)

    while True:
        try:
            asyncio.run(tail())
            info = client.get_job_info(job.id)
            away_since = None
            if info.status.is_terminal():
                # What was written between the end of the tail and the end of the job.
                write(client.get_job_logs(job.id)[seen:])
                status = info.status.value
                # Ray appends the log that has just been shown.
                message = (info.message or "").split(", last available logs")[0].strip()
                return JobEnd(status, _exit_code(status, info.driver_exit_code), message)
        except Exception as error:
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > _LOST_AFTER_SECONDS:
                raise RunFailed(
                    f"lost the head at {job.address} while following {job.id} ({first_line(error)}); "
                    "the job goes on if the head still runs."
                ) from error
        time.sleep(_POLL_SECONDS)


def how_to_stop(job: Job) -> str:
    """The command that stops a job."""
    return f"ray job stop {job.id} --address {job.address}"


def _exit_code(status: str, driver: int | None) -> int:
    """Exit code of a job: its driver's; 128+n for a signal n as shells have it; 1 when there was no driver."""
    if status == "SUCCEEDED":
        return 0
    if driver is None or driver == 0:
        return 1
    return driver if driver > 0 else 128 - driver


def _files(
    verb: Verb, file: str | Path, overrides: Sequence[str], folder: str, tracked: bool
) -> tuple[str, dict[str, str]]:
    """The job's file name and the resolved files it needs, by name: overrides, `extends` and `base` are worked in."""
    if verb == "train":
        path = find_experiment(file)
        config = load_config(path, overrides)
        refuse_password(config.tracking.uri, "tracking.uri")
        return path.name, {path.name: dump_config(for_cluster(config, folder, tracking_from_environment=tracked))}
    from cosa_ray.tuning.sweepfile import check_sweep, dump_sweep, find_sweep, load_sweep

    path = find_sweep(file)
    sweep, base = load_sweep(path, overrides)
    check_sweep(sweep, base, str(path))
    refuse_password(base.tracking.uri, "tracking.uri")
    base_name = f"{path.stem}-base.yaml"
    flat = sweep.model_copy(update={"base": base_name, "set": {}})
    return path.name, {
        path.name: dump_sweep(flat),
        base_name: dump_config(for_cluster(base, folder, tracking_from_environment=tracked)),
    }


def _not_taken(address: str, error: Exception) -> str:
    """One sentence for a submission that the head did not take."""
    if "413" in str(error) or "Request Entity Too Large" in str(error):
        return (
            f"--address {address}: the head refused the parcel as too large (Ray takes at most 100 MiB); "
            "install cosa-ray on the cluster and use --installed."
        )
    return f"--address {address}: the head did not take the job ({first_line(error)})."
