"""What Tune calls: schedulers that ask, decide as Ray's own do, and decide the same after a resume."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule
from ray.tune.search import Searcher

from cosa_ray.config.load import load_config
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning import hooks
from cosa_ray.tuning.hooks import STEP, Ask, Drive, Follow, StepAsha, StepMedian
from cosa_ray.tuning.journal import Journal
from cosa_ray.tuning.sweepfile import Budget, Sweep
from cosa_ray.tuning.tuner import make_scheduler
from cosa_ray.tuning.watch import Watch

FOLDER = "the sweep's folder"
TRIALS, LAST, EVERY, GRACE = 14, 100, 10, 20


class Asked:
    """A sweep as the hooks see it: a journal, a watch over it, and a search that proposes what it is given."""

    def __init__(self, folder: str) -> None:
        self.journal = Journal(RunFolder(folder))
        self.ends: list[int] = []
        self.settled: list[tuple[int, bool]] = []
        self.proposals: list[Any] = []
        self.watch = Watch(
            "s",
            {"m": "max"},
            TRIALS,
            self.journal,
            RunFolder(folder),
            steps=lambda values: LAST,
            end_trial=lambda entry, by: self.ends.append(entry.number),
            end_all=lambda: None,
            settle=self.settle,
            failures=9,
            budget=Budget(),
        )
        search = SimpleNamespace(next=lambda: self.proposals.pop(0) if self.proposals else None)
        self.drive = Drive(self.watch, search)

    def settle(self, entry: Any, killed: bool) -> Any:
        self.settled.append((entry.number, killed))
        return entry


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    made = Asked(f"memory:/{tmp_path}")
    with hooks.driving(FOLDER, made.drive):
        yield made
    assert FOLDER not in hooks.OPEN


def tune_trial(number: int) -> Any:
    trial = type("Trial", (), {"trial_id": f"tune_{number}", "config": {"trial": f"{number:03d}"}})
    return trial()


def stream(seed: int) -> list[tuple[int, int, float]]:
    """Evaluations (trial, step, score) of trials that overtake each other; some scores are equal, some undefined."""
    generator = np.random.default_rng(seed)
    level = generator.random(TRIALS)
    at = [0] * TRIALS
    made = []
    while any(step < LAST for step in at):
        number = int(generator.choice([n for n in range(TRIALS) if at[n] < LAST][:4]))  # four at a time
        at[number] += EVERY
        score = round(float(level[number] + 0.3 * generator.normal()), 1)
        made.append((number, at[number], float("nan") if generator.random() < 0.05 else score))
    return made


Make = Callable[[], Any]


def asha(brackets: int) -> tuple[Make, Make]:
    def ray() -> Any:
        arguments = {"grace_period": GRACE, "max_t": LAST, "reduction_factor": 2, "brackets": brackets}
        return ASHAScheduler(time_attr=STEP, stop_last_trials=False, **arguments)

    return lambda: StepAsha(FOLDER, GRACE, LAST, 2, brackets), ray


def median() -> tuple[Make, Make]:
    def ray() -> Any:
        return MedianStoppingRule(
            time_attr=STEP, grace_period=GRACE, min_samples_required=3, min_time_slice=10**9, hard_stop=True
        )

    return lambda: StepMedian(FOLDER, GRACE, 3), ray


KINDS = {"asha": asha(1), "hyperband": asha(3), "median": median()}


def by_ray(scheduler: Any, evaluations: list[tuple[int, int, float]]) -> list[tuple[int, int]]:
    """Who Ray's own scheduler stops, and at which step, in a Tune where nobody waits for a place."""
    tune = SimpleNamespace(get_live_trials=list)
    scheduler.set_search_properties("m", "max")
    trials = [tune_trial(number) for number in range(TRIALS)]
    for number, trial in enumerate(trials):
        np.random.seed(number)
        scheduler.on_trial_add(None, trial)
    stopped: dict[int, int] = {}
    for number, step, score in evaluations:
        if number not in stopped:
            result = {STEP: step, "m": score, "training_iteration": 1}
            if scheduler.on_trial_result(tune, trials[number], result) == "STOP":
                stopped[number] = step
    return list(stopped.items())


