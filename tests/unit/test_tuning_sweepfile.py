"""Sweep files: read, overridden, refused, written back; and rungs that would decide on noise."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosa_ray.errors import UserError
from cosa_ray.tuning.sweepfile import Sweep, check_sweep, dump_sweep, find_sweep, grace_steps, load_sweep, rungs

BASE = "training: {steps: 1000, warmup_iters: 400}\nevaluation: {every: 100}\noptimiser: {warmup_steps: 10}\n"


def write(folder: Path, sweep: str) -> Path:
    (folder / "base.yaml").write_text(BASE)
    (folder / "sweep.yaml").write_text("base: base.yaml\n" + sweep)
    return folder / "sweep.yaml"


def test_overrides_reach_the_sweep_or_its_base(tmp_path: Path) -> None:
    file = write(tmp_path, "set: {training.batch_size: 8}\nspace: {optimiser.lr: {loguniform: [1e-4, 1e-3]}}\n")
    sweep, base = load_sweep(file, ["trials=3", "asha.reduction_factor=4", "seed=7", "training.steps=900"])
    assert (sweep.trials, sweep.asha.reduction_factor) == (3, 4.0)
    assert (base.training.batch_size, base.training.steps, base.training.warmup_iters, base.seed) == (8, 900, 400, 7)


@pytest.mark.parametrize(
    ("sweep", "overrides", "words"),
    [
        ("trials: 2\n", [], ["lacks space"]),
        ("space: {optimiser.lr: {uniform: [1e-4, 1e-3]}}\ntrails: 2\n", [], ["trails", "trials"]),
        ("space: {optimiser.lr: {unifrom: [1e-4, 1e-3]}}\n", [], ["unifrom", "uniform"]),
        ("space: {optimiser.lr: {uniform: [1e-3, 1e-4]}}\n", [], ["low < high"]),
        ("space: {optimiser.lr: {uniform: [1e-4, 1e-3]}}\nset: {training.stepz: 4}\n", [], ["training.steps"]),
        ("space: {optimiser.lr: {uniform: [1e-4, 1e-3]}}\n", ["trails=2"], ["trails", "trials"]),
        ("space: {optimiser.lr: {uniform: [1e-4, 1e-3]}}\nsearch: bohb\n", [], ["search", "optuna"]),
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
        load_sweep("voc.yaml")


def test_dump_reads_back(tmp_path: Path) -> None:
    file = write(
        tmp_path, "space: {a.b: {choice: [x, null, 3]}, optimiser.lr: {quniform: [0.1, 0.3, 0.1]}}\ntrials: 5\n"
    )
    sweep, _ = load_sweep(file)
    (tmp_path / "again.yaml").write_text(dump_sweep(sweep))
    again, _ = load_sweep(tmp_path / "again.yaml")
    assert again == sweep


def test_a_bare_name_means_a_shipped_sweep() -> None:
    assert find_sweep("shapes").parent.name == "sweeps"


def asha(space: str = "optimiser.lr: {uniform: [1e-4, 1e-3]}", grace: int | None = None, factor: float = 2) -> str:
    given = "" if grace is None else f"grace_steps: {grace}, "
    return f"space: {{{space}}}\nscheduler: asha\nasha: {{{given}reduction_factor: {factor}}}\n"


@pytest.mark.parametrize(
    ("sweep", "arithmetic"),
    [
        (asha(grace=450), "warmup_iters 400 + evaluation.every 100 = 500"),
        # The longest warm-up and the rarest evaluation of the whole space count, not those of the base.
        (asha("training.warmup_iters: {randint: [100, 600]}", 500), "warmup_iters 600 + evaluation.every 100 = 700"),
        (asha("evaluation.every: {choice: [50, 300]}", 500), "warmup_iters 400 + evaluation.every 300 = 700"),
        (asha(grace=1000), "not before training.steps 1000"),
        (asha("training.warmup_iters: {choice: [400, 950]}"), "not before training.steps 1000"),
    ],
)
def test_rungs_in_the_noise_are_refused(tmp_path: Path, sweep: str, arithmetic: str) -> None:
    read, base = load_sweep(write(tmp_path, sweep))
    with pytest.raises(UserError) as caught:
        check_sweep(read, base, "sweep.yaml")
    assert arithmetic in str(caught.value)


def test_grace_is_derived_when_it_is_not_given(tmp_path: Path) -> None:
    read, base = load_sweep(write(tmp_path, asha()))
    assert grace_steps(read, base, "x") == 500


def test_the_rungs_named_are_those_ray_uses(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from ray.tune.schedulers import ASHAScheduler

    for factor in (1.2, 1.3, 2, 3):
        read, base = load_sweep(write(tmp_path, asha(grace=500, factor=factor)))
        at = rungs(read, base)
        scheduler = ASHAScheduler(time_attr="step", grace_period=500, max_t=at[-1] + 1, reduction_factor=factor)
        milestones = sorted(round(step) for step, _ in scheduler._brackets[0]._rungs)
        assert milestones == at
        assert at[-1] < base.training.steps


def test_the_schema_is_frozen_and_closed() -> None:
    sweep = Sweep.model_validate({"base": "shapes", "space": {}})
    with pytest.raises(ValueError, match="frozen"):
        sweep.trials = 3
