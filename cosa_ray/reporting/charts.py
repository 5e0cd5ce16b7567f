"""Drawings of the page, as SVG in the page's own colours: curves, intervals, confusion matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from cosa_ray.reporting.history import Chart

_WIDTH, _HEIGHT = 420, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 22, 12, 28
_COLOURS = 8  # of the page; further sides begin again, dashed
_LEAST = 0.0005  # cells of the confusion difference below this share stay empty
_LABELLED = 25  # classes up to which cells carry numbers


def look(letter: str) -> str:
    """The classes that give a side its colour, and its lines their dashes."""
    again, colour = divmod(ord(letter) - ord("A"), _COLOURS)
    return f"s{colour} d{again}"


def curve(chart: Chart) -> str:
    """A figure with a line per side, its letter at the line's end, and the points as data for the readout."""
    points = [point for line in chart.lines.values() for point in line]
    steps, values = [step for step, _ in points], [value for _, value in points]
    ticks = nice_ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    first, last = min(steps), max(steps)

    def x(step: float) -> float:
        return _LEFT + (step - first) / max(1, last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    ]
    below = [tick for tick in nice_ticks(first, last, 4) if first <= tick <= last and tick == int(tick)]
    parts += [
        f'<text class="tick" x="{x(tick):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{int(tick):,}</text>'
        for tick in below
    ]
    ends = _apart([(letter, y(line[-1][1])) for letter, line in chart.lines.items()])
    for letter, line in chart.lines.items():
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        parts.append(f'<polyline class="line {look(letter)}" points="{path}"/>')
        if len(line) == 1:
            parts.append(
                f'<circle class="dot {look(letter)}" cx="{x(line[0][0]):.1f}" cy="{y(line[0][1]):.1f}" r="3"/>'
            )
        parts.append(
            f'<text class="end {look(letter)}" x="{x(line[-1][0]) + 5:.1f}" y="{ends[letter] + 4:.1f}">{letter}</text>'
        )
    data = {
        "lines": {k: [[step, float(f"{value:.6g}")] for step, value in line] for k, line in chart.lines.items()},
        "x": [first, last, _LEFT, _WIDTH - _RIGHT],
    }
    name = escape(chart.metric)
    averaged = f'<span class="muted"> mean of {chart.averaged} points</span>' if chart.averaged > 1 else ""
    return (
        f'<figure class="chart" tabindex="0" aria-label="{name}" data-chart="{escape(json.dumps(data))}">'
        f"<figcaption><b>{name}</b>{averaged}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name} over the steps">{"".join(parts)}'
        f'<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" x1="-9" x2="-9"/></svg>'
        '<p class="readout" aria-live="polite">&nbsp;</p></figure>'
    )


def interval_bar(difference: float, interval: tuple[float, float], reach: float) -> str:
    """A difference with its interval on a line from -reach to reach, 0 in the middle."""

    def x(value: float) -> float:
        return 150 + 140 * value / (reach or 1)

    low, high = interval
    return (
        '<svg class="interval" viewBox="0 0 300 46" aria-hidden="true">'
        '<line class="axis" x1="10" x2="290" y1="20" y2="20"/><line class="zero" x1="150" x2="150" y1="6" y2="34"/>'
        f'<line class="span" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="20" y2="20"/>'
        f'<circle class="point" cx="{x(difference):.1f}" cy="20" r="5"/>'
        '<text class="tick" x="150" y="45" text-anchor="middle">0</text>'
        f'<text class="tick" x="10" y="45">{-reach:+.3f}</text>'
        f'<text class="tick" x="290" y="45" text-anchor="end">{reach:+.3f}</text></svg>'
    )


def confusion_map(classes: Sequence[str], difference: np.ndarray) -> str:
    """Differences of row shares (K, K) as coloured cells, rows truth; every cell says itself when pointed at."""
    size = len(classes)
    cell = 30 if size <= _LABELLED else 12
    font = 12 if size <= _LABELLED else 9
    margin = 20 + int(font * 0.58 * max(len(name) for name in classes))
    side = margin + size * cell + 6
    reach = float(np.abs(difference).max()) or 1.0
    parts = []
    for row, column in np.argwhere(np.abs(difference) >= _LEAST):
        value = float(difference[row, column])
        right = (value > 0) == (row == column)  # more on the diagonal is better, more beside it worse
        left, top = margin + int(column) * cell, margin + int(row) * cell
        said = f"{classes[row]} as {classes[column]}: {100 * value:+.1f} points"
        parts.append(
            f'<g class="{"up" if right else "down"}"><title>{escape(said)}</title>'
            f'<rect x="{left}" y="{top}" width="{cell - 1}" height="{cell - 1}" '
            f'fill-opacity="{max(0.08, abs(value) / reach):.2f}"/>'
            + (
                f'<text class="cell{" strong" if abs(value) > 0.6 * reach else ""}" x="{left + cell / 2 - 0.5}" '
                f'y="{top + cell / 2 + 4}" text-anchor="middle">{100 * value:+.0f}</text>'
                if size <= _LABELLED and abs(value) >= 0.005
                else ""
            )
            + "</g>"
        )
    for place, name in enumerate(classes):
        label, middle = escape(name), margin + place * cell + cell / 2 + 4
        parts.append(
            f'<text class="name" font-size="{font}" x="{margin - 6}" y="{middle}" text-anchor="end">{label}</text>'
            f'<text class="name" font-size="{font}" transform="translate({middle},{margin - 6}) rotate(-90)">'
            f"{label}</text>"
        )
    end = margin + size * cell
    grid = f'<rect class="frame" x="{margin - 0.5}" y="{margin - 0.5}" width="{end - margin}" height="{end - margin}"/>'
    return (
        f'<svg class="confusion" viewBox="0 0 {side} {side}" style="width:{side}px" role="img" '
        f'aria-label="difference of the confusion matrices">{grid}{"".join(parts)}</svg>'
    )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that span low..high, at least two."""
    if not high > low:
        width = abs(low) or 1.0
        low, high = low - width / 2, high + width / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def _apart(ends: Sequence[tuple[str, float]], gap: float = 12) -> dict[str, float]:
    """Heights of labels, moved apart where they would lie on each other."""
    placed: dict[str, float] = {}
    at = -math.inf
    for letter, height in sorted(ends, key=lambda end: end[1]):
        at = max(height, at + gap)
        placed[letter] = at
    over = max(0.0, at - (_HEIGHT - _BOTTOM))
    return {letter: height - over for letter, height in placed.items()}
