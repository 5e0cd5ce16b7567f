"""Compare runs, sweeps and groups of seeds: the function behind `cosa-ray compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cosa_ray.errors import UserError
from cosa_ray.reporting.differences import Comparison, MetricRow, Verdict, differences
from cosa_ray.reporting.history import Histories
from cosa_ray.reporting.page import render_page
from cosa_ray.reporting.pictures import Pictures, draw_pictures
from cosa_ray.reporting.subjects import find_sides

__all__ = ["Comparison", "MetricRow", "Verdict", "compare_runs"]


def compare_runs(
    names: Sequence[str],
    *,
    protocol: str | None = None,
    metric: str | None = None,
    storage: str = "runs",
    experiment: str | None = None,
    html: str | Path | None = None,
    pictures: bool = True,
    force: bool = False,
) -> Comparison:
    """Put two or more runs side by side, each against the first; the function of the verb.

    names: runs (name, folder, MLflow run id), sweeps (their best trial), patterns such as `voc-seed-*` for runs that
    differ in their seed only (their means), `mlflow:FILTER` for every run of an MLflow experiment that a filter finds.
    protocol: demands an evaluation under it; None takes one that all have. metric: the mIoU the verdict, the classes
    and the images are of; None is the first scored, AN's plain one. html: also writes one page that needs no network;
    pictures: with the images that differ most, for which both networks are run. Raises UserError when a word names
    nothing, an evaluation is missing, or the page exists and not `force`.
    """
    page = None if html is None else Path(html)
    if page is not None:
        if page.is_dir():
            raise UserError(f"--html {page}: is a folder; give a file's name.")
        if page.exists() and not force:
            raise UserError(f"{page} exists already: add --force to replace it, or choose another --html.")
        if not page.parent.is_dir():
            raise UserError(f"--html {page}: there is no folder {page.parent}; make it first.")
    sides, notes = find_sides(names, storage=storage, experiment=experiment)
    histories = Histories()
    compared = differences(sides, histories, protocol=protocol, metric=metric)
    charts = [] if page is None else histories.charts(sides)
    comparison = replace(
        compared.comparison,
        notes=[*notes, *compared.comparison.notes, *histories.notes],
        html=None if page is None else str(page.resolve()),
    )
    if page is not None:
        compared = replace(compared, comparison=comparison)
        drawn = draw_pictures(compared) if pictures else Pictures([], [], "Pictures were not asked for.")
        page.write_text(render_page(compared, charts, drawn), encoding="utf-8")
    return comparison
