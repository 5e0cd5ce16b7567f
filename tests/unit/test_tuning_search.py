"""The search is seeded: the same file asks for the same trials; and ASHA asks a trial to end, it kills none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cosa_ray.tuning.space import Dimension
from cosa_ray.tuning.sweepfile import Sweep
from cosa_ray.tuning.watch import SweepProgress, TrialRow, Watch

pytest.importorskip("ray")
SPACE = {
    "optimiser.lr": {"loguniform": [1e-5, 1e-2]},
    "pseudo_labels.policy": {"choice": ["single", "reliability"]},
    "pseudo_labels.threshold": {"uniform": [0.2, 0.8]},
}


def suggestions(search_seed: int, count: int = 15) -> list[dict]:
    """What the sweep's searcher asks for when each answer is the threshold: past TPE's ten random start-up trials."""
    from cosa_ray.config.schema import Config
    from cosa_ray.tuning.tuner import tune_config

    sweep = Sweep.model_validate({"base": "x", "space": SPACE, "search_seed": search_seed, "search": "optuna"})
    searcher = tune_config(sweep, Config(), "val/miou", 1, "folder").search_alg
    searcher.set_search_properties("val/miou", "max", {key: d.domain() for key, d in sweep.space.items()})
    asked = []
    for index in range(count):
        values = searcher.suggest(f"t{index}")
        asked.append(values)
        searcher.on_trial_complete(
            f"t{index}", {"val/miou": values["pseudo_labels.threshold"], "training_iteration": 1}
        )
    return asked


def test_optuna_repeats_itself_for_a_seed() -> None:
    first = suggestions(3)
    assert suggestions(3) == first
    assert suggestions(4) != first
    assert {values["pseudo_labels.policy"] for values in first} == {"single", "reliability"}
    # It learns: what it asks after the start-up scores above what it asked before.
    before, after = first[:10], first[10:]
    mean = [sum(v["pseudo_labels.threshold"] for v in group) / len(group) for group in (before, after)]
    assert mean[1] > mean[0]


@pytest.fixture
def watch():
    from cosa_ray.tuning import hooks

    asked: list[str] = []
    gone: list[str] = []
    made = Watch(
        "s",
        "val/miou",
        "max",
        4,
        steps=lambda values: 100,
        end_trial=asked.append,
        end_all=lambda: asked.append("*"),
        ended=gone.append,
        marked=lambda trial_id: trial_id == "behind",
    )
    made.asked, made.gone = asked, gone
    with hooks.watching("folder", made):
        yield made
    assert "folder" not in hooks.OPEN


def test_asha_asks_the_worse_trial_to_end_and_tune_to_go_on(watch: Watch) -> None:
    from cosa_ray.tuning.hooks import StepAsha

    scheduler = StepAsha("folder", 50, 101, 2)
    scheduler.set_search_properties("val/miou", "max")
    good, bad = SimpleNamespace(trial_id="good"), SimpleNamespace(trial_id="bad")
    for trial in (good, bad):
        scheduler.on_trial_add(None, trial)

    def report(trial: SimpleNamespace, step: int, miou: float) -> str:
        return scheduler.on_trial_result(None, trial, {"step": step, "val/miou": miou, "training_iteration": 1})

    assert report(good, 40, 0.1) == report(bad, 40, 0.0) == "CONTINUE"  # before the first rung nobody is judged
    assert report(good, 50, 0.6) == "CONTINUE"
    assert watch.asked == []
    assert report(bad, 50, 0.2) == "CONTINUE"
    assert watch.asked == ["bad"]
    assert report(bad, 100, 0.2) == "CONTINUE"  # asked once, however much it still reports
    assert watch.asked == ["bad"]
    assert watch.given_up("bad")
    assert not watch.given_up("good")


def test_what_tune_pickles_comes_back_without_the_watch(watch: Watch) -> None:
    from ray import cloudpickle

    from cosa_ray.tuning.hooks import Follow, StepAsha

    follow, scheduler = cloudpickle.loads(cloudpickle.dumps((Follow("folder"), StepAsha("folder", 50, 101, 2))))
    trial = SimpleNamespace(trial_id="a", config={"optimiser.lr": 0.1})
    follow.on_trial_start(0, [trial], trial)
    follow.on_trial_result(1, [trial], trial, {"val/miou": 0.5, "step": 30})
    follow.on_trial_result(2, [trial], trial, {"val/miou": float("nan"), "step": 40})
    follow.on_trial_result(3, [trial], trial, {"val/miou": 0.4, "step": 50})
    (row,) = watch.progress().rows
    assert (row.state, row.score, row.step, row.name) == ("running", 0.5, 50, "s-a")
    assert scheduler._folder == "folder"


def test_a_driver_that_is_gone_gives_its_place_back(watch: Watch) -> None:
    from cosa_ray.tuning.hooks import Follow

    done, killed = (SimpleNamespace(trial_id=name, config={}) for name in ("done", "killed"))
    follow = Follow("folder")
    follow.on_trial_start(0, [done, killed], done)
    follow.on_trial_start(0, [done, killed], killed)
    assert watch.gone == []
    follow.on_trial_complete(1, [done, killed], done)
    follow.on_trial_error(1, [done, killed], killed)
    assert watch.gone == ["done", "killed"]
    assert [row.state for row in watch.progress().rows] == ["finished", "failed"]


def test_trials_that_ended_before_a_resume_are_shown_as_they_ended(watch: Watch) -> None:
    from cosa_ray.tuning.hooks import Follow

    def ended(name: str, status: str = "TERMINATED") -> SimpleNamespace:
        analysis = {"val/miou": {"max": 0.5}}
        return SimpleNamespace(
            trial_id=name, status=status, config={"a": 1}, metric_analysis=analysis, last_result={"step": 60}
        )

    Follow("folder").on_step_begin(0, [ended("first"), ended("behind"), ended("again", "PENDING")])
    rows = {row.id: (row.state, row.score, row.step) for row in watch.progress().rows}
    assert rows == {"first": ("finished", 0.5, 60), "behind": ("stopped_early", 0.5, 60)}


def test_progress_says_who_is_best() -> None:
    rows = [
        TrialRow("a", "s-a", "finished", {}, score=0.3),
        TrialRow("b", "s-b", "stopped_early", {}, score=None),
        TrialRow("c", "s-c", "running", {}, step=5, steps=10, score=0.4),
    ]
    most = SweepProgress("s", "val/miou", "max", 4, rows)
    assert (most.best.id, most.ended) == ("c", 2)
    assert SweepProgress("s", "loss", "min", 4, rows).best.id == "a"
    assert "2/4 trials ended" in most.line()
    assert "c 5/10" in most.line()


def test_a_dimension_survives_the_round_trip_to_tune() -> None:
    dimension = Dimension(loguniform=(1e-4, 1e-2))
    assert all(1e-4 <= dimension.domain().sample() <= 1e-2 for _ in range(100))
