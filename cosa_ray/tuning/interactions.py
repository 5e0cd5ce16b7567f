"""Which settings of a sweep act together: what two of them explain of the score beyond what each explains alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cosa_ray.tuning.journal import Entry

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from optuna import Study

METHOD = (
    "A random forest is fitted to the scores; settings count evenly over their ranges, logarithmic ones by their "
    "logarithm. A pair's share is the variance of the forest's mean over all other settings as the two vary, less what "
    "each does alone, of the forest's whole variance (the second order of a functional ANOVA). `predicted` is the "
    "forest's R² on configurations left out of its trees: at 0 or below it learnt nothing, and shares are noise."
)
FEWEST = 16  # configurations; below, pairs are noise
JUDGED = 500  # configurations, drawn at random where there are more: trees grow with them, and seconds with trees
MOST = 8  # settings that are paired, those that explain most by themselves
_STEPS = 9  # places of a range that are looked at
_SPREAD, _DRAWN = 4096, 256  # settings that the whole variance, and a mean over the others, are taken over
_TREES = 128


@dataclass(frozen=True)
class Interactions:
    """What settings explain of one metric, alone and in pairs, as shares of a forest's variance (see METHOD).

    `pairs` has the strongest first. `surface`: the predicted score over the strongest pair, at the middles of equal
    parts of their heights (rows: the first setting, columns: the second). `note` says why there is nothing.
    """

    predicted: float | None = None
    configurations: int = 0
    alone: dict[str, float] = field(default_factory=dict)
    pairs: dict[tuple[str, str], float] = field(default_factory=dict)
    surface: tuple[tuple[float, ...], ...] = ()
    note: str | None = None

    def said(self) -> dict[str, Any]:
        """For a file: pairs by both names."""
        named = {f"{first} x {second}": share for (first, second), share in self.pairs.items()}
        return {
            "predicted": self.predicted,
            "configurations": self.configurations,
            "alone": self.alone,
            "pairs": named,
            "note": self.note,
        }


def interactions(study: Study, entries: Sequence[Entry], index: int) -> Interactions:
    """Interactions for one metric of `study_of` a sweep's entries, over the configurations that ran to their end.

    Settings that not all of them have are left out.
    """
    from optuna.trial import TrialState

    if any(entry.lineage for entry in entries):
        return Interactions(note="settings changed while the trials ran, so none has a score of its own")
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    if len(trials) < FEWEST:
        return Interactions(
            configurations=len(trials),
            note=f"it takes {FEWEST} configurations that ran to their end, and there are {len(trials)}",
        )
    if len(trials) > JUDGED:
        drawn_trials = np.random.default_rng(0).choice(len(trials), JUDGED, replace=False)
        trials = [trials[place] for place in sorted(drawn_trials.tolist())]
    names = [name for name in trials[0].params if all(name in trial.params for trial in trials)]
    distributions = {name: trials[0].distributions[name] for name in names}
    scores = np.array([trial.values[index] for trial in trials])
    if len(names) < 2 or not np.ptp(scores):
        few = "only one setting varies in all of them" if len(names) < 2 else "all configurations have the same score"
        return Interactions(configurations=len(trials), note=few)
    tried = np.array([[height(distributions[name], trial.params[name]) for name in names] for trial in trials])
    predict, predicted = _forest(tried, scores)
    drawn = _drawn([distributions[name] for name in names])
    whole = float(predict(drawn).var())
    if whole == 0.0:
        return Interactions(predicted, len(trials), note="the forest predicts the same score everywhere")
    places = [_places(distributions[name]) for name in names]

    def mean_over_others(*fixed: int) -> NDArray[np.float64]:
        """The forest's mean where these settings stand at each of their places."""
        shape = tuple(len(places[setting]) for setting in fixed)
        points = np.tile(drawn[None, :_DRAWN], (math.prod(shape), 1, 1))
        for setting, at in zip(fixed, np.meshgrid(*(places[s] for s in fixed), indexing="ij"), strict=True):
            points[:, :, setting] = at.reshape(-1, 1)
        return predict(points.reshape(-1, len(names))).reshape(*shape, -1).mean(-1)

    alone = [mean_over_others(setting) for setting in range(len(names))]
    most = sorted(sorted(range(len(names)), key=lambda setting: -alone[setting].var())[:MOST])
    shares, surfaces = {}, {}
    for first, second in itertools.combinations(most, 2):
        surface = mean_over_others(first, second)
        beyond = surface - surface.mean(1, keepdims=True) - surface.mean(0, keepdims=True)
        shares[first, second] = float(beyond.var()) / whole
        surfaces[first, second] = surface
    ordered = sorted(shares, key=lambda pair: -shares[pair])
    return Interactions(
        predicted,
        len(trials),
        {names[setting]: float(alone[setting].var()) / whole for setting in most},
        {(names[first], names[second]): shares[first, second] for first, second in ordered},
        tuple(tuple(row) for row in surfaces[ordered[0]].tolist()),
    )


def height(distribution: Any, value: Any) -> float:
    """Place of a value between the ends of its setting, 0 to 1."""
    if hasattr(distribution, "choices"):
        return float((distribution.choices.index(value) + 0.5) / len(distribution.choices))
    low, high = distribution.low, distribution.high
    if low == high:
        return 0.5
    if distribution.log:
        return math.log(value / low) / math.log(high / low)
    return float((value - low) / (high - low))


def _forest(
    tried: NDArray[np.float64], scores: NDArray[np.float64]
) -> tuple[Callable[[NDArray[np.float64]], NDArray[np.float64]], float]:
    """A forest's predictions, and its R² on what each tree was not shown."""
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(_TREES, oob_score=True, random_state=0)
    forest.fit(tried, scores)
    return forest.predict, float(forest.oob_score_)


def _places(distribution: Any) -> list[float]:
    """Heights of a setting that are looked at: all choices, or the middles of equal parts of its range."""
    count = len(distribution.choices) if hasattr(distribution, "choices") else _STEPS
    return [(place + 0.5) / count for place in range(count)]


def _drawn(distributions: Sequence[Any]) -> NDArray[np.float64]:
    """Settings spread evenly over the space, as heights; so are the first of them (a Sobol sequence)."""
    from scipy.stats.qmc import Sobol

    drawn = np.asarray(Sobol(len(distributions), rng=0).random(_SPREAD))
    for column, distribution in enumerate(distributions):
        if hasattr(distribution, "choices"):
            count = len(distribution.choices)
            drawn[:, column] = (np.floor(drawn[:, column] * count) + 0.5) / count
    return drawn
