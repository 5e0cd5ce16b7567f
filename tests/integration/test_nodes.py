"""Several machines, really: raylets with their own resources, a tracking server, storage in a folder and in S3."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.training.autoscaler import to_come
from cosa_ray.training.driver import RunResult, train
from cosa_ray.training.room import alive_nodes
from cosa_ray.training.runs import read_run
from cosa_ray.training.session import Progress
from cosa_ray.tuning.sweep import run_sweep
from cosa_ray.tuning.sweepfile import Sweep
from tests.conftest import history, tiny_config
from tests.integration.machines import Machines, Seen, machines
from tests.integration.team_server import PlainServer, bucket_server

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
Make = Callable[..., Config]
SETTINGS: dict[str, Any] = {"training__steps": 48, "checkpoint__every": 4, "evaluation__every": 24}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A bucket of a local S3 (moto); what processes need to reach it is in the environment."""
    import boto3

    with bucket_server(tmp_path_factory.mktemp("s3"), "shared"):
        yield boto3.resource("s3").Bucket("shared")


@pytest.fixture(scope="module")
def cluster(bucket: Any) -> Iterator[Machines]:
    """A head with two CPUs, whose machines can reach the bucket; tests add more."""
    with machines(head_cpus=2) as made:
        yield made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's server on SQLite: workers of several machines may not share a file."""
    with PlainServer(tmp_path_factory.mktemp("mlflow")) as plain:
        yield plain.url


def curve(config: Config, result: RunResult, key: str = "train/loss") -> list[tuple[int, float]]:
    assert config.tracking.uri is not None
    assert result.mlflow_run_id is not None
    return history(config.tracking.uri, result.mlflow_run_id, key)


