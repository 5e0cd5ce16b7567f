"""What is known of a running sweep: rows, the time left, what it has spent, and when it has to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning import watch as watch_module
from cosa_ray.tuning.journal import Entry, Journal
from cosa_ray.tuning.sweepfile import Budget
from cosa_ray.tuning.watch import STATUS_FILE, SweepProgress, TrialRow, Watch, better, duration

STEPS = 100


class Sweep:
    """A watch over a journal, the asks it made, and what `settle` will say of a trial."""

    def __init__(self, folder: Path) -> None:
        self.folder = RunFolder(str(folder))
        self.asked: list[Any] = []
        self.outcome: dict[str, Any] = {"state": "finished", "step": STEPS}

    def open(self, trials: int = 0, failures: int = 3, **budget: float) -> Watch:
        self.journal = Journal(self.folder)
        for _ in range(trials):
            self.journal.add({"x": len(self.journal)})
        return Watch(
            "s",
            {"m": "max"},
            4,
            self.journal,
            self.folder,
            steps=lambda values: STEPS,
            end_trial=lambda entry, by: self.asked.append((entry.number, by)),
            end_all=lambda: self.asked.append("all"),
            settle=self.settle,
            failures=failures,
            budget=Budget.model_validate(budget),
        )

    def settle(self, entry: Entry, killed: bool) -> Entry:
        return replace(entry, **self.outcome, **({"cause": "killed"} if killed else {}))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of the monotonic clock, to set."""
    now = [1000.0]
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: now[0])
    return now


def live(number: int, step: int, hours: float = 0.0) -> Mapping[str, Mapping[str, Any]]:
    return {f"s-{number:03d}": {"step": step, "phase": "co-training", "hours": hours}}


def test_a_trial_from_its_start_to_its_end(sweep: Sweep) -> None:
    watch = sweep.open(trials=2)
    watch.started(0)
    watch.advance({**live(0, 30, 0.5), **live(1, 60)})  # trial 1 has not started: what is said of it is old
    first, second = watch.progress().rows
    expected = TrialRow("000", "s-000", "running", {"x": 0}, 30, STEPS, "co-training", None, 0.5)
    assert first == expected
    assert (second.state, second.step) == ("pending", 0)
    watch.reported(0, {"m": 0.5, "step": 40, "other": 1}, "step")
    watch.reported(0, {"other": 1, "step": 50}, "step")  # an evaluation without the metric
    watch.reported(0, {"m": float("nan"), "step": 60}, "step")
    watch.reported(0, {"m": 0.4, "step": 70}, "step")
    assert [(report.step, report.metrics) for report in sweep.journal[0].reports][0::2] == [
        (40, {"m": 0.5}),
        (70, {"m": 0.4}),
    ]
    assert watch.progress().rows[0] == replace(expected, step=70, score=0.5)
    watch.recovered(0)
    assert watch.progress().rows[0].state == "pending"
    began = sweep.journal[0].started
    watch.started(0)
    assert sweep.journal[0].started == began
    watch.advance(live(0, 90, 0.75))
    ended = watch.gone(0, killed=False)
    assert (ended.state, ended.step, ended.hours) == ("finished", STEPS, 0.75)
    watch.advance(live(0, 95, 9.0))  # it has ended: nothing moves any more
    assert watch.progress().rows[0] == replace(expected, state="finished", step=STEPS, phase="", score=0.5, hours=0.75)
    assert repr(Journal(sweep.folder).entries()) == repr(sweep.journal.entries())


def test_failures_in_a_row_end_the_sweep_and_a_success_forgives(sweep: Sweep) -> None:
    watch = sweep.open(trials=6, failures=2)

    def end(number: int, state: str) -> None:
        sweep.outcome = {"state": state, "cause": f"cause {number}"}
        watch.gone(number, killed=False)

    for number, state in enumerate(("failed", "finished", "failed", "stopped_early", "failed")):
        end(number, state)
        assert (watch.ending, watch.failed) == (None, False)
    end(5, "failed")
    assert watch.failed
    assert watch.ending == "2 trials in a row failed, the last (005) because of: cause 5"
    assert sweep.asked == ["all"]


