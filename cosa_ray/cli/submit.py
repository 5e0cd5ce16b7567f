"""`cosa-ray submit`: run a verb as a job on a Ray cluster, follow it, return its exit code."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosa_ray.cli.ablate import ablate
from cosa_ray.cli.evaluate import evaluate
from cosa_ray.cli.output import json_only, say
from cosa_ray.cli.predict import predict, pseudo_labels
from cosa_ray.cli.promote import promote
from cosa_ray.cli.resume import said
from cosa_ray.cli.train import AsJson, train
from cosa_ray.cli.tune import tune

if TYPE_CHECKING:
    from cosa_ray.jobs.address import Found
    from cosa_ray.jobs.submit import JobEnd

Address = Annotated[
    str | None,
    typer.Option(
        help="Dashboard of the Ray head, http://HOST:PORT; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, "
        "cluster/current.yaml."
    ),
]
_PROGRESS = re.compile(r"\S+: step \d+/\d+ ")

app = typer.Typer(
    no_args_is_help=True,
    help="Send a job to a running Ray cluster, follow its log and return its exit code. Ctrl-C stops following; the "
    "job goes on. Only the resolved files and the package are sent. The head's token is taken from RAY_AUTH_TOKEN, or "
    "from the file RAY_AUTH_TOKEN_PATH. Example: cosa-ray submit train shapes --address http://127.0.0.1:8265",
)


def _submit(
    context: typer.Context,
    address: Address = None,
    folder: Annotated[
        str | None, typer.Option(help="Folder on the cluster where relative paths start; default: this folder's path.")
    ] = None,
    installed: Annotated[
        bool | None,
        typer.Option("--installed/--sent", help="Use the cosa-ray installed on the cluster, or send this one (usual)."),
    ] = None,
    python: Annotated[str | None, typer.Option(help="Python of the cluster's nodes; usually `python`.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the job.")] = False,
    as_json: AsJson = False,
    **parameters: Any,
) -> None:
    from cosa_ray.jobs.submit import submit_job

    typed = said(context)
    given = {key: value for key, value in parameters.items() if key in typed}
    with json_only(as_json) as emit:
        job = submit_job(
            context.info_name,  # type: ignore[arg-type]
            given,
            address=address,
            folder=folder,
            installed=installed,
            python=python,
        )
        command = job.command
        about = f"{command.verb} {command.subject}" + (f" as {command.name}" if command.name else "")
        size = f"{job.packed.files} files, {job.packed.bytes / 2**20:.1f} MiB sent"
        say(f"job {job.id} runs {about} on {job.found.cluster.address} ({size})")
        facts = {
            "job": job.id,
            "name": command.name,
            "address": job.found.cluster.address,
            "entrypoint": job.entrypoint,
            "files": job.packed.files,
            "bytes": job.packed.bytes,
        }
        if detach:
            say(f"follow it with: cosa-ray jobs logs {job.id} --follow{at(job.found)}")
            emit({**facts, "status": "PENDING", "exit_code": None, "message": ""})
            return
        end = follow_to_end(job.found, job.id)
        emit({**facts, "status": end.status, "exit_code": end.exit_code, "message": end.message})
    if end.exit_code:
        raise typer.Exit(end.exit_code)


def follow_to_end(found: Found, job_id: str) -> JobEnd:
    """Show a job's log until it has ended and say how; Ctrl-C leaves it running, with exit code 130."""
    from cosa_ray.jobs.submit import follow

    try:
        with log_writer() as write:
            end = follow(found, job_id, write)
    except KeyboardInterrupt:
        say(f"\nstopped following; job {job_id} goes on. Stop it with: cosa-ray jobs stop {job_id}{at(found)}")
        raise typer.Exit(130) from None
    say(f"job {job_id} {end.status.lower()}, exit code {end.exit_code}: {end.message}")
    return end


def at(found: Found) -> str:
    """The option that names a cluster again, where it was named by one."""
    return f" --address {found.cluster.address}" if found.origin == "--address" else ""


@contextmanager
def log_writer() -> Iterator[Callable[[str], None]]:
    """Yield a function for a job's log: on a terminal, lines of progress overwrite each other, as they do locally."""
    if not sys.stdout.isatty():
        yield lambda text: print(text, end="", flush=True)
        return
    rest = ""
    live = False

    def write(text: str) -> None:
        nonlocal rest, live
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            progress = _PROGRESS.match(line) is not None
            # Back to the start of a line of progress, which ends without a line feed, and over it.
            print("\r\x1b[K" if live else "", line, end="" if progress else "\n", sep="", flush=True)
            live = progress

    try:
        yield write
    finally:
        if live or rest:
            print(f"\n{rest}" if live and rest else rest, flush=True)


def _as_job(verb: Callable[..., None]) -> Callable[..., None]:
    """The command that submits a verb: its parameters, but for those of this process, and the cluster's."""
    own = inspect.signature(verb, eval_str=True).parameters.values()
    cluster = inspect.signature(_submit, eval_str=True).parameters.values()
    kept = [each for each in own if each.name not in ("context", "local", "as_json")]
    added = [each for each in cluster if each.kind is not inspect.Parameter.VAR_KEYWORD]

    def submit(**parameters: Any) -> None:
        _submit(**parameters)

    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*kept, *added)]
    submit.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    submit.__annotations__ = {each.name: each.annotation for each in parameters}
    submit.__doc__ = f"As a job: {(verb.__doc__ or '').splitlines()[0]}"
    return submit


for _verb in (train, tune, ablate, promote, evaluate, predict, pseudo_labels):
    app.command(_verb.__name__.replace("_", "-"))(_as_job(_verb))
