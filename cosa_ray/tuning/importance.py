"""What a sweep tried as a study of Optuna's, whatever the search was, and which settings mattered by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cosa_ray.tuning.journal import ENDED, Entry, by_configuration
from cosa_ray.tuning.search import configuration_scores, configuration_trial, make_study
from cosa_ray.tuning.space import Space
from cosa_ray.tuning.sweepfile import Mode

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

METHOD = (
    "How much of the score each setting explains by itself, as a share of what all of them explain by themselves "
    "(shares add up to 1, of noise too: `together.predicted` says whether there is anything to explain): Optuna's "
    "fANOVA (Hutter et al., ICML 2014), logarithmic settings by their logarithm. A conditional setting is judged among "
    "the configurations that have it. Of more than 200 configurations, 200 drawn at random are judged."
)
FEWEST = 8  # configurations; below, a random forest says nothing
MOST = 200  # fANOVA takes seconds for these and grows with the square: hours for a sweep of thousands, at its very end


@dataclass(frozen=True)
class Importance:
    """How much each setting mattered for one metric.

    `shares` add up to 1, over `configurations` that ran to their end. `conditional`: share of a conditional setting
    among the `among` configurations that have it. `early`: shares with those that were given up, every trial by its
    best evaluation up to `early_step`, the last that all of them reached. `note` says why there is nothing.
    """

    shares: dict[str, float] = field(default_factory=dict)
    configurations: int = 0
    conditional: dict[str, float] = field(default_factory=dict)
    among: dict[str, int] = field(default_factory=dict)
    early: dict[str, float] = field(default_factory=dict)
    early_step: int | None = None
    note: str | None = None


def study_of(space: Space, entries: Sequence[Entry], metrics: Mapping[str, Mode]) -> Study:
    """Every configuration as a trial of Optuna's, in order: the mean over its repeats, pruned (by the scheduler or the
    budget), failed or running.

    user_attrs: the numbers of its `trials`, and their mean `scores` where there are any, also of pruned ones.
    """
    study = make_study(metrics)
    for group in by_configuration(entries).values():
        scores = configuration_scores(group, metrics)
        ended = all(entry.state in ENDED or (entry.ended_by and scores) for entry in group)
        trial = configuration_trial(space, group, metrics, ended)
        trial.set_user_attr("trials", [entry.id for entry in group])
        if scores is not None:
            trial.set_user_attr("scores", list(scores))
        study.add_trial(trial)
    return study


def importance(study: Study, entries: Sequence[Entry], metrics: Mapping[str, Mode]) -> dict[str, Importance]:
    """Importance of the settings by metric, from `study_of` these entries."""
    return {metric: _of_metric(study, entries, metrics, index) for index, metric in enumerate(metrics)}


def _of_metric(study: Study, entries: Sequence[Entry], metrics: Mapping[str, Mode], index: int) -> Importance:
    from optuna.trial import TrialState

    if any(entry.lineage for entry in entries):
        return Importance(note="settings changed while the trials ran, so none has a score of its own")
    trials = study.get_trials(deepcopy=False)
    scored = {trial.number: trial.values[index] for trial in trials if trial.state == TrialState.COMPLETE}
    settings = {name for trial in trials for name in trial.params}
    if len(settings) == 1:
        return Importance(configurations=len(scored), note="only one setting varies")
    early, step = _early(trials, entries, metrics)
    having = _having(trials, scored)
    common = having.pop(tuple(scored), [])
    shares = _fanova([trial for trial in trials if trial.number in scored], common, scored)
    conditional: dict[str, float] = {}
    among: dict[str, int] = {}
    for numbers, names in having.items():
        found = _fanova([trials[number] for number in numbers], [*common, *names], scored)
        conditional |= {name: found[name] for name in names if name in found}
        among |= {name: len(numbers) for name in names if name in found}
    by_then = _fanova([trials[number] for number in early], _having(trials, early).get(tuple(early), []), early)
    note = None
    if len(scored) < FEWEST:
        note = f"it takes {FEWEST} configurations that ran to their end, and there are {len(scored)}"
    elif not shares:
        same = len(set(scored.values())) < 2
        note = "all configurations have the same score" if same else "only one setting varies in all of them"
    return Importance(shares, len(scored), conditional, among, by_then, step, note)


def _early(
    trials: Sequence[FrozenTrial], entries: Sequence[Entry], metrics: Mapping[str, Mode]
) -> tuple[dict[int, float], int | None]:
    """Best evaluations up to the last step that all reached, by number in the study; none where nobody was given up."""
    from optuna.trial import TrialState

    groups = list(by_configuration(entries).values())
    if not any(entry.state == "stopped_early" for group in groups for entry in group):
        return {}, None
    ((metric, mode),) = metrics.items()
    courses: dict[int, list[tuple[int, float]]] = {}
    for trial, group in zip(trials, groups, strict=True):
        cut = any(entry.state == "interrupted" for entry in group)  # by the budget, wherever it was
        if trial.state in (TrialState.PRUNED, TrialState.COMPLETE) and not cut:
            course = [(each.step, each.metrics.get(metric, math.nan)) for each in group[0].reports]
            courses[trial.number] = [(step, value) for step, value in course if math.isfinite(value)]
    until = min(course[-1][0] for course in courses.values())
    pick = max if mode == "max" else min
    reached = {number: [value for step, value in course if step <= until] for number, course in courses.items()}
    return {number: pick(values) for number, values in reached.items() if values}, until


def _having(trials: Sequence[FrozenTrial], scored: Mapping[int, float]) -> dict[tuple[int, ...], list[str]]:
    """Names of the settings by the numbers of the scored trials that have them."""
    chosen = [trials[number] for number in scored]
    having: dict[tuple[int, ...], list[str]] = {}
    for name in sorted({name for trial in chosen for name in trial.params}):
        having.setdefault(tuple(trial.number for trial in chosen if name in trial.params), []).append(name)
    return having


def _fanova(trials: Sequence[FrozenTrial], names: Sequence[str], scored: Mapping[int, float]) -> dict[str, float]:
    """Optuna's fANOVA of these settings, which all the trials have; nothing where it has nothing to go by."""
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    if len(trials) < FEWEST or len(names) < 2 or len({scored[trial.number] for trial in trials}) < 2:
        return {}
    if len(trials) > MOST:
        drawn = np.random.default_rng(0).choice(len(trials), MOST, replace=False)
        trials = [trials[place] for place in sorted(drawn.tolist())]
    study = optuna.create_study()
    for trial in trials:
        distributions, values = {}, {}
        for name in names:
            distributions[name], values[name] = _even(trial.distributions[name], trial.params[name])
        study.add_trial(
            optuna.trial.create_trial(value=scored[trial.number], params=values, distributions=distributions)
        )
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: float(share) for name, share in found.items()}


def _even(distribution: Any, value: Any) -> tuple[Any, Any]:
    """A logarithmic setting as its logarithm: fANOVA averages over ranges as they are given to it."""
    from optuna.distributions import FloatDistribution

    if not getattr(distribution, "log", False):
        return distribution, value
    return FloatDistribution(math.log(distribution.low), math.log(distribution.high)), math.log(value)