@pytest.mark.parametrize(
    ("budget", "spends", "why"),
    [
        ({"steps": 100}, {"step": 60}, "budget.steps 100 is spent"),
        ({"gpu_hours": 3}, {"hours": 1.6}, "budget.gpu_hours 3 is spent"),
        ({"cpu_hours": 3}, {"hours": 1.6}, "budget.cpu_hours 3 is spent"),
        ({"wall_hours": 0.5}, {"seconds": 1800}, "budget.wall_hours 0.5 is spent"),
    ],
)
def test_a_spent_budget_ends_the_sweep(
    sweep: Sweep, clock: list[float], budget: dict[str, float], spends: dict[str, float], why: str
) -> None:
    """Two trials that have ended or run count together; those that run are asked to end in the budget's name."""
    sweep.outcome = {"state": "finished", "step": int(spends.get("step", 40))}
    watch = sweep.open(trials=3, **budget)
    for number in (0, 1):
        watch.started(number)
    watch.advance(live(0, 0, spends.get("hours", 0.0)))
    watch.gone(0, killed=False)
    clock[0] += spends.get("seconds", 0.0) - 1
    watch.advance(live(1, 39, 1.3))
    assert watch.ending is None
    clock[0] += 1
    watch.advance(live(1, 40, 1.4))
    assert watch.ending == why
    assert sweep.asked == [(1, "budget"), (2, "budget"), "all"]
    watch.advance(live(1, 99, 9.0))
    assert len(sweep.asked) == 3


def test_wall_time_goes_on_from_the_start_before(sweep: Sweep, clock: list[float]) -> None:
    watch = sweep.open(trials=1, wall_hours=1)
    clock[0] += 3000
    watch.write_status(0.0)
    clock[0] += 50_000  # nobody runs it
    watch = sweep.open(wall_hours=1)
    clock[0] += 590
    watch.advance({})
    assert (watch.progress().seconds, watch.progress().seconds_taken, watch.ending) == (3590, 590, None)
    clock[0] += 10
    watch.advance({})
    assert watch.ending == "budget.wall_hours 1 is spent"


def test_the_status_file_is_written_now_and_then_and_reads_back(sweep: Sweep, clock: list[float]) -> None:
    watch = sweep.open(trials=1)
    watch.started(0)
    watch.write_status(2.0)
    first = SweepProgress.load(sweep.folder.read_text(STATUS_FILE))
    assert first == replace(watch.progress(), updated=first.updated)
    watch.reported(0, {"m": 0.5, "step": 40}, "step")
    clock[0] += 1.9
    watch.write_status(2.0)
    assert SweepProgress.load(sweep.folder.read_text(STATUS_FILE)) == first
    clock[0] += 0.1
    watch.write_status(2.0)
    assert SweepProgress.load(sweep.folder.read_text(STATUS_FILE)).rows[0].score == 0.5


def test_settings_are_looked_at_once_and_again_when_they_change(sweep: Sweep) -> None:
    """The display looks at all trials every second: at 10,000 of them nothing may be worked out anew each time."""
    watch = sweep.open(trials=3)
    looked: list[Any] = []
    watch._steps = lambda values: looked.append(dict(values)) or STEPS  # type: ignore[func-returns-value]
    first = watch.progress()
    watch.advance(live(1, 10))
    assert watch.progress().rows == first.rows
    assert [each["x"] for each in looked] == [0, 1, 2]
    watch.started(1)
    watch.advance(live(1, 10))
    watch.advance(live(1, 20))
    assert [row.step for row in watch.progress().rows] == [0, 20, 0]
    sweep.journal.update(2, values={"x": 7})
    assert [row.values["x"] for row in watch.progress().rows] == [0, 1, 7]
    assert [each["x"] for each in looked[3:]] == [1, 7]


