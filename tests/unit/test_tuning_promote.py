"""What a promotion decides without a cluster: which configurations, how long, which seeds, who wins, what is said."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cosa_ray.cli.main import main
from cosa_ray.config.load import apply_overrides, dump_config, flatten, load_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.evaluation.report import Report
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.check import check_sweep, complete
from cosa_ray.tuning.choosing import LENGTH, Source, choices, choose, full_length, plan_promotion, read_source
from cosa_ray.tuning.promote import _sum_up, promote_sweep
from cosa_ray.tuning.promotion import Configuration, PromotedRun, Promotion, Spread, machine_words
from cosa_ray.tuning.results import SweepResult, TrialResult, write_result
from cosa_ray.tuning.sweepfile import Sweep, dump_sweep, load_sweep

Make = Callable[..., Config]
SPACE = {"losses.cam_to_seg": {"uniform": [0.05, 0.4]}}
MIOU, COST = "val/miou", "cost/cpu_hours"


def trial(number: int, scores: dict[str, float] | None, state: str = "finished", **more: Any) -> TrialResult:
    given = {"values": {"losses.cam_to_seg": 0.1 + number / 100}, "configuration": number, **more}
    score = next(iter(scores.values())) if scores else None
    place = {"name": f"s-{number:03d}", "folder": "nowhere", "mlflow_run_id": None, "cause": None}
    return TrialResult(
        id=f"{number:03d}", state=state, step=20, score=score, scores=scores or {}, metrics={}, **place, **given
    )


def result_of(trials: list[TrialResult], folder: str = "s", **more: Any) -> SweepResult:
    given = {"state": "finished", "metrics": {MIOU: "max"}, "mode": "max", **more}
    metric = next(iter(given["metrics"]))
    place = {"parent_run_id": None, "tracking_uri": None, "best_file": None}
    return SweepResult(name="s", folder=folder, metric=metric, trials=trials, best=None, **place, **given)


def write_sweep(base: Config, sweep: dict[str, Any], result: SweepResult | None) -> None:
    """A sweep's folder as a sweep leaves it."""
    folder = RunFolder(f"{base.storage}/s")
    folder.write_text("sweep.yaml", dump_sweep(Sweep.model_validate({"base": "tiny", "space": SPACE, **sweep})))
    folder.write_text("base.yaml", dump_config(base))
    if result is not None:
        config = base.model_dump(mode="json")
        write_result(folder, result.with_trials([replace(each, config=config) for each in result.trials]))


def source_of(base: Config, trials: list[TrialResult], sweep: dict[str, Any] | None = None, **more: Any) -> Source:
    write_sweep(base, sweep or {}, result_of(trials, **more))
    return read_source("s", base.storage)


def test_configurations_are_ranked_by_the_mean_over_their_seeds() -> None:
    a, b, c = ({"losses.cam_to_seg": value} for value in (0.1, 0.2, 0.3))
    trials = [
        trial(0, {MIOU: 0.5}, values=a, seed=0),
        trial(1, {MIOU: 0.3}, values=a, seed=1, configuration=0),
        trial(2, {MIOU: 0.45}, "stopped_early", values=b),
        trial(3, {MIOU: 0.9}, "failed", values=c),
        trial(4, None, "interrupted", values=c),
    ]
    assert [(each.id, each.values, each.scores[MIOU]) for each in choices(result_of(trials))] == [
        ("002", b, 0.45),
        ("000", a, pytest.approx(0.4)),
    ]
    assert [each.id for each in choices(result_of(trials, metrics={MIOU: "min"}, mode="min"))] == ["000", "002"]


def test_a_seed_that_the_search_chose_makes_no_configuration() -> None:
    trials = [
        trial(number, {MIOU: score}, values={"losses.cam_to_seg": value, "seed": seed})
        for number, (value, seed, score) in enumerate([(0.1, 5, 0.4), (0.2, 6, 0.5), (0.1, 7, 0.8)])
    ]
    found = choices(result_of(trials))
    assert [(each.id, each.values) for each in found] == [
        ("000", {"losses.cam_to_seg": 0.1}),
        ("001", {"losses.cam_to_seg": 0.2}),
    ]


