"""Two hours of training with random kills, run by hand: `pytest -m soak tests/integration/test_soak.py`.

First the run that nobody disturbs, half an hour on two cores, then the same with kills, more of them while it is ahead
of the time that it is to take (SOAK_HOURS; SOAK_STEPS and SOAK_SEED say what is run). Ends with what was done to the
run and how long it took; the report goes to SOAK_REPORT, if set.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config
from cosa_ray.training.driver import train
from cosa_ray.training.runs import read_run
from tests.conftest import history
from tests.integration.machines import Machines, machines, workers
from tests.integration.team_server import PlainServer

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(6 * 3600)]
ROOT = Path(__file__).parents[2]
Make = Callable[..., Config]
STEPS = int(os.environ.get("SOAK_STEPS", "12500"))
HOURS = float(os.environ.get("SOAK_HOURS", "2"))
PAUSE_SECONDS = (15.0, 45.0)
PAUSE_SECONDS_AHEAD = (3.0, 15.0)


class Trouble(threading.Thread):
    """Does one random thing after the other to a run until it is told to stop; sooner while `ahead`."""

    def __init__(self, seed: int, ahead: Callable[[], bool], **ways: Callable[[], bool]) -> None:
        super().__init__(daemon=True)
        self._random, self._ahead, self._ways = random.Random(seed), ahead, ways
        self._done = threading.Event()
        self.made: Counter[str] = Counter()

    def run(self) -> None:
        while not self._done.wait(self._random.uniform(*(PAUSE_SECONDS_AHEAD if self._ahead() else PAUSE_SECONDS))):
            name = self._random.choice(sorted(self._ways))
            if self._ways[name]():
                self.made[name] += 1

    def stop(self) -> None:
        self._done.set()
        self.join()


def signalled(processes: list[psutil.Process], number: signal.Signals) -> bool:
    for each in processes:
        each.send_signal(number)
    return bool(processes)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PlainServer]:
    with PlainServer(tmp_path) as made:
        yield made


def test_soak(tiny: Make, server: PlainServer, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training__steps": STEPS, "checkpoint__every": 20, "evaluation__every": 1000}
    settings |= {"workers": 2, "resources__cpus_per_worker": 1.9, "resources__hang_seconds": 60.0}
    settings |= {"resources__max_failures": 1000}  # nothing here is a failure of the run's own
    seed = int(os.environ.get("SOAK_SEED", "0"))
    config = tiny(tracking__uri=server.url, **settings)
    (tmp_path / "x.yaml").write_text(dump_config(config))
    with machines(head_cpus=2) as cluster:
        extra = [cluster.add(2)]
        undisturbed = tiny(tracking__uri=server.url, **settings)
        began = time.monotonic()
        expected = train(undisturbed, name="undisturbed")
        plain = time.monotonic() - began
        drivers: list[subprocess.Popen[str]] = []
        began = time.monotonic()
        trouble = Trouble(
            seed,
            lambda: _step(config) / STEPS > (time.monotonic() - began) / (3600 * HOURS),
            kill_a_worker=lambda: signalled(workers()[:1], signal.SIGKILL),
            kill_all_workers=lambda: signalled(workers(), signal.SIGKILL),
            freeze_a_worker=lambda: signalled(workers()[-1:], signal.SIGSTOP),
            take_a_machine=lambda: _exchange(cluster, extra),
            kill_the_driver=lambda: _kill(drivers),
            mlflow_is_away=lambda: server.away(30) is None,
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.cluster.address}
        words = [sys.executable, "-m", "cosa_ray.cli.main", "train", "x.yaml", "--name", "soak"]
        trouble.start()
        ends: list[int] = []
        while True:
            resume = ["--resume"] if read_run(f"{config.storage}/soak") else []
            with (tmp_path / "drivers.log").open("a") as log:
                drivers.append(
                    subprocess.Popen([*words, *resume], cwd=tmp_path, env=environment, stderr=log, text=True)
                )
            ends.append(drivers[-1].wait())
            assert ends[-1] in (0, -signal.SIGKILL), (tmp_path / "drivers.log").read_text()[-3000:]
            if ends[-1] == 0:
                break
        trouble.stop()
        took = time.monotonic() - began
    run = read_run(f"{config.storage}/soak")
    assert run is not None
    assert run.record.state == "finished"
    for key in ("train/loss", "val/miou", "threshold/background"):
        mine = history(server.url, str(run.record.mlflow_run_id), key)
        assert mine == history(server.url, str(expected.mlflow_run_id), key), key
    report = {
        "steps": STEPS,
        "seed": seed,
        "undisturbed_seconds": round(plain),
        "seconds": round(took),
        "starts of the driver": len(ends),
        **trouble.made,
    }
    print(json.dumps(report))
    if target := os.environ.get("SOAK_REPORT"):
        Path(target).write_text(json.dumps(report, indent=1))


def _step(config: Config) -> int:
    """The step of the run's latest checkpoint."""
    run = read_run(f"{config.storage}/soak")
    return run.step if run is not None else 0


def _exchange(cluster: Machines, extra: list[Any]) -> bool:
    """Take the second machine away, and bring another after a while."""
    cluster.kill(extra.pop())
    time.sleep(10)
    extra.append(cluster.add(2))
    return True


def _kill(drivers: list[subprocess.Popen[str]]) -> bool:
    """Kill the driver that runs now, if one does."""
    if not drivers or drivers[-1].poll() is not None:
        return False
    drivers[-1].kill()
    return True
