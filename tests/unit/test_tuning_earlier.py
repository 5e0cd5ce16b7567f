"""Runs of before a sweep, in a real MLflow store: which of them count, with what score, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cosa_ray.config.load import apply_overrides
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.tracking.describe import parameters
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.earlier import _values, earlier_runs, keep_earlier
from cosa_ray.tuning.search import Known
from cosa_ray.tuning.sweepfile import Sweep

SPACE = {
    "losses.cam_to_seg": {"uniform": [0.05, 0.5]},
    "losses.seg_to_cam": {"same": "losses.cam_to_seg", "times": 0.5},
    "optimiser.clip_norm": {"choice": [1, None]},
    "pseudo_labels.policy": {"choice": ["single", "reliability"]},
    "contrastive.temperature": {"loguniform": [0.1, 1], "when": {"pseudo_labels.policy": "single"}},
    "assignment.scales": {"choice": [[1.0, 0.5, 1.5], [1.0]]},
    "model.backbone_args.depth": {"randint": [1, 4]},
}
IN = {"model.backbone_args.depth": 2}  # beside the schema's defaults
ONE: dict[str, Any] = {"val/miou": "max"}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Runs a..m, of which a, b and c count for SPACE."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    found = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    client = MlflowClient(tracking_uri=found)
    experiment = client.create_experiment("before")
    client.create_experiment("empty")
    other = client.create_experiment("other")

    def run(
        name: str,
        values: Mapping[str, Any] | None = None,
        miou: tuple[float, ...] = (0.3,),
        status: str = "FINISHED",
        where: str = experiment,
        **tags: str,
    ) -> None:
        made = client.create_run(
            where, run_name=name, tags={"team": "x", **{f"cosa_ray.{k}": v for k, v in tags.items()}}
        )
        logged = parameters(apply_overrides(Config(), {**IN, **(values or {})}))
        params = [Param(key, logged[key]) for key in logged if key in (*SPACE, "model.backbone_args", "seed")]
        metrics = [Metric("val/miou", value, 0, step) for step, value in enumerate(miou)]
        metrics += [Metric("cost/cpu_hours", 0.1 * step, 0, step) for step in range(len(miou))]
        client.log_batch(made.info.run_id, metrics=metrics, params=params)
        client.set_terminated(made.info.run_id, status)

    run("a", miou=(0.1, 0.6, 0.2))
    run(
        "b",
        {
            "losses.cam_to_seg": 0.3,
            "losses.seg_to_cam": 0.15,
            "optimiser.clip_norm": 1.0,
            "pseudo_labels.policy": "single",
            "contrastive.temperature": 0.25,
            "assignment.scales": [1],
        },
        miou=(float("nan"), 0.7, 0.65),
    )
    run("c", {"losses.cam_to_seg": 0.2, "losses.seg_to_cam": 0.1}, miou=(0.4,))
    run("d, outside", {"losses.cam_to_seg": 0.9, "losses.seg_to_cam": 0.45})
    run("e, not tied", {"losses.cam_to_seg": 0.2, "losses.seg_to_cam": 0.2})
    run("f, another choice", {"optimiser.clip_norm": 2.0})
    run("g, failed", status="FAILED")
    run("h, given up", stopped_by="asha")
    run("i, a sweep's own", kind="sweep")
    run("j, not evaluated", miou=())
    run("k, no score", miou=(float("nan"),))
    run("l, too deep", {"model.backbone_args.depth": 9})
    run("elsewhere", where=other)
    foreign = client.create_run(experiment, run_name="m, not ours", tags={"team": "x"})
    client.log_param(foreign.info.run_id, "lr", "0.1")
    client.log_metric(foreign.info.run_id, "val/miou", 0.99)
    client.set_terminated(foreign.info.run_id, "FINISHED")
    return found


@pytest.fixture
def ask(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Look for runs by a filter."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def look(
        runs: str = "tags.team = 'x'", metrics: Mapping[str, Any] = ONE, space: Any = None, **earlier: Any
    ) -> list[Known]:
        base = apply_overrides(Config(), {"tracking.uri": uri, "tracking.experiment": "before"})
        sweep = Sweep.model_validate(
            {"base": "x", "space": SPACE if space is None else space, "earlier": {"runs": runs, **earlier}}
        )
        return earlier_runs(sweep, base, metrics, RunFolder(str(tmp_path)), "sweep s")

    return look


PAPER = {
    "losses.cam_to_seg": 0.1,
    "losses.seg_to_cam": 0.05,
    "optimiser.clip_norm": None,
    "pseudo_labels.policy": "reliability",
    "assignment.scales": (1.0, 0.5, 1.5),
    "model.backbone_args.depth": 2,
}


def test_finished_runs_within_the_space_count_with_their_best_evaluation(ask: Any) -> None:
    found = ask()
    assert [(known.name, known.scores) for known in found] == [("b", (0.7,)), ("a", (0.6,)), ("c", (0.4,))]
    assert found[1].values == PAPER
    assert repr(found[0].values["optimiser.clip_norm"]) == "1"  # as the space writes it
    assert found[0].values == {
        "losses.cam_to_seg": 0.3,
        "losses.seg_to_cam": 0.15,
        "optimiser.clip_norm": 1,
        "pseudo_labels.policy": "single",
        "contrastive.temperature": 0.25,
        "assignment.scales": (1.0,),
        "model.backbone_args.depth": 2,
    }


def test_less_is_better_where_it_is(ask: Any) -> None:
    assert [(known.name, known.scores) for known in ask(metrics={"val/miou": "min"})] == [
        ("a", (0.1,)),
        ("c", (0.4,)),
        ("b", (0.65,)),
    ]


def test_several_metrics_are_those_of_the_last_evaluation(ask: Any) -> None:
    found = ask(metrics={"cost/cpu_hours": "min", "val/miou": "max"})
    assert [(known.name, known.scores) for known in found] == [("c", (0.0, 0.4)), ("b", (0.2, 0.65)), ("a", (0.2, 0.2))]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"runs": "metrics.`val/miou` > 0.35"}, ["b", "c"]),  # MLflow's own last values
        ({"runs": "params.`pseudo_labels.policy` = 'single'"}, ["b"]),
        ({"experiment": "other"}, ["elsewhere"]),
    ],
)
def test_the_filter_is_mlflows(ask: Any, given: dict[str, str], names: list[str]) -> None:
    assert [known.name for known in ask(**given)] == names


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"runs": "tags.team = 'y'"}, "no finished run with val/miou and settings within the space among 0 in"),
        (
            {"space": {"losses.cam_to_seg": {"uniform": [5, 6]}}},
            "within the space among 13 in experiment before of sqlite",
        ),
        ({"experiment": "empty"}, "among 0 in experiment empty"),
        ({"experiment": "nowhere"}, "among 0 in experiment nowhere"),
        ({"runs": "team is x"}, "earlier.runs: MLflow does not answer this filter"),
    ],
)
def test_what_finds_nothing_is_refused(ask: Any, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        ask(**given)
    assert str(caught.value).startswith("sweep s: ")
    assert "\n" not in str(caught.value)


def test_what_was_found_stays_the_same(ask: Any, tmp_path: Path) -> None:
    found = ask()
    keep_earlier(RunFolder(str(tmp_path)), found)
    assert ask("team is x") == found  # nobody is asked again


def test_a_tied_list_is_compared_as_a_list() -> None:
    space = {
        "evaluation.scales": {"choice": [[1.0], [1.0, 0.5]]},
        "assignment.scales": {"same": "evaluation.scales"},
    }
    sweep = Sweep.model_validate({"base": "x", "space": space})
    alike = {"evaluation.scales": "[1.0, 0.5]", "assignment.scales": "[1.0, 0.5]"}
    assert _values(sweep, alike) == dict.fromkeys(space, (1.0, 0.5))
    assert _values(sweep, alike | {"assignment.scales": "[1.0]"}) is None


def test_without_earlier_nobody_is_asked(tmp_path: Path) -> None:
    sweep = Sweep.model_validate({"base": "x", "space": SPACE})
    assert earlier_runs(sweep, Config(), ONE, RunFolder(str(tmp_path)), "x") == []
