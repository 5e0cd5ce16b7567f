"""The search space: every point it can produce lies inside it, and is a valid experiment before anything starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cosa_ray.config.load import apply_overrides, load_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.tuning.space import Dimension, Space, check_space, extremes, grid_points, order, points, sample

BASE = Config()


def space(**dimensions: dict[str, Any]) -> dict[str, Dimension]:
    return {key.replace("__", "."): Dimension.model_validate(value) for key, value in dimensions.items()}


def by_optuna(varied: Space, seed: int) -> dict[str, Any]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    return sample(varied, lambda name, dimension: dimension.suggest(trial, name))


def at_random(varied: Space, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return sample(varied, lambda _, dimension: dimension.draw(generator))


@pytest.mark.parametrize(
    ("dimension", "complaint"),
    [
        ({}, "exactly one of"),
        ({"uniform": [0, 1], "choice": [1]}, "exactly one of"),
        ({"uniform": [1, 1]}, "low < high"),
        ({"loguniform": [0, 1]}, "loguniform needs low > 0"),
        ({"lograndint": [0, 9]}, "lograndint needs low > 0"),
        ({"quniform": [0.25, 1.0, 0.1]}, "multiples of a step"),
        ({"quniform": [0.0, 1.0, 0.0]}, "multiples of a step"),
        ({"choice": []}, "at least one value"),
        ({"choice": ["a", "a"]}, "each once"),
        ({"choice": [1, 1.0]}, "each once"),
        ({"choice": [0, False]}, "each once"),
        ({"choice": [[1, 2], [1.0, 2.0]]}, "each once"),
        ({"randint": [0.5, 3]}, "valid integer"),
        ({"normal": [0, 1]}, "not permitted"),
        ({"uniform": [0, 1], "times": 2}, "times belongs to `same`"),
        ({"uniform": [0, 1], "points": 1}, "points is at least 2"),
        ({"randint": [0, 1], "points": 2}, "belongs to uniform, loguniform or lograndint"),
    ],
)
def test_dimension_refuses(dimension: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Dimension.model_validate(dimension)


RANGES = st.one_of(
    st.builds(
        lambda kind, low, width: {kind: [low, low + width]},
        st.sampled_from(["uniform", "loguniform"]),
        st.sampled_from([1e-7, 0.1, 1.0, 37.5]),
        st.sampled_from([1e-6, 0.3, 1.0, 1e4]),
    ),
    st.builds(
        lambda kind, low, width: {kind: [low, low + width]},
        st.sampled_from(["randint", "lograndint"]),
        st.integers(1, 9),
        st.integers(1, 5000),
    ),
    st.builds(
        lambda step, low, places: {"quniform": [step * low, step * (low + places), step]},
        st.sampled_from([1e-8, 0.05, 0.1, 0.25, 3.0]),
        st.integers(-20, 20),
        st.integers(1, 40),
    ),
)


@settings(deadline=None, max_examples=150)
@given(given=RANGES, seed=st.integers(0, 10_000), how=st.sampled_from([at_random, by_optuna]))
def test_what_is_proposed_lies_inside(given: dict[str, Any], seed: int, how: Callable[..., dict[str, Any]]) -> None:
    ((kind, (low, high, *step)),) = given.items()
    dimension = Dimension.model_validate(given)
    value = how({"x": dimension}, seed)["x"]
    assert dimension.holds(value)
    assert low - 1e-9 * abs(low) <= value <= high + 1e-9 * abs(high)
    assert isinstance(value, int if kind in ("randint", "lograndint") else float)
    if step:
        assert abs(value / step[0] - round(value / step[0])) < 1e-6
        assert len(repr(value)) <= 8  # no 0.30000000000000004
    assert not dimension.holds(high * 1.001 + 1)
    assert not dimension.holds(low - 1)


CHOICES = (1, 2.5, "a", "[1.5]", None, True, (1.5,), (1, 2))


@pytest.mark.parametrize("how", [at_random, by_optuna])
def test_a_choice_is_each_of_its_values_and_of_their_types(how: Callable[..., dict[str, Any]]) -> None:
    choices = tuple(choice for choice in CHOICES if choice not in (True, "[1.5]"))
    varied = {"x": Dimension(choice=choices)}
    assert {repr(how(varied, seed)["x"]) for seed in range(60)} == set(map(repr, choices))


@pytest.mark.parametrize("how", [at_random, by_optuna])
def test_whole_numbers_even_in_the_logarithm(how: Callable[..., dict[str, Any]]) -> None:
    """1 and 2 have the logarithm's share of 1..9, half a number at the ends included; both ends occur."""
    varied = {"x": Dimension(lograndint=(1, 9))}
    drawn = [how(varied, seed)["x"] for seed in range(400)]
    share = np.mean([value <= 2 for value in drawn])
    expected = np.log(2.5 / 0.5) / np.log(9.5 / 0.5)
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 400)
    assert {1, 9} <= set(drawn)


