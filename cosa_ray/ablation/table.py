"""A study's rows as tables, for a terminal and for Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosa_ray.ablation.numbers import seeds_words
from cosa_ray.tuning.promotion import markdown_line

if TYPE_CHECKING:
    from cosa_ray.ablation.numbers import Difference
    from cosa_ray.ablation.study import RowResult, Study

COLUMNS = ["row", "mean ± deviation", "by seed", "follows", "difference", "95 % interval", "over", "verdict"]


def table_rows(study: Study, metric: str | None = None) -> list[list[str]]:
    """A line per row of one metric (the headline), cells as text."""
    return [_line(row, metric or study.headline) for row in study.rows]


def markdown(study: Study) -> str:
    """The study as Markdown: a table per metric that all rows with a result have, the headline first."""
    names = [name for name in study.shared if "/iou/" not in name]
    parts = [
        f"# {study.name}\n\nSeeds {', '.join(map(str, study.seeds))}; last checkpoints. Differences are paired by "
        "seed, over the seeds that both rows have. The interval is Student's over seeds, widened to hold a bootstrap "
        f"over seeds and images where their counts are kept. Nothing is corrected for the {len(names)} tables: of "
        "metrics beside the one a study is about, one difference in twenty is beyond noise by chance.\n"
    ]
    parts += [f"Without a result: {failure}\n" for failure in study.failed]
    for name in names:
        parts.append(f"## {name}\n\n" + _table([COLUMNS, ["---"] * len(COLUMNS), *table_rows(study, name)]))
    for name, points in study.during.items():
        lines = [["row (the one it follows)", *(str(at.step) for at in points)], ["---"] * (len(points) + 1)]
        for row in study.rows:
            cells = [_cell(at.differences.get(row.name)) for at in points]
            if any(cell != "-" for cell in cells):
                lines.append([f"{row.name} ({row.after})", *cells])
        parts.append(f"## {name} over training: differences (bold: beyond noise)\n\n" + _table(lines))
    return "\n".join(parts)


def description(study: Study) -> str:
    """A study's rows in a few lines of Markdown, for MLflow's page of it."""
    shown = [
        COLUMNS.index(name) for name in ("row", "mean ± deviation", "follows", "difference", "95 % interval", "verdict")
    ]
    lines = [[cells[column] for column in shown] for cells in [COLUMNS, ["---"] * len(COLUMNS), *table_rows(study)]]
    parts = [
        f"**Study {study.name}**: {study.headline} of last checkpoints, {seeds_words(study.seeds)}",
        _table(lines).rstrip(),
        *(f"Without a result: {failure}" for failure in study.failed),
        f"All metrics, and figures of the differences over training: under Artifacts, in `{study.place}/`",
    ]
    return "\n\n".join(parts)


def _table(lines: list[list[str]]) -> str:
    return "\n".join(map(markdown_line, lines)) + "\n"


def _cell(found: Difference | None) -> str:
    if found is None:
        return "-"
    return f"**{found.mean:+.4f}**" if found.within_noise is False else f"{found.mean:+.4f}"


def _line(row: RowResult, metric: str) -> list[str]:
    value, found = row.metrics.get(metric), row.differences.get(metric)
    cells = [row.name, "-", "-"]
    if value is not None:
        spread = "" if value.deviation is None else f" ± {value.deviation:.4f}"
        by_seed = ", ".join(f"{seed}: {each:.4f}" for seed, each in value.by_seed.items())
        cells[1:] = [f"{value.mean:.4f}{spread}", by_seed]
    if found is None:
        return [*cells, *["-"] * 5]
    spread = "" if found.deviation is None else f" ± {found.deviation:.4f}"
    between = "-" if found.interval is None else f"{found.interval[0]:+.4f} to {found.interval[1]:+.4f}"
    return [*cells, row.after or "-", f"{found.mean:+.4f}{spread}", between, found.over, found.words]
