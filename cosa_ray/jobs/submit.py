"""Send a job to a Ray head, follow its log, and learn how it ended."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa_ray.errors import RunFailed, UserError
from cosa_ray.jobs.address import Found, find_cluster
from cosa_ray.jobs.command import Command, Verb, command_for
from cosa_ray.jobs.head import connect, first_line, forwarded_environment
from cosa_ray.jobs.parcel import Packed, absolute_tracking, pack
from cosa_ray.tracking.describe import GIT_FILE, git_state_to_send

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_LOST_AFTER_SECONDS = 60.0
_POLL_SECONDS = 0.5
# `ray job stop` kills after three seconds unless told otherwise; a run wants to write its checkpoint first.
_STOP_GENTLY = {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
_TRACKING = "MLFLOW_TRACKING_URI"
VERB, SUBJECT, NAME = "cosa_ray.verb", "cosa_ray.subject", "cosa_ray.name"  # of a job's metadata


@dataclass(frozen=True)
class Job:
    """A submitted job: where it runs, its id, its command line there, and what was sent."""

    found: Found
    id: str
    entrypoint: str
    command: Command
    packed: Packed


@dataclass(frozen=True)
class JobEnd:
    """How a job ended: Ray's status (SUCCEEDED, FAILED, STOPPED), the driver's exit code, Ray's message."""

    status: str
    exit_code: int
    message: str


def submit_job(
    verb: Verb,
    given: Mapping[str, Any],
    *,
    address: str | None = None,
    folder: str | None = None,
    installed: bool | None = None,
    python: str | None = None,
) -> Job:
    """Check a command here, send what it needs to a cluster, and start it there.

    `given`: the verb's parameters by name, as {"file": "voc", "set_": ["seed=1"], "name": "first"}. `address`: as for
    `find_cluster`, whose file gives what is None here. Relative paths start at `folder` on the cluster (None: the
    working folder, as on a shared file system). `installed` uses the cluster's own cosa_ray instead of sending this
    one; `python` is the interpreter there. Raises UserError before anything is sent when the command or the connection
    is wrong.
    """
    found = find_cluster(address)
    cluster = found.cluster
    folder = folder or cluster.folder or str(Path.cwd())
    installed = cluster.installed if installed is None else installed
    environment = forwarded_environment(os.environ)
    if _TRACKING in environment:
        environment[_TRACKING] = absolute_tracking(environment[_TRACKING], folder)
    command = command_for(verb, given, folder, tracked=_TRACKING in environment)
    if command.looks_up:
        environment.setdefault(_TRACKING, absolute_tracking("sqlite:///mlflow.db", folder))
    files = dict(command.files)
    if not installed and (state := git_state_to_send()) is not None:
        files[GIT_FILE] = state  # there is no repository where the job runs
    # Ray refuses a job and a driver that both set a variable, and the driver sets Ray Train's: these go by the command.
    train = [f"{key}={environment.pop(key)}" for key in sorted(environment) if key.startswith("RAY_TRAIN_")]
    # Ray starts the command in the parcel's folder, so that `-m` finds the package that came with it.
    words = [python or cluster.python, "-m", "cosa_ray.cli.start", *command.words]
    entrypoint = shlex.join([*(["env", *train] if train else []), *words])
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(command.subject).stem).strip("-").lower()
    with tempfile.TemporaryDirectory(prefix="cosa-ray-job-") as parcel:
        packed = pack(Path(parcel), files, package=not installed)
        client = connect(found)
        try:
            job_id = client.submit_job(
                entrypoint=entrypoint,
                submission_id=f"{verb}-{stem}-{secrets.token_hex(4)}",
                runtime_env={"working_dir": parcel, "env_vars": {**_STOP_GENTLY, **environment}},
                metadata={
                    VERB: verb,
                    SUBJECT: command.subject,
                    **({NAME: command.name} if command.name else {}),
                },
            )
        except Exception as error:  # whatever the head answers, it is one sentence here
            raise UserError(_not_taken(found, error)) from error
    return Job(found, job_id, entrypoint, command, packed)


def follow(found: Found, job_id: str, write: Callable[[str], None]) -> JobEnd:
    """Pass a job's log to `write` as it comes until the job has ended.

    A broken connection is made again for a minute; then RunFailed says that the job may go on. KeyboardInterrupt
    passes through and leaves the job running.
    """
    return _follow(connect(found), found, job_id, write)


def _follow(client: JobSubmissionClient, found: Found, job_id: str, write: Callable[[str], None]) -> JobEnd:
    seen = 0
    away_since: float | None = None

    async def tail() -> None:
        nonlocal seen, away_since
        position = 0
        async for chunk in client.tail_job_logs(job_id):
            away_since = None
            # A new connection starts at the beginning of the log.
            if fresh := chunk[max(0, seen - position) :]:
                write(fresh)
            position += len(chunk)
            seen = max(seen, position)

    while True:
        try:
            asyncio.run(tail())
            info = client.get_job_info(job_id)
            away_since = None
            if info.status.is_terminal():
                # What was written between the end of the tail and the end of the job.
                write(client.get_job_logs(job_id)[seen:])
                status = info.status.value
                # Ray appends the log that has just been shown.
                message = (info.message or "").split(", last available logs")[0].strip()
                return JobEnd(status, exit_code(status, info.driver_exit_code), message)
        except Exception as error:
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > _LOST_AFTER_SECONDS:
                raise RunFailed(
                    f"lost the head at {found.cluster.address} while following {job_id} ({first_line(error)}); "
                    "the job goes on if the head still runs."
                ) from error
        time.sleep(_POLL_SECONDS)


def exit_code(status: str, driver: int | None) -> int:
    """Exit code of a job: its driver's; 128+n for a signal n as shells have it; 1 when there was no driver."""
    if status == "SUCCEEDED":
        return 0
    if driver is None or driver == 0:
        return 1
    return driver if driver > 0 else 128 - driver


def _not_taken(found: Found, error: Exception) -> str:
    """One sentence for a submission that the head did not take."""
    if "413" in str(error) or "Request Entity Too Large" in str(error):
        return (
            f"{found.label}: the head refused the parcel as too large (Ray takes at most 100 MiB); "
            "install cosa-ray on the cluster and use --installed."
        )
    return f"{found.label}: the head did not take the job ({first_line(error)})."
