"""Ablations: what a file may say, which runs come of it, and what noise explains."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from cosa_ray.ablation.courses import During
from cosa_ray.ablation.figures import courses_figure, differences_figure, during_figure, metrics_shown
from cosa_ray.ablation.numbers import difference_of, interval_over_both, value_of
from cosa_ray.ablation.plan import load_ablation, plan_ablation
from cosa_ray.ablation.study import RowResult, Study, run_ablation, sum_up
from cosa_ray.ablation.table import markdown, table_rows
from cosa_ray.config.load import apply_overrides
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.reporting.history import Chart
from cosa_ray.training.driver import resolve
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.check import check_sweep
from cosa_ray.tuning.figures import RED
from cosa_ray.tuning.folder import sweep_files
from cosa_ray.tuning.results import SweepResult, TrialResult

SHORT = [
    "training.steps=60",
    "training.warmup_iters=40",
    "optimiser.warmup_steps=5",
    "dynamic_threshold.batches=10",
]


def write(folder: Path, rows: str, more: str = "") -> Path:
    file = folder / "study.yaml"
    file.write_text(f"base: shapes\n{more}\nrows:\n{rows}")
    return file


def test_rows_build_on_each_other_and_share_the_warm_up_before_any_ring_is_filled() -> None:
    ablation, base = load_ablation("terms", SHORT)
    plan = plan_ablation(ablation, base, "study", 2)
    check_sweep(plan.sweep, plan.base, "study")
    assert [warm_up.name for warm_up in plan.warm_ups] == ["study-warm-up-seed0", "study-warm-up-seed1"]
    for seed, warm_up in enumerate(plan.warm_ups):
        assert (warm_up.config.seed, warm_up.config.last_step, warm_up.config.training.steps) == (seed, 30, 60)
        assert warm_up.config.checkpoint.keep_full_state
    configs = [apply_overrides(plan.base, point) for point in plan.sweep.points]
    assert plan.points == [(row, seed) for seed in (0, 1) for row in range(7)]
    for (row, seed), config in zip(plan.points, configs, strict=True):
        assert (config.seed, config.continue_from) == (seed, f"study-warm-up-seed{seed}")
        wanted = apply_overrides(base, {**ablation.settings(row), "seed": seed, "continue_from": config.continue_from})
        assert config == wanted
    names = [row.name for row in ablation.rows]
    assert names[ablation.before(5) or 0] == "+ guided CAM", "the release's rows leave the staircase"
    for place in range(1, 7):  # a step changes what its row sets, and nothing else
        above = configs[ablation.before(place) or 0]
        assert configs[place] == apply_overrides(above, ablation.rows[place].set)


def test_the_rows_fit_on_other_experiments() -> None:
    ablation, base = load_ablation("terms", [*SHORT, "views.crop=192"], "voc_small")
    plan = plan_ablation(ablation, base, "study", 1)
    check_sweep(plan.sweep, plan.base, "study")
    assert plan.base.model.backbone == "tf_efficientnet_lite0"
    assert (plan.base.losses.contrastive, plan.base.views.crop) == (0.0, 192)
    with pytest.raises(UserError, match="no experiment file nonsense"):
        load_ablation("terms", [], "nonsense")


def test_overrides_reach_the_file_or_its_base(tmp_path: Path) -> None:
    write(tmp_path, "  - {name: a}\n  - {name: b, set: {losses.contrastive: 0.1}}", "set: {seed: 5}")
    ablation, base = load_ablation(tmp_path / "study.yaml", ["concurrency=1", "share_warm_up=false", "seed=7"])
    assert (ablation.concurrency, ablation.share_warm_up, base.seed) == (1, False, 7)
    (tmp_path / "mine.yaml").write_text("extends: shapes\ntraining: {batch_size: 3}\n")
    for other in (["base=mine"], []):
        ablation, base = load_ablation(tmp_path / "study.yaml", other, None if other else str(tmp_path / "mine.yaml"))
        assert (base.seed, base.training.batch_size) == (5, 3)
    (tmp_path / "none.yaml").write_text("base: shapes\n")
    with pytest.raises(UserError, match=r"none\.yaml: no ablation file, it lacks rows"):
        load_ablation(tmp_path / "none.yaml")


def test_rows_of_other_warm_ups_get_their_own(tmp_path: Path) -> None:
    rows = """
  - {name: a}
  - {name: b, set: {losses.contrastive: 0.2}}
  - {name: c, set: {training.decoder_in_warmup: true}}
  - {name: d, set: {losses.contrastive: 0.3}}
  - {name: e, after: a, set: {optimiser.lr: 1.0e-3}}
