"""The report of a sweep: what was tried as a study, tables, which settings mattered, figures that show something."""

from __future__ import annotations

import csv
import io
import logging
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cosa_ray.tuning import figures
from cosa_ray.tuning import importance as importance_module
from cosa_ray.tuning.importance import FEWEST, importance, study_of
from cosa_ray.tuning.interactions import FEWEST as PAIRED
from cosa_ray.tuning.interactions import interactions
from cosa_ray.tuning.journal import Entry, Report
from cosa_ray.tuning.parent import Parent
from cosa_ray.tuning.report import as_csv, as_html, by_configuration, leaderboard, log_report, tags
from cosa_ray.tuning.results import SweepResult, TrialResult, best_trial, pareto_front, write_result
from cosa_ray.tuning.search import trial_scores
from cosa_ray.tuning.space import Dimension, sample
from cosa_ray.tuning.sweepfile import Sweep

MIOU = {"val/miou": "max"}
BOTH = {"val/miou": "max", "cost/cpu_hours": "min"}
PLAIN = {"losses.cam_to_seg": {"uniform": [0.0, 1.0]}, "losses.seg_to_cam": {"uniform": [0.0, 1.0]}}
RICH = {
    "optimiser.lr": {"loguniform": [1e-5, 1e-2]},
    "losses.cam_to_seg": {"uniform": [0.0, 1.0]},
    "losses.seg_to_cam": {"same": "losses.cam_to_seg", "times": 0.5},
    "pseudo_labels.policy": {"choice": ["single", "reliability"]},
    "dynamic_threshold.enabled": {"choice": [True, False]},
    "dynamic_threshold.momentum": {"choice": [0.9, 0.99, 0.999], "when": {"dynamic_threshold.enabled": True}},
    "training.batch_size": {"lograndint": [1, 16]},
}
ONE_FOR_ALL = {
    "pseudo_labels.policy": {"choice": ["single", "two_threshold"]},
    "pseudo_labels.threshold": {"uniform": [0.3, 0.6], "when": {"pseudo_labels.policy": "single"}},
    "pseudo_labels.high": {"uniform": [0.6, 0.8], "when": {"pseudo_labels.policy": "two_threshold"}},
}


def space_of(said: dict) -> dict[str, Dimension]:
    return {name: Dimension.model_validate(each) for name, each in said.items()}


def entry(number: int, values: dict, *scores: float, state: str = "finished", **more) -> Entry:
    """A trial evaluated every 100 steps."""
    reports = tuple(Report(100 * (i + 1), {"val/miou": score}, 0.0) for i, score in enumerate(scores))
    more = {"configuration": number, "step": 100 * len(scores), "hours": 0.01 * (number + 1), **more}
    return Entry(number, values, state=state, reports=reports, **more)


def result_of(entries: list[Entry], metrics: dict[str, str], folder: Path = Path("/nowhere"), **more) -> SweepResult:
    trials = []
    for each in entries:
        scores = trial_scores(each, metrics) or ()
        trials.append(
            TrialResult(
                id=each.id,
                name=f"s-{each.id}",
                state=each.state,
                values=each.values,
                step=each.step,
                score=scores[0] if scores else None,
                metrics={},
                folder=f"{folder}-{each.id}",
                mlflow_run_id=f"run-{each.id}",
                cause=each.cause,
                scores=dict(zip(metrics, scores, strict=False)),
                kind=each.kind,
                stopped_by=each.ended_by,
                hours=each.hours,
                configuration=each.configuration,
                seed=each.seed or 0,
            )
        )
    best = best_trial(trials, metrics)
    metric, mode = next(iter(metrics.items()))
    front = [trial.id for trial in pareto_front(trials, metrics)] if len(metrics) > 1 else []
    said = {"state": "finished" if best else "failed", "hours": sum(t.hours for t in trials), "seconds": 90.0, **more}
    return SweepResult(
        name="s",
        folder=str(folder),
        metric=metric,
        mode=mode,
        parent_run_id=None,
        tracking_uri=None,
        trials=trials,
        best=best,
        best_file=str(folder / "best.yaml") if best else None,
        metrics=dict(metrics),
        front=front,
        **said,
    )


