"""Jobs of a cluster: which there are, how one is doing, what it wrote, and its end."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cosa_ray.errors import RunFailed, UserError
from cosa_ray.jobs.address import Found
from cosa_ray.jobs.head import connect, first_line
from cosa_ray.jobs.submit import NAME, SUBJECT, VERB, exit_code

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_POLL_SECONDS = 0.5
# Longer than a job is given to write its checkpoint (RAY_JOB_STOP_WAIT_TIME_S).
_STOP_SECONDS = 150.0


@dataclass(frozen=True)
class JobInfo:
    """A job of a cluster; times in seconds since 1970, `verb`, `subject` and `name` of jobs sent by cosa-ray."""

    id: str
    status: str
    verb: str
    subject: str
    name: str
    entrypoint: str
    started: float | None
    ended: float | None
    exit_code: int | None
    message: str

    @property
    def seconds(self) -> float | None:
        """How long it has run, None before it started."""
        return None if self.started is None else (self.ended or time.time()) - self.started

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


def list_jobs(found: Found) -> list[JobInfo]:
    """All jobs that the cluster knows, newest first; those that somebody runs without the Jobs API are left out."""
    jobs = [_info(each) for each in connect(found).list_jobs() if each.submission_id]
    return sorted(jobs, key=lambda job: -(job.started or 0.0))


def job_info(found: Found, job_id: str) -> JobInfo:
    """One job. Raises UserError when the cluster knows none of this id."""
    return _info(_details(connect(found), found, job_id))


def job_log(found: Found, job_id: str) -> str:
    """What a job has written so far. Raises UserError when the cluster knows none of this id."""
    client = connect(found)
    _details(client, found, job_id)
    return str(client.get_job_logs(job_id))


def stop_job(
    found: Found, job_id: str, *, wait: bool = True, say: Callable[[str], None] = lambda text: None
) -> JobInfo:
    """Ask a job to end, which a run answers with a checkpoint, and wait for that; how it is then.

    A job that has ended stays as it is. Raises RunFailed when it does not end in 150 seconds.
    """
    client = connect(found)
    details = _details(client, found, job_id)
    if details.status.is_terminal():
        say(f"job {job_id} has ended already ({details.status.value.lower()})")
        return _info(details)
    client.stop_job(job_id)
    end = time.monotonic() + _STOP_SECONDS
    while wait:
        details = _details(client, found, job_id)
        if details.status.is_terminal():
            break
        if time.monotonic() > end:
            raise RunFailed(f"job {job_id} has not ended {_STOP_SECONDS:.0f} s after it was asked to.")
        time.sleep(_POLL_SECONDS)
    return _info(details)


def _details(client: JobSubmissionClient, found: Found, job_id: str) -> JobDetails:
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "404" not in str(error) and "does not exist" not in str(error):
            raise RunFailed(f"{found.label}: no word of job {job_id} ({first_line(error)}).") from error
    known = [each.submission_id for each in client.list_jobs() if each.submission_id]
    close = difflib.get_close_matches(job_id, known, n=1) or known[-1:]
    raise UserError(
        f"{found.label}: no job {job_id} there"
        + (f"; did you mean {close[0]}?" if close else ", and no other.")
        + (" See cosa-ray jobs list." if close else "")
    )


def _info(job: JobDetails) -> JobInfo:
    """Ray's words of a job as ours."""
    status, metadata = job.status.value, job.metadata or {}
    ended = job.status.is_terminal()
    return JobInfo(
        id=str(job.submission_id),
        status=status,
        verb=metadata.get(VERB, ""),
        subject=metadata.get(SUBJECT, ""),
        name=metadata.get(NAME, ""),
        entrypoint=job.entrypoint,
        started=job.start_time / 1000 if job.start_time else None,
        ended=job.end_time / 1000 if ended and job.end_time else None,
        exit_code=exit_code(status, job.driver_exit_code) if ended else None,
        message=" ".join((job.message or "").split(", last available logs")[0].split()),
    )
