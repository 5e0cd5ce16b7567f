"""The search space of a sweep: which settings vary, how, and whether every value they can take makes sense."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from cosa_ray.config.load import apply_overrides, keys
from cosa_ray.config.schema import Config, Count, Section
from cosa_ray.errors import UserError
from cosa_ray.tuning.values import alike, as_number, as_value, is_multiple, is_number, shortly

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Scalar = bool | int | float | str | None
Value = Scalar | tuple[Scalar, ...]

# What belongs to the sweep as a whole: its trials share one dataset, one storage and one division of the cluster.
SHARED = ("storage", "tracking", "resources", "workers", "data.dataset", "init_from", "checkpoint")
_RANGES = ("uniform", "loguniform", "quniform", "randint", "lograndint")
_CORNERS = 256
_GRID = 10_000
_DRAWS = 64


class Dimension(Section):
    """How one setting varies: exactly one of the first seven, and for a conditional one `when`."""

    uniform: tuple[float, float] | None = Field(None, description="[low, high], evenly.")
    loguniform: tuple[float, float] | None = Field(None, description="[low, high], evenly in the logarithm.")
    quniform: tuple[float, float, float] | None = Field(
        None, description="[low, high, step]: low, low+step, ..., high."
    )
    randint: tuple[int, int] | None = Field(None, description="[low, high], whole numbers, both ends included.")
    lograndint: tuple[int, int] | None = Field(
        None, description="[low, high], whole numbers, both ends included, evenly in the logarithm."
    )
    choice: tuple[Value, ...] | None = Field(None, description="One of these values, or lists of values.")
    same: str | None = Field(None, description="Tied: the value of this other setting of the space.")
    times: float = Field(1.0, description="Of a tied setting: the factor on the other's value.")
    points: Count | None = Field(
        None, description="Of uniform, loguniform and lograndint under search: grid: how many values, ends included."
    )
    when: dict[str, Value] = Field(
        default_factory=dict,
        description="Conditional: varies only where these other settings of the space have this value, or one of these "
        "values; elsewhere it keeps the base experiment's.",
    )

    @model_validator(mode="after")
    def _sensible(self) -> Dimension:
        given = {kind: v for kind in (*_RANGES, "choice", "same") if (v := getattr(self, kind)) is not None}
        if len(given) != 1:
            kinds = ", ".join((*_RANGES, "choice", "same"))
            raise ValueError(f"give exactly one of {kinds}, got {', '.join(given) or 'none'}")
        ((kind, values),) = given.items()
        if self.times != 1.0 and kind != "same":
            raise ValueError("times belongs to `same`")
        if self.points is not None and (kind not in ("uniform", "loguniform", "lograndint") or self.points < 2):
            raise ValueError("points is at least 2 and belongs to uniform, loguniform or lograndint")
        if kind == "same":
            return self
        if kind == "choice":
            if not values or any(a == b or alike(a, b) for a, b in itertools.combinations(values, 2)):
                raise ValueError("choice needs at least one value, each once")
            return self
        low, high = values[:2]
        if low >= high:
            raise ValueError(f"{kind} needs low < high, got [{low}, {high}]")
        if kind in ("loguniform", "lograndint") and low <= 0:
            raise ValueError(f"{kind} needs low > 0, got {low}")
        if kind == "quniform":
            step = values[2]
            if step <= 0 or not all(is_multiple(v, step) for v in (low, high)):
                raise ValueError(
                    f"quniform needs low and high to be multiples of a step > 0, got [{low}, {high}, {step}]"
                )
        return self

    @property
    def range(self) -> tuple[float, float] | None:
        """Lower and upper end; None for a choice and a tied setting."""
        found = next((r for kind in _RANGES if (r := getattr(self, kind)) is not None), None)
        return None if found is None else (found[0], found[1])

    @property
    def step(self) -> float | None:
        """Distance of neighbouring values; None where there is none."""
        if self.randint is not None or self.lograndint is not None:
            return 1.0
        return self.quniform[2] if self.quniform is not None else None

    def corners(self) -> tuple[Value, ...]:
        """Every choice, or the two ends of the range."""
        return self.choice if self.choice is not None else self.range or ()

    def grid(self) -> list[Value] | None:
        """Every value of a grid search; None where nobody said how many."""
        if self.choice is not None:
            return list(self.choice)
        if self.randint is not None:
            return list(range(self.randint[0], self.randint[1] + 1))
        if self.quniform is not None:
            low, high, step = self.quniform
            return [self.tidy(low + step * index) for index in range(round((high - low) / step) + 1)]
        if self.points is None:
            return None
        assert self.range is not None
        space = np.linspace if self.uniform is not None else np.geomspace
        values = [float(value) for value in space(*self.range, self.points)]
        return list(dict.fromkeys(round(v) for v in values)) if self.lograndint is not None else list(values)

    def draw(self, generator: np.random.Generator) -> Value:
        """One value at random."""
        if self.choice is not None:
            return self.choice[int(generator.integers(len(self.choice)))]
        if self.quniform is not None:
            low, high, step = self.quniform
            return self.tidy(low + step * int(generator.integers(0, round((high - low) / step) + 1)))
        assert self.range is not None
        low, high = self.range
        if self.randint is not None:
            return int(generator.integers(int(low), int(high) + 1))
        if self.lograndint is not None:
            value = np.exp(generator.uniform(np.log(low - 0.5), np.log(high + 0.5)))
            return int(np.clip(round(value), low, high))
        if self.loguniform is not None:
            return float(np.clip(np.exp(generator.uniform(np.log(low), np.log(high))), low, high))
        return float(generator.uniform(low, high))

    def suggest(self, trial: BaseTrial, name: str) -> Value:
        """One value that Optuna suggests, also a fixed trial's own."""
        if self.choice is not None:
            # Optuna takes scalars; a list goes by its words.
            words = {c if not isinstance(c, tuple) else str(list(c)): c for c in self.choice}
            return words[trial.suggest_categorical(name, list(words))]
        assert self.range is not None
        low, high = self.range
        if self.randint is not None or self.lograndint is not None:
            return trial.suggest_int(name, int(low), int(high), log=self.lograndint is not None)
        # Tidied, or Optuna takes the rounding noise of an end for the end of the grid.
        low, high = self.tidy(low), self.tidy(high)
        return self.tidy(trial.suggest_float(name, low, high, step=self.step, log=self.loguniform is not None))

    def tidy(self, value: Any) -> Any:
        """A value as the dimension has it, where it has it.

        Without the rounding noise of its grid (0.30000000000000004 is 0.3); a word that is a number (1e-4, to YAML) as
        the number; a config's 1.0 as the 1 of a choice.
        """
        value = as_value(value)
        if self.choice is not None:
            return next((choice for choice in self.choice if alike(choice, value)), value)
        number = as_number(value)
        if self.range is None or number is None:
            return value
        if self.step is None or not is_multiple(number, self.step):
            return number
        if self.quniform is None:
            return round(number)
        return float(f"{round(number / self.step) * self.step:.14g}")

    def holds(self, value: Any) -> bool:
        """True when the dimension can have this value."""
        value = self.tidy(value)
        if self.choice is not None:
            return any(alike(choice, value) for choice in self.choice)
        if self.range is None or not is_number(value):
            return False
        if self.step is not None and not is_multiple(value, self.step):
            return False
        return self.tidy(self.range[0]) <= value <= self.tidy(self.range[1])


