"""What a sweep came to: the best configuration, the front, what is kept, and the record that reads back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosa_ray.config.load import load_config
from cosa_ray.config.schema import Config
from cosa_ray.training.runs import create_run
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.journal import Entry, Report
from cosa_ray.tuning.results import (
    SweepResult,
    TrialResult,
    best_trial,
    pareto_front,
    prune,
    read_result,
    trial_result,
    write_best,
    write_result,
)
from cosa_ray.tuning.trial import Trials

Make = Callable[..., Config]
ONE: dict[str, Any] = {"m": "max"}
MODES = ("max", "min")


def trial(number: int, state: str = "finished", configuration: int | None = None, **more: Any) -> TrialResult:
    scores = more.pop("scores", {})
    return TrialResult(
        id=f"{number:03d}",
        name=f"s-{number:03d}",
        state=state,
        values={},
        step=20,
        score=next(iter(scores.values()), None),
        metrics={},
        folder=more.pop("folder", f"/runs/s-{number:03d}"),
        mlflow_run_id=None,
        cause=None,
        scores=scores,
        configuration=number if configuration is None else configuration,
        **more,
    )


def result_of(trials: list[TrialResult], **more: Any) -> SweepResult:
    known = {"best": None, "best_file": None, "parent_run_id": None, "tracking_uri": None, "mode": "max", "metric": "m"}
    return SweepResult(name="s", folder="/runs/s", trials=trials, **{"state": "finished", **known, **more})


@pytest.mark.parametrize(
    ("scored", "mode", "best"),
    [
        ([(0, 0.2), (1, 0.4), (2, 0.3)], "max", "001"),
        ([(0, 0.2), (1, 0.4), (2, 0.3)], "min", "000"),
        ([(0, 0.4), (1, 0.4)], "max", "000"),
        # Seeds: one high score does not make a configuration the best.
        ([(0, 0.9), (0, 0.1), (2, 0.6), (2, 0.6)], "max", "002"),
        # A seed that failed does not count.
        ([(0, 0.5), (0, None), (2, 0.4), (2, 0.4)], "max", "000"),
        ([(0, None), (1, None)], "max", None),
        ([], "max", None),
    ],
)
def test_the_best_is_that_of_the_best_mean(scored: list[tuple[int, float | None]], mode: Any, best: str | None) -> None:
    trials = [
        trial(n, configuration=c, **({"state": "failed"} if score is None else {"scores": {"m": score}}))
        for n, (c, score) in enumerate(scored)
    ]
    found = best_trial(trials, {"m": mode})
    assert (found.id if found else None) == best


@pytest.mark.parametrize(
    ("state", "stopped_by", "counts"),
    [
        ("finished", None, True),
        ("stopped_early", "asha", True),
        ("interrupted", "budget", True),  # it has what it could afford
        ("interrupted", None, False),
        ("failed", None, False),
    ],
)
def test_whose_score_counts(state: str, stopped_by: str | None, counts: bool) -> None:
    one = trial(0, state, stopped_by=stopped_by, scores={"m": 0.5})
    assert (best_trial([one], ONE) is one) == counts
    assert pareto_front([one], ONE) == ([one] if counts else [])


POINTS = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=0, max_size=12)


@settings(deadline=None, max_examples=150)
@given(points=POINTS, modes=st.tuples(*[st.sampled_from(MODES)] * 3))
def test_the_front_is_who_nobody_beats(points: list[tuple[int, ...]], modes: tuple[str, ...]) -> None:
    metrics: dict[str, Any] = dict(zip("abc", modes, strict=True))
    trials = [trial(n, scores=dict(zip("abc", map(float, point), strict=True))) for n, point in enumerate(points)]
    trials.append(trial(99, scores={"a": 9.0}))  # without all of the metrics
    trials.append(trial(98, "failed", scores=dict.fromkeys("abc", 9.0)))

    def as_good(one: float, other: float, mode: str) -> bool:
        return one >= other if mode == "max" else one <= other

    wanted = []
    for point in points:
        beaten = False
        for other in points:
            pairs = list(zip(other, point, modes, strict=True))
            beaten |= all(as_good(o, p, mode) for o, p, mode in pairs) and any(o != p for o, p, _ in pairs)
        wanted.append(not beaten)
    front = {each.id for each in pareto_front(trials, metrics)}
    assert front == {f"{n:03d}" for n, on_front in enumerate(wanted) if on_front}


def test_pruning_keeps_what_is_still_wanted(tmp_path: Path) -> None:
    """The best with its other seeds, the front, and what can go on; metrics and records of the others stay."""
    trials = []
    for number, (state, configuration) in enumerate(
        [("finished", 0), ("finished", 1), ("failed", 1), ("finished", 3), ("interrupted", 4), ("stopped_early", 5)]
    ):
        folder = tmp_path / f"s-{number:03d}"
        (folder / "checkpoints" / "step_1").mkdir(parents=True)
        for file in ("checkpoints.json", "run.json"):
            (folder / file).write_text("{}")
        trials.append(trial(number, state, configuration, folder=str(folder), scores={"m": 0.1}))
    prune(result_of(trials, best=trials[1], front=["003"]))
    kept = {n for n in range(6) if (tmp_path / f"s-{n:03d}" / "checkpoints").exists()}
    assert kept == {n for n in range(6) if (tmp_path / f"s-{n:03d}" / "checkpoints.json").exists()} == {1, 2, 3, 4}
    assert all((tmp_path / f"s-{n:03d}" / "run.json").exists() for n in range(6))
    prune(result_of(trials, best=None))  # twice does no harm, and without a best all go that have ended
    assert {n for n in range(6) if (tmp_path / f"s-{n:03d}" / "checkpoints").exists()} == {4}


def test_a_result_reads_back(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    assert read_result(folder) is None
    trials = [
        trial(
            0,
            "stopped_early",
            scores={"m": 0.2, "c": 3.0},
            stopped_by="asha",
            hours=0.5,
            seed=3,
            origin="point",
            lineage=[{"step": 10, "donor": 1, "values": {"x": 1}}],
        ),
        trial(1, "failed", kind="diverged"),
    ]
    full = result_of(
        trials,
        best=trials[0],
        best_file="best.yaml",
        metrics={"m": "max", "c": "min"},
        front=["000"],
        hours=0.5,
        seconds=9.5,
    )
    for result in (full, result_of([], state="failed", cause="none of its 0 trials succeeded")):
        write_result(folder, result)
        assert read_result(folder) == result
    write_result(folder, full)
    again = read_result(folder)
    assert again.best is again.trials[0]


def test_a_result_with_lists_reads_back(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    one = TrialResult("000", "s-000", "finished", {"assignment.scales": (1.0, 0.5)}, 20, 0.5, {}, "/runs", None, None)
    write_result(folder, result_of([one]))
    assert read_result(folder).trials == [one]


def test_ranking(tmp_path: Path) -> None:
    trials = [
        trial(n, scores={} if score is None else {"m": score}) for n, score in enumerate((0.2, None, 0.0, 0.4, 0.2))
    ]
    assert [each.id for each in result_of(trials).ranked()] == ["003", "000", "004", "002", "001"]
    assert [each.id for each in result_of(trials, mode="min").ranked()] == ["002", "000", "004", "003", "001"]


def test_a_trial_by_its_journal_and_its_run(tiny: Make) -> None:
    trials = Trials("s", tiny(), "val/miou", None, False, None)
    run = create_run(trials.name("003"), trials.config, "val/miou").update(mlflow_run_id="abc", state="finished")
    for step, miou in ((10, 0.5), (20, 0.4)):
        run.checkpoints.register(f"checkpoints/step_{step:08d}", step, {"val/miou": miou, "val/map": 0.1 * step})
    reports = tuple(Report(step, {"val/miou": miou, "c": 1.0 * step}, 0.0) for step, miou in ((10, 0.5), (20, 0.4)))
    entry = Entry(3, {"losses.cam_to_seg": 0.3}, 2, 7, "point", "finished", 20, 0.25, reports=reports, ended_by="x")
    one = trial_result(entry, trials, {"val/miou": "max"})
    assert (one.score, one.scores, one.metrics) == (0.5, {"val/miou": 0.5}, {"val/miou": 0.5, "val/map": 1.0})
    assert (one.id, one.name, one.configuration, one.seed, one.origin) == ("003", "s-003", 2, 7, "point")
    assert (one.state, one.step, one.hours, one.stopped_by, one.mlflow_run_id) == ("finished", 20, 0.25, "x", "abc")
    assert (one.config["losses"]["cam_to_seg"], one.config["seed"]) == (0.3, 7)
    both = trial_result(entry, trials, {"val/miou": "max", "c": "min"})
    assert both.scores == {"val/miou": 0.4, "c": 20.0}
    nothing = trial_result(Entry(4, {}, 4, state="running"), trials, {"val/miou": "max"})
    assert (nothing.state, nothing.score, nothing.scores, nothing.mlflow_run_id) == ("interrupted", None, {}, None)


def test_the_best_is_an_experiment_file(tiny: Make, tmp_path: Path) -> None:
    base = tiny()
    best = TrialResult("000", "s-000", "finished", {"losses.cam_to_seg": 0.3}, 20, 0.5, {}, "/runs", None, None)
    file = write_best(RunFolder(str(tmp_path)), base, "s", "val/miou", best)
    assert load_config(file) == base.model_copy(update={"losses": base.losses.model_copy(update={"cam_to_seg": 0.3})})
    assert "val/miou 0.5000" in Path(file).read_text()
