"""Generations of a population: who copies whom, decided once, also when the sweep is killed in the middle of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.journal import Entry, Journal, Report
from cosa_ray.tuning.population import FOLDER, Generations, plan_generation, vary
from cosa_ray.tuning.sweepfile import Sweep

NAN = float("nan")
SPACE = {
    "real": {"loguniform": [0.01, 1]},
    "whole": {"randint": [1, 9]},
    "grid": {"quniform": [-0.4, 0.4, 0.1]},
    "pick": {"choice": ["a", "b", "c", "d"]},
    "tied": {"same": "real", "times": 2},
}


def sweep_of(**pbt: Any) -> Sweep:
    return Sweep.model_validate({"base": "x", "space": SPACE, "scheduler": "pbt", "pbt": pbt, "trials": 4})


def population(scores: list[float]) -> list[Entry]:
    values = {"real": 0.1, "whole": 3, "grid": 0.1, "pick": "b", "tied": 0.2}
    return [
        Entry(n, values, n, state="running", reports=(Report(10, {"m": score}, 0.0),)) for n, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("scores", "share", "mode", "takers", "donors"),
    [
        ([0.1, 0.2, 0.3, 0.4], 0.25, "max", {0}, {3}),
        ([0.1, 0.2, 0.3, 0.4], 0.25, "min", {3}, {0}),
        ([0.1, 0.2, 0.3, 0.4], 0.5, "max", {0, 1}, {2, 3}),
        ([0.1, 0.2, 0.3], 0.25, "max", {0}, {2}),  # at least one
        ([0.1, 0.2, 0.3, 0.4, 0.5], 0.5, "max", {0, 1}, {3, 4}),
        ([0.4, NAN, 0.3, 0.2], 0.25, "max", {1}, {0}),  # without a score: the worst, whatever the mode
        ([0.4, NAN, 0.3, 0.2], 0.25, "min", {1}, {3}),
        ([0.4, float("inf"), 0.3, 0.2], 0.25, "max", {1}, {0}),
        ([0.2, 0.4, 0.2, 0.2], 0.25, "max", {3}, {1}),  # of equals the later is the worse
        ([0.2, 0.2, 0.2, 0.2], 0.5, "max", set(), set()),
        ([0.2, 0.2, 0.2, 0.1], 0.5, "max", {3}, {0, 1}),  # 2 is no worse than its donor would be
        ([NAN, NAN], 0.5, "max", set(), set()),
        ([0.2], 0.5, "max", set(), set()),
    ],
)
def test_who_copies_whom(scores: list[float], share: float, mode: Any, takers: set[int], donors: set[int]) -> None:
    seen: set[int] = set()
    for step in range(1, 30):  # the donor is drawn by the step
        entries = [
            Entry(e.number, e.values, e.number, reports=(Report(step, e.reports[0].metrics, 0.0),))
            for e in population(scores)
        ]
        plan = plan_generation(sweep_of(share=share), entries, step, "m", mode)
        assert {int(number) for number in plan} == takers
        assert plan == plan_generation(sweep_of(share=share), list(reversed(entries)), step, "m", mode)
        seen |= {said["donor"] for said in plan.values()}
    assert seen == donors


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), resample=st.sampled_from([0.0, 0.5, 1.0]))
def test_varied_settings_stay_in_the_space(seed: int, resample: float) -> None:
    sweep, generator = sweep_of(resample=resample), np.random.default_rng(seed)
    values: dict[str, Any] = {"real": 0.05, "whole": 1, "grid": 0.4, "pick": "d", "tied": 0.1}
    for _ in range(20):
        values = vary(sweep.space, values, sweep, generator)
        assert list(values) == list(SPACE)
        assert all(sweep.space[key].holds(values[key]) for key in ("real", "whole", "grid", "pick"))
        assert repr(values["grid"]) in map(repr, (-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4))
        assert isinstance(values["whole"], int)
        assert values["tied"] == 2 * values["real"]


def test_a_number_moves_by_a_factor_and_a_choice_to_a_neighbour() -> None:
    sweep, generator = sweep_of(resample=0.0, factors=[0.8, 1.25]), np.random.default_rng(0)
    before = {"real": 0.1, "whole": 2, "grid": 0.1, "pick": "b", "tied": 0.2}
    drawn = [vary(sweep.space, before, sweep, generator) for _ in range(60)]
    assert {round(each["real"], 6) for each in drawn} == {0.08, 0.125}
    # Factors of a small number on a grid come to less than a step: it moves by one, or it never would.
    assert {each["whole"] for each in drawn} == {1, 3}
    assert {each["grid"] for each in drawn} == {0.0, 0.2}
    assert {each["pick"] for each in drawn} == {"a", "b", "c"}
    edge = [vary(sweep.space, {**before, "real": 1.0, "pick": "a"}, sweep, generator) for _ in range(60)]
    assert {each["real"] for each in edge} == {0.8, 1.0}
    assert {each["pick"] for each in edge} == {"a", "b"}
    still = sweep_of(resample=0.0, factors=[1.0])
    assert vary(still.space, before, still, generator) | {"pick": "b"} == before


class Killed(Exception):
    pass


class World:
    """A sweep's folder with a population of three, and what was done to it; each `open` is a start of the driver."""

    def __init__(self, folder: Path) -> None:
        self.folder = RunFolder(str(folder))
        self.done: list[tuple[Any, ...]] = []
        self.kill_at: str | None = None
        journal = Journal(self.folder)
        for number in range(3):
            journal.add({"real": 0.1 * (number + 1), "whole": 3, "grid": 0.1, "pick": "b", "tied": 0.2 * (number + 1)})
            journal.update(number, state="running")

    def open(self, total: int = 3) -> Generations:
        self.journal = Journal(self.folder)
        return Generations(
            sweep_of(share=0.5),
            [10, 20],
            "m",
            "max",
            self.journal,
            self.folder,
            total=total,
            copy=self.copy,
            publish=lambda step, plan: self.done.append(("publish", step, sorted(plan))),
        )

    def copy(self, taker: Entry, donor: Entry, step: int, values: dict[str, Any]) -> None:
        self.done.append(("copy", taker.number, donor.number, step, values))
        if self.kill_at == "copy":
            self.kill_at = None
            raise Killed

    def report(self, number: int, step: int, score: float) -> None:
        self.journal.report(number, step, {"m": score})


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_generation_waits_for_everybody_alive_and_is_decided_once(world: World) -> None:
    generations = world.open()
    for number, score in ((2, 0.9), (0, 0.1)):
        world.report(number, 10, score)
        generations.decide()
    assert world.done == []  # trial 1 is on its way
    world.report(1, 10, 0.5)
    generations.decide()
    ((_, taker, donor, step, values), published) = world.done
    assert (taker, donor, step, published) == (0, 2, 10, ("publish", 10, ["0"]))
    assert world.journal[0].values == values
    assert [report.metrics["m"] for report in world.journal[0].own_reports()] == [0.9]
    generations.decide()
    assert len(world.done) == 2
    # The next one comes without the trial that fails meanwhile.
    world.report(0, 20, 0.8)
    world.report(1, 20, 0.2)
    generations.decide()
    assert len(world.done) == 2
    world.journal.update(2, state="failed")
    generations.decide()
    assert world.done[2][:4] == ("copy", 1, 0, 20)
    assert world.done[3] == ("publish", 20, ["1"])