Space = Mapping[str, Dimension]


def sample(space: Space, pick: Callable[[str, Dimension], Any]) -> dict[str, Any]:
    """One point of a space: `pick` chooses for every setting that is free there; tied ones follow.

    A conditional setting whose condition does not hold is left out, and so are those tied to it.
    """
    values: dict[str, Any] = {}
    for name in order(space):
        dimension = space[name]
        if not _active(dimension, values):
            continue
        if dimension.same is not None:
            if dimension.same in values:
                values[name] = _tied(dimension, values[dimension.same])
        else:
            values[name] = pick(name, dimension)
    return {name: values[name] for name in space if name in values}


def order(space: Space) -> list[str]:
    """Names of the settings, each after those it depends on. Raises UserError where they depend on each other."""
    placed: dict[str, None] = {}
    while len(placed) < len(space):
        ready = [name for name in space if name not in placed and all(on in placed for on in _on(space[name]))]
        if not ready:
            circle = ", ".join(name for name in space if name not in placed)
            raise UserError(f"space: {circle} depend on each other by same or when; untie one of them.")
        placed.update(dict.fromkeys(ready))
    return list(placed)


def grid_points(space: Space) -> list[dict[str, Any]]:
    """Every point of a grid, the last setting fastest.

    Raises UserError for a range without a number of values, and for more points than anybody could mean.
    """
    values = {}
    for name, dimension in space.items():
        if dimension.same is None:
            values[name] = dimension.grid()
            if values[name] is None:
                raise UserError(
                    f"space.{name}: a grid search needs `points` (how many values) beside a range, or a choice."
                )
    if (most := math.prod(len(each or []) for each in values.values())) > _GRID:
        raise UserError(f"space: a grid of up to {most} points is too large ({_GRID} at most); use another search.")
    return list(_product(space, lambda name: values[name] or []))


def with_dimensions(space: Any, given: Mapping[str, Any]) -> Any:
    """A space with whole dimensions of `--set space.KEY={...}` in place of its own; null takes one out."""
    changed = dict(space) if isinstance(space, dict) else {}

    def change(key: str, value: Any) -> None:
        if isinstance(value, dict) and value and not set(value) & set(Dimension.model_fields):
            for part, below in value.items():  # a dotted setting, which --set has taken apart
                change(f"{key}.{part}", below)
        elif value is None:
            changed.pop(key, None)
        else:
            changed[key] = value

    for part, value in given.items():
        change(part, value)
    return changed


