"""A study's runs over their steps, as MLflow has them: curves, and at which budget a difference is to be seen."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosa_ray.ablation.figures import metrics_shown
from cosa_ray.ablation.numbers import Difference, Value, difference_of, value_of
from cosa_ray.reporting.history import Histories
from cosa_ray.reporting.subjects import Side
from cosa_ray.training.runs import Run, find_run

if TYPE_CHECKING:
    from cosa_ray.ablation.study import Study
    from cosa_ray.reporting.history import Chart


@dataclass(frozen=True)
class During:
    """A metric at an evaluation inside the runs: the rows' values, and what each differs by from the row it follows.

    Both by the row's name. Differences are over seeds: images are not counted there.
    """

    step: int
    values: dict[str, Value]
    differences: dict[str, Difference]


class Courses:
    """Reads what a study's runs logged on the way; finds nothing where they were not tracked."""

    def __init__(self, study: Study, storage: str) -> None:
        """storage: of the runs."""
        self.study, self._histories = study, Histories()
        self._runs: dict[str, dict[int, Run]] = {
            row.name: {seed: find_run(row.runs[seed], storage) for seed in row.metrics[study.headline].by_seed}
            for row in study.rows
            if study.headline in row.metrics
        }
        # What runs log on the way is under their own protocol and subset, whatever the study was evaluated with.
        own = [_own_prefix(run) for runs in self._runs.values() for run in runs.values()]
        outside = study.headline.rpartition("/")[0]
        self._shown = [f"{own[0]}/{name.removeprefix(f'{outside}/')}" for name in metrics_shown(study)] if own else []
        self.names = dict(zip(string.ascii_letters, self._runs, strict=False))

    def charts(self) -> list[Chart]:
        """Headline, thresholds and what is shown beside them, a row's mean over seeds by its letter in `names`."""
        sides = [Side(letter, name, "seeds", tuple(self._runs[name].values())) for letter, name in self.names.items()]
        wanted = [*self._shown, *(f"threshold/{name}" for name in ("background", "low", "high"))]
        charts = {chart.metric: chart for chart in self._histories.charts(sides, wanted) if _moves(chart)}
        return [charts[name] for name in wanted if name in charts]

    def during(self) -> dict[str, list[During]]:
        """What is shown of the study at every evaluation that all of its runs made, where these are several."""
        found = {metric: self._of(metric) for metric in self._shown}
        return {metric: points for metric, points in found.items() if len(points) > 1}

    def _of(self, metric: str) -> list[During]:
        rows = {
            name: {seed: dict(self._histories.points(run, metric)) for seed, run in runs.items()}
            for name, runs in self._runs.items()
        }
        steps = [set(points) for by_seed in rows.values() for points in by_seed.values()]
        found = []
        for step in sorted(set.intersection(*steps)) if steps else ():
            at = {name: {seed: points[step] for seed, points in by_seed.items()} for name, by_seed in rows.items()}
            values = {name: value for name, by_seed in at.items() if (value := value_of(by_seed)) is not None}
            differences = {
                row.name: difference
                for row in self.study.rows
                if row.after in at and row.name in at
                if (difference := difference_of(at[row.after], at[row.name])) is not None
            }
            found.append(During(step, values, differences))
        return found


def _own_prefix(run: Run) -> str:
    """What the names of a run's own evaluations begin with, by those of its last checkpoint; "" where it has none."""
    return next((name.rpartition("/")[0] for name in run.last().metrics if name.endswith("/map")), "")


def _moves(chart: Chart) -> bool:
    """Whether there is anything to see: a threshold that no row moves is a straight line."""
    return len({value for line in chart.lines.values() for _, value in line}) > 1
