"""Figures of a sweep for its MLflow page, 900 pixels wide; where there is nothing to draw, a sentence says why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cosa_ray.tuning.journal import Entry
from cosa_ray.tuning.results import SweepResult, TrialResult, grouped
from cosa_ray.tuning.sweepfile import Mode
from cosa_ray.tuning.watch import better

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GREEN, RED, GREY = "#3b6ea8", "#3f8f5f", "#b5473c", "#9a9a9a"
WIDTH, _DPI = 8.2, 110
_NAMED = 14  # members of a front that are named
Points = Sequence[tuple[int, float]]
Order = Mapping[str, float]


def history(result: SweepResult) -> Figure:
    """Score by trial, with the best so far; repeats of a configuration with their mean."""
    metrics = _metrics(result)
    if not any(trial.scores for trial in result.trials):
        return sentence("Search history", no_score(result))
    figure, panels = panels_of("Search history", len(metrics), 1, 3.4, sharex=True)
    repeated = len({trial.configuration for trial in result.trials}) < len(result.trials)
    for (metric, mode), axes in zip(metrics.items(), panels, strict=True):
        counted = [trial for trial in result.trials if trial.succeeded and metric in trial.scores]
        for early, label in ((False, "ran to its end"), (True, "ended early")):
            chosen = [trial for trial in counted if (trial.state != "finished") == early]
            if chosen:
                axes.scatter(
                    [int(trial.id) for trial in chosen],
                    [trial.scores[metric] for trial in chosen],
                    s=22,
                    facecolors="white" if early else BLUE,
                    edgecolors=BLUE,
                    alpha=0.5 if repeated else 1,
                    label=label,
                    zorder=3,
                )
        if counted:
            _best_so_far(axes, counted, metric, mode, last=int(result.trials[-1].id), repeated=repeated)
        lost = [int(trial.id) for trial in result.trials if trial.state == "failed"]
        if lost:
            axes.plot(
                lost, [0.02] * len(lost), "x", color=RED, transform=axes.get_xaxis_transform(), label="failed", ms=6
            )
        axes.set_ylabel(metric)
        axes.margins(y=0.13)
        _trial_axis(axes, result)
    panels[-1].set_xlabel("trial")
    legend(figure, panels[0])
    return figure


def _best_so_far(
    axes: Axes, counted: Sequence[TrialResult], metric: str, mode: Mode, *, last: int, repeated: bool
) -> None:
    """The best by then, up to the last trial; of repeats by their mean, which is drawn too."""
    course: list[tuple[int, float]] = []
    best = ""
    for group in grouped(counted).values():
        at, mean = int(group[-1].id), float(np.mean([trial.scores[metric] for trial in group]))
        if repeated:
            axes.hlines(mean, int(group[0].id) - 0.3, at + 0.3, color=BLUE, linewidth=2, zorder=4)
        if better(mean, course[-1][1] if course else None, mode):
            course.append((at, mean))
            best = f"{group[0].id}{' (mean)' if repeated else ''}: {mean:.4g}"
    up = 1 if mode == "max" else -1
    axes.annotate(
        best,
        course[-1],
        xytext=(0, 7 * up),
        textcoords="offset points",
        ha="center",
        va="bottom" if up > 0 else "top",
        fontsize=8.5,
        color=GREEN,
    )
    course.append((last, course[-1][1]))
    axes.plot(*zip(*course, strict=True), color=GREEN, drawstyle="steps-post", label="best so far", zorder=2)


def pareto(result: SweepResult) -> Figure:
    """Every pair of metrics against each other, with the trials that no other beats in every metric."""
    metrics = _metrics(result)
    title = "Pareto front"
    known = [trial for trial in result.trials if trial.succeeded and len(trial.scores) == len(metrics)]
    if not known:
        return sentence(title, no_score(result))
    pairs = [(a, b) for i, a in enumerate(metrics) for b in list(metrics)[i + 1 :]]
    figure, panels = panels_of(title, -(-len(pairs) // 2), min(2, len(pairs)), 4.2)
    words = {"max": "more is better", "min": "less is better"}
    for (across, up), axes in zip(pairs, panels, strict=False):
        front = sorted((t for t in known if t.id in result.front), key=lambda trial: trial.scores[across])
        rest = [trial for trial in known if trial.id not in result.front]
        axes.scatter([t.scores[across] for t in rest], [t.scores[up] for t in rest], s=20, color=GREY, label="beaten")
        x, y = [t.scores[across] for t in front], [t.scores[up] for t in front]
        if len(metrics) == 2:
            # What the front is known to reach: a step towards the worse side of the first metric.
            axes.step(x, y, where="pre" if metrics[across] == "max" else "post", color=RED, linewidth=1, alpha=0.6)
        axes.scatter(x, y, s=34, color=RED, label="front", zorder=3)
        every = -(-len(front) // _NAMED)
        for place, trial in enumerate(front[::every]):
            above = place % 2 == 0
            axes.annotate(
                trial.id,
                (trial.scores[across], trial.scores[up]),
                xytext=(0, 6 if above else -6),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                fontsize=7.5,
                color=RED,
            )
        axes.set_xlabel(f"{across}  ({words[metrics[across]]})", fontsize=9)
        axes.set_ylabel(f"{up}  ({words[metrics[up]]})", fontsize=9)
        axes.margins(0.09)
    for axes in panels[len(pairs) :]:
        axes.set_axis_off()
    legend(figure, panels[0])
    return figure


def curves(entries: Sequence[Entry], result: SweepResult) -> Figure:
    """Every trial's evaluations over its steps, coloured by its rank in the end."""
    lines = {
        metric: {
            entry.id: [
                (r.step, r.metrics[metric]) for r in entry.reports if math.isfinite(r.metrics.get(metric, math.nan))
            ]
            for entry in entries
        }
        for metric in _metrics(result)
    }
    if not any(line for each in lines.values() for line in each.values()):
        return sentence("Evaluations of all trials", no_score(result))
    return _courses("Evaluations of all trials", lines, result)