def judge(asked: Asked, scheduler: Any, evaluations: list[tuple[int, int, float]]) -> list[tuple[int, int]]:
    """Who is asked to end, and at which step."""
    found = []
    for number, step, score in evaluations:
        result, before = {STEP: step, "m": score}, len(asked.ends)
        assert scheduler.on_trial_result(None, tune_trial(number), result) == "CONTINUE"
        asked.watch.reported(number, result, STEP)
        if asked.ends[before:]:
            assert asked.ends[before:] == [number]
            found.append((number, step))
    return found


def come_about(
    evaluations: list[tuple[int, int, float]], ended: list[tuple[int, int]], late: int
) -> list[tuple[int, int, float]]:
    """The evaluations there are when trials that are asked to end report so many more times before they do."""
    until = {number: step + late * EVERY for number, step in ended}
    return [each for each in evaluations if each[1] <= until.get(each[0], LAST)]


def fresh(asked: Asked, make: Make) -> Any:
    """A scheduler as a start or a resume of the sweep makes it."""
    scheduler = make()
    scheduler.set_search_properties("m", "max")
    scheduler.recall([entry for entry in asked.journal.entries() if entry.reports], "m")
    for number in range(TRIALS):
        if number >= len(asked.journal):
            asked.journal.add({})
        scheduler.on_trial_add(None, tune_trial(number))
    return scheduler


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_who_is_asked_to_end_is_who_ray_would_stop(asked: Asked, kind: str, seed: int) -> None:
    """Each once, whatever it still reports."""
    ours, rays = KINDS[kind]
    evaluations = stream(seed)
    expected = by_ray(rays(), evaluations)
    assert len(expected) >= 2
    assert all(step >= GRACE for _, step in expected)
    assert judge(asked, fresh(asked, ours), come_about(evaluations, expected, late=2)) == expected