def swept(count: int, space: dict, metrics: dict[str, str], *, failing: int = 0) -> list[Entry]:
    """A made-up sweep at random: every `failing`-th trial diverges, and of one metric the poor are given up."""
    generator = np.random.default_rng(0)
    entries = []
    for number in range(count):
        values = sample(space, lambda _, dimension: dimension.draw(generator))
        quality = 0.5 - 0.1 * abs(np.log10(values.get("optimiser.lr", 1e-3)) + 3) + 0.1 * values["losses.cam_to_seg"]
        state, reports = "finished", []
        for step in (100, 200, 300):
            score = float(quality * step / 300 + generator.normal(0, 0.01))
            reports.append(Report(step, {"val/miou": score, "cost/cpu_hours": 0.1 + float(generator.uniform())}, 0.0))
            if len(metrics) == 1 and step == 200 and score < 0.25:
                state = "stopped_early"
                break
        known = {"ended_by": "asha"} if state == "stopped_early" else {}
        if failing and number % failing == failing - 1:
            state, reports, known = "failed", reports[:1], {"kind": "diverged", "cause": "loss <a> is not finite"}
        hours = float(generator.uniform(0.1, 0.3))
        entries.append(
            Entry(
                number, values, number, state=state, step=reports[-1].step, hours=hours, reports=tuple(reports), **known
            )
        )
    return entries


def test_the_study_is_what_was_tried() -> None:
    space = space_of(RICH)
    tried = {"optimiser.lr": 1e-3, "losses.cam_to_seg": 0.4, "losses.seg_to_cam": 0.2, "pseudo_labels.policy": "single"}
    off = {**tried, "dynamic_threshold.enabled": False, "training.batch_size": 4}
    on = {**off, "dynamic_threshold.enabled": True, "dynamic_threshold.momentum": 0.99}
    entries = [
        entry(0, off, 0.2, 0.5, 0.4),
        entry(1, on, 0.1, 0.3, state="stopped_early", ended_by="asha"),
        entry(2, off, 0.7, state="failed", kind="diverged"),
        entry(3, off, 0.6, state="interrupted"),
        entry(4, on, 0.35, state="interrupted", ended_by="budget"),
        entry(5, on, state="interrupted", ended_by="budget"),
    ]
    trials = study_of(space, entries, MIOU).trials
    assert [trial.number for trial in trials] == list(range(6))
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "PRUNED", "RUNNING"]
    assert trials[0].value == 0.5
    assert trials[1].intermediate_values == {100: 0.1, 200: 0.3}
    assert [trial.user_attrs.get("scores") for trial in trials] == [[0.5], [0.3], None, [0.6], [0.35], None]
    assert trials[0].params == {name: value for name, value in off.items() if name != "losses.seg_to_cam"}
    assert trials[1].params["dynamic_threshold.momentum"] == 0.99
    assert trials[0].distributions["optimiser.lr"].log


def test_repeats_are_one_trial_of_the_study_with_their_mean() -> None:
    values = [{"losses.cam_to_seg": 0.1 * place, "losses.seg_to_cam": 0.5} for place in range(2)]
    entries = [
        entry(0, values[0], 0.4, configuration=0, seed=7),
        entry(1, values[0], 0.6, configuration=0, seed=8),
        entry(2, values[1], 0.1, configuration=2, seed=7),
        entry(3, values[1], configuration=2, seed=8, state="failed"),
    ]
    study = study_of(space_of(PLAIN), entries, MIOU)
    assert [trial.value for trial in study.trials] == [0.5, 0.1]
    assert [trial.user_attrs["trials"] for trial in study.trials] == [["000", "001"], ["002", "003"]]
    assert study.best_trial.number == 0


def test_the_study_of_several_metrics_takes_the_last_evaluation() -> None:
    reports = (
        Report(1, {"val/miou": 0.9, "cost/cpu_hours": 1.0}, 0),
        Report(2, {"val/miou": 0.4, "cost/cpu_hours": 2.0}, 0),
    )
    values = {"losses.cam_to_seg": 0.1, "losses.seg_to_cam": 0.5}
    better = replace(
        entry(1, values, state="finished"), reports=(Report(1, {"val/miou": 0.5, "cost/cpu_hours": 1.5}, 0),)
    )
    study = study_of(space_of(PLAIN), [Entry(0, values, 0, state="finished", reports=reports), better], BOTH)
    assert [trial.values for trial in study.trials] == [[0.4, 2.0], [0.5, 1.5]]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [trial.number for trial in study.best_trials] == [1]


