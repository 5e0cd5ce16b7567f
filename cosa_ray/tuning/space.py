"""The search space of a sweep: which settings vary, how, and whether every value they can take makes sense."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from cosa_ray.config.load import apply_overrides, keys
from cosa_ray.config.schema import Config, Section
from cosa_ray.errors import UserError

Scalar = bool | int | float | str | None

# What belongs to the sweep as a whole: its trials share one dataset, one storage and one division of the cluster.
SHARED = ("storage", "tracking", "resources", "workers", "data.dataset", "init_from", "checkpoint")
_CORNERS = 256
_DRAWS = 64


class Dimension(Section):
    """How one setting varies: exactly one of these."""

    uniform: tuple[float, float] | None = Field(None, description="[low, high], evenly.")
    loguniform: tuple[float, float] | None = Field(None, description="[low, high], evenly in the logarithm.")
    quniform: tuple[float, float, float] | None = Field(
        None, description="[low, high, step]: low, low+step, ..., high."
    )
    randint: tuple[int, int] | None = Field(None, description="[low, high], whole numbers, both ends included.")
    choice: tuple[Scalar, ...] | None = Field(None, description="One of these values.")

    @model_validator(mode="after")
    def _sensible(self) -> Dimension:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(type(self).model_fields)}, got {', '.join(given) or 'none'}"
            )
        ((kind, values),) = given.items()
        if kind == "choice":
            if not values or len(set(map(repr, values))) != len(values):
                raise ValueError("choice needs at least one value, each once")
            return self
        low, high = values[:2]
        if low >= high:
            raise ValueError(f"{kind} needs low < high, got [{low}, {high}]")
        if kind == "loguniform" and low <= 0:
            raise ValueError(f"loguniform needs low > 0, got {low}")
        if kind == "quniform":
            step = values[2]
            if step <= 0 or any(not math.isclose(v / step, round(v / step), abs_tol=1e-6) for v in (low, high)):
                raise ValueError(
                    f"quniform needs low and high to be multiples of a step > 0, got [{low}, {high}, {step}]"
                )
        return self

    def corners(self) -> tuple[Scalar, ...]:
        """Every choice, or the two ends of the range."""
        if self.choice is not None:
            return self.choice
        return next(r for r in (self.uniform, self.loguniform, self.quniform, self.randint) if r is not None)[:2]

    def draw(self, generator: np.random.Generator) -> Scalar:
        """One value; used to check the inside of the space, not to search it."""
        if self.choice is not None:
            return self.choice[int(generator.integers(len(self.choice)))]
        if self.randint is not None:
            return int(generator.integers(self.randint[0], self.randint[1] + 1))
        if self.quniform is not None:
            low, high, step = self.quniform
            return self.tidy(low + step * int(generator.integers(0, round((high - low) / step) + 1)))
        if self.loguniform is not None:
            return float(np.exp(generator.uniform(*np.log(self.loguniform))))
        assert self.uniform is not None
        return float(generator.uniform(*self.uniform))

    def tidy(self, value: Any) -> Scalar:
        """A sampled value without the rounding noise of its grid (0.30000000000000004 is 0.3)."""
        return round(float(value), 10) if self.quniform is not None else value

    def domain(self) -> Any:
        """The same as a Ray Tune search domain, which Tune translates for Optuna."""
        from ray import tune

        if self.choice is not None:
            return tune.choice(list(self.choice))
        if self.randint is not None:
            return tune.randint(self.randint[0], self.randint[1] + 1)  # Tune leaves the upper end out
        if self.quniform is not None:
            return tune.quniform(*self.quniform)
        if self.loguniform is not None:
            return tune.loguniform(*self.loguniform)
        assert self.uniform is not None
        return tune.uniform(*self.uniform)


Space = Mapping[str, Dimension]


def check_space(space: Space, base: Config, where: str) -> None:
    """Refuse a space that names no setting, a shared one, or that can produce an experiment that is not valid.

    Checks the corners of the space (all of them up to 256, else those of every pair of settings) and 64 seeded draws
    of its inside. Raises UserError naming the key, the nearest valid key, and the offending values.
    """
    if not space:
        raise UserError(f"{where}: space is empty; name at least one setting to vary.")
    leaves = set(keys(Config))
    sections = {key.rpartition(".")[0] for key in leaves if "." in key}
    for key in space:
        if key in sections:
            raise UserError(f"{where}: space.{key} is a whole section; vary its settings one by one ({key}.…).")
        if any(key == shared or key.startswith(f"{shared}.") for shared in SHARED):
            raise UserError(f"{where}: space.{key} is shared by all trials of a sweep; set it under `set` instead.")
        apply_overrides(base, {key: space[key].corners()[0]}, f"{where}: space")
    for values in points(space):
        shown = ", ".join(f"{key}={_short(value)}" for key, value in values.items())
        apply_overrides(base, values, f"{where}: the space can produce {shown}, and then")


def points(space: Space) -> Iterator[dict[str, Scalar]]:
    """Corners of the space, then draws of its inside, as dotted overrides."""
    names = list(space)
    if math.prod(len(space[name].corners()) for name in names) <= _CORNERS:
        yield from (dict(zip(names, c, strict=True)) for c in itertools.product(*(space[n].corners() for n in names)))
    else:
        for pair in itertools.combinations(names, 2):
            for values in itertools.product(*(space[name].corners() for name in pair)):
                yield dict(zip(pair, values, strict=True))
    generator = np.random.default_rng(0)
    for _ in range(_DRAWS):
        yield {name: dimension.draw(generator) for name, dimension in space.items()}


def extremes(space: Space, base_value: float, key: str) -> tuple[float, float]:
    """Smallest and largest value a numeric setting can have in a trial of a space that has been checked."""
    if key not in space:
        return base_value, base_value
    # A quoted number is one too: the config takes it as such.
    values = [float(value) for value in space[key].corners() if value is not None]
    return min(values), max(values)


def _short(value: Scalar) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
