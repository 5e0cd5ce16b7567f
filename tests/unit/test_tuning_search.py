"""The search: a pure function of the sweep, its seed and its journal, whatever was killed on the way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from cosa_ray.config.schema import Config
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning import search as search_module
from cosa_ray.tuning.check import check_sweep
from cosa_ray.tuning.journal import Entry, Journal, Report
from cosa_ray.tuning.search import (
    Known,
    Search,
    configuration_trial,
    frozen_trial,
    make_sampler,
    make_study,
    trial_scores,
)
from cosa_ray.tuning.space import Dimension
from cosa_ray.tuning.sweepfile import Sweep

BASE = Config()
SPACE = {
    "losses.cam_to_seg": {"uniform": [0, 1]},
    "losses.contrastive": {"loguniform": [1e-3, 1]},
    "losses.seg_to_cam": {"same": "losses.contrastive", "times": 0.5},
    "pseudo_labels.policy": {"choice": ["single", "reliability"]},
    "contrastive.pixels": {"lograndint": [2, 300], "when": {"pseudo_labels.policy": "single"}},
    "optimiser.power": {"quniform": [0.1, 0.9, 0.1]},
    "assignment.scales": {"choice": [[1.0], [1.0, 0.5, 1.5]]},
}
GRID = {
    "losses.cam_to_seg": {"uniform": [0, 1], "points": 3},
    "pseudo_labels.policy": {"choice": ["single", "reliability"]},
}
POINTS: list[dict[str, Any]] = [{}, {"losses.cam_to_seg": "1e-1", "optimiser.power": 0.1 + 0.2}]
ONE: dict[str, Any] = {"val/miou": "max"}
TWO: dict[str, Any] = {"val/miou": "max", "cost/cpu_hours": "min"}


def sweep_of(search: str, **more: Any) -> Sweep:
    sweep = Sweep.model_validate({"base": "x", "space": SPACE, "search": search, **more})
    check_sweep(sweep, BASE, "x")
    return sweep


def answer(values: dict[str, Any], metrics: dict[str, Any]) -> dict[str, float]:
    """A simple response: best at cam_to_seg = 0.8, cheapest at 0.2."""
    x = values["losses.cam_to_seg"]
    both = {"val/miou": 1 - (x - 0.8) ** 2, "cost/cpu_hours": 1 + (x - 0.2) ** 2}
    return {metric: both[metric] for metric in metrics}


def end(journal: Journal, entry: Entry, metrics: dict[str, Any], state: str = "finished") -> None:
    """As a trial does; one in five fails, so that the search meets that too."""
    if entry.number % 5 == 3:
        journal.update(entry.number, state="failed", kind="diverged", cause="not finite")
        return
    journal.report(entry.number, 10, answer(entry.values, metrics), at=1.0)
    journal.update(entry.number, state=state)


def run(
    folder: Path, sweep: Sweep, metrics: dict[str, Any], *, killed: Sequence[int] = (), earlier: Sequence[Known] = ()
) -> list[Entry]:
    """All trials, one at a time; at those of `killed` the process dies while they run, and another goes on."""
    place = RunFolder(f"memory:/{folder}")  # faster than a disk that has to be waited for
    journal = Journal(place)
    search = Search(sweep, BASE, metrics, journal, earlier)
    waiting = set(killed)
    while (entry := search.next()) is not None:
        journal.update(entry.number, state="running")
        if entry.number in waiting:
            waiting.remove(entry.number)
            journal = Journal(place)
            before = journal[entry.number]
            search = Search(sweep, BASE, metrics, journal, earlier, again=[entry.number])
            entry = search.next()
            assert entry is not None
            assert (entry.number, entry.values, entry.state) == (before.number, before.values, "pending")
        end(journal, entry, metrics)
    assert search.total == len(journal)
    return Journal(place).entries()


def proposed(entries: Sequence[Entry]) -> list[tuple[Any, ...]]:
    return [(e.number, repr(e.values), e.configuration, e.seed, e.origin, e.memory) for e in entries]


CASES: dict[str, tuple[Callable[[], Sweep], dict[str, Any]]] = {
    "random": (lambda: sweep_of("random", trials=6, points=POINTS), ONE),
    "grid": (lambda: sweep_of("grid", space=GRID), ONE),
    "points": (lambda: sweep_of("points", points=POINTS), ONE),
    "repeats": (lambda: sweep_of("tpe", trials=4, repeats=3), ONE),
    "tpe": (lambda: sweep_of("tpe", trials=16, points=POINTS), ONE),
    "tpe, two metrics": (lambda: sweep_of("tpe", trials=14), TWO),
    "nsga2": (lambda: sweep_of("nsga2", trials=32), TWO),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kill_changes_nothing(tmp_path: Path, case: str) -> None:
    make, metrics = CASES[case]
    sweep = make()
    whole = proposed(run(tmp_path / "whole", sweep, metrics))
    assert len(whole) == {"repeats": 12, "grid": 6, "points": 2}.get(case, sweep.trials)
    every = range(len(whole))
    assert proposed(run(tmp_path / "every", sweep, metrics, killed=every)) == whole
    assert proposed(run(tmp_path / "last", sweep, metrics, killed=every[-2:])) == whole


def test_a_kill_changes_nothing_for_the_gaussian_process(tmp_path: Path) -> None:
    """Which learns from the ninth finished trial on (two of the first ten fail), and is slow."""
    sweep = sweep_of("gp", trials=12, space={"losses.cam_to_seg": SPACE["losses.cam_to_seg"]})
    whole = run(tmp_path / "whole", sweep, ONE)
    assert proposed(run(tmp_path / "killed", sweep, ONE, killed=[10])) == proposed(whole)
    assert min(abs(entry.values["losses.cam_to_seg"] - 0.8) for entry in whole[10:]) < 0.1


@pytest.mark.parametrize("search", ["random", "tpe", "nsga2", "gp"])
def test_another_seed_proposes_other_trials(tmp_path: Path, search: str) -> None:
    first, again, other = (
        run(tmp_path / str(place), sweep_of(search, trials=3, search_seed=seed), ONE)
        for place, seed in enumerate((3, 3, 4))
    )
    assert proposed(first) == proposed(again)
    assert not {repr(entry.values) for entry in first} & {repr(entry.values) for entry in other}
    assert len({repr(entry.values) for entry in first}) == 3


@pytest.mark.parametrize("search", ["random", "tpe", "nsga2"])
def test_what_is_proposed_lies_in_the_space(tmp_path: Path, search: str) -> None:
    space = sweep_of(search).space
    for entry in run(tmp_path, sweep_of(search, trials=25), ONE):
        values = entry.values
        assert all(space[key].holds(value) for key, value in values.items() if space[key].same is None)
        assert values["losses.seg_to_cam"] == 0.5 * values["losses.contrastive"]
        assert ("contrastive.pixels" in values) == (values["pseudo_labels.policy"] == "single")


def test_a_grid_is_tried_once_each_and_whole(tmp_path: Path) -> None:
    entries = run(tmp_path, sweep_of("grid", space=GRID), ONE)
    assert [tuple(entry.values.values()) for entry in entries] == list(
        itertools.product((0.0, 0.5, 1.0), ("single", "reliability"))
    )


@pytest.mark.parametrize("search", ["random", "points", "tpe"])
def test_points_and_the_best_of_earlier_runs_come_first(tmp_path: Path, search: str) -> None:
    earlier = [
        Known(name, {**frozen, "losses.cam_to_seg": at}, (score,))
        for name, at, score in (("x", 0.7, 0.9), ("y", 0.1, 0.5))
    ]
    sweep = sweep_of(search, points=POINTS, earlier={"runs": "", "best": 1}, trials=4)
    entries = run(tmp_path, sweep, ONE, earlier=earlier)
    assert [entry.origin for entry in entries[:3]] == ["point", "point", "earlier run x"]
    paper, second, best = (entry.values for entry in entries[:3])
    assert paper["losses.cam_to_seg"] == BASE.losses.cam_to_seg
    assert (second["losses.cam_to_seg"], second["optimiser.power"]) == (0.1, 0.3)
    assert best == earlier[0].values
    assert [entry.origin for entry in entries[3:]] == ([] if search == "points" else ["search"])


frozen = {
    "losses.contrastive": 0.1,
    "losses.seg_to_cam": 0.05,
    "pseudo_labels.policy": "reliability",
    "optimiser.power": 0.9,
    "assignment.scales": (1.0,),
}


def test_it_learns(tmp_path: Path) -> None:
    """What TPE proposes after its ten random ones lies nearer to the best value; and at once with earlier runs."""
    off = [
        abs(entry.values["losses.cam_to_seg"] - 0.8) for entry in run(tmp_path / "a", sweep_of("tpe", trials=30), ONE)
    ]
    assert np.mean(off[20:]) < 0.5 * np.mean(off[:10])
    earlier = [Known(str(n), {**frozen, "losses.cam_to_seg": n / 24}, (1 - abs(n / 24 - 0.8),)) for n in range(25)]
    means = {}
    for learn in (True, False):
        sweep = sweep_of("tpe", trials=8, earlier={"runs": "", "learn": learn, "best": 1})
        entries = run(tmp_path / str(learn), sweep, ONE, earlier=earlier)[1:]
        means[learn] = np.mean([abs(entry.values["losses.cam_to_seg"] - 0.8) for entry in entries])
    assert means[True] < 0.5 * means[False]


@pytest.mark.parametrize(("search", "before"), [("tpe", 14), ("gp", 10)])
def test_trials_that_still_run_are_kept_away_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str, before: int
) -> None:
    """With one seed for every proposal, the second of two would be the first again did it not know of that."""
    monkeypatch.setattr(search_module, "make_sampler", lambda kind, seed: make_sampler(kind, 5))
    space = {"losses.cam_to_seg": SPACE["losses.cam_to_seg"]}
    journal = Journal(RunFolder(str(tmp_path)))
    for place in range(before):
        entry = journal.add({"losses.cam_to_seg": place / before})
        journal.report(entry.number, 10, answer(entry.values, ONE))
        journal.update(entry.number, state="finished")
    asking = Search(sweep_of(search, trials=20, space=space), BASE, ONE, journal)
    first, second = asking.next(), asking.next()
    assert first.values != second.values
    journal.put(Entry(second.number, first.values, second.number, state="failed"))  # as if it had never been
    journal.update(first.number, state="failed")
    assert Search(sweep_of(search, trials=20, space=space), BASE, ONE, journal).next().values == first.values


def test_every_configuration_has_every_seed_before_the_next(tmp_path: Path) -> None:
    entries = run(tmp_path, sweep_of("tpe", trials=3, repeats=2, set={"seed": 7}), ONE)
    assert [(entry.configuration, entry.seed) for entry in entries] == [(n, s) for n in (0, 2, 4) for s in (0, 1)]
    assert all(one.values == other.values for one, other in zip(entries[::2], entries[1::2], strict=True))
    assert len({repr(entry.values) for entry in entries}) == 3


def reports(*scores: float) -> tuple[Report, ...]:
    return tuple(Report(10 * place, {"m": score}, 0.0) for place, score in enumerate(scores, 1))


STATE = optuna.trial.TrialState
ONE_SETTING = {"x": Dimension(uniform=(0.0, 1.0))}
MAX: dict[str, Any] = {"m": "max"}


@pytest.mark.parametrize(
    ("group", "ended", "state", "value", "course"),
    [
        ([Entry(0, {"x": 0.5}, 0, state="finished", reports=reports(0.2, 0.6, 0.4))], True, STATE.COMPLETE, 0.6, {}),
        # The mean over the seeds, of which one failed.
        (
            [
                Entry(0, {"x": 0.5}, 0, seed=0, state="finished", reports=reports(0.2)),
                Entry(1, {"x": 0.5}, 0, seed=1, state="failed", reports=reports(0.9)),
                Entry(2, {"x": 0.5}, 0, seed=2, state="finished", reports=reports(0.6, 0.1)),
            ],
            True,
            STATE.COMPLETE,
            0.4,
            {},
        ),
        ([Entry(0, {"x": 0.5}, 0, state="failed", reports=reports(0.9))], True, STATE.FAIL, None, {}),
        ([Entry(0, {"x": 0.5}, 0, state="finished", reports=reports(float("nan")))], True, STATE.FAIL, None, {}),
        (
            [Entry(0, {"x": 0.5}, 0, state="stopped_early", reports=reports(0.2, 0.3))],
            True,
            STATE.PRUNED,
            0.3,  # of a pruned trial Optuna's value is its last
            {10: 0.2, 20: 0.3},
        ),
        ([Entry(0, {"x": 0.5}, 0, state="running", reports=reports(0.2))], False, STATE.RUNNING, None, {}),
    ],
)
def test_what_optuna_is_told(group: list[Entry], ended: bool, state: STATE, value: float | None, course: dict) -> None:
    told = configuration_trial(ONE_SETTING, group, MAX, ended)
    assert (told.state, told.params, told.intermediate_values) == (state, {"x": 0.5}, course)
    study = make_study(MAX)
    study.add_trial(told)
    if state == STATE.COMPLETE:
        assert study.best_value == pytest.approx(value)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE


def test_scores_of_a_trial() -> None:
    """Of one metric the best; of several those of the last evaluation that has them all; after a copy those since."""
    entry = Entry(
        0,
        {},
        0,
        reports=(
            Report(10, {"m": 0.9, "c": 5.0}, 0.0),
            Report(20, {"m": 0.5, "c": 2.0}, 0.0),
            Report(30, {"m": 0.7, "c": 3.0}, 0.0),
            Report(40, {"m": float("nan"), "c": 1.0}, 0.0),
            Report(50, {"c": 1.0}, 0.0),
        ),
    )
    assert trial_scores(entry, {"m": "max"}) == (0.9,)
    assert trial_scores(entry, {"m": "min"}) == (0.5,)
    assert trial_scores(entry, {"c": "min", "m": "max"}) == (3.0, 0.7)
    copied = Entry(0, {}, 0, reports=entry.reports, lineage=({"step": 20, "donor": 1, "values": {}},))
    assert trial_scores(copied, {"m": "max"}) == (0.7,)
    assert trial_scores(Entry(0, {}, 0), {"m": "max"}) is None


def test_every_value_of_a_space_survives_optuna(tmp_path: Path) -> None:
    """Values of a journal as Optuna holds them; those it does not hold as parameters follow from these."""
    entries = run(tmp_path, sweep_of("random", trials=20), ONE)
    space = sweep_of("random").space
    for entry in entries:
        told = frozen_trial(space, entry.values, [0.5])
        free = {key: value for key, value in entry.values.items() if space[key].same is None}
        assert {key: str(list(v)) if isinstance(v, tuple) else v for key, v in free.items()} == told.params
        make_study(ONE).add_trial(told)
