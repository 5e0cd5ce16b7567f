"""A run whose folder is a bucket (a local S3), in one process without Ray."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.training.driver import RunResult, train
from cosa_ray.training.evaluating import evaluate_run
from cosa_ray.training.lease import hold
from cosa_ray.training.predicting import predict
from cosa_ray.training.runs import read_run
from cosa_ray.training.session import LocalSession
from cosa_ray.training.storage import RunFolder
from tests.conftest import history
from tests.integration.team_server import Process, bucket_server

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """moto's S3 as a process, with the bucket `shared`; the environment says how to reach it."""
    with bucket_server(tmp_path_factory.mktemp("s3"), "shared") as process:
        yield process


def keys() -> set[str]:
    import boto3

    return {each.key for each in boto3.resource("s3").Bucket("shared").objects.all() if not each.key.endswith("/")}


def curve(config: Config, result: RunResult) -> list[tuple[int, float]]:
    assert config.tracking.uri is not None
    assert result.mlflow_run_id is not None
    return history(config.tracking.uri, result.mlflow_run_id, "train/loss")


def test_a_run_in_a_bucket(s3: Process, tiny: Make, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, continued while the store hangs for a while, evaluated, and used; as a run in a folder."""
    here = tiny()
    expected = curve(here, train(here, name="here", local=True))
    config = tiny(storage="s3://shared/runs")

    class Stopping(LocalSession):
        steps = 0

        def stop_wished(self) -> bool:
            self.steps += 1
            return self.steps == 7

    with monkeypatch.context() as patch:
        patch.setattr("cosa_ray.training.driver.LocalSession", Stopping)
        stopped = train(config, name="there", local=True)
    assert stopped.state == "stopped"
    with pytest.raises(UserError, match="exists already"):
        train(config, name="there", local=True)

    def hang() -> None:
        while (run := read_run("s3://shared/runs/there")) is None or run.step < 10:
            time.sleep(0.05)
        s3.popen.send_signal(signal.SIGSTOP)
        time.sleep(5)
        s3.popen.send_signal(signal.SIGCONT)

    hung = threading.Thread(target=hang)
    hung.start()
    result = train(config, name="there", local=True, resume=True)
    hung.join()
    assert result.state == "finished"
    assert curve(config, result) == expected
    mine = {key.removeprefix("runs/there/") for key in keys() if key.startswith("runs/there/")}
    steps = {key.split("/")[1] for key in mine if key.startswith("checkpoints/")}
    assert steps <= {"step_00000010", "step_00000020"}
    assert "step_00000020" in steps
    assert {key for key in mine if "/" not in key} == {"run.json", "config.yaml", "checkpoints.json"}

    report = evaluate_run("there", storage="s3://shared/runs", local=True, track=False)
    assert report.folder.startswith("s3://shared/runs/there/evaluations/")
    assert any(key.startswith("runs/there/evaluations/") for key in keys())
    made: Any = predict("there", [str(pictures)], out="s3://shared/masks", storage="s3://shared/runs", local=True)
    assert made.images == 3
    assert any(key.startswith("masks/") and key.endswith("a.png") for key in keys())


def test_a_bucket_has_one_holder(s3: Process) -> None:
    folder = RunFolder("s3://shared/held/x")
    with hold(folder, "run x"), pytest.raises(UserError, match="is being worked on"), hold(folder, "run x"):
        pass
    with hold(folder, "run x"):
        pass
    assert "held/x/.lease.json" not in keys()
