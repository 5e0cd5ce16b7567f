"""A study's figures: every row's values and differences with their intervals, and the rows' courses over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cosa_ray.ablation.numbers import seeds_words
from cosa_ray.tuning.figures import BLUE, GREY, RED, legend, panels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from cosa_ray.ablation.study import Study
    from cosa_ray.reporting.history import Chart

# Drawn beside the headline where all rows have them.
BESIDE = ("context_foreground", "pseudo_miou", "pseudo_context_foreground", "cam_miou_held_out")
_MARKED = 30  # points of a line up to which each is marked


def metrics_shown(study: Study) -> list[str]:
    """The headline and those beside it that every row with a result has."""
    prefix = study.headline.rpartition("/")[0]
    return [name for name in (study.headline, *(f"{prefix}/{name}" for name in BESIDE)) if name in study.shared]


def differences_figure(study: Study) -> Figure:
    """For each shown metric, left every seed's value and the mean, right the difference from the row it follows."""
    shown = metrics_shown(study)
    height = 0.32 * len(study.rows) + 0.7
    title = f"{study.name}: last checkpoints, {seeds_words(study.seeds)}"
    figure, panels = panels_of(title, len(shown), 2, height, width=11.5, sharey=True)
    places = range(len(study.rows))
    for metric, left, right in zip(shown, panels[::2], panels[1::2], strict=True):
        right.axvline(0, color=GREY, linewidth=0.8)
        for place, row in enumerate(study.rows):
            if (value := row.metrics.get(metric)) is None:
                continue
            left.plot(list(value.by_seed.values()), [place] * len(value.by_seed), "o", color=BLUE, alpha=0.45, ms=5)
            left.plot(value.mean, place, "|", color=BLUE, ms=14, mew=2)
            if (found := row.differences.get(metric)) is None:
                continue
            color = RED if found.within_noise is False else BLUE
            right.plot(list(found.by_seed.values()), [place] * len(found.by_seed), "o", color=GREY, alpha=0.6, ms=4)
            right.plot(found.mean, place, "D", color=color, ms=5.5)
            if found.interval is not None:
                right.plot(found.interval, [place, place], "-", color=color, linewidth=1.6)
        left.set_yticks(list(places), [row.name for row in study.rows])
        left.set_ylim(len(study.rows) - 0.4, -0.6)
        left.set_xlabel(metric, fontsize=9)
        right.set_xlabel("difference from the row it follows, 95 % interval (red: beyond noise)", fontsize=9)
    return figure


def during_figure(study: Study) -> Figure:
    """Differences from the row each row follows, over training; full markers are beyond noise."""
    title = f"{study.name}: difference from the row it follows"
    figure, panels = panels_of(title, len(study.during), 1, 3.2, width=9.5, sharex=True)
    evaluations = next(iter(study.during.values()))
    following = [row.name for row in study.rows if any(row.name in at.differences for at in evaluations)]
    for (metric, points), axes in zip(study.during.items(), panels, strict=True):
        axes.axhline(0, color=GREY, linewidth=0.8)
        for name in following:
            there = [(at.step, at.differences[name]) for at in points if name in at.differences]
            line = _line(
                axes, study, name, [(step, found.mean) for step, found in there], marker="o", ms=5, mfc="white"
            )
            sure = [(step, found.mean) for step, found in there if found.within_noise is False]
            axes.plot([step for step, _ in sure], [mean for _, mean in sure], "o", color=line.get_color(), ms=5.5)
        axes.set_ylabel(metric, fontsize=9)
    panels[-1].set_xlabel("step (full markers: beyond noise)")
    legend(figure, panels[0], columns=3)
    return figure


def courses_figure(study: Study, charts: Sequence[Chart], rows: Mapping[str, str]) -> Figure:
    """Metrics over the steps, the mean over a row's seeds; charts hold a line for every letter of `rows`."""
    figure, panels = panels_of(f"{study.name}: mean over seeds", len(charts), 1, 3.2, width=9.5, sharex=True)
    for chart, axes in zip(charts, panels, strict=True):
        for letter, name in rows.items():
            if (points := chart.lines.get(letter)) is not None:
                _line(axes, study, name, points, marker="o" if len(points) < _MARKED else "", ms=3)
        axes.set_ylabel(chart.metric, fontsize=9)
    panels[-1].set_xlabel("step")
    legend(figure, panels[0], columns=3)
    return figure


def _line(axes: Axes, study: Study, name: str, points: Sequence[tuple[int, float]], **marks: Any) -> Line2D:
    """Draw a row's points (step, value), in the row's colour of all figures; dashed over a line that is the same."""
    place = [row.name for row in study.rows].index(name)
    steps, values = zip(*points, strict=True)
    same = any(np.array_equal(line.get_xydata(), points) for line in axes.lines)
    style = (0, (4, 4)) if same else ("-", "-.", ":")[place // 10 % 3]
    (line,) = axes.plot(steps, values, ls=style, color=f"C{place % 10}", linewidth=1.3, label=name, **marks)
    return line
