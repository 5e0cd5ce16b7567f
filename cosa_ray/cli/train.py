"""`cosa-ray train`: one experiment, from file to checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from cosa_ray.cli.output import json_only, metrics_table, progress_line, say, say_tracked
from cosa_ray.cli.resume import command_to_resume

File = Annotated[str, typer.Argument(help="Experiment file, by path or by the name of a shipped one.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be given several times.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]


def train(
    context: typer.Context,
    file: File,
    set_: Set = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; its folder is STORAGE/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of this name.")] = False,
    local: Annotated[bool, typer.Option("--local", help="One process, without Ray.")] = False,
    no_track: Annotated[bool, typer.Option("--no-track", help="Without MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train one experiment.

    Examples: cosa-ray train shapes --name first; cosa-ray train experiments/voc.yaml --set losses.contrastive=0.2
    """
    from cosa_ray.config.load import load_config
    from cosa_ray.config.names import default_name
    from cosa_ray.errors import UserError

    if resume and name is None:
        raise UserError("--resume needs the --name of the run to continue.")
    config = load_config(file, set_ or [])
    name = name or default_name("train", file)
    with json_only(as_json) as emit:
        from cosa_ray.training.driver import train as run

        with progress_line() as show:
            result = run(config, name=name, resume=resume, local=local, track=not no_track, show=show)
        if not as_json:
            metrics_table(
                f"{result.name}: {result.state} at step {result.step}, best by {result.metric}", result.best_metrics
            )
        say(f"checkpoints and config: {result.folder}")
        if result.state == "stopped":
            say(f"stopped; continue with: {command_to_resume(context, result.name)}")
        say_tracked(result.mlflow_run_id, result.tracking_uri)
        emit(result.as_json())