@pytest.mark.parametrize("state", ["failed", "finished", "stopped_early"])
def test_nothing_is_decided_while_trials_are_to_come_or_none_is_left(world: World, state: str) -> None:
    generations = world.open(total=4)
    for number in range(3):
        world.report(number, 10, 0.1 * number)
    generations.decide()
    assert world.done == []
    for number in range(3):
        world.journal.update(number, state=state)
    world.open(total=3)
    assert world.done == []


def arrive(world: World) -> None:
    for number, score in enumerate((0.1, 0.5, 0.9)):
        world.report(number, 10, score)


def test_a_kill_in_a_generation_changes_nothing(world: World, tmp_path: Path) -> None:
    """Between the plan and the copy, and between the copy and its note."""
    other = World(tmp_path / "undisturbed")
    other.open()
    arrive(other)
    other.open()
    world.open()
    arrive(world)
    world.kill_at = "copy"
    with pytest.raises(Killed):
        world.open()
    assert world.journal[0].lineage == ()
    assert json.loads(world.folder.read_text(f"{FOLDER}/00000010.json"))["0"]["donor"] == 2
    world.journal.update(0, state="interrupted")
    world.open()
    assert world.done == [world.done[0], *other.done]  # the copy that was cut short, then as if nothing had been
    assert world.done[0] == world.done[1]
    assert world.journal[0].lineage == other.journal[0].lineage
    assert world.journal[0].values == other.journal[0].values


def test_what_was_decided_before_is_published_again_and_copied_no_more(world: World) -> None:
    world.open()
    arrive(world)
    world.open()
    before = list(world.done)
    assert [each[0] for each in before] == ["copy", "publish"]
    world.open()
    assert world.done == [*before, before[1]]


def test_values_that_are_lists_stay_what_they_are(tmp_path: Path) -> None:
    """A plan that is read back from its file holds a choice of lists as the journal does."""
    space = {"losses": {"choice": [[1.0, 0.5], [1.0]]}}
    sweep = Sweep.model_validate({"base": "x", "space": space, "scheduler": "pbt", "pbt": {"share": 0.5}})
    folder, taken = RunFolder(str(tmp_path)), []
    journal = Journal(folder)
    for number in range(2):
        journal.add({"losses": (1.0, 0.5)})
        journal.report(number, 10, {"m": float(number)})

    def start(kill: bool) -> None:
        def copy(taker: Entry, donor: Entry, step: int, values: dict[str, Any]) -> None:
            if kill:
                raise Killed
            taken.append(values["losses"])

        publish = {"total": 2, "copy": copy, "publish": lambda step, plan: None}
        Generations(sweep, [10], "m", "max", Journal(folder), folder, **publish)

    with pytest.raises(Killed):
        start(kill=True)
    start(kill=False)
    assert taken[0] in ((1.0, 0.5), (1.0,))
    assert Journal(folder)[0].values == {"losses": taken[0]}
