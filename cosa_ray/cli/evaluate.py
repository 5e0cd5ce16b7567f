"""`cosa-ray evaluate`: a run's checkpoint under a protocol."""

from __future__ import annotations

from typing import Annotated

import typer

from cosa_ray.cli.output import count_bar, json_only, say, table
from cosa_ray.cli.train import AsJson


def evaluate(
    run: Annotated[str, typer.Argument(help="A run's name, its folder, or an MLflow run id.")],
    protocol: Annotated[
        str | None,
        typer.Option(help="release, multi_scale, single_scale, peers, or a YAML file; the run's own without it."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Another dataset of the same classes.")] = None,
    split: Annotated[str | None, typer.Option(help="Another split.")] = None,
    checkpoint: Annotated[str, typer.Option(help="best or last.")] = "best",
    storage: Annotated[str, typer.Option(help="Folder or URI that holds the runs.")] = "runs",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes on Ray; the run's own number without it.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    no_track: Annotated[bool, typer.Option("--no-track", help="Do not log to the run in MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a finished or running run on a whole split: scores of both networks, per class, with intervals.

    Examples: cosa-ray evaluate shapes-1; cosa-ray evaluate voc-1 --protocol release --split val
    """
    with json_only(as_json) as emit:
        from cosa_ray.training.evaluating import evaluate_run

        with count_bar("evaluate") as show:
            report = evaluate_run(
                run,
                protocol=protocol,
                dataset=dataset,
                split=split,
                which=checkpoint,
                storage=storage,
                workers=workers,
                local=local,
                track=not no_track,
                show=show,
            )
        if not as_json:
            table(
                f"{report.name}, {report.checkpoint} on {report.split} of {report.dataset}",
                ["metric", "value", "95 % over images"],
                [
                    [name, f"{value:.4f}", _interval(report.metrics, name)]
                    for name, value in sorted(report.metrics.items())
                    if "/iou/" not in name and not name.endswith(("_ci_low", "_ci_high"))
                ],
            )
            first = next(iter(report.per_class))
            table(
                f"per class, {report.prefix}/{first}",
                ["class", "IoU", "precision", "recall"],
                [
                    [str(row["class"]), *(_share(row[key]) for key in ("iou", "precision", "recall"))]
                    for row in report.per_class[first]
                ],
            )
            for title, images in (("worst", report.worst), ("best", report.best)):
                say(f"{title} images: " + ", ".join(f"{name} {miou:.3f}" for name, miou in images))
        say(f"report, tables and pictures: {report.folder}")
        emit(report.as_json())


def _interval(metrics: dict[str, float], name: str) -> str:
    bounds = [metrics.get(f"{name}_ci_{end}") for end in ("low", "high")]
    return "" if None in bounds else " to ".join(f"{bound:.4f}" for bound in bounds)


def _share(value: float | str) -> str:
    return "-" if not isinstance(value, float) or value != value else f"{value:.4f}"