@pytest.mark.parametrize("late", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_changes_no_decision(tmp_path: Path, kind: str, late: int) -> None:
    """The driver is killed after every seventh evaluation; the next one knows the journal only."""
    ours, rays = KINDS[kind]
    for seed in range(4):
        evaluations = stream(seed)
        undisturbed = by_ray(rays(), evaluations)
        evaluations = come_about(evaluations, undisturbed, late)
        found: list[tuple[int, int]] = []
        for start in range(0, len(evaluations), 7):
            part = Asked(f"memory:/{tmp_path}/{seed}")
            with hooks.driving(FOLDER, part.drive):
                found += judge(part, fresh(part, ours), evaluations[start : start + 7])
        assert found == undisturbed


def test_judging_leaves_other_draws_alone(asked: Asked) -> None:
    """Ray draws a trial's bracket from numpy's global generator; it is the trial's number that decides."""
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    scheduler = fresh(asked, KINDS["hyperband"][0])
    assert np.random.random() == expected
    brackets = [scheduler._brackets.index(scheduler._trial_info[f"{number:03d}"]) for number in range(TRIALS)]
    assert set(brackets) == {0, 1, 2}


@pytest.mark.parametrize("scheduler", ["none", "asha", "hyperband", "median"])
def test_the_scheduler_of_a_file_knows_what_was_before(asked: Asked, scheduler: str) -> None:
    settings = {"scheduler": scheduler, "asha": {"grace_steps": 20, "brackets": 2}, "median": {"grace_steps": 20}}
    sweep = Sweep.model_validate({"base": "x", "space": {"seed": {"randint": [0, 9]}}, **settings})
    base = load_config(
        "shapes",
        ["training.steps=100", "training.warmup_iters=10", "evaluation.every=10", "optimiser.warmup_steps=1"],
    )
    for number in range(5):
        asked.journal.add({})
        for step in (10, 20, 30):
            asked.watch.reported(number, {"m": 0.5 + number, STEP: step}, STEP)
    made = make_scheduler(sweep, base, FOLDER, asked.drive)
    if scheduler == "none":
        assert made is None
        return
    made.set_search_properties("m", "max")  # as Tune does
    if scheduler != "median":
        assert [[round(at) for at, _ in bracket._rungs] for bracket in made._brackets] == (
            [[80, 40, 20]] if scheduler == "asha" else [[80, 40, 20], [80, 40]]
        )
    asked.journal.add({})
    made.on_trial_add(None, tune_trial(5))
    judge(asked, made, [(5, 10, 0.0), (5, 20, 0.0), (5, 30, 0.0), (5, 40, 0.0)])
    assert asked.ends == [5]


def test_what_tune_pickles_comes_back_without_the_sweep(asked: Asked) -> None:
    asked.journal.add({"x": 1})
    asked.proposals.append(asked.journal[0])
    pickled = cloudpickle.dumps((Ask(FOLDER), Follow(FOLDER), *(make() for make, _ in KINDS.values())))
    ask, follow, *schedulers = cloudpickle.loads(pickled)
    assert ask.suggest("tune_0") == {"trial": "000", "values": {"x": 1}, "seed": None}
    trial = tune_trial(0)
    follow.on_trial_start(0, [trial], trial)
    follow.on_trial_result(1, [trial], trial, {"m": 0.5, STEP: 30})
    assert asked.journal[0].state == "running"
    assert [report.metrics["m"] for report in asked.journal[0].reports] == [0.5]
    for scheduler in schedulers:
        scheduler.set_search_properties("m", "max")
        scheduler.on_trial_add(None, trial)
        assert scheduler.on_trial_result(None, trial, {"m": 0.5, STEP: 30}) == "CONTINUE"


def test_tune_is_told_when_there_is_nothing_more_to_try(asked: Asked) -> None:
    ask = Ask(FOLDER)
    assert ask.suggest("tune_0") == Searcher.FINISHED
    asked.proposals.append(asked.journal.add({}))
    asked.watch.end("enough")
    assert ask.suggest("tune_0") == Searcher.FINISHED
    assert len(asked.proposals) == 1  # not taken


def test_what_becomes_of_a_trial_reaches_watch_and_population(asked: Asked) -> None:
    decided: list[int] = []
    asked.drive.generations = SimpleNamespace(decide=lambda: decided.append(len(asked.settled)))
    for _ in range(3):
        asked.journal.add({})
    trials = [tune_trial(number) for number in range(3)]
    follow = Follow(FOLDER)
    follow.on_trial_start(0, trials, trials[0])
    follow.on_trial_recover(0, trials, trials[0])
    assert [entry.state for entry in asked.journal.entries()] == ["pending"] * 3
    follow.on_trial_result(0, trials, trials[1], {"m": 0.5, STEP: 10})
    follow.on_trial_complete(0, trials, trials[1])
    follow.on_trial_error(0, trials, trials[2])
    assert asked.settled == [(1, False), (2, True)]
    assert decided == [0, 1, 2]
    asked.watch.end("enough")
    follow.on_trial_complete(0, trials, trials[0])
    assert decided == [0, 1, 2]  # a sweep that ends copies nobody any more


def test_the_first_signal_asks_and_the_second_is_tunes(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    tunes: list[int] = []
    interrupted: list[bool] = []
    monkeypatch.setattr(asked.watch, "interrupt", lambda: interrupted.append(True))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGINT, lambda number, frame: tunes.append(number))
        Follow(FOLDER).setup()
        signal.raise_signal(signal.SIGTERM)
        for _ in range(200):
            if interrupted:
                break
            signal.sigtimedwait([], 0.01)
        assert (interrupted, tunes) == ([True], [])
        signal.raise_signal(signal.SIGINT)
        assert (interrupted, tunes) == ([True], [signal.SIGINT])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
