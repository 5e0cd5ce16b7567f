"""What a sweep decides without a cluster: refusals that leave nothing behind, resumes, and what it came to."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cosa_ray.config.load import apply_overrides, dump_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.check import wanted
from cosa_ray.tuning.folder import NAME_LENGTH, check_folder
from cosa_ray.tuning.journal import Entry, Journal
from cosa_ray.tuning.metrics import reported, sweep_metrics
from cosa_ray.tuning.parent import Parent, deliver_rest
from cosa_ray.tuning.results import SweepResult, TrialResult, write_result
from cosa_ray.tuning.sweep import _again, _reopen, _result, run_sweep
from cosa_ray.tuning.sweepfile import Budget, Sweep, dump_sweep
from cosa_ray.tuning.trial import Trials
from cosa_ray.tuning.watch import Watch

Make = Callable[..., Config]
SPACE = {"losses.cam_to_seg": {"uniform": [0.1, 0.2]}}


def sweep_of(space: dict[str, Any] | None = None, **more: Any) -> Sweep:
    return Sweep.model_validate({"base": "tiny", "space": space or SPACE, "trials": 2, **more})


def trial(folder: Path, number: int, score: float | None, state: str = "finished") -> TrialResult:
    name, values = f"s-{number:03d}", {"losses.cam_to_seg": 0.15}
    known = {"mlflow_run_id": None, "cause": None, "configuration": number}
    return TrialResult(f"{number:03d}", name, state, values, 20, score, {}, str(folder / name), **known)


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
        ({"metric": ["val/miou", "loss"]}, "s", ["reports the metric loss"]),
        ({"metric": "val/miou", "space": {"evaluation.subset": {"choice": [None, 4]}}}, "s", ["evaluation.subset=4"]),
        ({"points": [{"losses.cam_to_seg": 3}]}, "s", ["sweep s: points[0]: losses.cam_to_seg=3 is not in the space"]),
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

    check_name("x" * NAME_LENGTH + "-" + Entry(999_999, {}, 0).id)


def test_the_metrics_a_run_reports_are_those_evaluation_finds(tiny: Make) -> None:
    """Against a real evaluation; the list has more: classes without pixels, the training loss, and what it cost."""
    import torch

    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.evaluation.evaluate import evaluate
    from cosa_ray.training.state import TrainState

    for config in (
        tiny(),
        tiny(evaluation__cam_threshold=0.25, evaluation__subset=4, evaluation__presence=0.2),
        tiny(training__warmup_iters=20),
    ):
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
        assert {name for name in set(known) - set(found) if "/iou/" not in name} == {"train/loss", "cost/cpu_hours"}
        assert len(known) == len(set(known))
    on_gpu = apply_overrides(tiny(), {"resources.gpus_per_worker": 1})
    assert "cost/gpu_hours" in reported(on_gpu, dataset.classes, len(split))


def test_the_metric_is_the_bases_own_unless_named(tiny: Make) -> None:
    assert sweep_metrics(sweep_of(), tiny(), "x") == {"val/miou": "max"}
    assert sweep_metrics(sweep_of(), tiny(training__warmup_iters=20), "x") == {"val/cam_miou_best": "max"}
    assert sweep_metrics(sweep_of(), tiny(training__stop_at=8), "x") == {"val/cam_miou_best": "max"}, "warm-up alone"
    several = sweep_of(metric=["val/map", "cost/cpu_hours"], mode=["max", "min"])
    assert list(sweep_metrics(several, tiny(), "x").items()) == [("val/map", "max"), ("cost/cpu_hours", "min")]
    # One trial in two never trains its decoder.
    mixed = sweep_of({"training.warmup_iters": {"choice": [8, 20]}})
    with pytest.raises(UserError, match=r"training\.warmup_iters=20 reports the metric val/miou"):
        sweep_metrics(mixed, tiny(), "x")


def test_a_finished_sweep_of_points_goes_on_where_more_of_them_are_asked_for(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def goes_on(config: Config) -> None:
        raise RuntimeError("goes on")

    base, points = tiny(), [{"losses.cam_to_seg": value} for value in (0.12, 0.14, 0.16)]

    def sweep(trials: int) -> Sweep:
        return sweep_of(search="points", points=points, trials=trials)

    folder = RunFolder(str(tmp_path / "runs" / "s"))
    folder.write_text("sweep.yaml", dump_sweep(sweep(2)))
    folder.write_text("base.yaml", dump_config(base))
    trials = [trial(tmp_path / "runs", number, 0.2) for number in range(2)]
    for each in trials:
        Journal(folder).add(each.values, state=each.state)
    write_result(folder, result_of(tmp_path / "runs", trials))
    monkeypatch.setattr("cosa_ray.training.driver.preflight", goes_on)
    assert run_sweep(sweep(2), base, name="s", resume=True, track=False).state == "finished"
    with pytest.raises(RuntimeError, match="goes on"):
        run_sweep(sweep(9), base, name="s", resume=True, track=False)
    for number in range(2):  # trials asked for that no point is there for are not waited for
        assert wanted(sweep_of(search="points", points=points[: number + 1], trials=9)) == number + 1


def test_a_finished_sweep_is_not_run_again(tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = tmp_path / "runs"
    base, sweep = tiny(), sweep_of(trials=3)
    folder = RunFolder(str(runs / "s"))
    folder.write_text("sweep.yaml", dump_sweep(sweep))
    folder.write_text("base.yaml", dump_config(base))
    trials = [trial(runs, 0, 0.2), trial(runs, 1, 0.4), trial(runs, 2, None, "failed")]
    journal = Journal(folder)
    for each in trials:
        journal.add(each.values, state=each.state)
    write_result(folder, result_of(runs, trials))
    for number in range(2):  # a kill between the result and the pruning of the losers
        (runs / f"s-{number:03d}" / "checkpoints").mkdir(parents=True)
    before = folder.read_text("sweep.json")
    with caplog.at_level(logging.WARNING):
        again = run_sweep(sweep, base, name="s", resume=True, track=False)
    assert json.dumps(again.as_json()) == json.dumps(json.loads(before))
    assert again.best is again.trials[1]
    assert "nothing to do" in caplog.text
    assert folder.read_text("sweep.json") == before
    assert not (runs / "s-000" / "checkpoints").exists()
    assert (runs / "s-001" / "checkpoints").exists()
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


@pytest.fixture
def started(tmp_path: Path) -> tuple[RunFolder, Callable[..., dict[str, str]]]:
    """The folder of a sweep that was started, and its files with other keys."""
    folder = RunFolder(str(tmp_path / "s"))

    def files(base: dict[str, Any] | None = None, **more: Any) -> dict[str, str]:
        return {
            "base.yaml": dump_config(apply_overrides(Config(), base or {})),
            "sweep.yaml": dump_sweep(sweep_of(**more)),
        }

    for file, content in files().items():
        folder.write_text(file, content)
    return folder, files


@pytest.mark.parametrize(
    "keys",
    [
        {"trials": 9},
        {"budget": {"steps": 5}},
        {"failures": 2, "restarts": 0, "keep": "all", "concurrency": 1},
    ],
)
def test_how_far_a_sweep_goes_may_change_on_a_resume(started: Any, keys: dict[str, Any]) -> None:
    folder, files = started
    check_folder(folder, "s", files(**keys), resume=True)
    check_folder(folder, "s", files(), resume=True)


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ({"search_seed": 1}, "search_seed of .*sweep.yaml"),
        ({"space": {"losses.cam_to_seg": {"uniform": [0.1, 0.3]}}}, "space of .*sweep.yaml"),
        ({"metric": "val/map"}, "metric of .*sweep.yaml"),
        ({"base": {"losses.contrastive": 0.5}}, "losses of .*base.yaml"),
        ({"base": {"storage": "elsewhere"}}, "storage of .*base.yaml"),
    ],
)
def test_what_a_trial_is_may_not(started: Any, keys: dict[str, Any], changed: str) -> None:
    folder, files = started
    with pytest.raises(
        UserError, match=f"started with other settings than these .{changed} differs.*trials, concurrency"
    ):
        check_folder(folder, "s", files(**keys), resume=True)


def test_a_setting_that_an_earlier_version_did_not_have_is_at_its_default(started: Any) -> None:
    folder, files = started
    content = yaml.safe_load(folder.read_text("base.yaml"))
    del content["pseudo_labels"]["agreement"]
    folder.write_text("base.yaml", yaml.safe_dump(content))
    check_folder(folder, "s", files(), resume=True)
    with pytest.raises(UserError, match=r"pseudo_labels of .*base\.yaml differs"):
        check_folder(folder, "s", files(base={"pseudo_labels.agreement": 1.0}), resume=True)
    content["pseudo_labels"]["gone"] = 1  # of a version that knew a setting this one does not
    folder.write_text("base.yaml", yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"pseudo_labels of .*base\.yaml differs"):
        check_folder(folder, "s", files(), resume=True)


def test_a_folder_that_is_there_or_is_not(started: Any, tmp_path: Path) -> None:
    folder, files = started
    with pytest.raises(UserError, match=r"sweep s exists already.*--resume"):
        check_folder(folder, "s", files(), resume=False)
    with pytest.raises(UserError, match=r"no sweep t in .* to resume"):
        check_folder(RunFolder(str(tmp_path / "t")), "t", files(), resume=True)
    # A kill while it was started leaves the base alone: that is no sweep.
    RunFolder(str(tmp_path / "t")).write_text("base.yaml", "x")
    check_folder(RunFolder(str(tmp_path / "t")), "t", files(), resume=False)


STATES = ("pending", "running", "interrupted", "finished", "stopped_early", "failed")


@pytest.mark.parametrize(("retry_failed", "again"), [(False, [0, 1, 2]), (True, [0, 1, 2, 5])])
def test_who_goes_on_when_a_sweep_is_resumed(tmp_path: Path, retry_failed: bool, again: list[int]) -> None:
    journal = Journal(RunFolder(str(tmp_path)))
    for state in STATES:
        journal.add({}, state=state, **({"kind": "diverged", "cause": "x"} if state == "failed" else {}))
    assert _again(journal, retry_failed) == again
    written = Journal(RunFolder(str(tmp_path)))
    # Whatever is refused after this, nothing is forgotten.
    assert (written[5].state, written[5].cause) == ("failed", "x")
    _reopen(journal, again)
    failed = Journal(RunFolder(str(tmp_path)))[5]
    assert (failed.state, failed.kind, failed.cause) == (
        ("interrupted", None, None) if retry_failed else ("failed", "diverged", "x")
    )


def outcome(tiny: Make, tmp_path: Path, trials: list[dict[str, Any]], **ended: Any) -> SweepResult:
    """The result of a sweep whose journal holds these trials."""
    folder = RunFolder(str(tmp_path / "s"))
    journal = Journal(folder)
    metrics: dict[str, Any] = ended.pop("metrics", {"val/miou": "max"})
    for each in trials:
        scores = each.pop("scores", None)
        entry = journal.add({"losses.cam_to_seg": 0.1}, **each)
        if scores:
            journal.report(entry.number, 20, dict(zip(metrics, scores, strict=True)))
    base = tiny()
    shared = Trials("s", base, "val/miou", None, False, None)
    watch = Watch(
        "s",
        metrics,
        len(trials),
        journal,
        folder,
        steps=lambda values: 20,
        end_trial=lambda entry, by: None,
        end_all=lambda: None,
        settle=lambda entry, killed: entry,
        failures=9,
        budget=Budget(),
    )
    for key, value in ended.items():
        setattr(watch, key, value)
    return _result(base, shared, metrics, watch, folder, "uri")


FINISHED: dict[str, Any] = {"state": "finished", "step": 20, "hours": 0.5}


@pytest.mark.parametrize(
    ("trials", "ended", "state", "cause", "best"),
    [
        ([{**FINISHED, "scores": [0.3]}, {**FINISHED, "scores": [0.5]}], {}, "finished", None, "001"),
        (
            [{**FINISHED, "scores": [0.3]}, {"state": "interrupted", "ended_by": "budget", "scores": [0.5]}],
            {"ending": "budget.steps 9 is spent"},
            "finished",
            "budget.steps 9 is spent",
            "001",
        ),
        (
            [{**FINISHED, "scores": [0.3]}, {"state": "interrupted", "scores": [0.5]}],
            {"ending": "it was stopped", "interrupted": True},
            "stopped",
            "it was stopped",
            "000",
        ),
        (
            [{**FINISHED, "scores": [0.3]}, {"state": "failed"}],
            {"ending": "5 trials in a row failed", "failed": True},
            "failed",
            "5 trials in a row failed",
            "000",
        ),
        (
            [{"state": "failed", "cause": "CUDA out of memory"}, {"state": "failed", "cause": "y"}],
            {},
            "failed",
            "none of its 2 trials succeeded; the first failed because of: CUDA out of memory",
            None,
        ),
        ([{**FINISHED}], {}, "failed", "none of its 1 trials succeeded; none reported val/miou", None),
    ],
)
def test_what_a_sweep_came_to(
    tiny: Make,
    tmp_path: Path,
    trials: list[dict[str, Any]],
    ended: dict[str, Any],
    state: str,
    cause: str | None,
    best: str | None,
) -> None:
    hours = 0.5 * sum(each.get("hours", 0) == 0.5 for each in trials)
    result = outcome(tiny, tmp_path, [dict(each) for each in trials], **ended)
    assert (result.state, result.cause, result.best and result.best.id) == (state, cause, best)
    assert (result.hours, result.hours_of, result.front) == (hours, "cpu", [])
    assert (result.best_file is not None) == (tmp_path / "s" / "best.yaml").exists() == (best is not None)


def test_a_sweep_of_several_metrics_has_a_front(tiny: Make, tmp_path: Path) -> None:
    scores = ([0.3, 1.0], [0.5, 3.0], [0.4, 4.0])
    trials = [{**FINISHED, "scores": each} for each in scores]
    result = outcome(tiny, tmp_path, trials, metrics={"val/miou": "max", "cost/cpu_hours": "min"})
    assert result.front == ["000", "001"]
    assert (result.metric, result.mode, result.best.id) == ("val/miou", "max", "001")


class Recorder:
    """Stands for a tracker: how the run ended."""

    run_id = "id"
    status = ""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def set_tags(self, tags: dict[str, str]) -> None: ...

    def log_text(self, path: str, text: str) -> None:
        json.loads(text)

    def finish(self, status: str) -> None:
        self.status = status


@pytest.mark.parametrize(("state", "status"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")])
def test_how_a_parent_run_ends(tmp_path: Path, state: str, status: str) -> None:
    tracker = Recorder()
    trials = [] if state == "failed" else [trial(tmp_path, 0, 0.3)]
    ended = Parent(tracker, "uri", None).finish(result_of(tmp_path, trials, state))
    assert (tracker.status, ended.parent_run_id) == (status, "id")


def test_without_tracking_there_is_nothing_to_deliver(tmp_path: Path) -> None:
    result = result_of(tmp_path, [trial(tmp_path, 0, 0.3)])
    assert deliver_rest(None, result) is result
