"""Faults that Ray sees: workers that hang, and failures that go on or come and go.

A killed worker and driver are in test_ray_training, machines that vanish or are told to go in test_nodes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed
from cosa_ray.training.driver import RunResult, train
from cosa_ray.training.runs import read_run
from tests.conftest import history
from tests.integration.machines import workers

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
Make = Callable[..., Config]
SETTINGS: dict[str, Any] = {"training__steps": 48, "checkpoint__every": 4, "evaluation__every": 24}


def curve(config: Config, result: RunResult) -> list[tuple[int, float]]:
    assert config.tracking.uri is not None
    assert result.mlflow_run_id is not None
    return history(config.tracking.uri, result.mlflow_run_id, "train/loss")


def at_step(config: Config, name: str, step: int, action: Callable[[], object]) -> threading.Thread:
    """Does something in a thread once the run has registered a checkpoint of that step."""

    def wait() -> None:
        folder = str(Path(config.storage) / name)
        while (run := read_run(folder)) is None or run.step < step:
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("count", [1, 2])
def test_hung_workers_are_started_again(ray_cluster: str, tiny: Make, count: int) -> None:
    """One worker of the run stops for good (SIGSTOP), as one in a dead file system or a broken collective does."""
    config = tiny(workers=count, resources__hang_seconds=10.0, **SETTINGS)
    frozen: list[psutil.Process] = []

    def freeze() -> None:
        frozen.append(workers()[-1])
        frozen[0].send_signal(signal.SIGSTOP)

    hung = at_step(config, "hung", 12, freeze)
    result = train(config, name="hung")
    hung.join(5)
    assert result.state == "finished"
    assert not frozen[0].is_running() or frozen[0].status() == psutil.STATUS_ZOMBIE, "nobody has to end it by hand"
    alone = tiny(**SETTINGS, workers=count)
    assert curve(config, result) == curve(alone, train(alone, name="undisturbed"))


class FreezeAtStart(WorkerGroupCallback):
    """Stops a worker of the first group for good (SIGSTOP), after it was made and before it is given the run."""

    def __init__(self, note: Path) -> None:
        self._note = note

    def after_worker_group_start(self, worker_group: Any) -> None:
        if not self._note.exists():
            pid = worker_group.get_workers()[-1].metadata.pid
            self._note.write_text(str(pid))
            os.kill(pid, signal.SIGSTOP)


def test_a_worker_that_hangs_before_it_has_started(
    ray_cluster: str, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from cosa_ray.training import driver

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    note = tmp_path / "frozen"
    monkeypatch.setattr(driver, "fit", partial(driver.fit, callbacks=[FreezeAtStart(note)]))
    config = tiny(workers=2, resources__hang_seconds=10.0, **SETTINGS)
    try:
        result = train(config, name="hung")
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert result.state == "finished"
    frozen = int(note.read_text())
    assert not psutil.pid_exists(frozen) or psutil.Process(frozen).status() == psutil.STATUS_ZOMBIE
    monkeypatch.undo()
    alone = tiny(workers=2, **SETTINGS)
    assert curve(config, result) == curve(alone, train(alone, name="undisturbed"))


def test_a_stuck_thread_is_noticed(ray_cluster: str, tiny: Make, tmp_path: Path) -> None:
    """The process answers, its loop does not: a file system that hangs while a checkpoint is written."""
    config = tiny(resources__hang_seconds=8.0, **SETTINGS)
    folder = Path(config.storage) / "stuck"

    def block() -> None:
        # Opening a pipe that nobody reads from waits for ever.
        run = read_run(str(folder))
        assert run is not None
        for step in range(run.step + 4, 48, 4):
            place = folder / "checkpoints" / f"step_{step:08d}"
            place.mkdir(exist_ok=True)
            if not (place / "state.pt").exists():
                os.mkfifo(place / "state.pt")
        before = workers()
        assert before
        psutil.wait_procs(before, timeout=60)

    stuck = at_step(config, "stuck", 12, block)
    result = train(config, name="stuck")
    stuck.join(60)
    assert result.state == "finished"
    alone = tiny(**SETTINGS)
    assert curve(config, result) == curve(alone, train(alone, name="undisturbed"))


def test_failures_without_progress_end_a_run_and_others_do_not(ray_cluster: str, tiny: Make) -> None:
    """With one restart allowed: four kills with checkpoints in between do no harm, two without end the run."""
    config = tiny(resources__max_failures=1, **SETTINGS)

    def kill_all() -> None:
        for each in workers():
            each.kill()

    threads = [at_step(config, "kills", step, kill_all) for step in (4, 12, 20, 32)]
    result = train(config, name="kills")
    for thread in threads:
        thread.join(5)
    assert result.state == "finished"
    alone = tiny(**SETTINGS)
    assert curve(config, result) == curve(alone, train(alone, name="undisturbed"))

    endless = tiny(resources__max_failures=1, **{**SETTINGS, "checkpoint__every": 1000, "evaluation__every": 48})
    done = threading.Event()

    def kill_often() -> None:
        while not done.wait(0.5):
            for each in workers():
                if time.time() - each.create_time() > 5:
                    each.kill()

    killer = threading.Thread(target=kill_often)
    killer.start()
    try:
        with pytest.raises(RunFailed, match=r"2 failures at the checkpoint of step 0"):
            train(endless, name="endless")
    finally:
        done.set()
        killer.join()


def test_a_killed_driver(ray_cluster: str, tiny: Make, tmp_path: Path) -> None:
    """kill -9 of the driver of a cluster's run; continued at once, while its workers may still be there."""
    config = tiny(workers=2, **SETTINGS)
    (tmp_path / "x.yaml").write_text(dump_config(config))
    words = [sys.executable, "-m", "cosa_ray.cli.main", "train", "x.yaml", "--name", "orphan"]
    driver = subprocess.Popen(words, cwd=tmp_path, env={**os.environ, "RAY_ADDRESS": ray_cluster})
    at_step(config, "orphan", 12, driver.kill).join(300)
    assert driver.wait(10) == -signal.SIGKILL
    orphans = workers()
    result = train(config, name="orphan", resume=True)
    assert result.state == "finished"
    _, alive = psutil.wait_procs(orphans, timeout=30)
    assert not alive, "nobody has to end them by hand"
    alone = tiny(workers=2, **SETTINGS)
    assert curve(config, result) == curve(alone, train(alone, name="undisturbed"))