"""
    plan = plan_ablation(*load_ablation(write(tmp_path, rows), SHORT), "s", 1)
    assert [warm_up.name for warm_up in plan.warm_ups] == ["s-warm-up-0-seed0", "s-warm-up-1-seed0"]
    assert [point.get("continue_from") for point in plan.sweep.points] == [
        "s-warm-up-0-seed0",
        "s-warm-up-0-seed0",
        "s-warm-up-1-seed0",
        "s-warm-up-1-seed0",
        None,
    ]
    assert any("e: with a warm-up of its own" in line for line in plan.said)
    alone = plan_ablation(*load_ablation(write(tmp_path, rows, "share_warm_up: false"), SHORT), "s", 2)
    assert not alone.warm_ups
    assert {point["seed"] for point in alone.sweep.points} == {0, 1}


@pytest.mark.parametrize(("own", "shared"), [("0.99", ["s-warm-up-seed0"]), ("null", [])])
def test_rows_of_other_momenta_share_a_warm_up_that_has_a_momentum_of_its_own(
    tmp_path: Path, own: str, shared: list[str]
) -> None:
    rows = "  - {name: a}\n  - {name: b, set: {assignment.momentum: 0.9}}"
    more = f"set: {{assignment.warmup_momentum: {own}}}"
    plan = plan_ablation(*load_ablation(write(tmp_path, rows, more), SHORT), "s", 1)
    assert [warm_up.name for warm_up in plan.warm_ups] == shared


def test_what_a_row_sets_holds_for_those_that_follow_however_it_is_written(tmp_path: Path) -> None:
    rows = """
  - {name: a, set: {losses: {contrastive: 0.0}, training.loss_stride: 4}}
  - {name: b, set: {losses: {seg_to_cam: 0.2}}}
  - {name: c, set: {losses.seg_to_cam: 0.3}}