def check_space(space: Space, base: Config, where: str, *, drawn: bool = True) -> None:
    """Refuse a space that names no setting, a shared one, or that can produce an experiment that is not valid.

    Checks the corners of the space (all of them up to 256, else those of every pair of settings, the rest at random,
    and 64 more) and 64 seeded draws of its inside, unless nothing is `drawn` from it. Raises UserError naming the key,
    the nearest valid key, and the offending values.
    """
    if not space:
        raise UserError(f"{where}: space is empty; name at least one setting to vary.")
    leaves = set(keys(Config))
    sections = {key.rpartition(".")[0] for key in leaves if "." in key}
    for key, dimension in space.items():
        if key in sections:
            raise UserError(f"{where}: space.{key} is a whole section; vary its settings one by one ({key}.…).")
        if any(key == shared or key.startswith(f"{shared}.") for shared in SHARED):
            raise UserError(f"{where}: space.{key} is shared by all trials of a sweep; set it under `set` instead.")
        for other in _on(dimension):
            if other not in space:
                raise UserError(
                    f"{where}: space.{key} depends on {other}, which is no setting of the space; add it there, or set "
                    f"{key} under `set`."
                )
        for other, wanted in dimension.when.items():
            for value in _listed(wanted):
                if space[other].same is None and not space[other].holds(value):
                    raise UserError(
                        f"{where}: space.{key} waits for {other} to be {value}, which it never is; mend `when`."
                    )
        if key not in leaves:  # unknown, or within a free-form mapping
            apply_overrides(base, {key: next(iter(dimension.corners()), None)}, f"{where}: space")
    try:
        order(space)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for key, dimension in space.items():
        if dimension.times != 1.0 and not all(map(is_number, _origin(space, key).corners())):
            raise UserError(f"{where}: space.{key} is {dimension.times:g} times {dimension.same}, which is no number.")
    for values in points(space) if drawn else ():
        shown = ", ".join(f"{key}={shortly(value)}" for key, value in values.items())
        apply_overrides(base, values, f"{where}: the space can produce {shown}, and then")


def points(space: Space) -> Iterator[dict[str, Any]]:
    """Corners of the space, then draws of its inside, as dotted overrides."""
    corners = list(itertools.islice(_product(space, lambda name: space[name].corners()), _CORNERS + 1))
    generator = np.random.default_rng(0)
    if len(corners) <= _CORNERS:
        yield from corners
    else:
        free = [name for name in space if not _on(space[name])]
        # A point of the space all of it: base values beside a pair may be ones that no trial has.
        for pair in [*itertools.combinations(free, 2), *[()] * _DRAWS]:
            for values in itertools.product(*(space[name].corners() for name in pair)):
                yield sample(space, _corner(dict(zip(pair, values, strict=True)), generator))
    for _ in range(_DRAWS):
        yield sample(space, lambda _, dimension: dimension.draw(generator))


def extremes(space: Space, base_value: float, key: str) -> tuple[float, float]:
    """Smallest and largest value a numeric setting can have in a trial of a space that has been checked."""
    if key not in space:
        return base_value, base_value
    dimension, factor, values = space[key], 1.0, []
    while True:
        if dimension.when:
            values.append(float(base_value))
        if dimension.same is None:
            break
        factor *= dimension.times
        dimension = space[dimension.same]
    # A quoted number is one too: the config takes it as such.
    values += [number * factor for value in dimension.corners() if (number := as_number(value)) is not None]
    return min(values), max(values)


def _product(space: Space, values: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values each free setting has where it is free."""
    names = order(space)

    def extend(index: int, chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if index == len(names):
            yield {name: chosen[name] for name in space if name in chosen}
            return
        name = names[index]
        dimension = space[name]
        if not _active(dimension, chosen) or (dimension.same is not None and dimension.same not in chosen):
            yield from extend(index + 1, chosen)
        elif dimension.same is not None:
            yield from extend(index + 1, {**chosen, name: _tied(dimension, chosen[dimension.same])})
        else:
            for value in values(name):
                yield from extend(index + 1, {**chosen, name: value})

    return extend(0, {})


def _corner(given: Mapping[str, Value], generator: np.random.Generator) -> Callable[[str, Dimension], Value]:
    """Picks the given values, and of other settings a corner at random."""

    def pick(name: str, dimension: Dimension) -> Value:
        corners = dimension.corners()
        return given[name] if name in given else corners[int(generator.integers(len(corners)))]

    return pick


def _origin(space: Space, key: str) -> Dimension:
    """The dimension whose value a tied setting takes in the end."""
    dimension = space[key]
    while dimension.same is not None:
        dimension = space[dimension.same]
    return dimension


def _on(dimension: Dimension) -> list[str]:
    """The settings a setting depends on."""
    return [*dimension.when, *([dimension.same] if dimension.same is not None else [])]


def _active(dimension: Dimension, values: Mapping[str, Any]) -> bool:
    """True when a conditional setting's conditions hold."""
    return all(
        key in values and any(alike(values[key], each) for each in _listed(wanted))
        for key, wanted in dimension.when.items()
    )


def _tied(dimension: Dimension, value: Any) -> Any:
    return value if dimension.times == 1.0 else value * dimension.times


def _listed(wanted: Any) -> tuple[Any, ...]:
    return wanted if isinstance(wanted, tuple) else (wanted,)
