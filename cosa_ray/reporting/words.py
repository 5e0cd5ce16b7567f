"""Numbers as the terminal and the page write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any


def number(value: float | None, *, sign: bool = False) -> str:
    """A metric; a dash where there is none."""
    if value is None:
        return "-"
    if not sign and float(value).is_integer() and abs(value) >= 2:
        return f"{value:,.0f}"  # a count
    return f"{value:{'+' if sign else ''}.4f}"


def interval(bounds: tuple[float, float]) -> str:
    """Both ends of a difference's interval."""
    return f"{bounds[0]:+.4f} to {bounds[1]:+.4f}"


def settings(values: Sequence[Any]) -> list[str]:
    """Values of a setting as files write them; six digits of a number, unless two that differ would look alike."""

    exact = [
        value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False) for value in values
    ]
    short = [f"{value:.6g}" if isinstance(value, float) else text for value, text in zip(values, exact, strict=True)]
    return short if len(set(short)) == len(set(exact)) else exact


def mean(side: dict[str, Any], key: str) -> float | None:
    """The mean of what a side's runs say under a key; None where none says it."""
    known = [run[key] for run in side["runs"] if run[key] is not None]
    return fmean(known) if known else None


def cost(side: dict[str, Any]) -> str:
    """Worker hours of a side, the mean over its runs."""
    hours = mean(side, "hours")
    if hours is None:
        return "-"
    units = " + ".join(sorted({run["hours_of"] for run in side["runs"]}))
    return f"{hours:.2f} {units} h" if hours >= 0.1 else f"{60 * hours:.2f} {units} min"


def duration(side: dict[str, Any]) -> str:
    """Wall time of a side from start to end, the mean over its runs."""
    known = mean(side, "wall_seconds")
    if known is None:
        return "-"
    minutes, seconds = divmod(round(known), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def steps(side: dict[str, Any]) -> str:
    """Steps of a side's runs, from the fewest to the most."""
    found = [run["step"] for run in side["runs"]]
    return f"{min(found):,}" if min(found) == max(found) else f"{min(found):,} to {max(found):,}"
