"""Comparing runs: intervals against a plain loop, what a word names, what differs, and a page that trusts no name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_ind

from cosa_ray.config.load import apply_overrides
from cosa_ray.config.protocol import Protocol, load_protocol
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.evaluation.confusion import paired_intervals, scores
from cosa_ray.evaluation.description import DESCRIPTION, Description
from cosa_ray.evaluation.report import Report
from cosa_ray.evaluation.tally import per_class
from cosa_ray.reporting.charts import nice_ticks
from cosa_ray.reporting.compare import compare_runs
from cosa_ray.reporting.differences import differences
from cosa_ray.reporting.evaluated import image_scores
from cosa_ray.reporting.history import POINTS, Histories, Tracked, _thinned
from cosa_ray.reporting.pictures import confusion_difference
from cosa_ray.reporting.subjects import find_sides
from cosa_ray.reporting.words import settings
from cosa_ray.training.runs import Run, create_run
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.results import SweepResult, TrialResult, write_result

CLASSES = ("circle", "square")
IDS = [f"image-{number:02d}" for number in range(30)]
_LABELS = np.random.default_rng(0).integers(0, 3, (len(IDS), 400))


def matrices(seed: int, right: float) -> np.ndarray:
    """Confusion matrices (N, 3, 3) of made-up predictions, a share of them right, on the same truth for all."""
    rng = np.random.default_rng(seed)
    found = np.zeros((len(IDS), 3, 3), np.int64)
    for image, truth in enumerate(_LABELS):
        guess = np.where(rng.random(truth.shape) < right, truth, rng.integers(0, 3, truth.shape))
        np.add.at(found[image], (truth, guess), 1)
    return found


def totals(each: np.ndarray) -> np.ndarray:
    return np.stack([np.array([np.diag(m), m.sum(1), m.sum(0)]) for m in each])


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Run]:
    """Make a run as training and evaluation leave it: a checkpoint's description, and evaluations of 30 images."""

    def make(
        name: str,
        *,
        seed: int = 0,
        right: float = 0.7,
        prefixes: tuple[str, ...] = ("val",),
        classes: tuple[str, ...] = CLASSES,
        ids: list[str] = IDS,
        more: dict[str, float] | None = None,
        **settings: object,
    ) -> Run:
        changes = {key.replace("__", "."): value for key, value in settings.items()}
        config = apply_overrides(Config(), {"storage": str(tmp_path / "runs"), "seed": seed, **changes}, "test")
        run = create_run(name, config, "val/miou")
        counts = matrices(seed + int(1000 * right), right)
        checkpoint = "checkpoints/step_00000020"
        metrics = {"val/miou": scores(counts.sum(0)).miou, **(more or {})}
        description = Description(name, 20, list(classes), metrics, "assignment", 7200.0, {"background": 0.5})
        run.folder.write_text(f"{checkpoint}/{DESCRIPTION}", json.dumps(asdict(description)))
        run.checkpoints.register(checkpoint, 20, metrics)
        for prefix in prefixes:
            evaluate(run, prefix, counts[[IDS.index(name) for name in ids]], classes, ids)
        return run

    return make