def test_the_front_is_of_configurations(tiny: Make) -> None:
    """Two seeds of one lie on either side of another: their mean decides."""
    points = {0: (0.9, 9.0), 1: (0.2, 1.0), 2: (0.6, 4.0), 3: (0.5, 5.0), 4: (0.5, 1.5), 5: (0.7, 4.5)}
    trials = [trial(number, {MIOU: miou, COST: cost}) for number, (miou, cost) in points.items()]
    trials.append(trial(6, {MIOU: 0.1, COST: 9.5}, values=trials[5].values, configuration=5, seed=1))
    points[5] = (0.4, 7.0)
    beaten = {
        one
        for one, (miou, cost) in points.items()
        if any(m >= miou and c <= cost and (m, c) != (miou, cost) for m, c in points.values())
    }
    source = source_of(
        tiny(), trials, {"metric": [MIOU, COST], "mode": ["max", "min"]}, metrics={MIOU: "max", COST: "min"}
    )
    chosen = choose(source, None, True)
    assert {int(each.id) for each in chosen} == set(points) - beaten == {0, 1, 2, 4}
    assert [each.id for each in chosen] == ["000", "002", "004", "001"]
    with pytest.raises(UserError, match=r"--front .* --top"):
        choose(source, 2, True)


def test_seeds_are_fresh(tiny: Make) -> None:
    trials = [trial(0, {MIOU: 0.5}, seed=3), trial(1, {MIOU: 0.4}, seed=4), trial(2, None, "failed", seed=5)]
    source = source_of(tiny(seed=3), trials)
    chosen = choose(source, 2, False)
    plan = plan_promotion(source, chosen, 3, [])
    assert (plan.experiment.seed, plan.sweep.repeats) == (6, 3)
    plan = plan_promotion(source, chosen, 2, ["seed=0"])
    assert (plan.experiment.seed, plan.sweep.repeats) == (0, 2)
    with pytest.raises(UserError, match=r"seed=1: the sweep used seed 3; take 6 or more"):
        plan_promotion(source, chosen, 3, ["seed=1"])
    with pytest.raises(UserError, match="one seed or more"):
        plan_promotion(source, chosen, 0, [])


def test_a_plan_is_a_sweep_of_the_chosen_points_and_passes_its_checks(tiny: Make) -> None:
    space = {
        "losses.cam_to_seg": {"loguniform": [0.05, 0.4]},
        "losses.seg_to_cam": {"same": "losses.cam_to_seg", "times": 0.5},
        "dynamic_threshold.enabled": {"choice": [True, False]},
        "dynamic_threshold.tolerance": {"uniform": [1e-4, 1e-2], "when": {"dynamic_threshold.enabled": True}},
        "evaluation.scales": {"choice": [[1.0], [1.0, 0.5]]},
        "contrastive.threshold": {"choice": [None, 0.4]},
        "seed": {"randint": [0, 10]},
    }
    free = {"evaluation.scales": [1.0, 0.5], "contrastive.threshold": None}
    one = {"losses.cam_to_seg": 0.2, "losses.seg_to_cam": 0.1, "dynamic_threshold.enabled": False, **free}
    two = {**one, "dynamic_threshold.enabled": True, "dynamic_threshold.tolerance": 0.005}
    trials = [trial(0, {MIOU: 0.5}, values={**one, "seed": 9}, seed=9), trial(1, {MIOU: 0.6}, values=two)]
    source = source_of(tiny(), trials, {"space": space, "scheduler": "median", "search": "tpe", "concurrency": 1})
    plan = plan_promotion(source, choose(source, 2, False), 2, [])
    check_sweep(plan.sweep, plan.experiment, "promoted")
    listed = {"evaluation.scales": (1.0, 0.5)}
    got = [complete(plan.sweep, plan.experiment, point) for point in plan.sweep.points]
    assert got == [{**two, **listed}, {**one, **listed}]
    sweep = plan.sweep
    assert (sweep.search, sweep.scheduler, sweep.keep, sweep.concurrency, sweep.set) == ("points", "none", "all", 1, {})
    assert plan.experiment.seed == 10
    assert plan.experiment.tracking.tags == {"cosa_ray.promoted_from": "s"}
    assert Sweep.model_validate(json.loads(json.dumps(sweep.model_dump(mode="json")))) == sweep


def shipped_source(tiny: Make, overrides: list[str], space: dict[str, Any] | None = None) -> Source:
    """The shipped sweep of shapes, as it would have been run here."""
    sweep, base = load_sweep("shapes", overrides)
    own = tiny()
    places = {"storage": own.storage, "data.dataset": own.data.dataset, "tracking.uri": own.tracking.uri}
    base = apply_overrides(base, places)
    values = {"losses.cam_to_seg": 0.2, "losses.seg_to_cam": 0.1, "losses.contrastive": 0.1}
    write_sweep(base, sweep.model_dump(), result_of([trial(0, {MIOU: 0.5}, values=values)]))
    return read_source("s", base.storage)


