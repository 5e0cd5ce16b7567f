"""`cosa-ray compare`: runs, sweeps and groups of seeds side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosa_ray.cli.output import json_only, say, table
from cosa_ray.cli.train import AsJson
from cosa_ray.reporting.words import cost, duration, interval, number, settings, steps

if TYPE_CHECKING:
    from cosa_ray.reporting.compare import Comparison, MetricRow

_WIDE = 6  # sides whose values a terminal has room for


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="A B",
            help="Two or more of: a run (name, folder, MLflow run id); a sweep (its best trial); a quoted pattern such "
            "as 'voc-seed-*' for runs that differ in their seed only (their means); 'mlflow:FILTER' for the runs of an "
            "MLflow experiment that a filter finds (at most 20, oldest first).",
        ),
    ],
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Demand evaluations under this protocol, or with this prefix of metrics; one that all have without it."
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="mIoU of the verdict, the classes and the images, as miou_labels_given.")
    ] = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Also write one page that needs no network.")] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="In the page, images on which the first two differ most.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the page where there is one.")] = False,
    storage: Annotated[str, typer.Option(help="Folder or URI that holds the runs.")] = "runs",
    experiment: Annotated[
        str | None, typer.Option(help="MLflow experiment of mlflow:FILTER; cosa-ray without it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs with the first: settings, metrics, classes, paired intervals over images, cost.

    Examples: cosa-ray compare voc-1 voc-2 --protocol release --html voc.html; cosa-ray compare 'base-seed-*'
    'new-seed-*'; cosa-ray compare 'mlflow:params."losses.contrastive" = "0.2"'
    """
    with json_only(as_json) as emit:
        from cosa_ray.reporting.compare import compare_runs

        found = compare_runs(
            names,
            protocol=protocol,
            metric=metric,
            storage=storage,
            experiment=experiment,
            html=html,
            pictures=pictures,
            force=force,
        )
        if not as_json:
            _show(found)
        for note in found.notes:
            say(note)
        if found.html is not None:
            say(f"page: {found.html}")
        emit(found.as_json())


def _show(found: Comparison) -> None:
    letters = [side["letter"] for side in found.sides]
    table(
        "what is compared",
        ["", "name", "kind", "runs", "steps", "cost a run", "wall time a run"],
        [_side(side) for side in found.sides],
    )
    if len(letters) > _WIDE:
        say(f"Settings, metrics and classes of more than {_WIDE} do not fit here; --json and --html have them.")
    else:
        _show_values(found, letters)
    for verdict in found.verdicts:
        print(verdict.sentence)


def _show_values(found: Comparison, letters: list[str]) -> None:
    against = [letters[0], *(part for letter in letters[1:] for part in (letter, f"{letter} - A"))]
    if found.config:
        table(
            "settings that differ",
            ["setting", *letters],
            [[row["key"], *settings(row["values"])] for row in found.config],
        )
    table(
        "metrics (difference from A, 95 % paired interval over images)",
        ["metric", "of", *against],
        [_metric(row) for row in found.metrics if row.is_shared],
    )
    if alone := sum(not row.is_shared for row in found.metrics):
        say(f"{alone} metrics that only one of them has are left out here; --json and --html have them.")
    if found.per_class:
        table(
            f"IoU per class, {found.classes_of}",
            ["class", *against],
            [[row["class"], *_with_differences(row["values"], row["differences"])] for row in found.per_class],
        )


def _side(side: dict[str, Any]) -> list[str]:
    kind = f"{side['kind']}: {side['note']}" if side["note"] else side["kind"]
    return [side["letter"], side["name"], kind, str(len(side["runs"])), steps(side), cost(side), duration(side)]


def _metric(row: MetricRow) -> list[str]:
    cells = [row.name, row.source]
    for place, (value, spread) in enumerate(zip(row.values, row.deviations, strict=True)):
        cells.append(number(value) + ("" if spread is None else f" ± {spread:.4f}"))
        if place:
            bounds = row.intervals[place]
            cells.append(number(row.differences[place], sign=True) + (f" ({interval(bounds)})" if bounds else ""))
    return cells


def _with_differences(values: list[float | None], differences: list[float | None]) -> list[str]:
    cells = [number(values[0])]
    for value, difference in zip(values[1:], differences[1:], strict=True):
        cells += [number(value), number(difference, sign=True)]
    return cells