@pytest.fixture(scope="module")
def alone(server: str, tiny_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """The loss of one process without Ray."""
    config = tiny_config(tiny_dataset, tmp_path_factory.mktemp("alone"), tracking__uri=server, **SETTINGS)
    return curve(config, train(config, name="alone", local=True))


def same(one: list[tuple[int, float]], other: list[tuple[int, float]], tolerance: float = 1e-4) -> None:
    """Every step once, with the same loss to the tolerance of another number of workers."""
    assert [step for step, _ in one] == [step for step, _ in other]
    assert [value for _, value in one] == pytest.approx([value for _, value in other], rel=tolerance)


def test_two_machines_of_two_workers_are_one_process(
    cluster: Machines, server: str, tiny: Make, alone: list[tuple[int, float]]
) -> None:
    node = cluster.add(2)
    config = tiny(workers=4, tracking__uri=server, **SETTINGS)
    with Seen("RayTrainWorker") as seen:
        result = train(config, name="spread")
    cluster.kill(node)
    assert result.state == "finished"
    assert len(seen.nodes) == 2
    assert max(seen.sizes) == 4
    same(curve(config, result), alone)


def test_sqlite_is_refused_with_several_machines(cluster: Machines, tiny: Make) -> None:
    node = cluster.add(2)
    assert to_come(alive_nodes()) == [], "nobody adds machines to a cluster that was started by hand"
    with pytest.raises(UserError, match="server"):
        train(tiny(workers=2), name="refused")
    cluster.kill(node)


def test_a_sweep_spreads(cluster: Machines, server: str, tiny: Make) -> None:
    node = cluster.add(2)
    base = tiny(tracking__uri=server, training__steps=12, evaluation__every=6, resources__cpus_per_worker=1.9)
    space = {"losses.cam_to_seg": {"uniform": [0.1, 0.2]}}
    sweep = Sweep.model_validate({"base": "x", "space": space, "search": "random", "trials": 4})
    with Seen("RayTrainWorker") as seen:
        result = run_sweep(sweep, base, name="spread-sweep")
    cluster.kill(node)
    assert [trial.state for trial in result.trials] == ["finished"] * 4
    assert len(seen.nodes) == 2


class At(threading.Thread):
    """Does things when a run's registered checkpoints reach steps, one after the other."""

    def __init__(self, folder: str, *todo: tuple[int, Callable[[], object]]) -> None:
        super().__init__(daemon=True)
        self._folder, self._todo = folder, todo
        self.done: list[int] = []

    def run(self) -> None:
        for step, action in self._todo:
            while (run := read_run(self._folder)) is None or run.step < step:
                time.sleep(0.1)
            action()
            self.done.append(step)


def test_a_machine_is_taken_away_and_another_comes(
    cluster: Machines, server: str, tiny: Make, alone: list[tuple[int, float]]
) -> None:
    """Two workers, one a machine: the run waits for the second machine and goes on from its checkpoint."""
    node = cluster.add(2)
    config = tiny(workers=2, resources__cpus_per_worker=1.9, tracking__uri=server, **SETTINGS)
    back = []
    todo = At(
        f"{config.storage}/taken",
        (12, lambda: cluster.kill(node)),
        (12, lambda: (time.sleep(5), back.append(cluster.add(2)))),
    )
    todo.start()
    result = train(config, name="taken")
    todo.join(10)
    for each in back:
        cluster.kill(each)
    assert todo.done == [12, 12]
    assert result.state == "finished"
    same(curve(config, result), alone)
    assert [step for step, _ in curve(config, result, "val/miou")] == [24, 48]


def test_a_machine_that_is_told_to_go_leaves_a_checkpoint(
    cluster: Machines, server: str, tiny: Make, tmp_path: Path
) -> None:
    """SIGTERM with a grace period, as spot machines get it: the notice is answered by a checkpoint of that moment."""
    long: dict[str, Any] = {"training__steps": 600, "checkpoint__every": 1000, "evaluation__every": 600}
    config = tiny(workers=2, resources__cpus_per_worker=1.9, tracking__uri=server, **long)
    machine = cluster.start(2, tmp_path / "machine.log")
    noticed: list[int] = []
    back: list[Any] = []

    def go() -> None:
        machine.popen.send_signal(signal.SIGTERM)
        while (run := read_run(f"{config.storage}/told")) is None or not run.step:
            time.sleep(0.05)
        noticed.append(run.step)
        assert machine.popen.poll() is None, "the checkpoint is there before the machine has gone"
        machine.popen.wait(60)
        back.append(cluster.add(2))

    told = threading.Event()

    def show(progress: Progress) -> None:
        if progress.step >= 20 and not told.is_set():
            told.set()
            threading.Thread(target=go, daemon=True).start()

    try:
        result = train(config, name="told", show=show)
    finally:
        machine.kill()
        for each in back:
            cluster.kill(each)
    assert noticed
    assert 20 <= noticed[0] < 600
    assert result.state == "finished"
    assert [step for step, _ in curve(config, result)] == list(range(1, 601)), "every step once"


def test_workers_follow_the_machines(
    cluster: Machines, server: str, tiny: Make, alone: list[tuple[int, float]]
) -> None:
    """Two workers, then one, then two again; the loss is that of an undisturbed run."""
    node = cluster.add(2)
    elastic = {"min": 1, "max": 2, "look_every": 2.0}
    config = tiny(
        workers=elastic,
        resources__cpus_per_worker=1.9,
        tracking__uri=server,
        **{**SETTINGS, "training__steps": 120, "evaluation__every": 60},
    )
    undisturbed = tiny(tracking__uri=server, **{**SETTINGS, "training__steps": 120, "evaluation__every": 60})
    expected = curve(undisturbed, train(undisturbed, name="long-alone", local=True))
    back = []
    todo = At(
        f"{config.storage}/elastic",
        (16, lambda: cluster.kill(node)),
        (32, lambda: back.append(cluster.add(2))),
    )
    todo.start()
    shown: list[Progress] = []
    with Seen("RayTrainWorker") as seen:
        result = train(config, name="elastic", show=shown.append)
    for each in back:
        cluster.kill(each)
    assert result.state == "finished"
    assert todo.done == [16, 32]
    sizes = [size for size in seen.sizes if size]
    assert sizes[0] == 2 or sizes[:2] == [1, 2], sizes
    assert 1 in sizes[1:], sizes
    assert sizes[-1] == 2 or sizes[-2:] == [2, 1], sizes
    same(curve(config, result), expected, tolerance=2e-3)


def test_three_machines_where_four_are_wished(
    cluster: Machines, server: str, tiny: Make, alone: list[tuple[int, float]]
) -> None:
    nodes = [cluster.add(2), cluster.add(2)]
    elastic = {"min": 2, "max": 4, "look_every": 60.0}
    config = tiny(workers=elastic, resources__cpus_per_worker=1.9, tracking__uri=server, **SETTINGS)
    with Seen("RayTrainWorker") as seen:
        result = train(config, name="three")
    for node in nodes:
        cluster.kill(node)
    assert max(seen.sizes) == 3
    same(curve(config, result), alone)


def test_everything_of_a_run_is_in_the_bucket(
    cluster: Machines, bucket: Any, server: str, tiny: Make, alone: list[tuple[int, float]], tmp_path: Path
) -> None:
    """Stopped, then continued by other machines: nothing of it was on a machine's own disk."""
    storage = f"s3://{bucket.name}/runs"
    config = tiny(workers=4, storage=storage, tracking__uri=server, **SETTINGS)
    node = cluster.add(2)
    before = set(tmp_path.rglob("*"))
    stop = At(f"{storage}/in-s3", (12, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    stop.start()
    stopped = train(config, name="in-s3")
    cluster.kill(node)
    assert stopped.state == "stopped"
    assert 12 <= stopped.step < 48
    other = cluster.add(2)
    result = train(config, name="in-s3", resume=True)
    cluster.kill(other)
    assert result.state == "finished"
    same(curve(config, result), alone)
    assert set(tmp_path.rglob("*")) == before, "nothing beside the bucket"
    keys = {each.key for each in bucket.objects.all()}
    for name in ("run.json", "config.yaml", "checkpoints.json", "checkpoints/step_00000048/online.safetensors"):
        assert f"runs/in-s3/{name}" in keys
    assert not [key for key in keys if "spool" in key and key.endswith(".jsonl")], "all of it was delivered"


def test_a_sweep_in_a_bucket(cluster: Machines, bucket: Any, server: str, tiny: Make) -> None:
    node = cluster.add(2)
    base = tiny(storage=f"s3://{bucket.name}/sweeps", tracking__uri=server, training__steps=12, evaluation__every=6)
    space = {"losses.cam_to_seg": {"uniform": [0.1, 0.2]}}
    sweep = Sweep.model_validate({"base": "x", "space": space, "search": "random", "trials": 2})
    result = run_sweep(sweep, base, name="s3-sweep")
    cluster.kill(node)
    assert [trial.state for trial in result.trials] == ["finished"] * 2
    assert {"sweeps/s3-sweep/sweep.json", "sweeps/s3-sweep/best.yaml"} <= {each.key for each in bucket.objects.all()}