@pytest.mark.parametrize(
    ("dimension", "written", "meant"),
    [
        ({"loguniform": [1e-5, 1e-2]}, "1e-4", 1e-4),  # a word, to YAML
        ({"uniform": [0, 2]}, 1, 1.0),
        ({"randint": [1, 900]}, 400.0, 400),
        ({"quniform": [0.0, 1.0, 0.1]}, 0.1 + 0.2, 0.3),
        ({"choice": [0, 1, None]}, 1.0, 1),
        ({"choice": ["1e-4", "1e-3"]}, 0.001, "1e-3"),
        ({"choice": [[1, 0.5]]}, [1.0, 0.5], (1, 0.5)),
        ({"choice": [True, False]}, True, True),
    ],
)
def test_a_value_may_be_written_as_a_config_takes_it(dimension: dict[str, Any], written: Any, meant: Any) -> None:
    read = Dimension.model_validate(dimension)
    assert read.holds(written)
    assert repr(read.tidy(written)) == repr(meant)


@pytest.mark.parametrize(
    ("dimension", "value"),
    [
        ({"quniform": [0.0, 1.0, 0.1]}, 0.33),
        ({"quniform": [0.3, 0.6, 0.1]}, 0.2),
        ({"randint": [1, 9]}, 2.5),
        ({"lograndint": [1, 9]}, 10),
        ({"uniform": [0, 2]}, True),
        ({"uniform": [0, 2]}, None),
        ({"uniform": [0, 2]}, "nan"),
        ({"uniform": [0, 2]}, "much"),
        ({"choice": [1, 2]}, True),
        ({"choice": [None]}, "None"),
        ({"choice": [[1, 2]]}, [1, 2, 3]),
        ({"choice": [2_000_000_000, 1_999_999_999]}, 1_999_999_998),
        ({"same": "x"}, 1),
    ],
)
def test_a_value_outside_is_told(dimension: dict[str, Any], value: Any) -> None:
    assert not Dimension.model_validate(dimension).holds(value)


CONDITIONAL = space(
    third={"same": "second", "times": 0.5},
    first={"choice": ["a", "b", "c"]},
    second={"quniform": [0.1, 0.4, 0.1], "when": {"first": ["a", "b"]}},
    fourth={"randint": [1, 3], "when": {"first": "b", "second": [0.2, 0.4]}},
    fifth={"same": "third"},
    sixth={"choice": [True, None]},
)


def obeys(point: dict[str, Any]) -> bool:
    """The conditions of CONDITIONAL, written out."""
    second = point["first"] in ("a", "b")
    fourth = point["first"] == "b" and point.get("second") in (0.2, 0.4)
    absent = (set() if second else {"second", "third", "fifth"}) | (set() if fourth else {"fourth"})
    if list(point) != [name for name in CONDITIONAL if name not in absent]:
        return False
    return not second or point["third"] == point["fifth"] == point["second"] * 0.5


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10_000), how=st.sampled_from([at_random, by_optuna]))
def test_conditional_and_tied_settings(seed: int, how: Callable[..., dict[str, Any]]) -> None:
    point = how(CONDITIONAL, seed)
    assert obeys(point)
    assert all(CONDITIONAL[name].holds(value) for name, value in point.items() if CONDITIONAL[name].same is None)


