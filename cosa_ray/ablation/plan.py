"""What an ablation file says, and the runs that come of it: one warm-up a seed, shared by the rows that agree on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from cosa_ray.config.load import apply_overrides, dump_section, flatten, merge, nest
from cosa_ray.config.onbase import OnBase, find_on_base, load_on_base
from cosa_ray.config.schema import Config
from cosa_ray.config.section import Count, Section
from cosa_ray.errors import UserError
from cosa_ray.tuning.space import SHARED, Dimension
from cosa_ray.tuning.sweepfile import Sweep
from cosa_ray.tuning.values import as_value

# What acts from co-training on, or from the steps before it that fill the ring: rows may differ there and share all of
# the warm-up before.
LATER = (
    "pseudo_labels.",
    "dynamic_threshold.",
    "losses.",
    "contrastive.",
    "dense_energy.",
    "assignment.scales",
    "assignment.flip",
    "assignment.ramp",
)
_OURS = ("seed", "continue_from", "init_from", "training.stop_at")


class Row(Section):
    """One arm of the study."""

    name: str = Field(min_length=1, description="What it is called in tables.")
    set: dict[str, Any] = Field(
        default_factory=dict, description="Settings, dotted or nested, on top of those of the row it follows."
    )
    after: str | None = Field(
        None, description="Row it builds on and is compared with; null is the one above, of the first the base."
    )


class Ablation(OnBase):
    """A study: a base experiment and rows, each of which differs from the one it follows by what it sets."""

    rows: tuple[Row, ...] = Field(min_length=2, description="The arms, each after the one it builds on.")
    share_warm_up: bool = Field(
        True, description="One classification warm-up a seed for all rows that agree on it, instead of one a row."
    )
    concurrency: Count | None = Field(None, description="Runs at a time; null fills the cluster.")

    @model_validator(mode="after")
    def _follows(self) -> Ablation:
        known: list[str] = []
        for row in self.rows:
            if row.name in known:
                raise ValueError(f"two rows are called {row.name}; name them apart")
            if row.after is not None and row.after not in known:
                raise ValueError(f"row {row.name} is after {row.after}, which is no row above it")
            known.append(row.name)
        for place, row in enumerate(self.rows):
            if place and not row.set:
                raise ValueError(f"row {row.name} sets nothing, so it is the same as the one it follows")
        return self

    def before(self, place: int) -> int | None:
        """The row that one follows; None of the first."""
        after = self.rows[place].after
        if after is None:
            return place - 1 if place else None
        return [row.name for row in self.rows].index(after)

    def settings(self, place: int) -> dict[str, Any]:
        """All that a row sets, what it builds on included, nested."""
        before = self.before(place)
        return merge(self.settings(before) if before is not None else {}, nest(self.rows[place].set))


@dataclass(frozen=True)
class WarmUp:
    """What runs before rows part: the experiment (its seed and all), up to `config.training.stop_at`."""

    name: str
    config: Config


@dataclass(frozen=True)
class Plan:
    """The runs of a study: warm-ups first, then a sweep whose points are the rows, seed by seed.

    `points` are the sweep's in order, as (row, seed); `said` is worth saying before it starts.
    """

    warm_ups: list[WarmUp]
    sweep: Sweep
    base: Config
    points: list[tuple[int, int]]
    said: list[str] = field(default_factory=list)


def load_ablation(
    file: str | Path, overrides: Sequence[str] = (), other_base: str | None = None
) -> tuple[Ablation, Config]:
    """An ablation and its base experiment with `key=value` overrides: the file's own keys first, else the base's.

    `other_base`: an experiment, by path or shipped name, in place of the file's own. Raises UserError naming the key,
    the file and the nearest valid key.
    """
    says = "an ablation names a base experiment and rows of settings"
    return load_on_base(Ablation, find_ablation(file), overrides, kind="ablation", says=says, other_base=other_base)


def plan_ablation(ablation: Ablation, base: Config, name: str, seeds: int) -> Plan:
    """The runs of a study under a name. Raises UserError for a row that is no experiment, or none of a study."""
    if base.continue_from is not None:
        raise UserError(
            f"continue_from={base.continue_from}: a study's rows go on from its own warm-ups; leave it out, or start "
            "these from the run's weights with init_from."
        )
    rows = [_row(ablation, base, place) for place in range(len(ablation.rows))]
    for place, row in enumerate(ablation.rows):
        above = ablation.before(place)
        if above is not None and rows[place] == rows[above]:
            raise UserError(f"row {row.name} sets what {ablation.rows[above].name} has already; leave one of them out.")
    varied = _varied(base, rows)
    numbers = range(base.seed, base.seed + seeds)
    groups = _groups(rows) if ablation.share_warm_up else []
    warm_ups: list[WarmUp] = []
    starts: dict[tuple[int, int], str] = {}
    said = []
    for number, members in enumerate(groups):
        stop = _parting(rows, members)
        if stop < 1 or len(members) < 2:
            continue
        if stop >= rows[members[0]].last_step:
            raise UserError(
                f"training.stop_at={base.training.stop_at} is not after step {stop}, up to which rows share their "
                "warm-up; raise it, or leave it out."
            )
        label = f"{name}-warm-up" + (f"-{number}" if len(groups) > 1 else "")
        for seed in numbers:
            changes = {"seed": seed, "training.stop_at": stop, "checkpoint.keep_full_state": True}
            warm_ups.append(WarmUp(f"{label}-seed{seed}", apply_overrides(rows[members[0]], changes, label)))
            starts |= {(row, seed): warm_ups[-1].name for row in members}
        names = "; ".join(ablation.rows[row].name for row in members)  # names may have commas
        said.append(f"{names}: one warm-up of {stop} steps a seed for all {len(members)}")
    alone = [row.name for place, row in enumerate(ablation.rows) if (place, base.seed) not in starts]
    if alone and ablation.share_warm_up:
        said.append(f"{'; '.join(alone)}: with a warm-up of {'its' if len(alone) == 1 else 'their'} own")
    points = [(row, seed) for seed in numbers for row in range(len(rows))]
    tables = [flatten(row) for row in rows]
    values = [
        {"seed": seed, "continue_from": starts.get((row, seed)), **{key: tables[row][key] for key in varied}}
        for row, seed in points
    ]
    choices = {key: _different([value[key] for value in values]) for key in values[0]}
    space = {key: Dimension(choice=choice) for key, choice in choices.items() if len(choice) > 1}
    sweep = Sweep(
        base=ablation.base,
        space=space,
        search="points",
        points=tuple({key: value for key, value in point.items() if key in space} for point in values),
        keep="all",
        concurrency=ablation.concurrency,
    )
    fixed = {key: values[0][key] for key in choices if key not in space}  # of all rows, though not of the base
    return Plan(warm_ups, sweep, apply_overrides(base, fixed, name), points, said)


def _row(ablation: Ablation, base: Config, place: int) -> Config:
    """A row's experiment."""
    name = ablation.rows[place].name
    settings = ablation.settings(place)
    for key in _dotted(settings):
        if key in _OURS or key.startswith(SHARED):
            raise UserError(f"row {name}: {key} is the study's own or shared by its rows; leave it out.")
    return apply_overrides(base, settings, f"row {name}")


