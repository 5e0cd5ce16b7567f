"""`cosa-ray import-release`: the authors' checkpoint as a run."""

from __future__ import annotations

from typing import Annotated

import typer

from cosa_ray.cli.output import json_only, say
from cosa_ray.cli.train import AsJson


def import_release(
    file: Annotated[str, typer.Argument(help="The authors' .pth file, path or URI.")],
    name: Annotated[str | None, typer.Option(help="Name of the run; the file's own without it.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads; width / 64 without it.")] = None,
    aux: Annotated[int, typer.Option(help="Block of the auxiliary tap.")] = -3,
    crop: Annotated[int, typer.Option(min=1, help="Side the network was trained at, pixels.")] = 448,
    dataset: Annotated[
        str | None, typer.Option(help="Dataset that names the classes, where they are not VOC's or COCO's.")
    ] = (None),
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Leave out tensors that the network does not have.")
    ] = False,
    storage: Annotated[str, typer.Option(help="Folder or URI that holds the runs.")] = "runs",
    no_track: Annotated[bool, typer.Option("--no-track", help="Without MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a run of a checkpoint that the authors released, for evaluate, predict and register.

    Example: cosa-ray import-release voc_best.pth --name released-voc
    """
    from pathlib import PurePosixPath

    from cosa_ray.training.release import import_release as run

    with json_only(as_json) as emit:
        found = run(
            file,
            name=name or PurePosixPath(file).stem,
            heads=heads,
            aux=aux,
            crop=crop,
            dataset=dataset,
            allow_unknown=allow_unknown,
            storage=storage,
            track=not no_track,
        )
        if found.left_out:
            say(f"left out: {', '.join(found.left_out)}")
        say(f"run {found.name} of {len(found.classes)} classes: {found.folder}")
        say(f"evaluate it: cosa-ray evaluate {found.name} --protocol release")
        emit(found.as_json())