def test_asking_to_end(sweep: Sweep) -> None:
    watch = sweep.open(trials=2)
    watch.give_up(1, "asha")
    assert sweep.asked == [(1, "asha")]
    assert watch.ending is None
    watch.interrupt()
    assert sweep.asked == [(1, "asha"), "all"]
    assert (watch.interrupted, watch.ending) == (True, "it was stopped")


def row(state: str, step: int, score: float | None = None, number: int = 0) -> TrialRow:
    return TrialRow(f"{number:03d}", "s", state, {}, step, STEPS, score=score)


@pytest.mark.parametrize(
    ("rows", "total", "taken", "seconds", "left"),
    [
        # Nobody has ended: everybody goes to the end. (70 + 100 + 2 x 100) steps at 30 steps in 60 s.
        ([row("running", 30), row("pending", 0)], 4, 30, 60.0, None),  # not a tenth of the 370 yet
        ([row("running", 30), row("pending", 0)], 4, 37, 60.0, 370 * 60 / 37),
        # Those that ended took 70 steps on average, failed ones left out: 70-20, 100-80 for one beyond, and 2 x 70.
        (
            [row("finished", 100), row("stopped_early", 40), row("failed", 3), row("running", 20), row("running", 80)],
            7,
            243,
            243.0,
            50 + 20 + 140,
        ),
        # An interrupted one goes on, as far as the one that has ended did.
        ([row("finished", 100), row("interrupted", 50)], 2, 150, 10.0, 50 * 10 / 150),
        ([row("running", 30)], 1, 0, 60.0, None),
        ([], 4, 0, 0.0, None),
    ],
)
def test_time_left(rows: list[TrialRow], total: int, taken: int, seconds: float, left: float | None) -> None:
    progress = SweepProgress("s", "m", "max", total, rows, seconds_taken=seconds, steps_taken=taken)
    assert progress.seconds_left == (None if left is None else pytest.approx(left))


def test_steps_of_before_a_resume_set_no_pace(sweep: Sweep, clock: list[float]) -> None:
    watch = sweep.open(trials=2)
    watch.reported(0, {"m": 0.1, "step": 80}, "step")
    watch = sweep.open()
    assert (watch.progress().steps_taken, watch.progress().seconds_left) == (0, None)
    for number in (0, 1):
        watch.started(number)
    clock[0] += 60
    watch.advance({**live(0, 90), **live(1, 20)})
    progress = watch.progress()
    assert progress.steps_taken == 30
    assert progress.seconds_left == pytest.approx((10 + 80 + 2 * 100) * 60 / 30)


def test_progress_says_who_is_best() -> None:
    rows = [
        row("finished", 100, 0.3),
        row("failed", 5, None, 1),
        row("running", 5, 0.4, 2),
        row("interrupted", 5, float("nan"), 3),
    ]
    most = SweepProgress("s", "m", "max", 6, rows)
    assert (most.best.id, most.ended) == ("002", 2)
    assert replace(most, ending="it was stopped").ended == 3  # an interrupted one goes on otherwise
    assert SweepProgress("s", "m", "min", 6, rows).best.id == "000"
    assert most.line() == "s: 2/6 trials ended  best m 0.4000 (002)  running: 002 5/100"
    assert SweepProgress("s", "m", "max", 6, rows[1:2]).line() == "s: 1/6 trials ended  no m yet  running: none"


@pytest.mark.parametrize(
    ("score", "than", "mode", "is_better"),
    [
        (0.5, None, "max", True),
        (0.5, 0.4, "max", True),
        (0.5, 0.4, "min", False),
        (0.5, 0.5, "max", False),
        (float("nan"), None, "max", False),
        (float("inf"), 0.4, "max", False),
    ],
)
def test_better(score: float, than: float | None, mode: Any, is_better: bool) -> None:
    assert better(score, than, mode) == is_better


@pytest.mark.parametrize(
    ("seconds", "words"), [(59.4, "59 s"), (59.6, "1 min"), (3599, "59 min"), (3600, "1 h 0 min"), (9000, "2 h 30 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