def _dotted(nested: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of the leaves of a nested mapping."""
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _varied(base: Config, rows: Sequence[Config]) -> list[str]:
    """Settings in which rows differ from each other or from the base, as dotted keys."""
    tables = [flatten(each) for each in (base, *rows)]
    keys = [key for key in tables[0] if any(table.get(key) != tables[0][key] for table in tables)]
    for key in keys:
        if any(isinstance(table.get(key), dict) for table in tables):
            raise UserError(
                f"{key} is set by a row, and a study cannot vary it: its settings are free in form; give each row's to "
                "an experiment of its own, and compare those (`cosa-ray compare`)."
            )
    return keys


def _groups(rows: Sequence[Config]) -> list[list[int]]:
    """Rows that agree on everything before they may part."""
    found: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        later = (*LATER, "assignment.momentum") if row.assignment.warmup_momentum is not None else LATER
        own = {key: value for key, value in flatten(row).items() if not key.startswith(later)}
        found.setdefault(repr(sorted(own.items())), []).append(place)
    return list(found.values())


def _parting(rows: Sequence[Config], members: Sequence[int]) -> int:
    """The last step that rows have in common: before the first of them fills its ring."""
    dynamic = [rows[row].dynamic_threshold for row in members]
    filling = max((each.batches for each in dynamic if each.enabled), default=0)
    return rows[members[0]].training.warmup_iters - filling


def _different(values: Sequence[Any]) -> tuple[Any, ...]:
    found: list[Any] = []
    for value in map(as_value, values):
        if value not in found:
            found.append(value)
    return tuple(found)


def find_ablation(file: str | Path) -> Path:
    """Path of an ablation file given by path, or by the name of a shipped one."""
    return find_on_base(file, "ablations")


def dump_ablation(ablation: Ablation) -> str:
    """YAML of an ablation that load_ablation reads back to an equal one."""
    return dump_section(ablation)
