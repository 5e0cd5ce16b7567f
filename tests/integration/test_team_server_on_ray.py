"""A sweep and its promotion against a team's server, from a cluster whose processes have ada's credentials."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from cosa_ray.config.schema import Config
from cosa_ray.tuning.promote import promote_sweep
from cosa_ray.tuning.sweep import Sweep, run_sweep
from tests.integration.team_server import TeamServer

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def cluster(team: TeamServer, request: pytest.FixtureRequest) -> Iterator[TeamServer]:
    """The server, and a cluster started with ada's credentials in the environment, as a team starts its own."""
    with team.client_of("ada"):
        request.getfixturevalue("ray_cluster")
        yield team


def test_a_sweep_and_its_promotion(cluster: TeamServer, tiny: Make) -> None:
    team = cluster
    short = {"training__steps": 12, "training__warmup_iters": 4, "evaluation__every": 6}
    base = tiny(tracking__uri=team.url, tracking__experiment="sweeps", **short)
    sweep = Sweep.model_validate(
        {"base": "tiny", "space": {"losses.cam_to_seg": {"uniform": [0.1, 0.2]}}, "search": "random", "trials": 2}
    )
    result = run_sweep(sweep, base, name="swept")
    assert result.state == "finished"
    (parent,) = team.run_ids("swept")
    assert result.parent_run_id == parent
    assert "sweep/sweep.json" in team.objects(parent)
    trials = team.postgres.query(
        "mlflow",
        "SELECT runs.name, runs.run_uuid, status FROM runs JOIN tags USING (run_uuid) "
        "WHERE key = 'mlflow.parentRunId' AND tags.value = %s ORDER BY runs.name",
        parent,
    )
    assert [(name, status) for name, _, status in trials] == [(t.name, "FINISHED") for t in result.trials]
    for _, run_id, _ in trials:
        assert [step for step, _ in team.points(run_id, "train/loss")] == list(range(1, 13))
        assert [step for step, _ in team.points(run_id, "val/miou")] == [6, 12]
        assert "config.yaml" in team.objects(run_id)

    done = promote_sweep(
        "swept",
        seeds=1,
        protocols=["single_scale"],
        storage=base.storage,
        register="swept-model",
        aliases=["champion"],
    )
    assert done.state == "finished"
    (promoted,) = team.run_ids("swept-promoted")
    assert {"promotion/promoted.json", "promotion/results.md"} <= set(team.objects(promoted))
    assert team.postgres.query("mlflow", "SELECT alias, version FROM registered_model_aliases") == [("champion", 1)]
