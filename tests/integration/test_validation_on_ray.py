"""Evaluations beside a run, by Ray Train's task: the same numbers at the same steps, whatever dies meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.training.driver import RunResult, train
from cosa_ray.training.runs import find_run
from tests.conftest import history

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
Make = Callable[..., Config]
SETTINGS: dict[str, Any] = {"training__steps": 24, "evaluation__every": 8, "checkpoint__every": 4}
BESIDE: dict[str, Any] = {**SETTINGS, "evaluation__asynchronous": True, "resources__cpus_per_worker": 0.9}


def measured(config: Config, result: RunResult) -> dict[str, list[tuple[int, float]]]:
    """Every point of every metric of evaluations in MLflow, but the time they took."""
    from mlflow import MlflowClient

    uri, run_id = config.tracking.uri or "", result.mlflow_run_id or ""
    keys = MlflowClient(tracking_uri=uri).get_run(run_id).data.metrics
    return {key: history(uri, run_id, key) for key in keys if key.startswith("val/")}


def images(config: Config, result: RunResult) -> set[str]:
    """Pictures of a run in MLflow by key and step."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=config.tracking.uri)
    found = [file.path for file in client.list_artifacts(result.mlflow_run_id or "", "images")]
    return {file.partition("+timestamp")[0] for file in found if file.endswith(".png")}


def validating() -> list[psutil.Process]:
    """Processes of evaluations beside a run on this machine."""
    titled = ((each, each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"]))
    return [each for each, words in titled if any("run_validation_fn" in word for word in words)]


@pytest.fixture
def expected(tiny: Make) -> dict[str, list[tuple[int, float]]]:
    config = tiny(**SETTINGS)
    return measured(config, train(config, name="expected", local=True))


def settled(config: Config, name: str) -> None:
    """Nothing is awaited any more, and what is kept is the last and the best."""
    entries = find_run(name, config.storage).checkpoints.entries()
    assert not any(entry.awaited for entry in entries)
    assert len(entries) <= 2
    folder = Path(config.storage) / name / "checkpoints"
    assert sorted(os.listdir(folder)) == sorted(entry.name.rpartition("/")[2] for entry in entries)


@pytest.mark.slow
def test_the_numbers_are_those_of_a_run_that_stops_to_evaluate(
    ray_cluster: str, tiny: Make, expected: dict[str, list[tuple[int, float]]]
) -> None:
    config = tiny(**BESIDE)
    result = train(config, name="beside")
    assert result.state == "finished"
    found = measured(config, result)
    assert [step for step, _ in found["val/cam_miou_best"]] == [8, 16, 24]
    assert [step for step, _ in found["val/miou"]] == [16, 24], "the decoder was not trained at step 8"
    assert found == expected
    assert {f"images/val~panel+step+{step}" for step in (8, 16, 24)} <= images(config, result)
    settled(config, "beside")
    best = find_run("beside", config.storage).best()
    assert best.metrics["val/miou"] == max(value for _, value in expected["val/miou"])
    assert result.best_metrics == best.metrics


@pytest.mark.slow
def test_an_evaluation_that_is_killed_is_done_again(
    ray_cluster: str, tiny: Make, expected: dict[str, list[tuple[int, float]]]
) -> None:
    config, killed = tiny(**BESIDE), []

    def kill() -> None:
        end = time.monotonic() + 300
        while not killed and time.monotonic() < end:
            for process in validating():
                process.kill()
                killed.append(process.pid)
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    result = train(config, name="killed")
    thread.join()
    assert killed
    assert result.state == "finished"
    assert measured(config, result) == expected
    settled(config, "killed")


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, 24])
def test_what_a_killed_driver_still_awaited_is_asked_for_again(
    ray_cluster: str, tiny: Make, tmp_path: Path, expected: dict[str, list[tuple[int, float]]], step: int
) -> None:
    """In the middle of a run, and after its last step."""
    config = tiny(**BESIDE)
    (tmp_path / "x.yaml").write_text(dump_config(config))
    words = [sys.executable, "-m", "cosa_ray.cli.main", "train", "x.yaml", "--name", "cut"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_ADDRESS": ray_cluster}
    driver = subprocess.Popen(words, cwd=tmp_path, env=environment, start_new_session=True)
    end = time.monotonic() + 300
    while True:
        assert time.monotonic() < end
        assert driver.poll() is None
        index = Path(config.storage) / "cut/checkpoints.json"
        entries = json.loads(index.read_text())["checkpoints"] if index.exists() else []
        if any(entry["awaited"] and entry["step"] == step for entry in entries):
            break
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    subprocess.run([*words, "--resume"], cwd=tmp_path, env=environment, check=True, timeout=600)
    run = find_run("cut", config.storage)
    assert run.record.state == "finished"
    uri, run_id = config.tracking.uri or "", run.record.mlflow_run_id or ""
    assert {key: history(uri, run_id, key) for key in expected} == expected
    settled(config, "cut")


def test_what_cannot_be_is_refused_before_it_starts(ray_cluster: str, tiny: Make) -> None:
    with pytest.raises(UserError, match=r"2 workers x 1.5 CPUs = 3 do not fit .* \(one evaluates beside the run"):
        train(tiny(evaluation__asynchronous=True, resources__cpus_per_worker=1.5), name="large")
    with pytest.raises(UserError, match=r"--local is one process, and evaluation\.asynchronous"):
        train(tiny(evaluation__asynchronous=True), name="here", local=True)
    with pytest.raises(UserError, match=r"evaluation\.asynchronous needs a number of workers"):
        tiny(evaluation__asynchronous=True, workers={"min": 1, "max": 2}, resources__cpus_per_worker=0.9)
