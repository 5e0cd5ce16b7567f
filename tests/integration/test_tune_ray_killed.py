"""Everything of Ray's is killed under a sweep. In a file of its own: no other cluster may run on the host meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cosa_ray.config.schema import Config
from tests.integration.test_tune_faults import assert_whole, checkpointed, start, wait_until, write_sweep

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]
Make = Callable[..., Config]


@pytest.mark.slow
def test_ray_is_killed_under_a_sweep(tiny: Make, tmp_path: Path) -> None:
    """kill -9 of everything of Ray's: the driver cannot go on, a resume on a fresh cluster can."""
    base = tiny(training__steps=120, evaluation__every=40, checkpoint__every=20)
    write_sweep(tmp_path, base, trials=3, concurrency=1)
    first = start(tmp_path, "", "struck")
    wait_until(lambda: checkpointed(tmp_path, "struck", 2), first)
    killed = [p for p in psutil.Process(first.pid).children(recursive=True) if p.is_running()]
    for process in killed:
        process.kill()
    try:
        first.wait(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() != 0
    second = start(tmp_path, "", "struck", "--resume")
    result = json.loads(second.communicate(timeout=400)[0])
    assert second.returncode == 0, (tmp_path / "err.log").read_text()
    assert [(trial["state"], trial["step"]) for trial in result["trials"]] == [("finished", 120)] * 3
    assert_whole(base.tracking.uri or "", result, 120)