"""
    ablation, base = load_ablation(write(tmp_path, rows), SHORT)
    plan = plan_ablation(ablation, base, "s", 1)
    configs = [apply_overrides(plan.base, point) for point in plan.sweep.points]
    assert [(each.losses.contrastive, each.losses.seg_to_cam) for each in configs] == [
        (0, base.losses.seg_to_cam),
        (0, 0.2),
        (0, 0.3),
    ]
    assert {each.training.loss_stride for each in (*configs, plan.warm_ups[0].config)} == {4}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("  - {name: a}", "rows"),
        ("  - {name: a}\n  - {name: a, set: {seed: 1}}", "two rows are called a"),
        ("  - {name: a}\n  - {name: b}", "row b sets nothing"),
        ("  - {name: a}\n  - {name: b, after: z, set: {losses.contrastive: 0.1}}", "after z, which is no row above"),
        ("  - {name: a}\n  - {name: b, set: {seed: 3}}", "row b: seed is the study's own"),
        ("  - {name: a}\n  - {name: b, set: {losses.contrastve: 0.1}}", "losses.contrastive"),
        ("  - {name: a}\n  - {name: b, set: {data.dataset: other}}", "shared by its rows"),
        ("  - {name: a}\n  - {name: b, set: {training: {stop_at: 30}}}", "row b: training.stop_at is the study's own"),
        ("  - {name: a}\n  - {name: b, set: {losses.contrastive: 0.1}}", "row b sets what a has already"),
        ("  - {name: a}\n  - {name: b, set: {model.backbone_args.depth: 3}}", "model.backbone_args is set by a row"),
    ],
)
def test_wrong_files_get_one_sentence(tmp_path: Path, rows: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace(".", r"\.")):
        plan_ablation(*load_ablation(write(tmp_path, rows), SHORT), "study", 1)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("continue_from=runs/other", "continue_from=runs/other: a study's rows go on from its own warm-ups"),
        ("training.stop_at=30", "training.stop_at=30 is not after step 30, up to which rows share"),
        ("concurency=1", r"--set concurency: .*; did you mean concurrency\?"),
        ("share_warm_up=maybe", "with --set: share_warm_up"),
        ("training.stepz=30", r"--set: unknown key training\.stepz; did you mean training\.steps\?"),
    ],
)
def test_what_a_base_cannot_say_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        plan_ablation(*load_ablation("terms", [*SHORT, override]), "study", 1)


def test_what_the_sweep_would_refuse_is_refused_before_a_warm_up_is_trained(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablation, _ = load_ablation("fading", SHORT)

    def study(name: str, seeds: int = 1, **more: Any) -> None:
        run_ablation(ablation, tiny(losses__contrastive=0), name=name, seeds=seeds, track=False, **more)

    monkeypatch.setattr("cosa_ray.training.ray_train.ray_cluster", lambda: pytest.fail("that would be too late"))
    other = RunFolder(str(tmp_path / "runs" / "other"))
    other.write_text("run.json", "{}")
    with pytest.raises(UserError, match="other exists already"):
        study("other")
    plan = plan_ablation(ablation, resolve(tiny(losses__contrastive=0), track=False), "begun", 1)
    for file, content in sweep_files(plan.sweep, plan.base).items():
        RunFolder(str(tmp_path / "runs" / "begun")).write_text(file, content)
    with pytest.raises(UserError, match="begun was started with other settings"):
        study("begun", seeds=2, resume=True)
    with pytest.raises(UserError, match="use up to"):
        study("x" * 99)


@pytest.mark.parametrize(("warm_up", "headline"), [(40, "miou"), (60, "cam_miou_best")])
def test_a_study_is_summed_up_by_the_metric_that_its_runs_are_judged_by(warm_up: int, headline: str) -> None:
    """Rows, seeds and metrics come from trials and their evaluations; a trial without one is named."""
    ablation, base = load_ablation("fading", [*SHORT, f"training.warmup_iters={warm_up}"])
    plan = plan_ablation(ablation, base, "study", 2)
    scores = {place: 0.5 + 0.01 * row + 0.1 * seed for place, (row, seed) in enumerate(plan.points)}
    trials = [
        TrialResult(id, f"study-{id}", "finished", {}, 60, None, {}, "", None, None, configuration=place)
        for place in scores
        for id in [f"{place:03d}"]
    ]
    result = SweepResult("study", "runs/study", "finished", "m", "max", None, None, trials, None, None)

    def evaluated(place: int) -> Any:
        metrics = {f"val/{headline}": scores[place], "val/map": 1.0, "val/map_ci_low": 0.9}
        report = SimpleNamespace(prefix="val", metrics=metrics)
        return SimpleNamespace(report=report, per_image=lambda: ([], {}))

    lost = len(plan.points) - 1
    study = sum_up(ablation, plan, result, {f"{place:03d}": evaluated(place) for place in scores if place != lost})
    assert (study.headline, study.seeds, study.place) == (f"val/{headline}", [0, 1], "ablation")
    assert study.shared == [f"val/{headline}", "val/map"]
    assert study.failed == [f"study-{lost:03d}: finished"]
    for number, row in enumerate(study.rows):
        assert row.runs == {seed: f"study-{plan.points.index((number, seed)):03d}" for seed in (0, 1)}
        assert row.metrics[study.headline].by_seed[0] == scores[plan.points.index((number, 0))]
    assert study.rows[1].differences[study.headline].mean == pytest.approx(0.01)
    assert list(study.rows[-1].metrics[study.headline].by_seed) == [0]
    assert f"| {study.rows[1].name} | {0.5 + 0.01 + 0.05:.4f}" in markdown(study)


def test_a_difference_is_paired_by_seed() -> None:
    above, row = {0: 0.50, 1: 0.60, 2: 0.40}, {0: 0.52, 1: 0.62, 2: 0.42, 7: 0.9}
    found = difference_of(above, row)
    assert found is not None
    assert list(found.by_seed) == [0, 1, 2]
    assert (found.mean, found.deviation) == (pytest.approx(0.02), pytest.approx(0.0, abs=1e-12))
    assert found.words == "higher", "the seeds differ by far more, and alike in both rows"
    assert found.over == "3 seeds"
    noisy = difference_of(above, {0: 0.55, 1: 0.58, 2: 0.41})
    assert noisy is not None
    assert noisy.words == "within noise"
    alone = difference_of({0: 0.5}, {0: 0.7})
    assert alone is not None
    assert (alone.deviation, alone.interval, alone.words) == (None, None, "fewer than 3 seeds: not known")
    two = difference_of({0: 0.50, 1: 0.60}, {0: 0.52, 1: 0.62})
    assert two is not None
    assert (two.within_noise, two.interval) == (None, pytest.approx((0.02, 0.02))), "two may agree by chance"
    assert difference_of({0: 0.5}, {1: 0.7}) is None
    value = value_of({1: 0.3, 0: 0.1, 2: float("nan")})
    assert value is not None
    assert (value.by_seed, value.mean, value.deviation) == (
        {0: 0.1, 1: 0.3},
        pytest.approx(0.2),
        pytest.approx(np.std([0.1, 0.3], ddof=1)),
    )


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_difference_is_beyond_noise_where_a_paired_t_test_says_so(seeds: int) -> None:
    rng, told = np.random.default_rng(0), []
    for scale in (0.5, 3.0, 10.0):
        for _ in range(20):
            above = rng.normal(0.5, 0.1, seeds)
            row = above + 0.01 * scale + rng.normal(0, 0.02, seeds)
            found = difference_of(dict(enumerate(above)), dict(enumerate(row)))
            assert found is not None
            test = ttest_rel(row, above)
            told.append(not found.within_noise)
            assert (test.pvalue < 0.05) is not found.within_noise
            assert found.interval == pytest.approx(tuple(test.confidence_interval()))
    assert 0 < sum(told) < len(told)


def totals(rng: np.random.Generator, images: int, correct: float) -> np.ndarray:
    """(N, 3, 2): of each image the pixels of two classes, true, predicted and in both."""
    truth = rng.integers(50, 150, size=(images, 2))
    both = rng.binomial(truth, correct)
    predicted = both + (truth - both)[:, ::-1]
    return np.stack([both, truth, predicted], 1)


def test_the_interval_covers_seeds_and_images() -> None:
    from cosa_ray.evaluation.confusion import ious

    def miou(table: np.ndarray) -> float:
        return float(np.nanmean(ious(table.sum(0, keepdims=True))))

    rng = np.random.default_rng(0)
    above, row = [totals(rng, 40, 0.7) for _ in range(3)], [totals(rng, 40, share) for share in (0.7, 0.75, 0.8)]
    low, high = interval_over_both(above, row, 4000)
    # By brute force: every draw of seeds there is, images drawn for each.
    differences = []
    for seeds in itertools.product(range(3), repeat=3):
        for _ in range(60):
            chosen = rng.integers(40, size=40)
            differences.append(np.mean([miou(row[s][chosen]) - miou(above[s][chosen]) for s in seeds]))
    assert (low, high) == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.012)
    one_seed = interval_over_both(above[2:], row[2:], 1000)
    assert one_seed[1] - one_seed[0] < high - low, "with one seed only images are drawn"
    # Told is the wider of both: Student's over these seeds here, images alone where there is one.
    scores = [{seed: miou(table) for seed, table in enumerate(tables)} for tables in (above, row)]
    kept = [dict(enumerate(tables)) for tables in (above, row)]
    found = difference_of(*scores, (kept[0], kept[1]), resamples=4000)
    assert found is not None
    assert (found.bootstrap, found.over) == ((low, high), "3 seeds and 40 images")
    student = ttest_rel(list(scores[1].values()), list(scores[0].values())).confidence_interval()
    assert found.interval == pytest.approx((min(low, student.low), max(high, student.high)))
    alone = difference_of({2: scores[0][2]}, {2: scores[1][2]}, (kept[0], kept[1]), resamples=1000)
    assert alone is not None
    assert (alone.interval, alone.over) == (one_seed, "1 seed and 40 images")


def test_tables_show_every_row_and_say_what_is_missing() -> None:
    rising, flat = {0: 0.5, 1: 0.52, 2: 0.54}, dict.fromkeys(range(3), 0.5)
    value, step = value_of(rising), difference_of(flat, rising)
    assert value is not None
    assert step is not None
    rows = [
        RowResult("base", {}, None, {0: "s-1"}, {"val/miou": value}, {}),
        RowResult("+ term", {"losses.contrastive": 0.1}, "base", {0: "s-2"}, {"val/miou": value}, {"val/miou": step}),
        RowResult("lost", {}, "base", {}, {}, {}),
    ]
    study = Study("s", "runs/s", "finished", "val/miou", [0, 1], rows, ["s-3: its process was killed"])
    first, second, third = table_rows(study)
    assert first == ["base", "0.5200 ± 0.0200", "0: 0.5000, 1: 0.5200, 2: 0.5400", "-", "-", "-", "-", "-"]
    assert second[3:5] == ["base", "+0.0200 ± 0.0200"]
    assert second[-2:] == ["3 seeds", "within noise"]
    assert third == ["lost", *["-"] * 7]
    text = markdown(study)
    assert json.loads(json.dumps(study.as_json()))["rows"][1]["differences"]["val/miou"]["within_noise"] is True
    assert "Without a result: s-3: its process was killed" in text
    assert "| + term | 0.5200 ± 0.0200 |" in text.partition("## val/miou")[2]


def test_figures_show_every_seed_and_which_steps_are_beyond_noise(tmp_path: Path) -> None:
    seeds = range(4)
    low, high = ({seed: base + 0.001 * seed for seed in seeds} for base in (0.5, 0.6))
    values = [value_of(each) for each in (low, high)]
    step = difference_of(low, high)
    assert step is not None
    rows = [
        RowResult("base", {}, None, {}, {"val/miou": values[0], "val/context_foreground": values[0]}, {}),
        RowResult("+ term", {}, "base", {}, {"val/miou": values[1], "val/context_foreground": values[1]}, {}),
        RowResult("lost", {}, "base", {}, {}, {}),
    ]
    rows[1].differences["val/miou"] = step
    study = Study("s", "runs/s", "finished", "val/miou", list(seeds), rows)
    assert metrics_shown(study) == ["val/miou", "val/context_foreground"]
    figure = differences_figure(study)
    left, right, *others = figure.axes
    assert len(others) == 2
    assert [text.get_text() for text in left.get_yticklabels()] == ["base", "+ term", "lost"]
    assert [sorted(line.get_xdata()) for line in left.lines[::2]] == [list(low.values()), list(high.values())]
    bars = [line for line in right.lines if line.get_linestyle() == "-" and len(set(line.get_ydata())) == 1]
    assert [line.get_color() for line in bars] == [RED]  # 0.1 on every seed is beyond noise
    assert tuple(bars[0].get_xdata()) == step.interval
    figure.savefig(tmp_path / "differences.png")

    # On the way: nothing of the step at 10, all of it at 20.
    noisy = difference_of(low, {seed: 0.5 + 0.02 * (-1) ** seed for seed in seeds})
    assert noisy is not None
    values_at = {"base": values[0], "+ term": values[1]}
    study = replace(
        study, during={"val/miou": [During(10, values_at, {"+ term": noisy}), During(20, values_at, {"+ term": step})]}
    )
    (axes,) = during_figure(study).axes
    _, line, sure = axes.lines
    assert list(line.get_xdata()) == [10, 20]
    assert list(line.get_ydata()) == [noisy.mean, step.mean]
    assert (list(sure.get_xdata()), list(sure.get_ydata())) == ([20], [step.mean])
    colour = line.get_color()
    over = markdown(study).partition("## val/miou over training")[2]
    assert f"| + term (base) | {noisy.mean:+.4f} | **{step.mean:+.4f}** |" in over
    assert "| row (the one it follows) | 10 | 20 |" in over

    charts = [Chart("val/miou", {"a": [(1, 0.1), (2, 0.2)], "b": [(2, 0.3)], "c": [(1, 0.1), (2, 0.2)]}, 1)]
    figure = courses_figure(study, charts, {"a": "base", "b": "+ term", "c": "lost"})
    base, term, same = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in (base, term, same)] == [[0.1, 0.2], [0.3], [0.1, 0.2]]
    assert term.get_color() == colour, "a row has one colour in all figures"
    assert (base.get_linestyle(), same.get_linestyle()) == ("-", "--"), "a line under another is still seen"
    figure.savefig(tmp_path / "courses.png")