def test_full_length_is_the_base_experiments(tiny: Make) -> None:
    source = shipped_source(tiny, ["training.steps=500"])
    plan = plan_promotion(source, choose(source, 1, False), 1, ["evaluation.panel_images=0", "losses.dense_energy=0.3"])
    before, full, now = map(flatten, (source.base, load_config("shapes"), plan.experiment))
    assert before["training.steps"] == 500
    changed = {key for key in now if key.startswith(LENGTH)}
    assert {"training.steps", "evaluation.every", "evaluation.subset", "checkpoint.every"} <= changed
    for key, value in now.items():
        if key == "evaluation.panel_images":
            assert value == 0
        elif key == "losses.dense_energy":
            assert value == 0.3
        elif key in changed:
            assert value == full[key], key
        elif key not in ("seed", "tracking.tags"):
            assert value == before[key], key
    said = plan.said[-1]
    assert "shapes.yaml: " in said
    assert f"training.steps {full['training.steps']} (in the sweep 500)" in said


def test_a_base_that_is_not_known_is_not_guessed(tiny: Make, tmp_path: Path) -> None:
    """Not found, or found and not what the sweep was made from: only somebody else can say what full length is."""
    trials = [trial(0, {MIOU: 0.5})]
    shortened = source_of(tiny(), trials, {"base": "tiny", "set": {"training.steps": 20}})
    with pytest.raises(UserError, match=r"set training\.steps.* tiny is not found from here; name it with --base"):
        full_length(shortened, [])
    assert full_length(shortened, ["training.steps"])[0] == shortened.base
    whole = source_of(tiny(), trials, {"base": "tiny", "set": {"losses.dense_energy": 0.5}})
    assert full_length(whole, [])[0] == whole.base
    other = source_of(tiny(), trials, {"base": "../shapes.yaml", "set": {"training.steps": 20}})
    with pytest.raises(UserError, match=r"shapes\.yaml says [\w.]+=.*, and the sweep had .*--base"):
        full_length(other, [])
    config, said = full_length(other, [], "voc")
    assert config.training.steps == load_config("voc").training.steps
    assert config.model == other.base.model
    assert "voc.yaml" in said
    with pytest.raises(UserError, match="no experiment file nowhere"):
        full_length(other, [], "nowhere")


@pytest.mark.parametrize(
    ("metric", "then"),
    [
        (None, None),
        ("val_subset_4/miou", MIOU),
        ("train/loss", "train/loss"),
        (("val_subset_4/cam_miou_best", COST), ("val/cam_miou_best", COST)),
    ],
)
def test_metrics_are_named_as_full_length_runs_name_them(tiny: Make, metric: Any, then: Any) -> None:
    trials = [trial(0, {"val_subset_4/miou": 0.5})]
    source = source_of(tiny(evaluation__subset=4), trials, {"metric": metric}, metrics={"val_subset_4/miou": "max"})
    plan = plan_promotion(source, choose(source, 1, False), 1, ["evaluation.subset=null"])
    assert plan.sweep.metric == then