def evaluate(
    run: Run, prefix: str, counts: np.ndarray, classes: tuple[str, ...] = CLASSES, ids: list[str] = IDS, step: int = 20
) -> None:
    import pyarrow as pa

    protocol = prefix.partition("/")[2]
    used = load_protocol(protocol) if protocol else Protocol()
    matrix = counts.sum(0)
    report = Report(
        name=run.record.name,
        checkpoint=f"checkpoints/step_{step:08d}",
        step=step,
        dataset="nowhere",
        split="val",
        prefix=prefix,
        protocol=used.model_dump(mode="json"),
        metrics={f"{prefix}/miou": scores(matrix).miou, f"{prefix}/images": float(len(ids))},
        per_class={"miou": per_class(matrix, classes)},
        curve_thresholds=[],
        curves={},
        worst=[],
        best=[],
    )
    folder = f"evaluations/{prefix.replace('/', '.')}/step_{step:08d}"
    rows = [["", "background", *classes], *([label, *map(str, row)] for label, row in zip("abc", matrix, strict=True))]
    quoted = "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    run.folder.write_text(f"{folder}/confusion_miou.csv", quoted)
    flat = pa.array(totals(counts).reshape(-1).astype(np.int32))
    table = pa.table({"id": ids, "miou": pa.FixedSizeListArray.from_arrays(flat, 9)})
    with (
        pa.OSFile(run.folder.join(f"{folder}/per_image.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as out,
    ):
        out.write_table(table)
    run.folder.write_text(f"{folder}/result.json", json.dumps(report.as_json()))


def test_paired_intervals_equal_a_plain_loop() -> None:
    sides = [totals(matrices(seed, right)) for seed, right in ((1, 0.6), (2, 0.65), (3, 0.5))]
    rng = np.random.default_rng(5)
    drawn = rng.multinomial(len(IDS), np.full(len(IDS), 1 / len(IDS)), size=50)
    mious = np.zeros((3, 50))
    for resample, times in enumerate(drawn):
        for number, side in enumerate(sides):
            hits, truth, predicted = sum(count * image for count, image in zip(times, side, strict=True))
            mious[number, resample] = np.mean(hits / (truth + predicted - hits))
    expected = [np.quantile(mious[number] - mious[0], [0.05, 0.95]) for number in (1, 2)]
    np.testing.assert_allclose(paired_intervals(sides, resamples=50, level=0.9, seed=5), expected, rtol=0, atol=1e-12)


def test_paired_intervals_are_those_of_any_other_bootstrap() -> None:
    """Other draws, made image by image: the ends agree as far as so many resamples can."""
    first, second = totals(matrices(1, 0.6)), totals(matrices(2, 0.65))
    rng, found = np.random.default_rng(99), []
    for _ in range(4000):
        chosen = rng.integers(0, len(IDS), len(IDS))
        hits, truth, predicted = np.stack([side[chosen].sum(0) for side in (first, second)], axis=1)
        miou = (hits / (truth + predicted - hits)).mean(1)
        found.append(miou[1] - miou[0])
    np.testing.assert_allclose(
        paired_intervals([first, second], resamples=4000)[0],
        np.quantile(found, [0.025, 0.975]),
        atol=0.2 * np.std(found),  # 3 standard errors of an end
    )


def test_paired_intervals_are_paired() -> None:
    first, second = totals(matrices(1, 0.6)), totals(matrices(2, 0.65))
    low, high = paired_intervals([first, second])[0]
    assert 0 < low < high
    np.testing.assert_allclose(paired_intervals([second, first])[0], (-high, -low), atol=1e-12)
    assert paired_intervals([first, first]) == [(0, 0)]
    # The images are much unlike each other; of a difference that is the same on all of them nothing remains.
    hard, easy = np.tile([[[10], [100], [100]]], (10, 1, 1)), np.tile([[[90], [100], [100]]], (10, 1, 1))
    mixed = np.concatenate([hard, easy])
    assert np.ptp(paired_intervals([mixed, mixed])[0]) == 0
    assert all(np.isnan(paired_intervals([first[:0], second[:0]])[0]))


def test_the_intervals_of_groups_are_of_their_means() -> None:
    runs = np.stack([totals(matrices(seed, 0.6)) for seed in (1, 2)])
    other = totals(matrices(3, 0.65))
    (both,) = paired_intervals([runs, other])
    np.testing.assert_allclose(paired_intervals([runs, np.stack([other, other])])[0], both, rtol=0, atol=1e-12)
    alone = [paired_intervals([run, other])[0] for run in runs]
    assert min(each[0] for each in alone) < both[0] < both[1] < max(each[1] for each in alone)


def test_image_scores_are_over_the_classes_in_the_mask() -> None:
    matrix = np.array([[[4, 1, 0], [0, 0, 0], [1, 0, 4]], [[0, 0, 0]] * 3])
    expected = (4 / 6 + 4 / 5) / 2  # the class that is only predicted counts nowhere
    found = image_scores(totals(matrix))
    assert found[0] == pytest.approx(expected)
    assert np.isnan(found[1])


def test_two_runs_are_compared(made, tmp_path: Path) -> None:
    made("one", right=0.6, more={"val/map": 0.5})
    made("two", right=0.8, losses__contrastive=0.25, tracking__log_every=7)
    found = compare_runs(["one", "two"], storage=str(tmp_path / "runs"))
    assert found.config == [{"key": "losses.contrastive", "values": [Config().losses.contrastive, 0.25]}]
    a, b = (scores(matrices(int(1000 * right), right).sum(0)) for right in (0.6, 0.8))
    (verdict,) = found.verdicts
    assert verdict.metric == "val/miou"
    assert verdict.difference == pytest.approx(b.miou - a.miou)
    assert verdict.interval is not None
    assert verdict.interval[0] < verdict.difference < verdict.interval[1]
    assert verdict.within_noise is False
    assert "more than the choice of images explains (95 % interval over the 30 images" in verdict.sentence
    assert "what another seed would change is not known" in verdict.sentence
    assert [row["class"] for row in found.per_class] == ["background", *CLASSES]
    np.testing.assert_allclose([row["differences"][1] for row in found.per_class], b.iou - a.iou)
    rows = {(row.source, row.name): row for row in found.metrics}
    lonely = rows["best checkpoint", "val/map"]
    assert (lonely.values, lonely.differences) == ([0.5, None], [0, None])
    assert rows["evaluation", "val/miou"].intervals[1] == verdict.interval
    each = [image_scores(totals(matrices(int(1000 * right), right))) for right in (0.6, 0.8)]
    by_hand = max(range(len(IDS)), key=lambda place: abs(each[1][place] - each[0][place]))
    assert found.images[0]["id"] == IDS[by_hand]
    assert found.images[0]["difference"] == pytest.approx(each[1][by_hand] - each[0][by_hand])
    assert found.sides[0]["runs"][0]["hours"] == 2
    json.dumps(found.as_json(), allow_nan=False)


def test_the_same_run_twice_is_within_noise(made, tmp_path: Path) -> None:
    made("one")
    (verdict,) = compare_runs(["one", "one"], storage=str(tmp_path / "runs")).verdicts
    assert (verdict.difference, verdict.interval, verdict.within_noise) == (0, (0, 0), True)
    assert "level with" in verdict.sentence


def test_images_are_matched_by_id(made, tmp_path: Path) -> None:
    made("one", right=0.6)
    made("two", right=0.8, ids=IDS[:20][::-1])
    found = compare_runs(["one", "two"], storage=str(tmp_path / "runs"))
    first, second = totals(matrices(600, 0.6))[:20], totals(matrices(800, 0.8))[:20]
    assert found.verdicts[0].interval == pytest.approx(paired_intervals([first, second])[0])
    assert "intervals and pictures are of the 20 that they have in common" in " ".join(found.notes)


def test_images_of_the_same_ids_that_are_not_the_same_have_no_interval(made, tmp_path: Path) -> None:
    made("one")
    two = made("two", prefixes=())
    evaluate(two, "val", np.roll(matrices(700, 0.7), 1, axis=0))
    found = compare_runs(["one", "two"], storage=str(tmp_path / "runs"))
    assert (found.images, found.verdicts[0].interval) == ([], None)
    assert "Images of the same ids have other masks" in " ".join(found.notes)
    assert found.per_class, "what was summed over a split is still there to be looked at"


def test_groups_of_seeds_are_means(made, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        made(f"base-{seed}", seed=seed, right=0.6)
    made("new-0", right=0.61)
    found = compare_runs(["base-*", "new-*"], storage=str(tmp_path / "runs"))
    mious = [scores(matrices(seed + 600, 0.6).sum(0)).miou for seed in (0, 1, 2)]
    row = next(row for row in found.metrics if row.source == "evaluation" and row.name == "val/miou")
    assert row.counts == [3, 1]
    assert row.values[0] == pytest.approx(np.mean(mious))
    assert row.deviations == [pytest.approx(np.std(mious, ddof=1)), None]
    assert found.sides[0]["kind"] == "seeds"
    assert {"key": "seed", "values": [[0, 1, 2], [0]]} in found.config
    assert f"A {np.std(mious, ddof=1):.4f} (n = 3), B not known (one run)" in found.verdicts[0].sentence


def test_a_difference_that_seeds_explain_is_noise(made, tmp_path: Path) -> None:
    """Within a group the runs are far apart; over images the difference of the means is sure all the same."""
    for seed, right in enumerate((0.5, 0.8)):
        made(f"base-{seed}", seed=seed, right=right)
        made(f"new-{seed}", seed=seed, right=right + 0.03, losses__contrastive=0.25)
    (verdict,) = compare_runs(["base-*", "new-*"], storage=str(tmp_path / "runs")).verdicts
    base, new = (
        [scores(matrices(s + int(1000 * r), r).sum(0)).miou for s, r in enumerate(rights)]
        for rights in ((0.5, 0.8), (0.53, 0.83))
    )
    over_seeds = ttest_ind(new, base, equal_var=False).confidence_interval(0.95)
    assert verdict.interval is not None
    assert 0 < verdict.interval[0] < verdict.difference < over_seeds.high
    assert verdict.within_noise is True
    assert f"95 % interval is {over_seeds.low:+.4f} to {over_seeds.high:+.4f}, which holds 0." in verdict.sentence


def test_a_group_may_be_trained_on_other_machines(made, tmp_path: Path) -> None:
    made("base-0", seed=0, workers=2)
    made("base-1", seed=1, training__threads=3)
    made("other")
    sides, _ = find_sides(["base-*", "other"], storage=str(tmp_path / "runs"))
    assert [run.record.name for run in sides[0].runs] == ["base-0", "base-1"]


def test_a_group_may_differ_in_its_seed_only(made, tmp_path: Path) -> None:
    made("base-0", seed=0)
    made("base-1", seed=1, optimiser__lr=1e-3)
    made("twin-a", seed=4)
    made("twin-b", seed=4)
    storage = str(tmp_path / "runs")
    with pytest.raises(UserError, match=r"base-0 and base-1 differ in optimiser\.lr \(6e-05 and 0\.001\)"):
        find_sides(["base-*", "twin-a"], storage=storage)
    with pytest.raises(UserError, match="twin-a and twin-b have the same seed, 4"):
        find_sides([f"{storage}/twin-?", "base-0"], storage="elsewhere")
    with pytest.raises(UserError, match=r"no run in .* has such a name"):
        find_sides(["none-*", "twin-a"], storage=storage)
    with pytest.raises(UserError, match="takes two or more"):
        find_sides(["base-0"], storage=storage)
    with pytest.raises(UserError, match="21 runs are too many"):
        find_sides(["base-0"] * 21, storage=storage)


def result_of(storage: Path, trials: list[TrialResult], best: TrialResult | None) -> None:
    folder = RunFolder(str(storage / "sweep"))
    result = SweepResult("sweep", folder.uri, "finished", "val/miou", "max", None, None, trials, best, None)
    write_result(folder, result)


def trial(run: Run, number: int, score: float, **more: Any) -> TrialResult:
    name, folder = run.record.name, run.folder.uri
    return TrialResult(f"{number:03d}", name, "finished", {}, 20, score, {}, folder, None, None, **more)


def test_a_sweep_is_its_best_trial(made, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    trials = [trial(made(f"sweep-00{n}", right=0.7 + n / 20), n, 0.7 + n / 20, configuration=n) for n in (0, 1)]
    made("other")
    result_of(storage, trials, trials[1])
    sides, _ = find_sides(["sweep", "other"], storage=str(storage))
    assert (sides[0].name, sides[0].kind, sides[0].note) == ("sweep", "sweep", "best trial: sweep-001")
    assert [run.record.name for run in sides[0].runs] == ["sweep-001"]
    result_of(storage, [], None)
    with pytest.raises(UserError, match="has no best trial"):
        find_sides([str(storage / "sweep"), "other"], storage=str(storage))
    (storage / "running").mkdir()
    (storage / "running/sweep.yaml").touch()
    with pytest.raises(UserError, match="has come to no result yet"):
        find_sides(["running", "other"], storage=str(storage))


def test_a_sweep_that_repeats_is_all_seeds_of_its_best_configuration(made, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    runs = [made(f"sweep-00{number}", seed=number % 2) for number in range(4)]
    trials = [trial(run, n, 0.5 + n, configuration=n // 2 * 2, seed=n % 2) for n, run in enumerate(runs)]
    result_of(storage, trials, trials[2])
    made("other")
    sides, _ = find_sides(["sweep", "other"], storage=str(storage))
    assert [run.record.name for run in sides[0].runs] == ["sweep-002", "sweep-003"]
    assert sides[0].settings()["seed"] == [0, 1]


def test_the_best_checkpoints_evaluation_is_compared(made, tmp_path: Path) -> None:
    made("one")
    two = made("two", right=0.8)
    evaluate(two, "val", matrices(1, 0.3), step=30)
    storage = str(tmp_path / "runs")
    found = compare_runs(["one", "two"], storage=storage)
    assert found.evaluated is not None
    assert found.evaluated["steps"] == [[20], [20]]
    assert found.verdicts[0].values[1] == pytest.approx(scores(matrices(800, 0.8).sum(0)).miou)
    three = made("three", prefixes=())
    evaluate(three, "val", matrices(1, 0.3), step=10)
    notes = compare_runs(["one", "three"], storage=storage).notes
    assert "B (three) was evaluated at step 10, and its best checkpoint is at 20." in notes


def test_evaluations_of_other_data_are_compared_when_asked_for(made, tmp_path: Path) -> None:
    made("one", prefixes=("val/single_scale", "others.val/single_scale"))
    made("two", prefixes=("others.val/single_scale", "val/single_scale"))
    made("three", prefixes=("others.val/single_scale",))
    storage = str(tmp_path / "runs")

    def judged(*names: str, **asked: str) -> str:
        return compare_runs(names, storage=storage, **asked).verdicts[0].metric

    assert judged("one", "two") == "val/single_scale/miou"
    assert judged("one", "two", protocol="single_scale") == "val/single_scale/miou"
    assert judged("one", "two", protocol="others.val/single_scale") == "others.val/single_scale/miou"
    assert judged("one", "three") == "others.val/single_scale/miou"
    made("four", prefixes=("test/single_scale",))
    with pytest.raises(UserError, match=r"not evaluated alike under single_scale \(one as .*, four as test/single_sc"):
        compare_runs(["one", "four"], storage=storage, protocol="single_scale")


def test_a_side_without_evaluation_has_dashes_and_is_judged_by_its_training(made, tmp_path: Path) -> None:
    made("one", right=0.6)
    made("bare", right=0.7, prefixes=())
    made("two", right=0.8)
    found = compare_runs(["one", "bare", "two"], storage=str(tmp_path / "runs"))
    assert found.evaluated is not None
    assert found.evaluated["pair"] == ["A", "C"]
    assert [verdict.interval is None for verdict in found.verdicts] == [True, False]
    assert found.verdicts[0].difference == pytest.approx(
        scores(matrices(700, 0.7).sum(0)).miou - scores(matrices(600, 0.6).sum(0)).miou
    )
    assert [row["values"][1] for row in found.per_class] == [None] * 3
    row = next(row for row in found.metrics if row.source == "evaluation" and row.name == "val/miou")
    assert (row.values[1], row.differences[1], row.intervals[1]) == (None, None, None)
    assert "B (bare) has no evaluation val" in " ".join(found.notes)


def test_a_trial_whose_checkpoints_are_gone_is_compared_by_what_mlflow_has(made, tmp_path: Path) -> None:
    iou = {"val/iou/background": 0.9, "val/iou/circle": 0.5}
    made("kept", right=0.8, prefixes=(), more=iou)
    pruned = made("pruned", right=0.7, prefixes=())
    pruned.folder.remove("checkpoints.json")
    pruned.folder.remove("checkpoints")

    class Remembered(Histories):
        def of(self, run: Run) -> Tracked:
            points = {"val/miou": (40, 0.5), "val/iou/background": (40, 0.8), "val/iou/circle": (40, 0.6)}
            return Tracked(
                "0" * 32, 60.0, {**points, "cost/gpu_hours": (40, 3.0)} if run.record.name == "pruned" else {}
            )

    sides, _ = find_sides(["kept", "pruned"], storage=str(tmp_path / "runs"))
    found = differences(sides, Remembered()).comparison
    (verdict,) = found.verdicts
    kept = scores(matrices(800, 0.8).sum(0)).miou
    assert (verdict.values, verdict.interval) == ((pytest.approx(kept), 0.5), None)
    assert [(row["class"], row["differences"][1]) for row in found.per_class] == [
        ("background", pytest.approx(-0.1)),
        ("circle", pytest.approx(0.1)),
    ]
    assert found.classes_of == "val/miou, last step"
    run = found.sides[1]["runs"][0]
    assert (run["step"], run["best_step"], run["hours"], run["hours_of"]) == (40, None, 3.0, "GPU")
    assert "none is written yet: pruned. Their metrics are those that MLflow has" in " ".join(found.notes)


def test_the_confusion_difference_is_of_the_shares_of_true_classes(made, tmp_path: Path) -> None:
    for seed in (0, 1):
        made(f"base-{seed}", seed=seed, right=0.6)
    made("new", right=0.8)
    sides, _ = find_sides(["base-*", "new"], storage=str(tmp_path / "runs"))
    found = confusion_difference(differences(sides, Histories()))
    assert found is not None
    classes, difference = found
    assert classes == ["background", *CLASSES]
    for true in range(3):
        for given in range(3):
            shares = [
                m[true, given] / m[true].sum()
                for m in (matrices(s, r).sum(0) for s, r in ((600, 0.6), (601, 0.6), (800, 0.8)))
            ]
            assert difference[true, given] == pytest.approx(shares[2] - (shares[0] + shares[1]) / 2)


def test_what_is_measured_otherwise_is_said(made, tmp_path: Path) -> None:
    made("one", prefixes=("val/single_scale",))
    two = made("two", prefixes=("val/single_scale",), evaluation__scales=[1.0])
    place = two.folder.path + "/evaluations/val.single_scale/step_00000020/result.json"
    result = json.loads(Path(place).read_text())
    result["protocol"] |= {"flip": True, "batch_size": 2}
    Path(place).write_text(json.dumps(result))
    notes = " ".join(compare_runs(["one", "two"], storage=str(tmp_path / "runs")).notes)
    assert "evaluation.scales differ" in notes
    assert "B (two) was evaluated with other settings than A (one), though the name is the same: flip True" in notes


def test_runs_of_other_classes_have_no_interval(made, tmp_path: Path) -> None:
    made("one")
    made("two", classes=("circle", "triangle"))
    found = compare_runs(["one", "two"], storage=str(tmp_path / "runs"))
    assert (found.per_class, found.images, found.verdicts[0].interval) == ([], [], None)
    assert "The runs have other classes" in " ".join(found.notes)


def test_a_missing_evaluation_says_which_command_makes_it(made, tmp_path: Path) -> None:
    made("one", prefixes=("val", "val/single_scale"))
    two = made("two", prefixes=())
    storage = str(tmp_path / "runs")
    command = re.escape(f"cosa-ray evaluate {two.folder.uri} --protocol single_scale")
    with pytest.raises(UserError, match=f"run two has no evaluation under single_scale; make it with: {command}"):
        compare_runs(["one", "two"], storage=storage, protocol="single_scale")
    found = compare_runs(["one", "two"], storage=storage)
    assert found.evaluated is None
    assert "cosa-ray evaluate" in found.notes[1]
    assert "by the best checkpoint, of which there is no interval" in found.verdicts[0].sentence
    made("three", prefixes=("val", "val/single_scale"))
    assert compare_runs(["one", "three"], storage=storage).verdicts[0].metric == "val/miou"
    named = compare_runs(["one", "three"], storage=storage, protocol="single_scale")
    assert named.verdicts[0].metric == "val/single_scale/miou"
    with pytest.raises(UserError, match="--metric miou_online: these evaluations have miou in common"):
        compare_runs(["one", "three"], storage=storage, metric="miou_online")


class Tags(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_trusts_no_name(made, tmp_path: Path) -> None:
    hostile = '<b>&"<script>alert(1)</script>'
    classes = (hostile, '" onmouseover="alert(2)')
    made("one", right=0.6, classes=classes)
    made("two", right=0.8, classes=classes, data__train_split="</td><img src=x onerror=alert(3)>")
    page = tmp_path / "page.html"
    compare_runs(["one", "two"], storage=str(tmp_path / "runs"), html=page, pictures=False)
    seen = Tags()
    seen.feed(page.read_text())
    assert [tag for tag, _ in seen.tags].count("script") == 1, "only the page's own"
    assert not [tag for tag, _ in seen.tags if tag == "img"]
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert hostile in seen.text
    outside = [value for _, a in seen.tags for name, value in a.items() if name in ("src", "href")]
    assert outside == ["data:,"], "nothing is loaded from anywhere"
    assert "default-src 'none'" in page.read_text()
    with pytest.raises(UserError, match="exists already: add --force"):
        compare_runs(["one", "two"], storage=str(tmp_path / "runs"), html=page)
    compare_runs(["one", "two"], storage=str(tmp_path / "runs"), html=page, pictures=False, force=True)


def test_a_page_without_its_data_set_says_so(made, tmp_path: Path) -> None:
    made("one", right=0.6)
    made("two", right=0.8)
    page = tmp_path / "page.html"
    compare_runs(["one", "two"], storage=str(tmp_path / "runs"), html=page)
    assert "The images cannot be drawn: " in page.read_text()


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.3137, 0.3201), (-5e-5, 4e-5), (0, 31_999), (2.0, 2.0), (0, 0)]
)
def test_ticks_are_round_and_span_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_settings_are_short_unless_they_would_look_alike() -> None:
    assert settings([0.5363451269665402, None, True, "auto", [1.0, 0.5]]) == [
        "0.536345",
        "null",
        "true",
        "auto",
        "[1.0, 0.5]",
    ]
    assert settings([0.1234567, 0.1234568]) == ["0.1234567", "0.1234568"]


def test_long_curves_are_averaged_in_groups() -> None:
    points = [(step, float(step % 7)) for step in range(1, 1001)]
    thin = _thinned(points)
    assert len(thin) <= POINTS
    assert thin[0] == (5, pytest.approx(np.mean([value for _, value in points[:5]])))
    assert thin[-1][0] == 1000
    assert _thinned(points[:POINTS]) == points[:POINTS]
