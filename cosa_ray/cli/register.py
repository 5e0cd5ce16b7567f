"""`cosa-ray register`: a run's checkpoint in MLflow's model registry."""

from __future__ import annotations

from typing import Annotated

import typer

from cosa_ray.cli.output import json_only, say
from cosa_ray.cli.train import AsJson


def register(
    run: Annotated[str, typer.Argument(help="A run's name, its folder, or an MLflow run id.")],
    name: Annotated[str, typer.Option("--name", help="Name of the registered model.")],
    alias: Annotated[list[str] | None, typer.Option(help="Alias of this version; may be given several times.")] = None,
    checkpoint: Annotated[str, typer.Option(help="best or last.")] = "best",
    storage: Annotated[str, typer.Option(help="Folder or URI that holds the runs.")] = "runs",
    as_json: AsJson = False,
) -> None:
    """Register a run's checkpoint, with signature, example, classes, palette and metrics.

    Example: cosa-ray register voc-1 --name cosa-voc --alias best
    """
    with json_only(as_json) as emit:
        from cosa_ray.training.models import register_run

        found = register_run(run, name=name, aliases=alias or [], which=checkpoint, storage=storage)
        say(f"version {found.version} of {found.name}: cosa-ray predict {found.uri} IMAGES...")
        emit(found.as_json())