def test_a_grid_is_every_combination_that_obeys_the_conditions() -> None:
    values = {
        "third": [None, 0.05, 0.1, 0.15, 0.2],
        "first": ["a", "b", "c"],
        "second": [None, 0.1, 0.2, 0.3, 0.4],
        "fourth": [None, 1, 2, 3],
        "fifth": [None, 0.05, 0.1, 0.15, 0.2],
        "sixth": [True, "none"],
    }
    wanted = []
    for combination in itertools.product(*values.values()):
        point = {name: value for name, value in zip(values, combination, strict=True) if value is not None}
        point["sixth"] = None if point["sixth"] == "none" else True
        if obeys(point):
            wanted.append(point)
    found = grid_points(CONDITIONAL)
    assert len(found) == len(wanted) == 2 * (4 + 2 + 2 * 3 + 1)
    assert sorted(map(repr, found)) == sorted(map(repr, wanted))


@pytest.mark.parametrize(
    ("dimension", "values"),
    [
        ({"uniform": [0, 1], "points": 3}, [0.0, 0.5, 1.0]),
        ({"loguniform": [1e-4, 1e-2], "points": 3}, [1e-4, 1e-3, 1e-2]),
        ({"lograndint": [1, 100], "points": 3}, [1, 10, 100]),
        ({"lograndint": [1, 3], "points": 9}, [1, 2, 3]),
        ({"randint": [2, 4]}, [2, 3, 4]),
        ({"quniform": [-0.3, 0.1, 0.1]}, [-0.3, -0.2, -0.1, 0.0, 0.1]),
    ],
)
def test_values_of_a_grid(dimension: dict[str, Any], values: list[float]) -> None:
    read = Dimension.model_validate(dimension)
    found = read.grid()
    assert found == pytest.approx(values, rel=1e-12)
    assert all(map(read.holds, found))
    assert [type(value) for value in found] == [type(value) for value in values]


def test_a_grid_has_the_last_setting_fastest() -> None:
    assert grid_points(space(a={"choice": [1, 2]}, b={"choice": ["x", "y"]})) == [
        {"a": a, "b": b} for a in (1, 2) for b in ("x", "y")
    ]


