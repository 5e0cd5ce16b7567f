"""`cosa-ray jobs`: what runs on a cluster, how it is doing, what it writes, and its end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from cosa_ray.cli.output import json_only, say, table
from cosa_ray.cli.submit import Address, follow_to_end
from cosa_ray.cli.train import AsJson

if TYPE_CHECKING:
    from cosa_ray.jobs.manage import JobInfo

JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, as `submit` and `jobs list` say it.")]

app = typer.Typer(no_args_is_help=True, help="Jobs of a Ray cluster: list, status, logs, stop.")


@app.command("list")
def list_(address: Address = None, as_json: AsJson = False) -> None:
    """List a cluster's jobs, newest first.

    Example: cosa-ray jobs list --address http://127.0.0.1:8265
    """
    from cosa_ray.jobs.address import find_cluster
    from cosa_ray.jobs.manage import list_jobs

    with json_only(as_json) as emit:
        found = find_cluster(address)
        jobs = list_jobs(found)
        if not as_json:
            columns = ["job", "status", "exit code", "started", "took", "about", "run or sweep"]
            table(f"jobs of {found.cluster.address}", columns, [_row(job) for job in jobs])
        emit({"address": found.cluster.address, "jobs": [job.as_json() for job in jobs]})


@app.command()
def status(job: JobId, address: Address = None, as_json: AsJson = False) -> None:
    """Say how a job is doing, or how it ended."""
    from cosa_ray.jobs.address import find_cluster
    from cosa_ray.jobs.manage import job_info

    with json_only(as_json) as emit:
        info = job_info(find_cluster(address), job)
        if not as_json:
            print(_sentence(info))
        emit(info.as_json())


@app.command()
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until it has ended; return its exit code.")] = False,
    address: Address = None,
) -> None:
    """Print what a job has written."""
    from cosa_ray.jobs.address import find_cluster
    from cosa_ray.jobs.manage import job_log

    found = find_cluster(address)
    if not follow:
        print(job_log(found, job), end="")
        return
    end = follow_to_end(found, job)
    if end.exit_code:
        raise typer.Exit(end.exit_code)


@app.command()
def stop(
    job: JobId,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")] = True,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Ask a job to end; a run writes a checkpoint first, and goes on with submit ... --name NAME --resume."""
    from cosa_ray.jobs.address import find_cluster
    from cosa_ray.jobs.manage import stop_job

    with json_only(as_json) as emit:
        info = stop_job(find_cluster(address), job, wait=wait, say=say)
        if not as_json:
            print(_sentence(info))
        emit(info.as_json())


def _sentence(job: JobInfo) -> str:
    took = f", {_duration(job.seconds)}" if job.seconds is not None else ""
    code = f", exit code {job.exit_code}" if job.exit_code is not None else ""
    about = " ".join(word for word in (job.verb, job.subject, f"as {job.name}" if job.name else "") if word)
    return f"job {job.id} ({about or job.entrypoint}): {job.status.lower()}{code}{took}. {job.message}".rstrip()


def _row(job: JobInfo) -> list[str]:
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started)) if job.started else "-"
    return [
        job.id,
        job.status.lower(),
        "-" if job.exit_code is None else str(job.exit_code),
        started,
        "-" if job.seconds is None else _duration(job.seconds),
        f"{job.verb} {job.subject}".strip() or job.entrypoint[:40],
        job.name or "-",
    ]


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
