"""Figures of how a sweep's score hangs on its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cosa_ray.tuning.figures import (
    BLUE,
    GREEN,
    GREY,
    RED,
    WIDTH,
    colour_of,
    key,
    legend,
    panels_of,
    rank_bar,
    ranks_of,
    sentence,
)
from cosa_ray.tuning.importance import Importance
from cosa_ray.tuning.interactions import Interactions, height
from cosa_ray.tuning.sweepfile import Mode

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna import Study
    from optuna.trial import FrozenTrial

_ABSENT = -0.13  # height in parallel coordinates of what a configuration does not have


def importances(found: Mapping[str, Importance]) -> Figure:
    """Shares of the settings as bars, by metric."""
    drawn = {metric: each for metric, each in found.items() if each.shares or each.early}
    title = "Which settings matter"
    if not drawn:
        return sentence(title, "; ".join(dict.fromkeys(f"{each.note}." for each in found.values())) or "No trial.")
    rows = max(len({*e.shares, *e.conditional, *e.early}) for e in drawn.values())
    figure, panels = panels_of(title, len(drawn), 1, 1.5 + 0.36 * rows)
    for (metric, each), axes in zip(drawn.items(), panels, strict=True):
        share = {**each.early, **each.conditional, **each.shares}
        names = sorted(share, key=lambda name: share[name])
        places = np.arange(len(names))
        both = bool(each.shares and each.early)
        height, shift = (0.38, 0.2) if both else (0.7, 0.0)
        label = f"the {each.configurations} that ran to their end"
        _bars(axes, each.shares, names, shift, height=height, color=BLUE, label=label)
        look = {"height": height, "color": "white", "edgecolor": BLUE, "hatch": "////"}
        _bars(axes, each.conditional, names, shift, label="among those that have it", **look)
        if each.early:
            label = f"all, as they were by step {each.early_step}"
            _bars(axes, each.early, names, -shift, height=height, color=GREEN, label=label)
        axes.set_yticks(
            places, [f"{name} ({each.among[name]})" if name in each.among else name for name in names], fontsize=8.5
        )
        axes.set_xlim(0, 108)
        axes.xaxis.set_major_formatter("{x:g} %")
        hint = "\n(few configurations: a hint, no more)" if each.configurations < 30 and not each.early else ""
        axes.set_xlabel(f"share of the variance of {metric} explained by the setting alone{hint}")
    legend(figure, panels[0])
    return figure


def _bars(axes: Axes, values: Mapping[str, float], names: Sequence[str], at: float, **look: Any) -> None:
    """Shares as labelled bars beside their settings, shifted by `at`."""
    shown = [(place + at, 100 * values[name]) for place, name in enumerate(names) if name in values]
    if shown:
        y, x = zip(*shown, strict=True)
        axes.bar_label(axes.barh(y, x, **look), fmt="%.0f %%", padding=3, fontsize=8)


def together(study: Study, found: Mapping[str, Interactions], metrics: Mapping[str, Mode]) -> Figure:
    """Shares of pairs of settings, and the predicted score over the strongest pair, by metric."""
    title = "Which settings act together"
    drawn = {metric: each for metric, each in found.items() if each.pairs}
    if not drawn:
        return sentence(title, "; ".join(dict.fromkeys(f"{each.note}." for each in found.values())) or "No trial.")
    figure, panels = panels_of(title, len(drawn), 2, 4.2, width=10.4)
    known, distributions = _scored(study), _distributions(study)
    for (metric, each), left, right in zip(drawn.items(), panels[::2], panels[1::2], strict=True):
        _shares(left, each, metric)
        place = list(metrics).index(metric)
        complete = [(t.params, t.user_attrs["scores"][place]) for t in known if t.state.name == "COMPLETE"]
        _surface(right, each, metric, distributions, complete)
    return figure


def _shares(axes: Axes, found: Interactions, metric: str) -> None:
    """Alone on the diagonal, pairs below it, in per cent."""
    names = list(found.alone)
    table = np.full((len(names), len(names)), np.nan)
    for name, share in found.alone.items():
        table[names.index(name), names.index(name)] = 100 * share
    for pair, share in found.pairs.items():
        row, column = sorted((names.index(name) for name in pair), reverse=True)
        table[row, column] = 100 * share
    axes.imshow(table, cmap="Blues", vmin=0, vmax=max(10.0, float(np.nanmax(table))), aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            dark = value > 0.6 * max(10.0, float(np.nanmax(table)))
            axes.text(
                column, row, f"{value:.0f}", ha="center", va="center", fontsize=8.5, color="white" if dark else "black"
            )
    axes.set_xticks(range(len(names)), [_broken(name) for name in names], fontsize=7, rotation=90)
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    sure = f"R² {found.predicted:.2f} on configurations not shown"
    axes.set_title(f"% of the variance of {metric}, alone and in pairs\n({sure})", fontsize=8.5, loc="left")


def _surface(
    axes: Axes,
    found: Interactions,
    metric: str,
    distributions: Mapping[str, Any],
    tried: Sequence[tuple[Mapping[str, Any], float]],
) -> None:
    """Predicted score over the strongest pair, and as dots what was scored."""
    from matplotlib.colors import Normalize

    first, second = next(iter(found.pairs))
    scale: dict[str, Any] = {"norm": Normalize(np.min(found.surface), np.max(found.surface)), "cmap": "viridis"}
    image = axes.imshow(found.surface, origin="lower", extent=(0, 1, 0, 1), aspect="auto", **scale)
    across, up = ([height(distributions[name], settings[name]) for settings, _ in tried] for name in (second, first))
    axes.scatter(across, up, c=[score for _, score in tried], s=26, edgecolors="white", linewidths=0.8, **scale)
    axes.set_xticks(*_ticks(distributions[second]), fontsize=8)
    axes.set_yticks(*_ticks(distributions[first]), fontsize=8)
    axes.set_xlabel(second, fontsize=8.5)
    axes.set_ylabel(first, fontsize=8.5)
    axes.set_title("the strongest pair: predicted, and as dots tried", fontsize=8.5, loc="left")
    axes.figure.colorbar(image, ax=axes).set_label(metric, fontsize=8.5)


def parallel(study: Study, metrics: Mapping[str, Mode], order: Sequence[str] = ()) -> Figure:
    """Parallel coordinates of the configurations, coloured by their rank; `order`: settings, the last beside the score.

    A configuration that does not have a setting goes through its lower mark.
    """
    title = "Parallel coordinates of the configurations"
    known = _scored(study)
    if not known:
        return sentence(title, "No configuration has a score.")
    distributions = _distributions(study)
    names = sorted(distributions, key=lambda name: order.index(name) if name in order else -1)
    figure, (axes,) = panels_of(title, 1, 1, 4.9, width=max(WIDTH, 1.2 * (len(names) + len(metrics)) + 0.6))
    ends = [_ends([trial.user_attrs["scores"][index] for trial in known]) for index in range(len(metrics))]
    mode = next(iter(metrics.values()))
    ranks = ranks_of({str(trial.number): trial.user_attrs["scores"][0] for trial in known}, mode)
    failed = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "FAIL"]

    def heights(trial: FrozenTrial) -> list[float]:
        jitter = ((trial.number * 0.618) % 1 - 0.5) * 0.05
        settings = [_beside(distributions[n], trial.params[n], jitter) if n in trial.params else _ABSENT for n in names]
        scores = trial.user_attrs.get("scores")
        if scores is None:
            return [*settings, *[_ABSENT] * len(metrics)]
        return [*settings, *((s - low) / (high - low) for s, (low, high) in zip(scores, ends, strict=True))]

    places = np.arange(len(names) + len(metrics))
    for trial in failed:
        axes.plot(places, heights(trial), color=RED, linewidth=0.8, linestyle=":", zorder=1)
    for trial in sorted(known, key=lambda trial: -ranks[str(trial.number)]):
        rank = ranks[str(trial.number)]
        early = trial.state.name == "PRUNED"
        axes.plot(
            places,
            heights(trial),
            color=colour_of(rank),
            linewidth=2.6 if rank == 0 else 1.1,
            linestyle="--" if early else "-",
            zorder=3 - rank,
        )
    for place, name in enumerate(names):
        _marks(axes, place, *_ticks(distributions[name]))
    for place, (low, high) in enumerate(ends, len(names)):
        _marks(axes, place, *zip(*[(x, f"{low + x * (high - low):.3g}") for x in (0, 0.25, 0.5, 0.75, 1)], strict=True))
    if failed or any(name not in trial.params for trial in known for name in names):
        axes.text(-0.06, _ABSENT, "none", ha="right", va="center", fontsize=8, color=GREY)
    axes.set_xticks(places, [_broken(name) for name in (*names, *metrics)], fontsize=8)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0, pad=4)
    axes.set_xlim(-0.3, places[-1] + 0.45)
    axes.set_ylim(-0.2, 1.04)
    rank_bar(figure, axes, len(known))
    key(figure, best=True, early=any(t.state.name == "PRUNED" for t in known), failed=bool(failed))
    return figure


def slices(study: Study, metrics: Mapping[str, Mode]) -> Figure:
    """Score against each setting by itself, logarithmic ones on such an axis; darker is later."""
    title = "Score against each setting"
    known = _scored(study)
    if not known:
        return sentence(title, "No configuration has a score.")
    distributions = _distributions(study)
    columns = min(3, len(distributions))
    rows = -(-len(distributions) // columns)
    figure, panels = panels_of(title, rows * len(metrics), columns, 2.3, sharey="row")
    trials = study.get_trials(deepcopy=False)
    failed = [trial for trial in trials if trial.state.name == "FAIL"]
    size = rows * columns
    for index, metric in enumerate(metrics):
        for place, panel in enumerate(panels[index * size : (index + 1) * size]):
            if place >= len(distributions):
                panel.set_axis_off()
                continue
            name = list(distributions)[place]
            spread = _placed(distributions[name], panel)
            for early in (True, False):
                chosen = [t for t in known if name in t.params and (t.state.name == "PRUNED") == early]
                colours = [colour_of(1 - (trial.number + 1) / len(trials)) for trial in chosen]
                panel.scatter(
                    [spread(trial) for trial in _setting(chosen, name)],
                    [trial.user_attrs["scores"][index] for trial in chosen],
                    s=20,
                    facecolors="none" if early else colours,
                    edgecolors=colours,
                    linewidths=1,
                )
            lost = [spread(trial) for trial in _setting(failed, name)]
            panel.plot(lost, [0.03] * len(lost), "x", color=RED, ms=5, transform=panel.get_xaxis_transform())
            panel.set_xlabel(name, fontsize=8.5)
            panel.margins(y=0.12)
            panel.grid(axis="y", color="#e6e6e6", linewidth=0.6)
            panel.set_axisbelow(True)
            if place % columns == 0:
                panel.set_ylabel(metric, fontsize=8.5)
    key(figure, later=True, early=any(t.state.name == "PRUNED" for t in known), failed=bool(failed), dots=True)
    return figure


def _scored(study: Study) -> list[FrozenTrial]:
    """Trials of the study that count, complete and given up."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.name in ("COMPLETE", "PRUNED") and "scores" in trial.user_attrs
    ]


