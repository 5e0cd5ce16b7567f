"""A study's rows as tables, for a terminal and for Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosa_ray.ablation.study import RowResult, Study

COLUMNS = ["row", "mean ± deviation", "by seed", "step from", "step", "95 % interval", "verdict"]


def table_rows(study: Study, metric: str | None = None) -> list[list[str]]:
    """A line per row of one metric (the headline), cells as text."""
    return [_line(row, metric or study.headline) for row in study.rows]


def markdown(study: Study) -> str:
    """The study as Markdown: a table per metric that all rows with a result have, the headline first."""
    names = [name for name in study.shared if "/iou/" not in name]
    parts = [
        f"# {study.name}\n\nSeeds {', '.join(map(str, study.seeds))}; last checkpoints; steps are paired by seed; the "
        "interval is a bootstrap over seeds, and over images where their counts are kept.\n"
    ]
    parts += [f"Without a result: {failure}\n" for failure in study.failed]
    for name in names:
        lines = [COLUMNS, ["---"] * len(COLUMNS), *table_rows(study, name)]
        parts.append(f"## {name}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n")
    return "\n".join(parts)


def _line(row: RowResult, metric: str) -> list[str]:
    value, step = row.metrics.get(metric), row.steps.get(metric)
    cells = [row.name, "-", "-"]
    if value is not None:
        spread = "" if value.deviation is None else f" ± {value.deviation:.4f}"
        cells[1:] = [f"{value.mean:.4f}{spread}", ", ".join(f"{each:.4f}" for each in value.by_seed.values())]
    if step is None:
        return [*cells, "-", "-", "-", "-"]
    spread = "" if step.deviation is None else f" ± {step.deviation:.4f}"
    between = "-" if step.interval is None else f"{step.interval[0]:+.4f} to {step.interval[1]:+.4f}"
    return [*cells, row.after or "-", f"{step.mean:+.4f}{spread}", between, step.words]
