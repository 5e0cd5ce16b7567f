"""A cluster that starts with no machine for workers: Ray's own autoscaler adds them, over its provider for one host."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.training.driver import train
from tests.conftest import history
from tests.integration.machines import Seen
from tests.integration.team_server import PlainServer

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
Make = Callable[..., Config]


def machines_with_cpus() -> int:
    import ray

    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


@pytest.fixture
def autoscaled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, and up to two machines of two CPUs each when they are asked for."""
    import ray
    from ray.cluster_utils import AutoscalingCluster

    from cosa_ray.training.ray_train import RAY_TRAIN_SETTINGS

    for key, value in RAY_TRAIN_SETTINGS.items():
        monkeypatch.setenv(key, value)
    machine = {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    cluster = AutoscalingCluster({"CPU": 0}, {"machine": machine}, idle_timeout_minutes=0.2)
    cluster.start()
    try:
        ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_machines_come_for_a_run_and_go_after_it(autoscaled: Any, tiny: Make, tmp_path: Path) -> None:
    """From none to two and back; the loss is that of one process, and what could never fit is refused at once."""
    settings: dict[str, Any] = {"training__steps": 24, "evaluation__every": 12, "checkpoint__every": 8}
    with PlainServer(tmp_path) as server:
        settings["tracking__uri"] = server.url
        alone = train(tiny(**settings), name="alone", local=True)
        assert machines_with_cpus() == 0
        with pytest.raises(UserError, match=r"resources\.cpus_per_worker"):
            train(tiny(workers=2, **settings), name="unstated")
        with pytest.raises(UserError, match="do not fit"):
            train(tiny(workers=3, resources__cpus_per_worker=1.9, **settings), name="never")
        with Seen("RayTrainWorker") as seen:
            result = train(tiny(workers=2, resources__cpus_per_worker=1.9, **settings), name="scaled")
        assert result.state == "finished"
        assert len(seen.nodes) == 2
        expected, found = (history(server.url, str(run.mlflow_run_id), "train/loss") for run in (alone, result))
    assert [step for step, _ in found] == list(range(1, 25))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-4)
    end = time.monotonic() + 300
    while machines_with_cpus() and time.monotonic() < end:
        time.sleep(1)
    assert machines_with_cpus() == 0