@pytest.mark.parametrize(
    ("varied", "sentence"),
    [
        (space(a={"uniform": [0, 1]}), "space.a: a grid search needs `points`"),
        ({f"k{i}": Dimension(randint=(1, 10)) for i in range(12)}, "grid of up to 1000000000000 points is too large"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(varied: Space, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        grid_points(varied)


@pytest.mark.parametrize(
    ("varied", "circle"),
    [
        (space(a={"same": "a"}), "a depend"),
        (space(c={"choice": [1]}, a={"same": "b"}, b={"choice": [1], "when": {"a": 1}}), "a, b depend"),
    ],
)
def test_circles_are_refused(varied: Space, circle: str) -> None:
    with pytest.raises(UserError, match=circle):
        order(varied)


ENABLED = "dynamic_threshold.enabled"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (space(), ["space is empty"]),
        (space(losses__cam_to_sek={"uniform": [0, 1]}), ["losses.cam_to_sek", "did you mean losses.cam_to_seg?"]),
        (space(losses={"choice": [1]}), ["space.losses is a whole section"]),
        (space(data__dataset={"choice": ["a", "b"]}), ["space.data.dataset is shared by all trials"]),
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
        # A tied setting that leaves its range at the other's upper end.
        (
            space(
                pseudo_labels__threshold={"uniform": [0.2, 0.6]},
                contrastive__threshold={"same": "pseudo_labels.threshold", "times": 2},
            ),
            ["contrastive.threshold=1.2"],
        ),
        # Only where the condition holds.
        (
            space(
                dynamic_threshold__enabled={"choice": [True, False]},
                pseudo_labels__threshold={"uniform": [0.2, 1.0], "when": {ENABLED: False}},
            ),
            [f"{ENABLED}=False, pseudo_labels.threshold=1"],
        ),
        (
            space(losses__cam_to_seg={"same": "losses.seg_to_cam"}),
            ["losses.cam_to_seg depends on losses.seg_to_cam, which is no setting of the space"],
        ),
        (
            space(losses__cam_to_seg={"uniform": [0, 1], "when": {ENABLED: True}}),
            [f"losses.cam_to_seg depends on {ENABLED}"],
        ),
        (
            space(
                losses__cam_to_seg={"uniform": [0, 1], "when": {"pseudo_labels.policy": ["single", "both"]}},
                pseudo_labels__policy={"choice": ["single", "reliability"]},
            ),
            ["losses.cam_to_seg waits for pseudo_labels.policy to be both, which it never is"],
        ),
        (
            space(
                pseudo_labels__policy={"choice": ["single", "reliability"]},
                model__backbone={"same": "pseudo_labels.policy"},
                losses__cam_to_seg={"same": "model.backbone", "times": 2},
            ),
            ["losses.cam_to_seg is 2 times model.backbone, which is no number"],
        ),
        (space(losses__cam_to_seg={"same": "losses.cam_to_seg"}), ["losses.cam_to_seg depend on each other"]),
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


@pytest.mark.parametrize(
    "good",
    [
        # Only together: the base's own warm-up of 6000 steps is longer than these, and no trial has it.
        space(
            training__steps={"randint": [100, 200]},
            training__warmup_iters={"randint": [10, 90]},
            optimiser__warmup_steps={"choice": [5]},
        ),
        space(model__backbone_args__embed_dim={"choice": [64, 128]}),
        space(
            losses__contrastive={"choice": [0, 0.1]},
            contrastive__temperature={"loguniform": [0.1, 1], "when": {"losses.contrastive": 0.1}},
            losses__seg_to_cam={"same": "losses.contrastive", "times": 0.5},
        ),
        space(assignment__scales={"choice": [[1.0], [1.0, 0.5, 1.5]]}),
    ],
)
def test_check_space_takes_what_is_right(good: dict[str, Dimension]) -> None:
    check_space(good, BASE, "sweep.yaml")
    padded = {**good, **{f"model.backbone_args.k{i}": Dimension(uniform=(0.0, 1.0)) for i in range(9)}}
    check_space(padded, BASE, "sweep.yaml")  # too large for all of its corners


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
    assert all(set(point) == set(names) for point in seen)
    for one, two in itertools.combinations(names, 2):
        assert set(itertools.product((0.0, 1.0), repeat=2)) <= {(point[one], point[two]) for point in seen}


@pytest.mark.parametrize(
    ("varied", "key", "ends"),
    [
        ({"training.steps": {"randint": [100, 300]}}, "training.steps", (100, 300)),
        ({"training.steps": {"choice": [50, 20, 70]}}, "training.steps", (20, 70)),
        ({"training.steps": {"choice": [50, 20, 70]}}, "evaluation.every", (7, 7)),
        ({"training.steps": {"choice": ["400", 100]}}, "training.steps", (100, 400)),
        # Where it does not vary, the base's 7 stays.
        ({"a": {"choice": [1, 2]}, "b": {"randint": [10, 20], "when": {"a": 1}}}, "b", (7, 20)),
        ({"a": {"randint": [10, 20]}, "b": {"same": "a", "times": 2.5}}, "b", (25, 50)),
        ({"a": {"randint": [1, 2]}, "b": {"same": "a", "times": -3}, "c": {"same": "b", "times": 2}}, "c", (-12, -6)),
        # Tied to a conditional one it is left out with it.
        (
            {
                "x": {"choice": [1, 2]},
                "a": {"randint": [10, 20], "when": {"x": 1}},
                "b": {"same": "a", "times": 2},
            },
            "b",
            (7, 40),
        ),
    ],
)
def test_extremes(varied: dict[str, Any], key: str, ends: tuple[float, float]) -> None:
    read = {name: Dimension.model_validate(dimension) for name, dimension in varied.items()}
    assert extremes(read, 7, key) == ends
    drawn = {float(at_random(read, seed).get(key, 7)) for seed in range(50)}
    assert min(drawn) >= ends[0]
    assert max(drawn) <= ends[1]


def test_every_point_of_a_good_space_is_a_valid_experiment() -> None:
    base = load_config("shapes")
    varied = space(
        optimiser__lr={"loguniform": [1e-4, 1e-2]},
        optimiser__weight_decay={"same": "optimiser.lr", "times": 10},
        dynamic_threshold__start={"choice": ["extremes", "quantiles"]},
    )
    check_space(varied, base, "sweep.yaml")
    for point in points(varied):
        made = apply_overrides(base, point).optimiser
        assert made.lr == pytest.approx(point["optimiser.lr"])
        assert made.weight_decay == pytest.approx(10 * made.lr)
