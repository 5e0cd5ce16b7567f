"""Values of settings, as a sweep file, a config, JSON and MLflow write them: when two of them are the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def as_value(value: Any) -> Any:
    """A list of a YAML or JSON file as the tuple it is in a space."""
    return tuple(as_value(each) for each in value) if isinstance(value, list) else value


def shortly(value: Any) -> str:
    """A value for people: four significant digits of a real number."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def at(nested: Any, key: str, missing: Any = None) -> Any:
    """The value of a dotted key in nested mappings (a free-form one too)."""
    for part in key.split("."):
        nested = nested.get(part, missing) if isinstance(nested, Mapping) else missing
    return nested


def alike(one: Any, other: Any) -> bool:
    """True when two values are one to a config, but for rounding: 1, 1.0 and the word 1, but not true."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if type(one) is type(other) and one == other:
        return True
    first, second = as_number(one), as_number(other)
    if first is None or second is None:
        return False
    if first.is_integer() and second.is_integer():  # relative closeness would make large neighbours one
        return first == second
    return math.isclose(first, second)


def as_number(value: Any) -> float | None:
    """A number, or a word that is one; None for anything else."""
    if not is_number(value) and not isinstance(value, str):
        return None
    try:
        return number if math.isfinite(number := float(value)) else None
    except (ValueError, OverflowError):
        return None


def is_number(value: Any) -> bool:
    """True for a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_multiple(value: float, step: float) -> bool:
    """True when a number is a whole number of steps, but for rounding."""
    return math.isclose(value / step, round(value / step), abs_tol=1e-6)
