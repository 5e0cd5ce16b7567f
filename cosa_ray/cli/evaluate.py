"""`cosa-ray evaluate`: a run's best checkpoint on a split."""

from __future__ import annotations

from typing import Annotated

import typer

from cosa_ray.cli.output import json_only, metrics_table
from cosa_ray.cli.train import AsJson


def evaluate(
    run: Annotated[str, typer.Argument(help="A run's name, its folder, or an MLflow run id.")],
    dataset: Annotated[str | None, typer.Option(help="Another dataset of the same classes.")] = None,
    split: Annotated[str | None, typer.Option(help="Another split.")] = None,
    checkpoint: Annotated[str, typer.Option(help="best or last.")] = "best",
    storage: Annotated[str, typer.Option(help="Folder or URI that holds the runs.")] = "runs",
    as_json: AsJson = False,
) -> None:
    """Evaluate a run's checkpoint by its own protocol on the whole split.

    Example: cosa-ray evaluate shapes-1 --split val
    """
    with json_only(as_json) as emit:
        from cosa_ray.training.evaluating import evaluate_run

        result = evaluate_run(run, dataset=dataset, split=split, which=checkpoint, storage=storage)
        if not as_json:
            metrics_table(f"{result.name}, {result.checkpoint} on {result.dataset}", result.metrics)
        emit(result.as_json())
