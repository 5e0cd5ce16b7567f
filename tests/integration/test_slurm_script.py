"""The Slurm script with real Ray over two pretended nodes: stopped at the time limit, queued again, finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
JOB = str(10**9 + os.getpid())
# Slurm's side: `srun` runs the command here, whatever the node; two nodes have the same name.
SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'localhost\\nlocalhost\\n'; else echo "$*" >> scontrol.log; fi
"""


@pytest.fixture
def sbatch(tmp_path: Path, tiny: Callable[..., Config]) -> Callable[..., psutil.Popen]:
    """Start the script as Slurm would, in a folder with an experiment of two workers."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "slurm").mkdir(exist_ok=True)
        (tmp_path / "slurm" / name).write_text(text)
        (tmp_path / "slurm" / name).chmod(0o755)
    (tmp_path / "x.yaml").write_text(dump_config(tiny(storage="runs", workers=2, training__steps=80)))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_", "SLURM_"))}

    def start(*words: str, **environment: str) -> psutil.Popen:
        with (tmp_path / "job.log").open("a") as log:
            return psutil.Popen(
                [ROOT / "cluster" / "slurm" / "cosa-ray.sbatch", *words],
                cwd=tmp_path,
                env={
                    **clean,
                    "PATH": f"{tmp_path / 'slurm'}{os.pathsep}{os.environ['PATH']}",
                    "PYTHONPATH": str(ROOT),
                    "HOME": str(tmp_path),
                    "COSA_VENV": str(Path(sys.executable).parent.parent),
                    "SLURM_JOB_ID": JOB,
                    "SLURM_JOB_NODELIST": "localhost",
                    "SLURM_CPUS_PER_TASK": "1",
                    **environment,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    return start


def left_over() -> list[str]:
    """Command lines of processes that belong to this test's Ray."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if f"/tmp/cosa-ray-{JOB}" in line:
            found.append(line)
    return found


def test_a_job_is_stopped_with_a_checkpoint_queued_again_and_finished(
    sbatch: Callable[..., psutil.Popen], tmp_path: Path
) -> None:
    words = ["train", "x.yaml", "--name", "first", "--no-track"]
    run, log = tmp_path / "runs" / "first", tmp_path / "job.log"
    process = sbatch(*words)
    try:
        end = time.monotonic() + 240
        while not (run / "checkpoints.json").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        # What Slurm does three minutes before the time limit.
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=120) == 0, log.read_text()
        record = json.loads((run / "run.json").read_text())
        assert record["state"] == "stopped", log.read_text()
        stopped_at = json.loads((run / "checkpoints.json").read_text())["checkpoints"][-1]["step"]
        assert 0 < stopped_at < 80
        assert (tmp_path / "scontrol.log").read_text() == f"requeue {JOB}\n"
        assert left_over() == []

        process = sbatch(*words, SLURM_RESTART_COUNT="1")
        assert process.wait(timeout=240) == 0, log.read_text()
    finally:
        if process.is_running():
            process.terminate()  # the script stops its Ray
            process.wait(timeout=60)
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert (tmp_path / "scontrol.log").read_text().count("\n") == 1
    assert left_over() == []
    assert not list(tmp_path.glob(".cosa-ray-*"))
    assert not Path(f"/tmp/cosa-ray-{JOB}").exists()
