"""What a sweep decides without a cluster: refusals that leave nothing behind, results that are there already."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.tuning.metrics import reported, sweep_metric
from cosa_ray.tuning.parent import Parent, deliver_rest
from cosa_ray.tuning.results import SweepResult, TrialResult, read_result, write_result
from cosa_ray.tuning.sweep import NAME_LENGTH, run_sweep
from cosa_ray.tuning.sweepfile import Sweep, dump_sweep

Make = Callable[..., Config]
SPACE = {"losses.cam_to_seg": {"uniform": [0.1, 0.2]}}


def sweep_of(space: dict[str, Any] | None = None, **more: Any) -> Sweep:
    return Sweep.model_validate({"base": "tiny", "space": space or SPACE, "trials": 2, **more})


def trial(folder: Path, name: str, score: float | None, state: str = "finished") -> TrialResult:
    return TrialResult(
        name, f"s-{name}", state, {"losses.cam_to_seg": 0.15}, 20, score, {}, str(folder / f"s-{name}"), None, None, {}
    )


def result_of(folder: Path, trials: list[TrialResult], state: str = "finished") -> SweepResult:
    best = max((t for t in trials if t.score is not None), key=lambda t: t.score or 0, default=None)
    return SweepResult(
        "s", str(folder / "s"), state, "val/miou", "max", None, None, trials, best, str(folder / "s" / "best.yaml")
    )


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({}, "x" * (NAME_LENGTH + 1), [f"has {NAME_LENGTH + 1} characters", f"up to {NAME_LENGTH}"]),
        ({}, "../x", ["use up to"]),
        ({"metric": "val/miuo"}, "s", ["no evaluation reports the metric val/miuo", "did you mean val/miou?"]),
        ({"metric": "loss"}, "s", ["reports the metric loss"]),
        ({"metric": "val/miou", "space": {"evaluation.subset": {"choice": [None, 4]}}}, "s", ["evaluation.subset=4"]),
    ],
)
def test_a_refused_sweep_leaves_nothing_behind(
    tiny: Make, tmp_path: Path, changes: dict[str, Any], name: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        run_sweep(sweep_of(**changes), tiny(), name=name)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_name_of_full_length_leaves_room_for_the_trials() -> None:
    from cosa_ray.training.runs import check_name

    check_name("x" * NAME_LENGTH + "-abcde_00000")  # as Tune's random search names trials; Optuna's are shorter


def test_the_metrics_a_run_reports_are_those_evaluation_finds(tiny: Make) -> None:
    """Against a real evaluation; what the list has more is a class without pixels, and the training loss."""
    import torch

    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.evaluation.evaluate import evaluate
    from cosa_ray.training.state import TrainState

    for config in (tiny(), tiny(evaluation__cam_threshold=0.25, evaluation__subset=4), tiny(training__warmup_iters=20)):
        dataset = open_dataset(config.data.dataset)
        state = TrainState(config, dataset.num_classes, torch.device("cpu"))
        split = dataset.split("val")
        found = evaluate(
            state.online,
            state.assignment,
            split,
            config,
            classes=dataset.classes,
            thresholds=state.threshold_values(),
            segment=config.training.warmup_iters < config.training.steps,
        ).metrics
        known = reported(config, dataset.classes, len(split))
        assert set(found) <= set(known)
        assert {name for name in set(known) - set(found) if "/iou/" not in name} == {"train/loss"}
        assert len(known) == len(set(known))


def test_the_metric_is_the_bases_own_unless_named(tiny: Make) -> None:
    assert sweep_metric(sweep_of(), tiny(), "x") == "val/miou"
    assert sweep_metric(sweep_of(), tiny(training__warmup_iters=20), "x") == "val/cam_miou_best"
    assert sweep_metric(sweep_of(metric="val/map"), tiny(), "x") == "val/map"
    # One trial in two never trains its decoder.
    mixed = sweep_of({"training.warmup_iters": {"choice": [8, 20]}})
    with pytest.raises(UserError, match=r"training\.warmup_iters=20 reports the metric val/miou"):
        sweep_metric(mixed, tiny(), "x")


def test_a_finished_sweep_is_not_run_again(tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import sys

    runs = tmp_path / "runs"
    base, sweep = tiny(), sweep_of()
    (runs / "s").mkdir(parents=True)
    (runs / "s" / "sweep.yaml").write_text(dump_sweep(sweep))
    (runs / "s" / "base.yaml").write_text(dump_config(base))
    result = result_of(runs, [trial(runs, "a", 0.2), trial(runs, "b", 0.4), trial(runs, "c", None, "failed")])
    from cosa_ray.training.storage import RunFolder

    write_result(RunFolder(str(runs / "s")), result)
    for name in "ab":  # a kill between the result and the pruning of the losers
        (runs / f"s-{name}" / "checkpoints").mkdir(parents=True)
    before = (runs / "s" / "sweep.json").read_text()
    with caplog.at_level(logging.WARNING):
        again = run_sweep(sweep, base, name="s", resume=True, track=False)
    assert again == result
    assert again.best is again.trials[1]
    assert "nothing to do" in caplog.text
    assert (runs / "s" / "sweep.json").read_text() == before
    assert not (runs / "s-a" / "checkpoints").exists()
    assert (runs / "s-b" / "checkpoints").exists()
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_a_result_reads_back(tmp_path: Path) -> None:
    from cosa_ray.training.storage import RunFolder

    folder = RunFolder(str(tmp_path))
    assert read_result(folder) is None
    for result in (result_of(tmp_path, [trial(tmp_path, "a", 0.2)]), result_of(tmp_path, [], "stopped")):
        write_result(folder, result)
        assert read_result(folder) == result


class Recorder:
    """Stands for a tracker: what was logged, and how the run ended."""

    run_id = "id"

    def __init__(self) -> None:
        self.metrics: list[tuple[dict[str, float], int]] = []
        self.status = ""

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append((metrics, step))

    def set_tags(self, tags: dict[str, str]) -> None: ...

    def log_text(self, path: str, text: str) -> None:
        json.loads(text)

    def finish(self, status: str) -> None:
        self.status = status


@pytest.mark.parametrize(
    ("state", "status", "logged"), [("finished", "FINISHED", 1), ("stopped", "KILLED", 0), ("failed", "FAILED", 0)]
)
def test_how_a_parent_run_ends(tmp_path: Path, state: str, status: str, logged: int) -> None:
    """A metric logged at a stop would be what stays: MLflow drops what a resumed run logs up to that step."""
    tracker = Recorder()
    trials = [] if state == "failed" else [trial(tmp_path, "a", 0.3)]
    ended = Parent(tracker, "uri", None).finish(result_of(tmp_path, trials, state))
    assert (tracker.status, len(tracker.metrics), ended.parent_run_id) == (status, logged, "id")
    assert tracker.metrics in ([], [({"val/miou": 0.3}, 20)])


def test_without_tracking_there_is_nothing_to_deliver(tmp_path: Path) -> None:
    result = result_of(tmp_path, [trial(tmp_path, "a", 0.3)])
    assert deliver_rest(None, result) is result