def trajectories(thresholds: Mapping[str, Mapping[str, Points]], result: SweepResult, read: int) -> Figure:
    """Thresholds of the trials over their steps, coloured by rank; `read`: trials whose course MLflow gave."""
    title = "Thresholds of all trials"
    if not any(line for each in thresholds.values() for line in each.values()):
        return sentence(title, "MLflow has no threshold/* metric of any trial.")
    if read < len(result.trials):
        title = f"Thresholds of {read} of {len(result.trials)} trials"
    return _courses(title, thresholds, result)


def cost(result: SweepResult) -> Figure:
    """Hours of every trial, by how it ended."""
    total, kind = sum(trial.hours for trial in result.trials), f"{result.hours_of.upper()} time"
    if not total:
        return sentence("Cost of the trials", "No trial has taken any time.")
    unit, factor = _unit(max(trial.hours for trial in result.trials))
    every, times = _unit(total)
    failed = sum(trial.hours for trial in result.trials if trial.state == "failed")
    lost = f", {100 * failed / total:.0f} % of it for trials that failed" if failed else ""
    figure, (axes,) = panels_of(f"Cost of the trials: {total * times:.3g} {every} of {kind} in all{lost}", 1, 1, 3.6)
    looks = {
        "finished": (BLUE, "ran to its end"),
        "stopped_early": ("#a9c3de", "ended early"),
        "interrupted": ("#d8d8d8", "interrupted"),
        "failed": (RED, "failed"),
    }
    for state, (colour, label) in looks.items():
        chosen = [trial for trial in result.trials if trial.state == state]
        if chosen:
            axes.bar([int(t.id) for t in chosen], [t.hours * factor for t in chosen], color=colour, label=label)
    axes.set_xlabel("trial")
    axes.set_ylabel(f"{kind}, {unit}")
    _trial_axis(axes, result)
    legend(figure, axes)
    return figure


def sentence(title: str, text: str) -> Figure:
    """A figure that says why there is none."""
    import textwrap

    figure, (axes,) = panels_of(title, 1, 1, 1.6)
    axes.set_axis_off()
    text = "\n".join(textwrap.wrap(text[:1].upper() + text[1:], 105))
    figure.text(0.012, 0.6, text, fontsize=10, color="#505050", va="top")
    return figure


def _courses(title: str, lines: Mapping[str, Mapping[str, Points]], result: SweepResult) -> Figure:
    """Metrics over the steps, a panel for each and a line for each trial."""
    ranks = _trial_ranks(result)
    states = {trial.id: trial.state for trial in result.trials}
    figure, panels = panels_of(title, len(lines), 1, 2.5 if len(lines) > 1 else 4.0, sharex=True)
    for (metric, each), axes in zip(lines.items(), panels, strict=True):
        for number, line in each.items():
            if not line:
                continue
            steps, values = zip(*line, strict=True)
            rank = ranks.get(number)
            colour = RED if states[number] == "failed" else GREY if rank is None else colour_of(rank)
            look: dict[str, Any] = {"color": colour, "linewidth": 2.4 if rank == 0 else 1.1}
            axes.plot(steps, values, zorder=3 - (1.5 if rank is None else rank), **look)
            mark = {"failed": "x", "stopped_early": "o", "interrupted": "s"}.get(states[number])
            if mark or len(line) == 1:
                fill = "white" if mark == "o" else colour
                axes.plot(steps[-1], values[-1], mark or ".", color=colour, markerfacecolor=fill, ms=5, zorder=4)
        axes.set_ylabel(metric)
        axes.margins(x=0.02, y=0.08)
    panels[-1].set_xlabel("optimiser steps")
    if ranks:
        rank_bar(figure, panels, len(set(ranks.values())))
    ended = set(states.values())
    key(figure, best=bool(ranks), early="stopped_early" in ended, failed="failed" in ended, dots=True)
    return figure


