"""Sweep files: read, overridden, refused in one sentence, written back; and schedules that could not work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from cosa_ray.config.load import SHIPPED, apply_overrides, load_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.tuning.check import check_sweep, complete, generations, grace_steps, rungs, wanted
from cosa_ray.tuning.space import Dimension
from cosa_ray.tuning.sweepfile import Sweep, dump_sweep, find_sweep, load_sweep

BASE = "training: {steps: 1000, warmup_iters: 400}\nevaluation: {every: 100}\noptimiser: {warmup_steps: 10}\n"
LR = {"optimiser.lr": {"loguniform": [1e-5, 1e-2]}}
WEIGHTS = {"losses.cam_to_seg": {"uniform": [0, 1]}}


def write(folder: Path, sweep: str) -> Path:
    (folder / "base.yaml").write_text(BASE)
    (folder / "sweep.yaml").write_text("base: base.yaml\n" + sweep)
    return folder / "sweep.yaml"


def sweep_of(space: dict[str, Any] | None = None, **more: Any) -> Sweep:
    return Sweep.model_validate({"base": "base", "space": LR if space is None else space, **more})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("base")
    write(folder, "")
    return load_config(folder / "base.yaml")


def test_overrides_reach_the_sweep_or_its_base(tmp_path: Path) -> None:
    file = write(tmp_path, "set: {training.batch_size: 8}\nspace: {optimiser.lr: {loguniform: [1e-4, 1e-3]}}\n")
    sweep, base = load_sweep(file, ["trials=3", "asha.reduction_factor=4", "seed=7", "training.steps=900"])
    assert (sweep.trials, sweep.asha.reduction_factor) == (3, 4.0)
    assert (base.training.batch_size, base.training.steps, base.training.warmup_iters, base.seed) == (8, 900, 400, 7)


def test_overrides_give_take_and_add_whole_dimensions(tmp_path: Path) -> None:
    file = write(tmp_path, "space: {optimiser.lr: {loguniform: [1e-4, 1e-3]}, losses.cam_to_seg: {uniform: [0, 1]}}\n")
    given = ["space.optimiser.lr={uniform: [0.1, 0.2]}", "space.losses.cam_to_seg=null", "space.seed.choice=[1, 2]"]
    sweep, _ = load_sweep(file, given)
    assert sweep.space == {"optimiser.lr": Dimension(uniform=(0.1, 0.2)), "seed": Dimension(choice=(1, 2))}
    with pytest.raises(UserError, match=r"with --set: .*low < high"):
        load_sweep(file, ["space.optimiser.lr={uniform: [0.2, 0.1]}"])


@pytest.mark.parametrize(
    ("sweep", "overrides", "words"),
    [
        ("trials: 2\n", [], ["lacks space"]),
        ("space: {optimiser.lr: {uniform: [1e-4, 1e-3]}}\ntrails: 2\n", [], ["trails", "did you mean trials?"]),
        ("space: {optimiser.lr: {unifrom: [1e-4, 1e-3]}}\n", [], ["unifrom"]),
        ("space: {optimiser.lr: {uniform: [1e-3, 1e-4]}}\n", [], ["low < high"]),
        ("space: {optimiser.lr: {uniform: [1e-4, 1e-3]}}\nset: {training.stepz: 4}\n", [], ["training.steps"]),
        ("space: {optimiser.lr: {uniform: [1e-4, 1e-3]}}\n", ["trails=2"], ["trails", "trials"]),
        ("space: {optimiser.lr: {uniform: [1e-4, 1e-3]}}\nsearch: bohb\n", [], ["search", "'tpe'"]),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(
    tmp_path: Path, sweep: str, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_sweep(write(tmp_path, sweep), overrides)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_an_experiment_is_no_sweep() -> None:
    with pytest.raises(UserError, match="cosa-ray train"):
        load_sweep("coco.yaml")


EARLIER = {"runs": "status = 'FINISHED'"}


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"metric": []}, "at least one name"),
        ({"metric": ["val/miou", "val/miou"]}, "each once"),
        ({"metric": ["val/miou", "val/map"], "mode": ["max"]}, "mode has 1 entries for 2 metrics"),
        ({"mode": ["max", "min"]}, "mode has 2 entries for 1 metrics"),
        *[
            ({"metric": ["val/miou", "val/map"], "scheduler": scheduler}, f"scheduler {scheduler} orders trials by one")
            for scheduler in ("asha", "hyperband", "median", "pbt")
        ],
        *[
            ({"repeats": 3, "scheduler": scheduler}, f"repeats: 3 and scheduler: {scheduler} do not mix.*promote")
            for scheduler in ("asha", "hyperband", "median", "pbt")
        ],
        ({"repeats": 2, "space": {"seed": {"randint": [0, 9]}}}, "seed cannot be in the space too"),
        ({"search": "points"}, "needs points, or earlier.best"),
        ({"search": "points", "earlier": EARLIER}, "needs points, or earlier.best"),
        ({"search": "grid", "earlier": EARLIER}, "tries its own points only"),
        ({"search": "grid", "points": [{}]}, "tries its own points only"),
        ({"search": "random", "earlier": EARLIER}, "random learns nothing from earlier runs; set earlier.best"),
        ({"search": "points", "points": [{}], "earlier": EARLIER}, "points learns nothing"),
        ({"budget": {"gpu_hours": 1, "cpu_hours": 1}}, "gpu_hours or cpu_hours"),
        ({"budget": {"wall_hours": 0}}, "greater than 0"),
        ({"asha": {"reduction_factor": 1}}, "greater than 1"),
        ({"pbt": {"share": 0.6}}, "less than or equal to 0.5"),
        ({"pbt": {"factors": []}}, "at least 1 item"),
    ],
)
def test_what_does_not_agree_is_refused(keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        sweep_of(**keys)


def test_every_metric_has_a_mode() -> None:
    assert sweep_of(metric=["a", "b"], mode="min").modes == ("min", "min")
    assert sweep_of(metric=["a", "b"], mode=["max", "min"]).modes == ("max", "min")
    assert (sweep_of(metric=["a"]).modes, sweep_of().modes) == (("max",), ("max",))
    assert [sweep_of(metric=metric).several for metric in (None, "a", ["a"], ["a", "b"])] == [False, False, False, True]


POLICY = {"pseudo_labels.policy": {"choice": ["single", "reliability"]}}
SMALL = {"losses.contrastive": {"quniform": [0.1, 0.4, 0.1]}, **POLICY}
TIED = {
    **SMALL,
    "losses.seg_to_cam": {"same": "losses.contrastive", "times": 0.5},
    "contrastive.temperature": {"uniform": [0.2, 1], "when": {"pseudo_labels.policy": "single"}},
}


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (sweep_of({"losses": {"choice": [1]}}), ["whole section"]),
        (sweep_of(SMALL, search="grid", trials=3), ["the grid has 8 points and trials is 3", "leave trials out"]),
        (sweep_of(search="grid"), ["space.optimiser.lr", "needs `points`"]),
        (sweep_of(points=[{"optimiser.lrr": 1e-3}]), ["points[0]: optimiser.lrr", "did you mean optimiser.lr?"]),
        (sweep_of(points=[{}, {"optimiser.lr": 1}]), ["points[1]: optimiser.lr=1 is not in the space"]),
        (
            sweep_of({"losses.dense_energy": {"uniform": [1, 2]}}, points=[{}]),
            ["points[0]: losses.dense_energy=0.0 (of the base experiment, because the point does not say)"],
        ),
        (sweep_of(SMALL, points=[{"losses.contrastive": 0.33}]), ["losses.contrastive=0.33 is not in the space"]),
        (
            sweep_of(TIED, points=[{"losses.seg_to_cam": 0.3}]),
            ["losses.seg_to_cam is tied to losses.contrastive, so it is 0.05"],
        ),
        (
            sweep_of(TIED, points=[{"losses.contrastive": "much"}]),
            ["losses.contrastive=much is not in the space"],
        ),
        (
            sweep_of(TIED, points=[{"pseudo_labels.policy": "reliability", "contrastive.temperature": 0.5}]),
            ["contrastive.temperature does not vary there, because of its `when`"],
        ),
        (sweep_of(budget={"gpu_hours": 1}), ["trials have no GPU; use budget.cpu_hours"]),
    ],
)
def test_a_sweep_that_cannot_work_is_refused(base, sweep: Sweep, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_sweep(sweep, base, "sweep.yaml")
    assert str(caught.value).startswith("sweep.yaml: ")
    for word in words:
        assert word in str(caught.value)


def test_hours_are_of_what_trials_are_given() -> None:
    gpus = load_config("shapes", ["resources.gpus_per_worker=0.5"])
    check_sweep(sweep_of(budget={"gpu_hours": 1}), gpus, "x")
    with pytest.raises(UserError, match=r"trials have GPUs; use budget\.gpu_hours"):
        check_sweep(sweep_of(budget={"cpu_hours": 1}), gpus, "x")


def test_a_point_is_completed_from_the_base(base) -> None:
    """Also as YAML and people write it: 1e-3 is a word there, and 0 is 0.0 to the schema."""
    assert complete(sweep_of(), base, {"optimiser.lr": "1e-3"}) == {"optimiser.lr": 0.001}
    point = complete(sweep_of(TIED), base, {"pseudo_labels.policy": "single"})
    assert point == {
        "losses.contrastive": 0.1,
        "pseudo_labels.policy": "single",
        "losses.seg_to_cam": 0.05,
        "contrastive.temperature": 0.5,
    }
    assert "contrastive.temperature" not in complete(sweep_of(TIED), base, {})
    choice = sweep_of({"losses.dense_energy": {"choice": [0, 1]}, "assignment.scales": {"choice": [[1, 0.5, 1.5]]}})
    check_sweep(choice.model_copy(update={"points": ({},)}), base, "x")
    assert repr(complete(choice, base, {})) == "{'losses.dense_energy': 0, 'assignment.scales': (1, 0.5, 1.5)}"


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ({}, 8),
        ({"trials": 3}, 3),
        ({"space": SMALL, "search": "grid"}, 8),
        ({"search": "points", "points": [{}, {}]}, 2),
        ({"search": "points", "points": [{}, {}], "earlier": {**EARLIER, "best": 3}}, 5),
        ({"search": "points", "points": [{}, {}], "trials": 1}, 1),
    ],
)
def test_how_many_are_wanted(keys: dict[str, Any], count: int) -> None:
    assert wanted(sweep_of(**keys)) == count


FULL = {
    "set": {"model.checkpoint": None, "training.steps": 50},
    "space": {
        "a": {"uniform": [0, 1], "points": 3},
        "b": {"loguniform": [1e-6, 1e-3]},
        "c": {"quniform": [0.1, 0.3, 0.1]},
        "d": {"randint": [1, 3]},
        "e": {"lograndint": [1, 300]},
        "f": {"choice": ["x", None, 3, 0.5, True, [1.0, 2.0], "1e-4"]},
        "g": {"same": "a", "times": 2.0},
        "h": {"uniform": [0, 1], "when": {"f": None, "d": [1, 2]}},
    },
    "search": "gp",
    "search_seed": 3,
    "points": [{"a": 0.5, "f": None}, {"f": [1.0, 2.0]}, {}],
    "earlier": {"runs": "tags.`a` = 'b'", "experiment": "other", "best": 2, "learn": False},
    "trials": 5,
    "repeats": 2,
    "concurrency": 3,
    "metric": ["val/miou", "cost/cpu_hours"],
    "mode": ["max", "min"],
    "asha": {"grace_steps": 7, "reduction_factor": 3, "brackets": 2},
    "median": {"grace_steps": 9, "trials": 4},
    "pbt": {"every": 5, "share": 0.5, "resample": 0.0, "factors": [0.5, 2]},
    "budget": {"steps": 9, "wall_hours": 0.5, "cpu_hours": 2},
    "failures": 1,
    "restarts": 0,
    "keep": "all",
}


@pytest.mark.parametrize("keys", [{}, FULL])
def test_dump_reads_back(tmp_path: Path, keys: dict[str, Any]) -> None:
    sweep = Sweep.model_validate({"base": "base.yaml", "space": LR, **keys})
    text = dump_sweep(sweep)
    assert Sweep.model_validate(yaml.safe_load(text)) == sweep
    if not keys:
        assert set(yaml.safe_load(text)) == {"base", "space"}
        write(tmp_path, "")
        (tmp_path / "again.yaml").write_text(text)
        assert load_sweep(tmp_path / "again.yaml")[0] == sweep


def test_a_bare_name_means_a_shipped_sweep() -> None:
    assert find_sweep("shapes").parent.name == "sweeps"


@pytest.mark.parametrize("file", sorted(file.stem for file in (SHIPPED / "sweeps").glob("*.yaml")))
def test_shipped_sweeps_can_work(file: str) -> None:
    sweep, base = load_sweep(file)
    check_sweep(sweep, base, file)
    losses = {"losses.cam_to_seg", "losses.seg_to_cam", "losses.contrastive", "pseudo_labels.threshold"}
    assert losses <= set(sweep.space)


def asha(space: dict[str, Any] | None = None, grace: int | None = None, **more: Any) -> Sweep:
    return sweep_of(space, **{"scheduler": "asha", "asha": {"grace_steps": grace, **more.pop("asha", {})}, **more})


@pytest.mark.parametrize(
    ("sweep", "arithmetic"),
    [
        (asha(grace=450), "asha.grace_steps 450 puts.*warmup_iters 400 . evaluation.every 100 = 500"),
        # The longest warm-up and the rarest evaluation of the whole space count, not those of the base.
        (
            asha({"training.warmup_iters": {"randint": [100, 600]}}, 500),
            "warmup_iters 600 . evaluation.every 100 = 700",
        ),
        (asha({"evaluation.every": {"choice": [50, 300]}}, 500), "warmup_iters 400 . evaluation.every 300 = 700"),
        (
            asha(
                {**POLICY, "evaluation.every": {"randint": [50, 300], "when": {"pseudo_labels.policy": "single"}}}, 500
            ),
            "warmup_iters 400 . evaluation.every 300 = 700",
        ),
        (asha(grace=1000), "not before the last step 1000"),
        (asha({"training.warmup_iters": {"choice": [400, 950]}}), "not before the last step 1000"),
        (sweep_of(scheduler="median", median={"grace_steps": 450}), "median.grace_steps 450 puts"),
        (
            sweep_of(scheduler="hyperband"),
            "asha.brackets 3 is more than the 1 rungs there are .steps 500.; lower it to 1",
        ),
    ],
)
def test_rungs_that_cannot_work_are_refused(base, sweep: Sweep, arithmetic: str) -> None:
    with pytest.raises(UserError, match=arithmetic):
        check_sweep(sweep, base, "sweep.yaml")


def test_grace_is_derived_when_it_is_not_given(base) -> None:
    assert grace_steps(asha(), base, "x") == 500
    classifier = load_config("shapes", ["training.steps=900", "training.warmup_iters=900", "evaluation.every=200"])
    assert grace_steps(sweep_of(scheduler="median"), classifier, "x") == 200


def test_a_run_that_stops_before_its_schedule_ends_has_its_rungs_before_that(base) -> None:
    def stopping(at: int) -> Config:
        return apply_overrides(base, {"training.stop_at": at})

    assert rungs(asha(asha={"reduction_factor": 1.5}), base) == [500, 750]
    assert rungs(asha(asha={"reduction_factor": 1.5}), stopping(700)) == [500]
    with pytest.raises(UserError, match=r"first rung at step 500.*not before the last step 450"):
        check_sweep(asha(), stopping(450), "x")
    varied = asha({"training.stop_at": {"choice": [450, 700]}}, asha={"reduction_factor": 1.5})
    assert rungs(varied, base) == [500]


@pytest.mark.parametrize("factor", [1.2, 1.3, 2, 3])
@pytest.mark.parametrize("brackets", [1, 2, 3])
def test_the_rungs_named_are_those_ray_uses(factor: float, brackets: int) -> None:
    from ray.tune.schedulers.async_hyperband import _Bracket

    base = load_config("shapes", ["training.steps=9000", "training.warmup_iters=100", "evaluation.every=100"])
    sweep = asha(grace=500, scheduler="hyperband", asha={"reduction_factor": factor, "brackets": brackets})
    at = rungs(sweep, base)
    assert at[-1] < 9000 <= at[-1] * factor + 1
    for bracket in range(brackets):
        made = _Bracket(at[0], at[-1] + 1, factor, bracket, stop_last_trials=False)
        assert sorted(round(step) for step, _ in made._rungs) == at[bracket:]


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({}, [500, 600, 700, 800, 900]),
        ({"pbt": {"every": 200}}, [600, 800]),
        ({"pbt": {"every": 400}}, [800]),
    ],
)
def test_generations_come_after_warm_up_and_before_the_end(base, keys: dict[str, Any], steps: list[int]) -> None:
    sweep = sweep_of(WEIGHTS, scheduler="pbt", **keys)
    check_sweep(sweep, base, "x")
    assert generations(sweep, base) == steps


def test_a_classifier_has_generations_from_the_start() -> None:
    base = load_config("shapes", ["training.steps=300", "training.warmup_iters=300", "evaluation.every=100"])
    assert generations(sweep_of(WEIGHTS, scheduler="pbt"), base) == [100, 200]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"space": {"training.steps": {"choice": [900, 1000]}}}, "all trials go the same way, so training.steps"),
        ({"space": {"evaluation.every": {"choice": [50, 100]}}}, "so evaluation.every cannot vary"),
        *[
            ({"space": {key: {"choice": choices}}}, f"space.{key} cannot change while a trial runs")
            for key, choices in {
                "model.decoder_width": [256, 512],
                "assignment.momentum": [0.9, 0.99],
                "seed": [1, 2],
                "pseudo_labels.policy": ["single", "reliability"],
                # A checkpoint holds the threshold itself; the pictures' size is that of the position embeddings.
                "pseudo_labels.threshold": [0.3, 0.4],
                "views.crop": [48, 64],
                "dynamic_threshold.batches": [10, 20],
            }.items()
        ],
        (
            {
                "space": {
                    "views.flip": {"choice": [0, 0.5]},
                    "views.blur": {"choice": [0, 0.5], "when": {"views.flip": 0}},
                }
            },
            "space.views.blur is conditional",
        ),
        ({"pbt": {"every": 150}}, "pbt.every 150 is no multiple of evaluation.every 100"),
        ({"pbt": {"every": 1000}}, "no generation of pbt.every 1000 steps"),
        ({"trials": 1}, "two trials or more"),
    ],
)
def test_a_population_that_cannot_work_is_refused(base, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_sweep(sweep_of(**{"space": WEIGHTS, "scheduler": "pbt", **keys}), base, "x")


def test_the_schema_is_frozen_and_closed() -> None:
    sweep = sweep_of()
    with pytest.raises(ValueError, match="frozen"):
        sweep.trials = 3
