"""`cosa-ray submit`: run a train or tune job on a Ray cluster, follow it, return its exit code."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from cosa_ray.cli.output import json_only, say
from cosa_ray.cli.train import AsJson, Set


class Verb(StrEnum):
    """What a job can run."""

    train = "train"
    tune = "tune"


def submit(
    verb: Annotated[Verb, typer.Argument(help="What the job runs.")],
    file: Annotated[str, typer.Argument(help="Experiment file (train) or sweep file (tune), by path or shipped name.")],
    address: Annotated[str, typer.Option(help="Dashboard of the Ray head, as http://127.0.0.1:8265.")],
    set_: Set = None,
    name: Annotated[str | None, typer.Option(help="Name of the run or sweep.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run or sweep of this name.")] = False,
    folder: Annotated[
        str | None, typer.Option(help="Folder on the cluster where relative paths start; default: this folder's path.")
    ] = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="Use the cosa-ray installed on the cluster; send only the file.")
    ] = False,
    python: Annotated[str, typer.Option(help="Python of the cluster's nodes.")] = "python",
    as_json: AsJson = False,
) -> None:
    """Send a job to a running Ray head, follow its log and return its exit code.

    Ctrl-C stops following; the job goes on. Only the resolved experiment and the package are sent. The head's token
    is taken from RAY_AUTH_TOKEN, or from the file RAY_AUTH_TOKEN_PATH. With --json the log goes to stderr.

    Example: cosa-ray submit train shapes --address http://127.0.0.1:8265
    """
    from cosa_ray.errors import UserError
    from cosa_ray.jobs import submit as jobs

    if resume and name is None:
        raise UserError("--resume needs the --name of the run or sweep to continue.")
    arguments = [*(["--name", name] if name else []), *(["--resume"] if resume else [])]
    with json_only(as_json) as emit:
        job = jobs.submit_job(
            verb.value,
            file,
            set_ or [],
            address=address,
            arguments=arguments,
            folder=folder,
            installed=installed,
            python=python,
        )
        say(f"job {job.id} runs on {job.address}")
        try:
            end = jobs.follow(job, lambda text: print(text, end="", flush=True, file=sys.stdout))
        except KeyboardInterrupt:
            say(f"\nstopped following; job {job.id} goes on. Stop it with: {jobs.how_to_stop(job)}")
            raise typer.Exit(130) from None
        say(f"job {job.id} {end.status.lower()}, exit code {end.exit_code}: {end.message}")
        emit(
            {
                "job": job.id,
                "address": job.address,
                "entrypoint": job.entrypoint,
                "status": end.status,
                "exit_code": end.exit_code,
                "message": end.message,
            }
        )
    if end.exit_code:
        raise typer.Exit(end.exit_code)