def _distributions(study: Study) -> dict[str, Any]:
    """Distributions of the settings that any trial has."""
    return {name: each for trial in study.get_trials(deepcopy=False) for name, each in trial.distributions.items()}


def _beside(distribution: Any, value: Any, jitter: float) -> float:
    """Height of a value, of a choice a little beside it: else lines would lie on each other."""
    return height(distribution, value) + (jitter if hasattr(distribution, "choices") else 0.0)


def _ticks(distribution: Any) -> tuple[list[float], list[str]]:
    """Heights and words of the marks of a setting's axis."""
    if hasattr(distribution, "choices"):
        values = list(distribution.choices)
    elif distribution.log:
        low, high = distribution.low, distribution.high
        decades = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
        inside = [v for v in decades if 0.07 < height(distribution, v) < 0.93]
        values = [low, *inside, high]
    else:
        values = list(np.linspace(distribution.low, distribution.high, 5))
    return [height(distribution, value) for value in values], [_word(value) for value in values]


def _marks(axes: Axes, place: int, heights: Sequence[float], words: Sequence[str]) -> None:
    axes.plot([place, place], [0, 1], color="#505050", linewidth=0.8, zorder=4)
    for at, word in zip(heights, words, strict=True):
        axes.plot([place - 0.02, place + 0.02], [at, at], color="#505050", linewidth=0.8, zorder=4)
        axes.text(
            place + 0.05,
            at,
            word,
            fontsize=7.5,
            va="center",
            zorder=5,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
        )


