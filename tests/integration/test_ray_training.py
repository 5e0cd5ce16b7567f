"""The same loop under Ray Train: any number of workers, killed workers, a stopped driver."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed
from cosa_ray.training.driver import RunResult, train
from tests.conftest import history, tiny_config

pytestmark = pytest.mark.ray
Make = Callable[..., Config]


def curve(config: Config, result: RunResult, key: str = "train/loss") -> list[tuple[int, float]]:
    assert config.tracking.uri is not None
    assert result.mlflow_run_id is not None
    return history(config.tracking.uri, result.mlflow_run_id, key)


def train_workers() -> list[psutil.Process]:
    """Processes of Ray Train's workers on this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("RayTrainWorker" in word for word in process.info["cmdline"] or []):
            found.append(process)
    return found


@contextmanager
def watching(watch: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `watch(done)` in a thread for the time of the block."""
    done = threading.Event()
    thread = threading.Thread(target=watch, args=(done,))
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def status(config: Config, run: str) -> tuple[str, str | None]:
    """(status, cause) of a run in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=config.tracking.uri)
    (found,) = client.search_runs(["1"], f"tags.`cosa_ray.run` = '{run}'")
    return found.info.status, found.data.tags.get("cosa_ray.cause")


def registered(folder: Path) -> list[int]:
    """Steps of the checkpoints a run's index names."""
    try:
        return [entry["step"] for entry in json.loads((folder / "checkpoints.json").read_text())["checkpoints"]]
    except FileNotFoundError:
        return []


# Co-training begins after the eighth step.
SETTINGS: dict[str, Any] = {"training__steps": 48, "checkpoint__every": 4, "evaluation__every": 24}


class Ran(NamedTuple):
    """An undisturbed run; the names of Ray's processes meanwhile, and of the files that its controller had mapped."""

    config: Config
    result: RunResult
    processes: set[str]
    controller: set[str]

    def curve(self, key: str = "train/loss") -> list[tuple[int, float]]:
        return curve(self.config, self.result, key)


def undisturbed(config: Config, name: str) -> Ran:
    processes: set[str] = set()
    mapped: set[str] = set()

    def look(done: threading.Event) -> None:
        while not done.wait(0.5):
            for process in psutil.process_iter(["cmdline"]):
                title = " ".join(process.info["cmdline"] or [])
                if title.startswith("ray::"):
                    processes.add(title.removeprefix("ray::").partition(".")[0])
                if "TrainController" in title:
                    with suppress(psutil.Error):
                        mapped.update(Path(file.path).name for file in process.memory_maps())

    with watching(look):
        return Ran(config, train(config, name=name), processes, mapped)