def test_the_leaderboard_says_what_became_of_every_trial() -> None:
    entries = [
        entry(0, {"optimiser.lr": 1e-3, "pseudo_labels.policy": None}, 0.1, 0.3),
        entry(1, {"optimiser.lr": 2e-3}, 0.7, 0.6),
        entry(2, {"optimiser.lr": 3e-3}, 0.9, state="failed", kind="out_of_memory", cause='said "no, never" <b>'),
        entry(3, {"optimiser.lr": 4e-3}, 0.8, state="interrupted"),
        entry(4, {"optimiser.lr": 5e-3}, 0.2, state="stopped_early", ended_by="asha"),
    ]
    result = result_of(entries, MIOU)
    rows = list(csv.DictReader(io.StringIO(as_csv(leaderboard(result)))))
    assert [(row["rank"], row["trial"]) for row in rows] == [
        ("1", "s-001"),
        ("2", "s-000"),
        ("3", "s-004"),
        ("", "s-003"),
        ("", "s-002"),
    ]
    assert [row["val/miou"] for row in rows] == ["0.7", "0.3", "0.2", "0.8", ""]
    assert [row["step"] for row in rows] == ["200", "200", "100", "100", "100"]
    assert rows[1]["pseudo_labels.policy"] == "null"
    assert rows[0]["pseudo_labels.policy"] == ""
    assert (rows[4]["failure"], rows[4]["cause"]) == ("out_of_memory", 'said "no, never" <b>')
    assert (rows[2]["state"], rows[2]["stopped_by"]) == ("stopped early", "asha")
    assert [float(row["cpu_hours"]) for row in rows] == [0.02, 0.01, 0.05, 0.04, 0.03]
    assert rows[0]["mlflow_run_id"] == "run-001"
    assert "seed" not in rows[0]
    page = as_html(result, [leaderboard(result)])
    assert "said &quot;no, never&quot; &lt;b&gt;" in page
    assert page.count("<tr class=best>") == 1
    assert "<tr class=best><td class=n>1</td><td>s-001</td>" in page


def test_configurations_are_ranked_by_their_mean() -> None:
    scores = {0: [0.30, 0.90, None], 3: [0.60, 0.65, 0.70], 6: [None, None, None]}
    entries = [
        entry(first + seed, {"optimiser.lr": 0.1 * first}, *([score] if score else []), configuration=first, seed=seed)
        if score
        else entry(first + seed, {"optimiser.lr": 0.1 * first}, configuration=first, seed=seed, state="failed")
        for first, group in scores.items()
        for seed, score in enumerate(group)
    ]
    result = result_of(entries, MIOU)
    table = by_configuration(result)
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [(row["rank"], row["configuration"], row["n"]) for row in rows] == [
        ("1", "003", "3"),
        ("2", "000", "2"),
        ("", "006", "0"),
    ]
    for row, group in zip(rows[:2], ([0.6, 0.65, 0.7], [0.3, 0.9]), strict=True):
        assert float(row["val/miou mean"]) == pytest.approx(statistics.mean(group), rel=1e-5)
        assert float(row["val/miou std"]) == pytest.approx(statistics.stdev(group), rel=1e-5)
    assert (rows[2]["val/miou mean"], rows[2]["trials"]) == ("", "006 007 008")
    assert table.best == {0}
    assert result.best is not None
    assert result.best.configuration == 3
    assert [row["seed"] for row in csv.DictReader(io.StringIO(as_csv(leaderboard(result))))][:2] == ["1", "2"]


def scored(count: int, space: dict, score) -> list[Entry]:
    generator = np.random.default_rng(1)
    points = [sample(space, lambda _, dimension: dimension.draw(generator)) for _ in range(count)]
    return [entry(number, values, float(score(values))) for number, values in enumerate(points)]