def test_a_sweep_is_found_wherever_it_was_started_from(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own files may say `runs` and `datasets/shapes`, from a folder that nobody knows any more."""
    base = tiny()
    write_sweep(base, {}, result_of([trial(0, {MIOU: 0.5})]))
    relative = apply_overrides(base, {"storage": "runs", "data.dataset": "shapes", "tracking.uri": None})
    (tmp_path / "runs" / "s" / "base.yaml").write_text(dump_config(relative))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_source("../runs/s", "runs").base == base


ENDED = [trial(0, {MIOU: 0.5}), trial(1, {MIOU: 0.4})]


@pytest.mark.parametrize(
    ("state", "given", "words"),
    [
        ("none", {}, ["no run s"]),
        ("open", {}, ["sweep s is starting", "no result yet"]),
        ("failed", {}, ["sweep s failed", "--retry-failed"]),
        ("no score", {}, ["no trial has a score"]),
        ("finished", {"top": 3}, ["--top 3", "2 configurations"]),
        ("finished", {"front": True}, ["--front", "one metric", MIOU]),
        ("finished", {"aliases": ["champion"]}, ["--alias champion", "--register"]),
        ("finished", {"register": "x"}, ["--register", "--no-track"]),
        ("finished", {"register": "a/b", "track": True}, ["model name 'a/b'"]),
        ("finished", {"register": "x", "aliases": ["v1"], "track": True}, ["alias 'v1'"]),
        ("finished", {"protocols": ["releases"]}, ["no protocol releases", "single_scale"]),
        ("finished", {"protocols": ["single_scale", "single_scale"]}, ["give each once"]),
        ("finished", {"protocols": ["given.yaml"]}, ["--protocol given", "decides"]),
        ("finished", {"protocols": ["test.yaml"]}, ["no split", "elsewhere"]),
        ("finished", {"overrides": ["losses.cam_to_seg=1"]}, ["losses.cam_to_seg", "leave it out"]),
        ("finished", {"overrides": ["losses={}"]}, ["losses", "leave it out"]),
        ("finished", {"overrides": ["training.stepz=4"]}, ["training.stepz", "training.steps"]),
        ("finished", {"overrides": ["training.steps=4"]}, ["warmup_iters", "training.steps (4)"]),
        ("finished", {"name": "../x"}, ["use up to"]),
        ("finished", {"name": "taken"}, ["taken exists already", "--resume"]),
        ("finished", {"resume": True}, ["no sweep s-promoted", "without --resume"]),
        ("finished", {"name": "taken", "resume": True}, ["taken is no promotion of sweep s"]),
    ],
)
def test_a_refused_promotion_leaves_nothing_behind(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, given: dict[str, Any], words: list[str]
) -> None:
    base = tiny()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.yaml").write_text("labels: [given]\n")
    (tmp_path / "test.yaml").write_text("split: elsewhere\n")
    if state != "none":
        results = {
            "open": None,
            "failed": result_of(ENDED, state="failed", cause="5 trials in a row failed"),
            "no score": result_of([trial(0, None)]),
        }
        write_sweep(base, {}, results.get(state, result_of(ENDED)))
        taken = RunFolder(f"{base.storage}/taken")
        taken.write_text("sweep.yaml", dump_sweep(Sweep.model_validate({"base": "tiny", "space": SPACE})))
        taken.write_text("base.yaml", dump_config(base))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        promote_sweep("s", **{"track": False, "storage": base.storage, **given})
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_no_sweep(tiny: Make, tmp_path: Path) -> None:
    from cosa_ray.training.runs import create_run

    create_run("single", tiny(), MIOU)
    with pytest.raises(UserError, match="single is a run, and promote takes a sweep"):
        promote_sweep("single", storage=str(tmp_path / "runs"))


def test_the_command_says_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, said in (
        (["promote", "never"], "never"),
        (["promote", "never", "--top", "0"], "--top"),
        (["promote", "never", "--seeds", "0"], "--seeds"),
        (["promote", "never", "--retry-failed"], "--resume"),
        (["promote", "never", "--alias", "best"], "--register"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        (sentence,) = err.splitlines()
        assert said in sentence
    assert not list(tmp_path.iterdir())


def run(name: str, score: float | None, state: str = "finished", **more: Any) -> PromotedRun:
    metrics = {} if score is None else {"val/p/miou": score, "val/p/cam_miou_best": score / 2}
    return PromotedRun(name, f"runs/{name}", 1, state, 1400, 0.5, metrics, **more)


def promotion_of(configurations: list[Configuration], **more: Any) -> Promotion:
    given = {"metric": "val/p/miou", "mode": "max", "columns": ["val/p/miou", "val/p/cam_miou_best"], **more}
    return Promotion("s-promoted", "runs/s-promoted", "s", "finished", configurations=configurations, **given).ranked()


def test_the_winner_has_the_best_mean_and_all_of_its_seeds() -> None:
    steady = Configuration({"optimiser.lr": 1e-3}, (run("a0", 0.60), run("a1", 0.64), run("a2", 0.65)), "003", 0.7)
    lucky = Configuration({"optimiser.lr": 2e-3}, (run("b0", 0.70), run("b1", 0.40), run("b2", 0.50)))
    broken = Configuration({"optimiser.lr": 3e-3}, (run("c0", 0.90), run("c1", None, "failed", cause="diverged")))
    empty = Configuration({"optimiser.lr": 4e-3}, (run("d0", None, "failed"),))
    found = promotion_of([empty, broken, lucky, steady])
    assert found.configurations == [steady, lucky, broken, empty]
    assert found.winner is steady
    assert found.model is not None
    assert found.model.name == "a2"
    assert found.margin is not None
    difference, error = found.margin
    first, second = [0.60, 0.64, 0.65], [0.70, 0.40, 0.50]
    assert difference == pytest.approx(statistics.mean(first) - statistics.mean(second))
    assert error == pytest.approx((statistics.variance(first) / 3 + statistics.variance(second) / 3) ** 0.5)
    assert promotion_of([broken, empty]).winner is broken
    assert promotion_of([broken, steady]).margin is None, "0.25 ahead, but of a seed that was lucky enough to finish"
    assert promotion_of([empty]).winner is None
    least = promotion_of([steady, lucky], mode="min")
    assert least.winner is lucky
    assert least.model is not None
    assert least.model.name == "b1"
    spread = steady.spread("val/p/miou")
    assert spread is not None
    assert spread.std == pytest.approx(statistics.stdev(first))
    assert Spread.of([0.7123]).shown() == "0.712"


def test_the_row_is_a_row_of_the_table() -> None:
    values = {"losses.cam_to_seg": 0.123456, "pseudo_labels.policy": "a|b"}
    one = Configuration(values, (run("a0", 0.60), run("a1", 0.64)), "003", 0.7)
    two = Configuration({**values, "losses.cam_to_seg": 0.3}, (run("b0", 0.4), run("b1", None, "failed")))
    facts = {"experiment": "shapes.yaml", "hours_of": "gpu", "date": "2030-01-02", "commit": "abc", "machine": "2 CPUs"}
    found = promotion_of([two, one], **facts)
    assert found.markdown_row() == (
        "| `shapes.yaml` with losses.cam_to_seg=0.1235, pseudo_labels.policy=a\\|b | 2 | 1,400 | 0.620 ± 0.028 | "
        "0.310 ± 0.014 | 2 x 0.50 GPU h | 2030-01-02 | abc | 2 CPUs |"
    )
    lines = found.markdown().splitlines()
    assert lines[0] == (
        "| configuration | seeds | steps | `val/p/miou` | `val/p/cam_miou_best` | cost | date | commit | machine |"
    )
    assert lines[2] == found.markdown_row()
    assert "| 1 of 2 | 1,400 | 0.400 | 0.200 | 1 x 0.50 GPU h |" in lines[3]
    said = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert said["winner"]["spreads"]["val/p/miou"] == {
        "mean": pytest.approx(0.62),
        "std": pytest.approx(statistics.stdev([0.6, 0.64])),
        "count": 2,
    }
    assert said["model"]["name"] == "a1"
    assert said["row"] == found.markdown_row()


def test_runs_with_their_evaluations_become_a_promotion(tiny: Make) -> None:
    """By the first protocol, not by the sweep's metric; each configuration knows the trial it comes from."""
    base = tiny()
    a, b = {"losses.cam_to_seg": 0.10}, {"losses.cam_to_seg": 0.11}
    source = source_of(base, [trial(0, {MIOU: 0.5}, values=a), trial(1, {MIOU: 0.4}, values=b)])
    plan = plan_promotion(source, choose(source, 2, False), 2, [])
    config = plan.experiment.model_dump(mode="json")
    scores = {0: (a, 0.9, 0.50), 1: (a, 0.8, 0.54), 2: (b, 0.7, 0.60), 3: (b, 0.6, 0.62)}
    trials, reports = [], {}
    for number, (values, own, measured) in scores.items():
        more = {"values": values, "configuration": number // 2 * 2, "seed": 1 + number % 2, "config": config}
        trials.append(trial(number, {MIOU: own}, hours=0.5, **more))
        metrics = {"val/p/miou": measured, "val/p/cam_miou_best": measured / 2, "val/p/iou/bird": None}
        reports[f"{number:03d}"] = [
            Report(
                *("name", "checkpoint", 20, "data", "val", "val/p"),
                *({}, metrics, {}, [], {}, [], []),
            )
        ]
    found = _sum_up(source, plan, result_of(trials, base.storage), reports)
    assert (found.metric, found.columns) == ("val/p/miou", ["val/p/miou", "val/p/cam_miou_best"])
    assert [(each.source, each.source_score) for each in found.configurations] == [("001", 0.4), ("000", 0.5)]
    assert found.winner is not None
    assert found.winner.values == b
    assert found.winner.spread("val/p/miou") == Spread(pytest.approx(0.61), pytest.approx(0.02 / 2**0.5), 2)
    assert found.model is not None
    assert found.model.name == "s-003"
    assert "val/p/iou/bird" not in found.model.metrics
    without = _sum_up(source, plan, result_of(trials, base.storage), {})
    assert (without.metric, without.mode, without.winner and without.winner.source) == (MIOU, "max", "000")


def test_machines_in_words() -> None:
    environment = {"cpus": 16, "cpu": "EPYC", "gpus": ["NVIDIA H100 80GB HBM3, 81559 MiB, 550.1"] * 8}
    assert machine_words(environment, 2.0) == "2 x NVIDIA H100 80GB HBM3"
    assert machine_words(environment, 0.5) == "0.5 x NVIDIA H100 80GB HBM3"
    assert machine_words(environment, 0.0) == "16 CPUs, EPYC"