def panels_of(
    title: str, rows: int, columns: int, height: float, *, width: float = WIDTH, **share: Any
) -> tuple[Figure, list[Axes]]:
    """A figure outside pyplot, which keeps figures for ever and is not safe in threads; panels `height` inches high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, rows * height + 0.7), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11.5, x=0.012, ha="left")
    panels = list(figure.subplots(rows, columns, squeeze=False, **share).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8.5)
    return figure, panels


def legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """One legend below everything drawn."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def key(figure: Figure, *, dots: bool = False, **shown: bool) -> None:
    """A legend of what lines (or `dots`) look like, for the looks that are shown."""
    from matplotlib.lines import Line2D

    dot = {"linestyle": "none", "marker": "o"}
    looks: dict[str, dict[str, Any]] = {
        "best": {"color": colour_of(0), "linewidth": 2.6, "label": "best"},
        "later": {"color": colour_of(0), "label": "tried later (darker)", **dot},
        "early": {
            "color": colour_of(0.3),
            "label": "ended early",
            **({**dot, "mfc": "white"} if dots else {"ls": "--"}),
        },
        "failed": {"color": RED, "label": "failed", **({**dot, "marker": "x"} if dots else {"ls": ":"})},
    }
    handles = [Line2D([], [], markersize=5, **look) for name, look in looks.items() if shown.get(name)]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def rank_bar(figure: Figure, axes: Any, count: int) -> None:
    """The colours of the ranks, beside the panels."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    shades = ListedColormap([colour_of(1 - share) for share in np.linspace(0, 1, 64)])
    bar = figure.colorbar(ScalarMappable(cmap=shades), ax=axes, fraction=0.03, pad=0.01, aspect=30)
    bar.set_ticks([0, 1], labels=[f"{count}", "1"] if count > 1 else ["", "1"])
    bar.set_label("rank", fontsize=8.5, labelpad=-8)
    bar.outline.set_visible(False)


def colour_of(rank: float) -> Any:
    """Colour of a rank, 0 the best (dark) to 1."""
    from matplotlib import colormaps

    return colormaps["YlGnBu"](0.95 - 0.68 * rank)


def ranks_of(scores: Order, mode: Mode) -> dict[str, float]:
    """Ranks, 0 the best to 1 the worst."""
    ordered = sorted(scores, key=lambda name: scores[name] * (-1 if mode == "max" else 1))
    return {name: place / max(1, len(ordered) - 1) for place, name in enumerate(ordered)}


def _trial_ranks(result: SweepResult) -> dict[str, float]:
    """Ranks of the trials by their first metric; all repeats of a configuration have that of their mean."""
    scores: dict[str, list[float]] = {}
    for trial in result.trials:
        if trial.succeeded and trial.score is not None:
            scores.setdefault(str(trial.configuration), []).append(trial.score)
    ranks = ranks_of({number: float(np.mean(each)) for number, each in scores.items()}, _metrics(result)[result.metric])
    return {
        trial.id: ranks[str(trial.configuration)]
        for trial in result.trials
        if trial.succeeded and trial.score is not None
    }


def _metrics(result: SweepResult) -> dict[str, Mode]:
    return result.metrics or {result.metric: "max" if result.mode == "max" else "min"}


def _unit(hours: float) -> tuple[str, float]:
    """The unit in which a time reads best, and how many of it an hour has."""
    return ("hours", 1.0) if hours >= 1 else ("minutes", 60.0) if hours >= 1 / 60 else ("seconds", 3600.0)


def _trial_axis(axes: Axes, result: SweepResult) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.7, max((int(trial.id) for trial in result.trials), default=0) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def no_score(result: SweepResult) -> str:
    """The sentence for a sweep without a score."""
    kinds = [trial.kind or trial.state for trial in result.trials]
    counts = ", ".join(f"{kinds.count(kind)} {kind.replace('_', ' ')}" for kind in dict.fromkeys(kinds))
    return f"no trial has a score ({counts or 'no trial was started'})."
