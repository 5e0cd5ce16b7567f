"""A study's rows as tables, for a terminal and for Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosa_ray.ablation.numbers import Step
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
        parts.append(f"## {name}\n\n" + _table(lines))
    for name, points in study.during.items():
        lines = [["row (the one it follows)", *(str(at.step) for at in points)], ["---"] * (len(points) + 1)]
        for row in study.rows:
            cells = [_cell(at.steps[row.name]) if row.name in at.steps else "-" for at in points]
            if any(cell != "-" for cell in cells):
                lines.append([f"{row.name} ({row.after})", *cells])
        parts.append(f"## {name} over training (bold: beyond noise)\n\n" + _table(lines))
    return "\n".join(parts)


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _cell(step: Step) -> str:
    return f"**{step.mean:+.4f}**" if step.within_noise is False else f"{step.mean:+.4f}"


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
