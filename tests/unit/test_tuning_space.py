"""The search space: refused before anything starts when it can produce what the schema would refuse."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cosa_ray.config.load import apply_overrides, load_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.tuning.space import Dimension, check_space, extremes, points

BASE = Config()


def space(**dimensions: dict[str, Any]) -> dict[str, Dimension]:
    return {key.replace("__", "."): Dimension.model_validate(value) for key, value in dimensions.items()}


@pytest.mark.parametrize(
    ("dimension", "complaint"),
    [
        ({}, "exactly one of"),
        ({"uniform": [0, 1], "choice": [1]}, "exactly one of"),
        ({"uniform": [1, 1]}, "low < high"),
        ({"loguniform": [0, 1]}, "low > 0"),
        ({"quniform": [0.25, 1.0, 0.1]}, "multiples of a step"),
        ({"quniform": [0.0, 1.0, 0.0]}, "multiples of a step"),
        ({"choice": []}, "at least one value"),
        ({"choice": ["a", "a"]}, "each once"),
        ({"randint": [0.5, 3]}, "valid integer"),
        ({"normal": [0, 1]}, "not permitted"),
    ],
)
def test_dimension_refuses(dimension: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Dimension.model_validate(dimension)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (space(), ["space is empty"]),
        (space(losses__cam_to_sek={"uniform": [0, 1]}), ["losses.cam_to_sek", "losses.cam_to_seg"]),
        (space(losses={"choice": [1]}), ["whole section"]),
        (space(data__dataset={"choice": ["a", "b"]}), ["shared by all trials"]),
        (space(resources__cpus_per_worker={"uniform": [0.5, 1]}), ["shared by all trials"]),
        # Out of range at a corner, and the value that does it.
        (space(pseudo_labels__threshold={"uniform": [0.5, 1.5]}), ["pseudo_labels.threshold", "1.5"]),
        (space(pseudo_labels__policy={"choice": ["single", "both"]}), ["pseudo_labels.policy", "both"]),
        # Each setting is fine alone; together two corners are not.
        (
            space(pseudo_labels__low={"uniform": [0.1, 0.5]}, pseudo_labels__high={"uniform": [0.4, 0.9]}),
            ["pseudo_labels.low=0.5", "pseudo_labels.high=0.4"],
        ),
        # Both corners are multiples of the loss stride; what lies between is not.
        (space(views__crop={"randint": [96, 128]}, training__loss_stride={"choice": [2, 4]}), ["multiple of"]),
        # A fraction for a whole number, hidden behind whole corners.
        (space(training__warmup_iters={"uniform": [100, 200]}), ["training.warmup_iters", "integer"]),
    ],
)
def test_check_space_names_what_is_wrong(bad: dict[str, Dimension], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_space(bad, BASE, "sweep.yaml")
    sentence = str(caught.value)
    assert sentence.startswith("sweep.yaml: ")
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_check_space_takes_the_shipped_sweep() -> None:
    from cosa_ray.tuning.sweepfile import load_sweep

    sweep, base = load_sweep("sweeps/shapes.yaml")
    check_space(sweep.space, base, "sweep")
    assert sweep.trials >= 4
    wanted = {"losses.cam_to_seg", "losses.seg_to_cam", "losses.contrastive", "pseudo_labels.threshold"}
    assert wanted <= set(sweep.space)


def test_points_hold_every_combination_of_corners() -> None:
    varied = space(
        losses__cam_to_seg={"uniform": [0.1, 0.2]},
        pseudo_labels__policy={"choice": ["single", "reliability"]},
        training__batch_size={"randint": [4, 8]},
    )
    seen = {tuple(point.values()) for point in points(varied)}
    assert set(itertools.product((0.1, 0.2), ("single", "reliability"), (4, 8))) <= seen


def test_points_of_a_large_space_hold_every_pair_of_corners() -> None:
    names = [f"k{i}" for i in range(12)]
    varied = {name: Dimension(uniform=(0.0, 1.0)) for name in names}
    seen = list(points(varied))
    assert len(seen) < 1000
    for one, two in itertools.combinations(names, 2):
        assert {(p[one], p[two]) for p in seen if len(p) == 2 and one in p and two in p} == set(
            itertools.product((0.0, 1.0), repeat=2)
        )


@settings(deadline=None, max_examples=60)
@given(
    low=st.integers(-50, 50),
    steps=st.integers(1, 20),
    step=st.sampled_from([0.05, 0.1, 0.25, 1.0, 3.0]),
    seed=st.integers(0, 100),
)
def test_drawn_values_stay_inside_and_on_the_grid(low: int, steps: int, step: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    quantised = Dimension(quniform=(low * step, (low + steps) * step, step))
    value = quantised.draw(generator)
    assert low * step - 1e-9 <= value <= (low + steps) * step + 1e-9
    assert abs(value / step - round(value / step)) < 1e-6
    assert low <= Dimension(randint=(low, low + steps)).draw(generator) <= low + steps
    ends = (2.0**low, 2.0 ** (low + steps))
    assert ends[0] * 0.999 <= Dimension(loguniform=ends).draw(generator) <= ends[1] * 1.001


def test_tune_domains_sample_what_the_file_says() -> None:
    """Tune leaves the upper end of randint out and may leave a quniform's grid; the file's own meaning must hold."""
    pytest.importorskip("ray")
    randint = Dimension(randint=(2, 4))
    assert {randint.domain().sample() for _ in range(200)} == {2, 3, 4}
    grid = Dimension(quniform=(0.3, 0.6, 0.1))
    assert {grid.tidy(grid.domain().sample()) for _ in range(200)} == {0.3, 0.4, 0.5, 0.6}
    assert {Dimension(choice=("a", None, 3)).domain().sample() for _ in range(200)} == {"a", None, 3}


def test_extremes() -> None:
    varied = space(training__steps={"randint": [100, 300]}, evaluation__every={"choice": [50, 20, 70]})
    assert extremes(varied, 7, "training.steps") == (100, 300)
    assert extremes(varied, 7, "evaluation.every") == (20, 70)
    assert extremes(varied, 7, "training.warmup_iters") == (7, 7)
    quoted = space(training__warmup_iters={"choice": ["400", 100]})
    assert extremes(quoted, 7, "training.warmup_iters") == (100, 400)
    assert apply_overrides(BASE, {"training.warmup_iters": "400"}).training.warmup_iters == 400


def test_every_point_of_a_good_space_is_a_valid_experiment() -> None:
    base = load_config("shapes")
    varied = space(
        optimiser__lr={"loguniform": [1e-4, 1e-2]}, dynamic_threshold__start={"choice": ["extremes", "quantiles"]}
    )
    check_space(varied, base, "sweep.yaml")
    for point in points(varied):
        assert apply_overrides(base, point).optimiser.lr == pytest.approx(point["optimiser.lr"])
