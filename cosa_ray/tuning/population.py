"""Population-based training (Jaderberg et al., arXiv 1711.09846) in generations, on the project's own checkpoints.

All trials stop at the same step with a checkpoint; when the last has arrived, the worst take the checkpoints of the
best (weights of both networks, optimiser, thresholds with their rings) and other settings, and all go on. Tune's own
scheduler copies Tune checkpoints, of which a trial under Ray Train has none. Being decided at a standstill and seeded,
a generation comes out the same whatever was killed on the way; each is written down before anybody acts on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.journal import ENDED, Entry, Journal
from cosa_ray.tuning.space import Dimension, Space, sample
from cosa_ray.tuning.sweepfile import Mode, Sweep
from cosa_ray.tuning.values import as_value

FOLDER = "generations"


class Generations:
    """Decides, at every step where the population stands still, who copies whom."""

    def __init__(
        self,
        sweep: Sweep,
        at: list[int],
        metric: str,
        mode: Mode,
        journal: Journal,
        folder: RunFolder,
        *,
        total: int,
        copy: Callable[[Entry, Entry, int, Mapping[str, Any]], None],
        publish: Callable[[int, Mapping[str, Any]], None],
    ) -> None:
        """`copy` gives a trial (first) another's checkpoint of a step and new settings; `publish` lets trials go on."""
        self._sweep, self._at, self._metric, self._mode = sweep, at, metric, mode
        self._journal, self._folder, self._total = journal, folder, total
        self._copy, self._publish = copy, publish
        for step in at:  # those of before a resume
            if (text := folder.read_text(_file(step))) is not None:
                self._act(step, json.loads(text))
        self.decide()

    def decide(self) -> None:
        """Decide the generations for which everybody still alive has arrived; called when anything has changed."""
        for step in self._at:
            if self._folder.exists(_file(step)):
                continue
            entries = self._journal.entries()
            alive = [entry for entry in entries if entry.state not in ENDED]
            arrived = [entry for entry in alive if _report(entry, step, self._metric) is not None]
            if len(entries) < self._total or len(arrived) < len(alive) or not alive:
                return
            plan = plan_generation(self._sweep, arrived, step, self._metric, self._mode)
            self._folder.write_text(_file(step), json.dumps(plan, indent=1, default=list))
            self._act(step, plan)

    def _act(self, step: int, plan: Mapping[str, Any]) -> None:
        """Copy what is not copied yet, then let everybody go on."""
        for number, said in plan.items():
            entry, donor = self._journal[int(number)], self._journal[said["donor"]]
            if not any(done["step"] == step for done in entry.lineage):
                values = {key: as_value(v) for key, v in said["values"].items()}
                self._copy(entry, donor, step, values)
                self._journal.copied(entry.number, donor.number, step, values)
        self._publish(step, plan)


def plan_generation(
    sweep: Sweep, arrived: list[Entry], step: int, metric: str, mode: Mode
) -> dict[str, dict[str, Any]]:
    """Who copies whom at a step, and with which settings: number of the trial -> donor and values.

    Truncation selection: the worst share takes from the best share, a donor drawn at random for each; nobody copies
    where all have the same score. Trials without a finite score are the worst.
    """
    sign = 1.0 if mode == "max" else -1.0

    def score(entry: Entry) -> float:
        report = _report(entry, step, metric)
        value = report if report is not None else np.nan
        return sign * value if np.isfinite(value) else -np.inf

    ranked = sorted(arrived, key=lambda entry: (-score(entry), entry.number))
    count = max(1, int(len(ranked) * sweep.pbt.share))
    if len(ranked) < 2 or score(ranked[0]) == score(ranked[-1]) or not np.isfinite(score(ranked[0])):
        return {}
    generator = np.random.default_rng([sweep.search_seed, step])
    best, worst = ranked[:count], ranked[len(ranked) - count :]
    plan = {}
    for entry in sorted(worst, key=lambda entry: entry.number):
        donor = best[int(generator.integers(len(best)))]
        if score(donor) > score(entry):
            values = vary(sweep.space, donor.values, sweep, generator)
            plan[str(entry.number)] = {"donor": donor.number, "values": values}
    return plan


def vary(space: Space, values: Mapping[str, Any], sweep: Sweep, generator: np.random.Generator) -> dict[str, Any]:
    """Settings near a donor's: each drawn afresh, or a number times a factor within its range, or a next choice."""

    def pick(name: str, dimension: Dimension) -> Any:
        if generator.random() < sweep.pbt.resample:
            return dimension.draw(generator)
        value = values[name]
        if dimension.choice is not None:
            place = dimension.choice.index(value) + int(generator.integers(-1, 2))
            return dimension.choice[min(max(place, 0), len(dimension.choice) - 1)]
        assert dimension.range is not None
        low, high = dimension.range
        factor = float(generator.choice(sweep.pbt.factors))
        step = dimension.step
        moved = value * factor
        if step is not None:  # at least to the next value, or a small one would never move
            places = round((moved - value) / step) or int(np.sign(moved - value))
            moved = value + step * places
        return dimension.tidy(min(max(moved, low), high))

    return sample(space, pick)


def _report(entry: Entry, step: int, metric: str) -> float | None:
    """A trial's score at a step: nan where it was evaluated without one, None where it has not arrived."""
    found = next((report for report in entry.reports if report.step == step), None)
    if found is None:
        return None
    return found.metrics.get(metric, float("nan"))


def _file(step: int) -> str:
    return f"{FOLDER}/{step:08d}.json"