@pytest.fixture(scope="module")
def alone(ray_cluster: str, tiny_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One worker on Ray."""
    return undisturbed(tiny_config(tiny_dataset, tmp_path_factory.mktemp("alone"), **SETTINGS), "alone")


@pytest.fixture(scope="module")
def pair(ray_cluster: str, tiny_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Two workers on Ray at the same global batch."""
    return undisturbed(tiny_config(tiny_dataset, tmp_path_factory.mktemp("pair"), workers=2, **SETTINGS), "pair")


def test_two_workers_equal_one(alone: Ran, pair: Ran) -> None:
    """Twenty steps across the end of warm-up at the same global batch, fp32: the same losses to 1e-4."""
    assert [step for step, _ in alone.curve()] == list(range(1, 49))
    for (step, one), (_, two) in list(zip(alone.curve(), pair.curve(), strict=True))[:20]:
        assert two == pytest.approx(one, abs=1e-4), f"step {step}"
    assert alone.curve("val/images") == pair.curve("val/images"), "no image dropped or counted twice"
    assert alone.result.last_metrics["val/images"] == 11
    (step, one), (_, two) = alone.curve("val/miou")[0], pair.curve("val/miou")[0]
    assert step == 24
    assert two == pytest.approx(one, abs=1e-2)


def test_ray_and_local_are_the_same_bits(alone: Ran, tiny: Make) -> None:
    config = tiny(**SETTINGS)
    assert alone.curve() == curve(config, train(config, name="bare", local=True))


def test_ray_s_controller_does_not_import_torch(alone: Ran) -> None:
    """Neither for what it hands to a single worker nor for what that returns: seconds, half a gigabyte a run."""
    assert any(name.startswith("_raylet") for name in alone.controller), "seen at work"
    assert not any("torch" in name for name in alone.controller)


def test_a_run_starts_no_process_it_has_no_use_for(alone: Ran, pair: Ran) -> None:
    """Each of Ray's costs seconds of a core; a run reads its data set itself, and nobody preempts one machine."""
    for ran in (alone, pair):
        assert {"TrainController", "RayTrainWorker"} <= ran.processes
        assert not {"DatasetManager", "PreemptionWatcher"} & ran.processes


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_mistake_that_one_worker_meets_ends_the_run(
    ray_cluster: str, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one waits in a collective, for half an hour if nobody ends it; and nothing starts again."""

    def work(job: Any, monitor: Any) -> Any:  # a function of a function: Ray carries it to the workers as it is
        from cosa_ray.errors import UserError
        from cosa_ray.training import ray_train

        original = ray_train.run_worker

        def run(job: Any, session: Any, device: Any) -> Any:
            import torch.distributed

            if torch.distributed.get_rank() == 1:
                raise UserError("only worker 1 meets this; mend it.")
            return original(job, session, device)

        ray_train.run_worker = run
        return ray_train._work(job, monitor)

    config = tiny(workers=2)
    monkeypatch.setattr("cosa_ray.training.ray_train._work", work)
    with pytest.raises(RunFailed, match=r"failed at step 0: only worker 1 meets this; mend it\."):
        train(config, name="mistaken")
    assert status(config, "mistaken") == ("FAILED", "only worker 1 meets this; mend it.")


@pytest.mark.parametrize(
    "moments", [[(16, 36)], pytest.param([(4, 8), (12, 20), (28, 40)], marks=pytest.mark.slow)], ids=["one", "three"]
)
def test_killed_workers_leave_the_loss_curve_as_it_was(pair: Ran, tiny: Make, moments: list[tuple[int, int]]) -> None:
    """kill -9 of one of two workers at random moments, inside co-training too; each restart is from a checkpoint."""
    config = tiny(workers=2, resources__max_failures=10, **SETTINGS)
    folder = Path(config.storage) / "killed"
    draw = random.Random(0)
    killed: list[int] = []

    def kill(done: threading.Event) -> None:
        for moment in moments:
            after = draw.randrange(*moment)
            while not done.is_set() and max(registered(folder), default=0) < after:
                time.sleep(0.01)
            time.sleep(draw.random() * 0.2)
            victims = train_workers()
            if done.is_set() or not victims:
                return
            victim = draw.choice(victims)
            victim.kill()
            killed.append(max(registered(folder)))
            victim.wait(10)

    with watching(kill):
        disturbed = train(config, name="killed")
    assert len(killed) == len(moments), "every kill must have happened"
    assert killed[-1] >= 16, "one of them inside co-training"
    assert disturbed.state == "finished"
    for key in ("train/loss", "threshold/background", "val/miou"):
        assert curve(config, disturbed, key) == pair.curve(key), key


@pytest.mark.slow
def test_a_kill_between_upload_and_registration(ray_cluster: str, tiny: Make) -> None:
    """A checkpoint that is whole on storage but not yet registered does not count; nothing of it is left behind."""
    config = tiny(training__steps=40, checkpoint__every=1, evaluation__every=40)
    undisturbed = train(config, name="undisturbed", local=True)
    folder = Path(config.storage) / "between"
    caught: list[int] = []

    def kill(done: threading.Event) -> None:
        worker, whole = None, 0
        while not done.is_set():  # a busy wait: the moment is short
            for file in sorted(folder.glob("checkpoints/step_*/state.pt")):
                step = int(file.parent.name[5:])
                try:
                    size = file.stat().st_size
                except FileNotFoundError:
                    continue
                if step < 12:
                    continue
                if step in registered(folder):
                    whole = size  # what a full state of co-training weighs; it is the last file to be copied
                elif 0 < whole == size:
                    worker = worker or train_workers()[0]
                    worker.suspend()
                    # Suspended, the worker cannot change what is read here.
                    if step not in registered(folder):
                        worker.kill()
                        caught.append(step)
                        return
                    worker.resume()

    with watching(kill):
        disturbed = train(config, name="between")
    assert caught, "the kill must have happened between upload and registration"
    assert disturbed.state == "finished"
    assert curve(config, disturbed) == curve(config, undisturbed)
    assert {int(path.name[5:]) for path in (folder / "checkpoints").iterdir()} == set(registered(folder))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_leaves_a_checkpoint_that_resumes(
    ray_cluster: str, tiny: Make, tmp_path: Path, number: signal.Signals
) -> None:
    config = tiny(training__steps=400, training__warmup_iters=8, checkpoint__every=1000, evaluation__every=1000)
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(config))
    command = [sys.executable, "-m", "cosa_ray.cli.main", "train", str(file), "--name", "stopped", "--json"]
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    ) as driver:
        assert driver.stderr is not None
        for line in driver.stderr:
            if "step" in line:
                driver.send_signal(number)
                break
        out, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    stopped = json.loads(out)
    assert stopped["state"] == "stopped"
    assert registered(Path(stopped["folder"])) == [stopped["step"]]
    shorter = tiny(training__steps=400, training__warmup_iters=8, checkpoint__every=1000, evaluation__every=1000)
    resumed = train(shorter, name="stopped", resume=True)
    assert resumed.state == "finished"
    assert [step for step, _ in curve(config, resumed)] == list(range(1, 401))