def test_importance_of_many_configurations_is_that_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna import Study
    from optuna.importance import FanovaImportanceEvaluator

    space = space_of({"losses.cam_to_seg": {"uniform": [0, 1]}, "losses.contrastive": {"uniform": [0, 1]}})
    entries = scored(30, space, lambda v: v["losses.cam_to_seg"] + 0.05 * v["losses.contrastive"])
    judged: list[int] = []
    evaluate = FanovaImportanceEvaluator.evaluate

    def counted(self: FanovaImportanceEvaluator, study: Study, *args: object, **more: object) -> dict[str, float]:
        judged.append(len(study.trials))
        return evaluate(self, study, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(FanovaImportanceEvaluator, "evaluate", counted)
    monkeypatch.setattr(importance_module, "MOST", 12)
    found = importance(study_of(space, entries, MIOU), entries, MIOU)["val/miou"]
    assert judged == [12]
    assert found.configurations == len(entries)
    assert next(iter(found.shares)) == "losses.cam_to_seg"
    assert sum(found.shares.values()) == pytest.approx(1)


def test_importance_is_optunas_and_finds_the_setting_that_matters() -> None:
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    space = space_of({**PLAIN, "losses.contrastive": {"uniform": [0.0, 1.0]}})
    entries = scored(30, space, lambda v: v["losses.seg_to_cam"] ** 2 + 0.05 * v["losses.contrastive"])
    study = study_of(space, entries, MIOU)
    found = importance(study, entries, MIOU)["val/miou"]
    assert found.shares == get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    assert next(iter(found.shares)) == "losses.seg_to_cam"
    assert found.shares["losses.seg_to_cam"] > 0.8
    assert sum(found.shares.values()) == pytest.approx(1)
    assert (found.configurations, found.note, found.early) == (30, None, {})


def test_a_logarithmic_setting_matters_by_its_logarithm() -> None:
    """Only the lowest of three decades makes a difference: 1 % of the range, a third of what is searched."""
    space = space_of({"optimiser.lr": {"loguniform": [1e-5, 1e-2]}, "losses.cam_to_seg": {"uniform": [0, 1]}})
    entries = scored(40, space, lambda v: (v["optimiser.lr"] > 1e-4) + 0.3 * v["losses.cam_to_seg"])
    found = importance(study_of(space, entries, MIOU), entries, MIOU)["val/miou"]
    # The variances by hand: 1/3 * 2/3 of the step, 0.3² / 12 of the slope.
    assert found.shares["optimiser.lr"] == pytest.approx(2 / 9 / (2 / 9 + 0.09 / 12), abs=0.05)


def test_a_conditional_setting_is_judged_where_it_is_set_and_a_given_up_trial_by_its_step() -> None:
    space = space_of(
        {
            "losses.cam_to_seg": {"uniform": [0, 1]},
            "dynamic_threshold.enabled": {"choice": [True, False]},
            "dynamic_threshold.tolerance": {"uniform": [0, 1], "when": {"dynamic_threshold.enabled": True}},
        }
    )
    entries = scored(40, space, lambda v: v.get("dynamic_threshold.tolerance", 0.5) + 0.1 * v["losses.cam_to_seg"])
    # Those with a small loss weight are given up at step 100; at that step all have it as their score.
    entries = [
        entry(e.number, e.values, 0.2 * e.values["losses.cam_to_seg"], state="stopped_early", ended_by="asha")
        if e.values["losses.cam_to_seg"] < 0.3
        else entry(e.number, e.values, 0.2 * e.values["losses.cam_to_seg"], 1 + e.reports[0].metrics["val/miou"])
        for e in entries
    ]
    found = importance(study_of(space, entries, MIOU), entries, MIOU)["val/miou"]
    ended = [e for e in entries if e.state == "finished"]
    assert found.configurations == len(ended) < 40
    assert found.among == {"dynamic_threshold.tolerance": sum(e.values["dynamic_threshold.enabled"] for e in ended)}
    assert found.conditional["dynamic_threshold.tolerance"] > 0.8
    assert "dynamic_threshold.tolerance" not in found.shares
    assert found.early_step == 100
    assert found.early["losses.cam_to_seg"] > 0.95


def test_who_was_cut_by_the_budget_explains_nothing() -> None:
    space = space_of(PLAIN)
    whole = scored(FEWEST, space, lambda v: v["losses.cam_to_seg"])
    cut = [
        entry(FEWEST + number, each.values, 0.0, state="interrupted", ended_by="budget")
        for number, each in enumerate(whole[:2])
    ]
    study = study_of(space, [*whole, *cut], MIOU)
    found = importance(study, [*whole, *cut], MIOU)["val/miou"]
    assert (found.configurations, found.early_step) == (FEWEST, None)
    assert found.shares == importance(study_of(space, whole, MIOU), whole, MIOU)["val/miou"].shares
    assert [trial.state.name for trial in study.trials[FEWEST:]] == ["PRUNED", "PRUNED"]
    # Nor does it say up to which step those can be compared that the scheduler gave up.
    judged = [*whole, entry(FEWEST + 2, whole[0].values, 0.1, state="stopped_early", ended_by="asha")]
    later = [replace(each, reports=tuple(replace(report, step=200) for report in each.reports)) for each in judged]
    early = [*later, *cut]
    assert importance(study_of(space, early, MIOU), early, MIOU)["val/miou"].early_step == 200


@pytest.mark.parametrize(
    ("count", "said", "score", "sentence"),
    [
        (FEWEST - 1, PLAIN, lambda v: v["losses.cam_to_seg"], f"there are {FEWEST - 1}"),
        (FEWEST, PLAIN, lambda v: 0.5, "the same score"),
        (20, {"losses.cam_to_seg": PLAIN["losses.cam_to_seg"]}, lambda v: v["losses.cam_to_seg"], "only one setting"),
        (30, ONE_FOR_ALL, lambda v: v.get("pseudo_labels.high", 0.5), "only one setting varies in all"),
        (0, PLAIN, None, "there are 0"),
    ],
)
def test_where_importance_cannot_be_told_a_sentence_says_why(count: int, said: dict, score, sentence: str) -> None:
    space = space_of(said)
    entries = scored(count, space, score)
    found = importance(study_of(space, entries, MIOU), entries, MIOU)["val/miou"]
    assert found.shares == {}
    assert sentence in (found.note or "")


def test_a_pair_has_the_share_that_its_formula_gives() -> None:
    """Of a + b + 4 (a - 1/2) (b - 1/2) both alone have 1/12 of variance and the pair (4 / 12)²; a third has nothing."""
    space = space_of({**PLAIN, "losses.contrastive": {"loguniform": [0.01, 1.0]}})
    names = ("losses.cam_to_seg", "losses.seg_to_cam")

    def score(values: dict) -> float:
        a, b = (values[name] for name in names)
        return a + b + 4 * (a - 0.5) * (b - 0.5)

    entries = scored(400, space, score)
    found = interactions(study_of(space, entries, MIOU), entries, 0)
    whole = 2 / 12 + (4 / 12) ** 2
    assert next(iter(found.pairs)) == names
    assert found.pairs[names] == pytest.approx((4 / 12) ** 2 / whole, abs=0.08)
    assert [found.alone[name] for name in names] == pytest.approx([1 / 12 / whole] * 2, abs=0.08)
    assert all(share < 0.02 for pair, share in found.pairs.items() if pair != names)
    assert found.predicted is not None
    assert found.predicted > 0.9
    corner = found.surface[-1][-1]
    assert corner == max(max(row) for row in found.surface)
    assert found.said()["pairs"][" x ".join(names)] == found.pairs[names]


def test_settings_that_add_up_do_not_act_together_and_noise_is_not_predicted() -> None:
    space = space_of({**PLAIN, "pseudo_labels.policy": {"choice": ["single", "reliability"]}})
    entries = scored(200, space, lambda v: v["losses.cam_to_seg"] + (v["pseudo_labels.policy"] == "single"))
    found = interactions(study_of(space, entries, MIOU), entries, 0)
    assert max(found.pairs.values()) < 0.02
    # 1/4 of a coin's variance, 1/12 of the slope's.
    assert found.alone["pseudo_labels.policy"] == pytest.approx(0.75, abs=0.05)
    generator = np.random.default_rng(3)
    entries = scored(200, space, lambda _: generator.normal())
    noise = interactions(study_of(space, entries, MIOU), entries, 0)
    assert noise.predicted is not None
    assert noise.predicted < 0.1


@pytest.mark.parametrize(
    ("count", "said", "score", "sentence"),
    [
        (PAIRED - 1, PLAIN, lambda v: v["losses.cam_to_seg"], f"there are {PAIRED - 1}"),
        (PAIRED, PLAIN, lambda v: 0.5, "the same score"),
        (PAIRED, {"losses.cam_to_seg": PLAIN["losses.cam_to_seg"]}, lambda v: v["losses.cam_to_seg"], "only one"),
    ],
)
def test_where_pairs_cannot_be_told_a_sentence_says_why(count: int, said: dict, score, sentence: str) -> None:
    space = space_of(said)
    entries = scored(count, space, score)
    found = interactions(study_of(space, entries, MIOU), entries, 0)
    assert found.pairs == {}
    assert sentence in (found.note or "")


def test_pairs_of_settings_that_changed_on_the_way_are_not_told() -> None:
    space = space_of(PLAIN)
    entries = scored(PAIRED, space, lambda v: v["losses.cam_to_seg"])
    copied = replace(entries[3], lineage=({"step": 100, "donor": 1, "values": {}},))
    entries = [*entries[:3], copied, *entries[4:]]
    assert "settings changed" in (interactions(study_of(space, entries, MIOU), entries, 0).note or "")


class Recorder:
    """Stands for a tracker; draws figures as it does."""

    run_id = "id"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.metrics: list[tuple[dict[str, float], int]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append((metrics, step))

    def set_tags(self, values: dict[str, str]) -> None:
        self.tags |= values

    def log_text(self, path: str, text: str) -> None:
        self.files[path] = text.encode()

    def log_dict(self, path: str, value: dict) -> None:
        self.files[path] = repr(value).encode()

    def log_figure(self, path: str, figure) -> None:
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        self.files[path] = stream.getvalue()

    def finish(self, status: str) -> None:
        self.tags["status"] = status


class Histories:
    """Stands for a store and its client: every run has one threshold, logged every 50 steps, the last one twice."""

    experiment, shown = "e", "store"

    def __init__(self, steps: int = 300, away: bool = False) -> None:
        self.steps, self.away = steps, away
        self.asked: list[str] = []

    def client(self) -> Histories:
        return self

    def said(self, error: BaseException) -> str:
        return str(error)

    def get_experiment_by_name(self, name: str) -> None:
        if self.away:
            raise ConnectionError("nobody is there")

    def get_run(self, run_id: str) -> SimpleNamespace:
        return SimpleNamespace(data=SimpleNamespace(metrics={"threshold/background": 0.4, "train/loss": 1.0}))

    def get_metric_history(self, run_id: str, key: str) -> list[SimpleNamespace]:
        self.asked.append(key)
        steps = [*range(50, self.steps + 1, 50), self.steps]
        return [
            SimpleNamespace(step=step, timestamp=place, value=0.4 + step / 2000 + 0.01 * int(run_id[-2:]))
            for place, step in enumerate(steps)
        ]


def sweep_of(space: dict, metrics: dict[str, str]) -> Sweep:
    said = {name: each.model_dump(mode="json", exclude_defaults=True) for name, each in space.items()}
    return Sweep.model_validate(
        {"base": "b", "space": said, "search": "random", "metric": list(metrics), "mode": list(metrics.values())}
    )


def colours(data: bytes) -> tuple[int, int, int]:
    """Width, height, and how many pixels are not white, of a PNG."""
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG"
    pixels = np.asarray(picture.convert("RGB"))
    return picture.width, picture.height, int((pixels < 250).any(-1).sum())


CASES = {
    "60 trials, conditional": (60, RICH, MIOU, 9),
    "several metrics": (10, PLAIN, BOTH, 5),
    "one trial": (1, PLAIN, MIOU, 0),
    "all failed": (4, PLAIN, MIOU, 1),
    "none started": (0, PLAIN, MIOU, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_every_figure_is_drawn(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    count, said, metrics, failing = CASES[case]
    space = space_of(said)
    entries = swept(count, space, metrics, failing=failing)
    result = result_of(entries, metrics, tmp_path)
    (tmp_path / "best.yaml").write_text("the best\n")
    tracker, store = Recorder(), Histories()
    with caplog.at_level(logging.WARNING):
        log_report(tracker, store, sweep_of(space, metrics), result, entries)
    assert not caplog.records
    drawn = {path.removeprefix("sweep/").removesuffix(".png") for path in tracker.files if path.endswith(".png")}
    expected = {"history", "curves", "cost", "importance", "interactions", "parallel", "slice", "thresholds"}
    assert drawn == expected | ({"pareto"} if len(metrics) > 1 else set())
    texts = {path.removeprefix("sweep/") for path in tracker.files if not path.endswith(".png")}
    assert texts == {"leaderboard.csv", "leaderboard.html", "importance.json"} | (
        {"best.yaml"} if result.best else set()
    )
    inks = {name: colours(tracker.files[f"sweep/{name}.png"]) for name in drawn}
    assert all(width >= 880 for width, _, _ in inks.values())
    assert all(ink > 500 for _, _, ink in inks.values())
    # A sentence is a low picture; a figure is none.
    sentences = {name for name, (_, height, _) in inks.items() if height < 300}
    assert (
        sentences
        == {
            "60 trials, conditional": set(),
            "several metrics": {"interactions"},
            "one trial": {"importance", "interactions"},
            "all failed": expected - {"cost", "thresholds", "curves"},
            "none started": expected,
        }[case]
    )
    assert set(store.asked) <= {"threshold/background"}
    assert len(store.asked) == count
    assert f"{count} trials" in tracker.tags["mlflow.note.content"]
    if result.best is not None:
        assert f"trial {result.best.id} with val/miou {result.best.score:.4g}" in tracker.tags["mlflow.note.content"]


def test_a_figure_shows_its_data() -> None:
    """Without the last trial it is another picture."""
    space = space_of(PLAIN)
    entries = swept(6, space, MIOU)
    whole, less = (result_of(chosen, MIOU) for chosen in (entries, entries[:-1]))
    for draw in (figures.history, figures.cost):
        pictures = []
        for result in (whole, less):
            tracker = Recorder()
            tracker.log_figure("f", draw(result))
            pictures.append(np.asarray(Image.open(io.BytesIO(tracker.files["f"])).convert("L")))
        assert (pictures[0] != pictures[1]).sum() > 100


def test_what_fails_in_the_report_fails_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    space = space_of(PLAIN)
    entries = swept(3, space, MIOU)

    def broken(result: SweepResult) -> None:
        raise ZeroDivisionError("no figure today")

    monkeypatch.setattr(figures, "cost", broken)
    tracker = Recorder()
    log_report(tracker, Histories(away=True), sweep_of(space, MIOU), result_of(entries, MIOU, tmp_path), entries)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "sweep s: its MLflow run lacks cost.png (no figure today)"
    ]
    assert "sweep/cost.png" not in tracker.files
    assert colours(tracker.files["sweep/thresholds.png"])[1] < 300
    assert {"sweep/history.png", "sweep/slice.png", "sweep/leaderboard.html"} <= set(tracker.files)


def test_the_parent_run_says_how_the_sweep_ended_and_what_it_cost(tmp_path: Path) -> None:
    entries = [
        entry(0, {"optimiser.lr": 0.1}, 0.2, 0.5),
        entry(1, {"optimiser.lr": 0.2}, 0.1, state="stopped_early", ended_by="asha"),
        entry(2, {"optimiser.lr": 0.3}, state="failed", kind="died", cause="it was killed"),
    ]
    result = result_of(entries, MIOU, tmp_path, state="failed", cause="3 trials in a row failed")
    tracker = Recorder()
    Parent(tracker, None, None).finish(result, entries)
    expected = {
        "val/miou": 0.5,
        "cost/cpu_hours": pytest.approx(0.06),
        "sweep/seconds": 90.0,
        "sweep/trials": 3,
        "sweep/failed": 1,
        "sweep/stopped_early": 1,
    }
    assert tracker.metrics == [(expected, 300)]
    assert tracker.tags == {
        "cosa_ray.state": "failed",
        "cosa_ray.best_trial": "s-000",
        "cosa_ray.cause": "3 trials in a row failed",
        "status": "FAILED",
    }
    assert set(tracker.files) == {"sweep/sweep.json"}

    # Resumed, it ends well: the cause is not left standing.
    from cosa_ray.training.storage import RunFolder

    assert "cosa_ray.cause" not in tags(replace(result, state="finished", cause=None))
    write_result(RunFolder(str(tmp_path)), result)
    assert tags(replace(result, state="finished", cause=None))["cosa_ray.cause"] == ""
