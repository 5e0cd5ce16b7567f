"""A cluster that starts with no machine for workers: Ray's own autoscaler adds them, over its provider for one host."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.training import autoscaler
from cosa_ray.training.driver import train
from cosa_ray.training.room import Node, alive_nodes
from tests.conftest import history
from tests.integration.machines import Seen
from tests.integration.team_server import PlainServer, Process, free_port, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
Make = Callable[..., Config]
CLUSTER: dict[str, Any] = {
    "cluster_name": "on-one-host",
    "auth": {"ssh_user": "nobody"},
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "machine": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "max_workers": 2,
    "idle_timeout_minutes": 0.2,
}


def machines_with_cpus() -> int:
    import ray

    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


@pytest.fixture
def autoscaled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A head without CPUs, and up to two machines of two CPUs each when they are asked for.

    Not Ray's AutoscalingCluster: its wheel lacks the file that this reads, and it ends every Ray process of the host.
    """
    import ray

    from cosa_ray.training.ray_train import RAY_TRAIN_SETTINGS

    for key, value in RAY_TRAIN_SETTINGS.items():
        monkeypatch.setenv(key, value)
    plan = tmp_path / "cluster.json"  # which is YAML too
    defaults = Path(ray.__file__).parent / "autoscaler/local/defaults.yaml"  # what `ray up` fills in
    port = free_port()
    settings = ("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check")
    provider = {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", **dict.fromkeys(settings, True)}
    plan.write_text(json.dumps({**yaml.safe_load(defaults.read_text()), **CLUSTER, "provider": provider}))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--num-cpus=0", "--block"]
    command += [
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
        f"--autoscaling-config={plan}",
        "--disable-usage-stats",
    ]
    environment = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with Process(command, tmp_path / "ray.log", environment) as head:
        head.wait_until(lambda: "--block" in head.output.read_text())
        try:
            ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
            yield
        finally:
            ray.shutdown()
            started = psutil.Process(head.popen.pid).children(recursive=True)
            for each in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()


def test_machines_come_for_a_run_and_go_after_it(autoscaled: None, tiny: Make, tmp_path: Path) -> None:
    """From none to two and back; the loss is that of one process, and what could never fit is refused at once."""
    settings: dict[str, Any] = {"training__steps": 24, "evaluation__every": 12, "checkpoint__every": 8}
    with PlainServer(tmp_path) as server:
        settings["tracking__uri"] = server.url
        alone = train(tiny(**settings), name="alone", local=True)
        assert machines_with_cpus() == 0
        assert autoscaler.to_come(alive_nodes()) == [Node(2.0), Node(2.0)]
        wait_for(autoscaler._autoscaled)
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
    wait_for(lambda: machines_with_cpus() == 0, seconds=300)
