"""What a sweep tries next: a pure function of the sweep, its seed, and what its trials have come to so far."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cosa_ray.config.schema import Config
from cosa_ray.tuning.check import complete, wanted
from cosa_ray.tuning.journal import ENDED, Entry, Journal, by_configuration
from cosa_ray.tuning.space import Space, grid_points, sample
from cosa_ray.tuning.sweepfile import Mode, Sweep

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

SAMPLERS = ("tpe", "gp", "nsga2")  # those that learn


@dataclass(frozen=True)
class Known:
    """A configuration that an earlier run tried, and its score in every metric of the sweep."""

    name: str
    values: dict[str, Any]
    scores: tuple[float, ...]


class Search:
    """Proposes trials, and learns from the journal what became of them: made anew after a kill, it knows the same."""

    def __init__(
        self,
        sweep: Sweep,
        base: Config,
        metrics: Mapping[str, Mode],
        journal: Journal,
        earlier: Sequence[Known] = (),
        again: Sequence[int] = (),
    ) -> None:
        """`earlier`: runs to start from, best first. `again`: numbers of trials that are to go on."""
        self._sweep, self._metrics, self._journal = sweep, dict(metrics), journal
        self._again = list(again)
        first = [(complete(sweep, base, point), "point") for point in sweep.points]
        if sweep.earlier is not None:
            first += [(known.values, f"earlier run {known.name}") for known in earlier[: sweep.earlier.best]]
        self._first, self._known = first, len(earlier)
        self._grid = grid_points(sweep.space) if sweep.search == "grid" else []
        self._seeds = [base.seed + repeat for repeat in range(sweep.repeats)] if sweep.repeats > 1 else [None]
        self._earlier = list(earlier) if sweep.earlier is not None and sweep.earlier.learn else []
        self._told: dict[int, FrozenTrial] = {}  # of configurations that have ended: they do not change any more

    @property
    def total(self) -> int:
        """Trials of the whole sweep."""
        return self._configurations() * len(self._seeds)

    def next(self) -> Entry | None:
        """The next trial, written down; None when there is none left."""
        if self._again:
            return self._journal.update(self._again.pop(0), state="pending", ended=None, ended_by=None)
        groups = by_configuration(self._journal.entries())
        for configuration, group in groups.items():
            if len(group) < len(self._seeds):
                known = group[0]
                return self._journal.add(
                    known.values, first=configuration, seed=self._seeds[len(group)], origin=known.origin
                )
        index = len(groups)
        if index >= self._configurations():
            return None
        given = self._first[index] if index < len(self._first) else None
        if self._sweep.search in SAMPLERS:
            return self._ask(index, given)
        values, origin = given or (self._chosen(index), "search")
        return self._journal.add(values, seed=self._seeds[0], origin=origin)

    def _configurations(self) -> int:
        return len(self._grid) if self._grid else wanted(self._sweep, self._known)

    def _chosen(self, index: int) -> dict[str, Any]:
        """Configuration `index` of a grid, or at random."""
        if self._grid:
            return self._grid[index]
        generator = np.random.default_rng([self._sweep.search_seed, index])
        return sample(self._sweep.space, lambda _, dimension: dimension.draw(generator))

    def _ask(self, index: int, given: tuple[dict[str, Any], str] | None) -> Entry:
        """The next configuration, by Optuna.

        The study is made anew of what is known, and the sampler seeded by the configuration's place in the sweep: so
        it makes no difference whether this process has seen the sweep from its start.
        """
        space = self._sweep.space
        study = self._study()
        seed = int(np.random.SeedSequence([self._sweep.search_seed, index]).generate_state(1)[0])
        study.sampler = make_sampler(self._sweep.search, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if given is not None:
                study.enqueue_trial(_as_parameters(space, given[0]))
            trial = study.ask()
            values = sample(space, lambda name, dimension: dimension.suggest(trial, name))
        # Not study.trials: it copies every trial, which takes as long as all the rest.
        known = study.get_trials(deepcopy=False)[trial.number].system_attrs
        memory = {key: value for key, value in known.items() if key != "fixed_params"}
        origin = given[1] if given is not None else "search"
        return self._journal.add(values, seed=self._seeds[0], origin=origin, memory=memory)

    def _study(self) -> Study:
        """Everything known, as a study of Optuna's; trials that still run are in it as such."""
        study = make_study(self._metrics)
        for known in self._earlier:
            study.add_trial(frozen_trial(self._sweep.space, known.values, known.scores))
        for configuration, group in by_configuration(self._journal.entries()).items():
            if configuration not in self._told:
                ended = len(group) == len(self._seeds) and all(entry.state in ENDED for entry in group)
                known = configuration_trial(self._sweep.space, group, self._metrics, ended)
                if not ended:
                    study.add_trial(known)
                    continue
                self._told[configuration] = known
            study.add_trial(self._told[configuration])
        return study


