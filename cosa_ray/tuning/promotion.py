"""What a promotion came to: every configuration over its seeds, the winner, and the row for a table of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from cosa_ray.tuning.sweepfile import Mode
from cosa_ray.tuning.values import shortly


@dataclass(frozen=True)
class Spread:
    """A metric over seeds: mean, standard deviation (n - 1; None of a single seed), and n."""

    mean: float
    std: float | None
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of one value or more."""
        return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values))

    def shown(self) -> str:
        """0.713 ± 0.004."""
        return f"{self.mean:.3f}" + ("" if self.std is None else f" ± {self.std:.3f}")


@dataclass(frozen=True)
class PromotedRun:
    """One seed of a configuration. `metrics` are its best evaluation's and those of every protocol, by tracked name."""

    name: str
    folder: str
    seed: int
    state: str
    step: int
    hours: float
    metrics: dict[str, float]
    mlflow_run_id: str | None = None
    cause: str | None = None


@dataclass(frozen=True)
class Configuration:
    """A promoted configuration: what the search chose, the sweep's trial it comes from with its score, its runs."""

    values: dict[str, Any]
    runs: tuple[PromotedRun, ...]
    source: str | None = None
    source_score: float | None = None

    @property
    def finished(self) -> list[PromotedRun]:
        """The runs that came to their end."""
        return [run for run in self.runs if run.state == "finished"]

    @property
    def whole(self) -> bool:
        """True when all its seeds came to their end."""
        return len(self.finished) == len(self.runs)

    def spread(self, metric: str) -> Spread | None:
        """A metric over the seeds that have it; None where none has."""
        values = [run.metrics[metric] for run in self.finished if metric in run.metrics]
        return Spread.of(values) if values else None

    def changes(self) -> str:
        """The settings that the search chose, as words."""
        return ", ".join(f"{key}={shortly(value)}" for key, value in self.values.items())


@dataclass(frozen=True)
class Promotion:
    """A promotion of `sweep`: `state` finished or stopped, `configurations` best first by the mean of `metric`.

    A configuration of which a seed failed comes after those that are whole. `columns`: metrics of the row. `hours_of`:
    gpu or cpu. `registered`: the version that the registry gave the winner. `experiment`: name of the sweep's base.
    """

    name: str
    folder: str
    sweep: str
    state: str
    metric: str
    mode: Mode
    configurations: list[Configuration] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    experiment: str = ""
    hours_of: str = "cpu"
    date: str = ""
    commit: str | None = None
    machine: str = ""
    parent_run_id: str | None = None
    tracking_uri: str | None = None
    registered: dict[str, Any] | None = None

    @property
    def winner(self) -> Configuration | None:
        """The configuration with the best mean; None where none has the metric, or the promotion was stopped."""
        first = self.configurations[0] if self.configurations and self.state == "finished" else None
        return first if first is not None and first.spread(self.metric) is not None else None

    @property
    def model(self) -> PromotedRun | None:
        """The winner's run whose own value of the metric is best: the one to use; its value is not the result."""
        if self.winner is None:
            return None
        runs = [run for run in self.winner.finished if self.metric in run.metrics]
        return max(runs, key=lambda run: sign(self.mode) * run.metrics[self.metric])

    @property
    def margin(self) -> tuple[float, float | None] | None:
        """(how far the winner's mean is from the second's, standard error over seeds of that); None without a second.

        Of those with all seeds, as the ranking has them first. The standard error is None where either has one seed.
        """
        whole = [each for each in self.configurations if each.whole]
        found = [spread for each in whole[:2] if (spread := each.spread(self.metric)) is not None]
        if self.winner is None or len(found) < 2:
            return None
        first, second = found
        if first.std is None or second.std is None:
            return first.mean - second.mean, None
        return first.mean - second.mean, float(np.sqrt(first.std**2 / first.count + second.std**2 / second.count))

    def head(self) -> list[str]:
        """Columns of the table of results."""
        metrics = [f"`{metric}`" for metric in self.columns]
        return ["configuration", "seeds", "steps", *metrics, "cost", "date", "commit", "machine"]

    def row(self, configuration: Configuration) -> list[str]:
        """A configuration in the table of results."""
        runs = configuration.finished
        steps = sorted({run.step for run in runs})
        seeds = f"{len(runs)}" if configuration.whole else f"{len(runs)} of {len(configuration.runs)}"
        experiment = f"`{self.experiment}`" if self.experiment else ""
        return [
            f"{experiment}{' with ' if experiment else ''}{configuration.changes()}",
            seeds,
            " to ".join(f"{step:,}" for step in dict.fromkeys((steps[0], steps[-1]))) if steps else "-",
            *((spread.shown() if spread else "-") for spread in map(configuration.spread, self.columns)),
            _cost([run.hours for run in runs], self.hours_of),
            self.date or "-",
            self.commit or "-",
            self.machine or "-",
        ]

    def markdown(self) -> str:
        """The table of results, best first."""
        return "\n".join(
            [
                markdown_line(self.head()),
                markdown_line(["---"] * len(self.head())),
                *(markdown_line(self.row(c)) for c in self.configurations),
            ]
        )

    def markdown_row(self) -> str | None:
        """The winner's line of it."""
        return markdown_line(self.row(self.winner)) if self.winner is not None else None

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping, with means and deviations of all metrics, the winner, its model and its row."""
        said = asdict(self)
        for configuration, shown in zip(self.configurations, said["configurations"], strict=True):
            names = sorted({name for run in configuration.finished for name in run.metrics})
            shown["spreads"] = {
                name: asdict(spread) for name in names if (spread := configuration.spread(name)) is not None
            }
        return {
            **said,
            "winner": said["configurations"][0] if self.winner is not None else None,
            "model": asdict(self.model) if self.model is not None else None,
            "margin": self.margin,
            "row": self.markdown_row(),
        }

    def ranked(self) -> Promotion:
        """The same with its configurations best first."""

        def key(configuration: Configuration) -> tuple[bool, bool, float]:
            spread = configuration.spread(self.metric)
            return (
                spread is None,
                not configuration.whole,
                -sign(self.mode) * spread.mean if spread is not None else 0.0,
            )

        return replace(self, configurations=sorted(self.configurations, key=key))


def sign(mode: str) -> float:
    """1 where more is better, -1 where less is."""
    return 1.0 if mode == "max" else -1.0


def machine_words(environment: Mapping[str, Any], gpus: float) -> str:
    """What a run was trained on, from its environment as it was logged: so many GPUs, or the CPUs of its machine."""
    names = [line.partition(",")[0].strip() for line in environment.get("gpus", ())]
    if gpus and names:
        return f"{gpus:g} x {names[0]}"
    return ", ".join(str(word) for word in (f"{environment.get('cpus')} CPUs", environment.get("cpu")) if word)


def _cost(hours: Sequence[float], of: str) -> str:
    """So many runs times their mean cost."""
    if not hours:
        return "-"
    mean = float(np.mean(hours))
    words = f"{mean:.2f} {of.upper()} h" if mean >= 0.1 else f"{60 * mean:.2f} {of.upper()} min"
    return f"{len(hours)} x {words}"


def markdown_line(cells: Sequence[str]) -> str:
    """A line of a Markdown table; bars within cells are escaped."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
