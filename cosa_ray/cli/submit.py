"""`cosa-ray submit`: run a train or tune job on a Ray cluster, follow it, return its exit code."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import Annotated

import typer


class Verb(StrEnum):
    """What a job can run."""

    train = "train"
    tune = "tune"


def submit(
    verb: Annotated[Verb, typer.Argument(help="What the job runs.")],
    file: Annotated[str, typer.Argument(help="Experiment file (train) or sweep file (tune), by path or shipped name.")],
    address: Annotated[
        str, typer.Option("--address", help="Dashboard of the Ray head, as http://127.0.0.1:8265.", envvar="COSA_HEAD")
    ],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a setting: key=value.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run or sweep.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run or sweep of that --name.")] = False,
    folder: Annotated[
        str | None,
        typer.Option("--folder", help="Folder on the cluster where relative paths start; default: this folder."),
    ] = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="Use the cosa-ray installed on the cluster; send only the file.")
    ] = False,
    python: Annotated[str, typer.Option("--python", help="Python of the cluster's nodes.")] = "python",
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout at the end; the log goes to stderr.")
    ] = False,
) -> None:
    """Send a job to a running Ray head, follow its log and return its exit code.

    Ctrl-C stops following; the job goes on. Only the resolved experiment and the package are sent. The head's token
    is taken from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.

    Example: cosa-ray submit train shapes.yaml --address http://127.0.0.1:8265
    """
    from cosa_ray.errors import UserError
    from cosa_ray.jobs import submit as jobs

    if resume and not name:
        raise UserError("--resume: say which one with --name.")
    arguments = [*(["--name", name] if name else []), *(["--resume"] if resume else [])]
    job = jobs.submit(
        verb.value,
        file,
        overrides or (),
        address=address,
        arguments=arguments,
        folder=folder,
        installed=installed,
        python=python,
    )
    print(f"job {job.id} submitted to {job.address}", file=sys.stderr)
    log = sys.stderr if as_json else sys.stdout

    def write(text: str) -> None:
        log.write(text)
        log.flush()

    try:
        end = jobs.follow(job, write)
    except KeyboardInterrupt:
        print(
            f"\nstopped following; job {job.id} goes on. Stop it with: {jobs.how_to_stop(job)}",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    print(f"job {job.id}: {end.status.lower()} (exit code {end.exit_code}) {end.message}", file=sys.stderr)
    if as_json:
        print(
            json.dumps(
                {
                    "job": job.id,
                    "address": job.address,
                    "entrypoint": job.entrypoint,
                    "status": end.status,
                    "exit_code": end.exit_code,
                    "message": end.message,
                }
            )
        )
    if end.exit_code:
        raise typer.Exit(end.exit_code)