def _placed(distribution: Any, axes: Axes) -> Callable[[tuple[int, Any]], float]:
    """Set the axis of a setting up; where a value stands on it."""
    if hasattr(distribution, "choices"):
        choices = list(distribution.choices)
        words = [_word(choice) for choice in choices]
        long = sum(map(len, words)) > 30
        axes.set_xticks(range(len(choices)), words, rotation=20 if long else 0, ha="right" if long else "center")
        axes.set_xlim(-0.6, len(choices) - 0.4)
        # Beside each other, not on top; the golden ratio spreads neighbours.
        return lambda found: choices.index(found[1]) + ((found[0] * 0.618) % 1 - 0.5) * 0.4
    low, high = distribution.low, distribution.high
    if distribution.log:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_xscale("log")
        if high / low <= 100:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low <= 20 else (1, 3)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
        room = (high / low) ** 0.04
        axes.set_xlim(low / room, high * room)
    elif high > low:
        axes.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    return lambda found: float(found[1])


def _setting(trials: Iterable[FrozenTrial], name: str) -> list[tuple[int, Any]]:
    """Number and value of the trials that have a setting."""
    return [(trial.number, trial.params[name]) for trial in trials if name in trial.params]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5))


def _word(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    word = f"{value:.3g}" if isinstance(value, float) else str(value)
    return word if len(word) <= 14 else f"{word[:13]}…"


def _broken(name: str) -> str:
    """A dotted name in lines."""
    return name.replace(".", ".\n").replace("/", "/\n")