def configuration_trial(
    space: Space, group: Sequence[Entry], metrics: Mapping[str, Mode], ended: bool = True
) -> FrozenTrial:
    """What Optuna is told of a configuration: the mean over its repeats, or how far it came where it was given up."""
    first = group[0]
    if not ended:
        return frozen_trial(space, first.values, None, memory=first.memory)
    course: dict[int, float] = {}
    if any(entry.state in ("stopped_early", "interrupted") for entry in group):  # by the scheduler, by the budget
        metric = next(iter(metrics))
        course = {each.step: each.metrics[metric] for each in first.own_reports() if metric in each.metrics}
    scores = configuration_scores(group, metrics)
    return frozen_trial(space, first.values, scores, failed=scores is None, pruned=course, memory=first.memory)


def configuration_scores(group: Sequence[Entry], metrics: Mapping[str, Mode]) -> tuple[float, ...] | None:
    """Score of a configuration in every metric, the mean over its repeats; None when none has one."""
    found = [scores for entry in group if (scores := trial_scores(entry, metrics)) is not None]
    return tuple(float(value) for value in np.mean(found, axis=0)) if found else None


def trial_scores(entry: Entry, metrics: Mapping[str, Mode]) -> tuple[float, ...] | None:
    """Score of a trial: of one metric the best evaluation's, of several those of the last evaluation together.

    None for a trial that failed, or has no finite score.
    """
    if entry.state == "failed":
        return None
    reports = [
        values
        for report in entry.own_reports()
        if np.isfinite(values := [report.metrics.get(metric, np.nan) for metric in metrics]).all()
    ]
    if not reports:
        return None
    if len(metrics) > 1:
        return tuple(reports[-1])
    (mode,) = metrics.values()
    return (max(reports)[0] if mode == "max" else min(reports)[0],)


def make_study(metrics: Mapping[str, Mode]) -> Study:
    """An empty Optuna study of these metrics, in memory."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["maximize" if mode == "max" else "minimize" for mode in metrics.values()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study.set_metric_names(list(metrics))
    return study


def make_sampler(search: str, seed: int) -> Any:
    """Optuna's sampler of a learning search."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if search == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=8)
        if search == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def frozen_trial(
    space: Space,
    values: Mapping[str, Any],
    scores: Sequence[float] | None,
    *,
    failed: bool = False,
    pruned: Mapping[int, float] | None = None,
    memory: Mapping[str, Any] | None = None,
) -> FrozenTrial:
    """A configuration as a trial of Optuna's: complete, failed, pruned after `pruned` (step -> score), or running."""
    import optuna
    from optuna.trial import FixedTrial, TrialState, create_trial

    fixed = FixedTrial(_as_parameters(space, values))
    sample(space, lambda name, dimension: dimension.suggest(fixed, name))
    distributions: dict[str, optuna.distributions.BaseDistribution] = fixed.distributions
    state = TrialState.FAIL if failed else TrialState.RUNNING if scores is None else TrialState.COMPLETE
    if pruned and scores is not None:
        state = TrialState.PRUNED
    return create_trial(
        state=state,
        values=list(scores) if scores is not None and state == TrialState.COMPLETE else None,
        params=fixed.params,
        distributions=distributions,
        intermediate_values=dict(pruned or {}),
        system_attrs=dict(memory or {}),
    )


def _as_parameters(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as Optuna holds them: free settings only, a list by its words."""
    return {
        name: str(list(value)) if isinstance(value, tuple) else value
        for name, value in values.items()
        if space[name].same is None
    }
