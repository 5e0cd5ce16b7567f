"""The Slurm script's decisions, with stubs in place of Slurm, Ray and cosa-ray (the real ones: tests/integration)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cluster_files import CLUSTER

SCRIPT = CLUSTER / "slurm" / "cosa-ray.sbatch"
# `srun` runs the command here; every program writes down how it was called, after it has set its trap. The head answers
# once it has done so, as the real one: the workers come after it.
STUBS = {
    "srun": """
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
""",
    "scontrol": """
if [ "$1" = show ]; then printf 'localhost\\nlocalhost\\n'; else echo "scontrol $*" >> "$CALLS"; fi
""",
    "ray": """
if [ "$1" = health-check ]; then
  until grep -q "^ray start --head" "$CALLS"; do sleep 0.05; done
  exit 0
fi
trap 'echo "ray stopped" >> "$CALLS"; exit 0' TERM
echo "ray $* $(stat -c 'token %s %a' "$RAY_AUTH_TOKEN_PATH") $RAY_AUTH_MODE" >> "$CALLS"
while true; do sleep 0.05; done
""",
    # Waits, as the real one, until all nodes are there.
    "python": 'until [ "$(grep -c "^ray start" "$CALLS")" = "$2" ]; do sleep 0.05; done\n',
    "cosa-ray": """
trap 'echo "cosa-ray stopped" >> "$CALLS"; exit 0' TERM
echo "cosa-ray $* at $RAY_ADDRESS" >> "$CALLS"
case " $* " in
  *" --resume "*) exit "${RESUMED:-0}" ;;
  *" lasting "*) while true; do sleep 0.05; done ;;
esac
exit "${CODE:-0}"
""",
}
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name, text in STUBS.items():
        program = tmp_path / "venv" / "bin" / name
        program.write_text("#!/bin/bash\n" + text)
        program.chmod(0o755)

    def run(*words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [SCRIPT, *words],
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path),
                "CALLS": str(tmp_path / "calls"),
                "COSA_VENV": str(tmp_path / "venv"),
                # A number that no job of this machine has: the script makes and removes folders named by it.
                "SLURM_JOB_ID": str(10**9 + os.getpid()),
                "SLURM_JOB_NODELIST": "localhost",
                "SLURM_CPUS_PER_TASK": "3",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


def calls(folder: Path) -> list[str]:
    file = folder / "calls"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(folder: Path, start: str) -> None:
    end = time.monotonic() + 20
    while not any(call.startswith(start) for call in calls(folder)):
        assert time.monotonic() < end, calls(folder)
        time.sleep(0.05)


def test_it_starts_ray_on_each_node_with_a_token_runs_and_stops_all(start: Start, tmp_path: Path) -> None:
    process = start("train", "voc", "--name", "first")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    head, worker, run, *stopped = calls(tmp_path)
    assert re.match(r"ray start --head --block --node-ip-address=127\.0\.0\.1 --port=\d+ --num-cpus=3 ", head)
    assert "--dashboard-host=127.0.0.1" in head
    assert re.match(r"ray start --block --address=127\.0\.0\.1:\d+ --num-cpus=3 ", worker)
    for node in (head, worker):
        assert node.endswith("token 64 600 token")
    port = re.findall(r"--port=(\d+)", head)[0]
    assert run == f"cosa-ray train voc --name first at 127.0.0.1:{port}"
    assert stopped == ["ray stopped", "ray stopped"]
    assert not list(tmp_path.glob(".cosa-ray-*"))
    assert not Path(f"/tmp/cosa-ray-{10**9 + os.getpid()}").exists()


def test_it_returns_the_runs_exit_code(start: Start, tmp_path: Path) -> None:
    process = start("train", "voc", "--name=first", CODE="1")
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert calls(tmp_path)[-2:] == ["ray stopped", "ray stopped"]


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=["time limit", "cancelled"]
)
def test_a_signal_stops_the_run_before_ray(
    number: signal.Signals, requeued: bool, start: Start, tmp_path: Path
) -> None:
    process = start("train", "voc", "--name", "lasting")
    wait_for(tmp_path, "cosa-ray train")
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    after = calls(tmp_path)[3:]
    job = f"scontrol requeue {10**9 + os.getpid()}"
    assert after == ["cosa-ray stopped", "ray stopped", "ray stopped", *([job] if requeued else [])]


@pytest.mark.parametrize(
    ("code", "ends", "runs"),
    [
        ("0", 0, ["--name first --resume"]),
        ("1", 1, ["--name first --resume"]),
        # Nothing to resume: the job was ended before the run was made.
        ("2", 0, ["--name first --resume", "--name first"]),
    ],
)
def test_a_requeued_job_goes_on(code: str, ends: int, runs: list[str], start: Start, tmp_path: Path) -> None:
    process = start("train", "voc", "--name", "first", SLURM_RESTART_COUNT="1", RESUMED=code)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == ends, output
    found = [re.findall(r"voc (.*) at", call)[0] for call in calls(tmp_path) if call.startswith("cosa-ray")]
    assert found == runs


def test_a_run_without_a_name_is_refused_in_one_sentence(start: Start, tmp_path: Path) -> None:
    process = start("train", "voc")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert output.count("\n") == 1
    assert "--name" in output
    assert calls(tmp_path) == []


def test_ray_that_does_not_start_ends_the_job(start: Start, tmp_path: Path) -> None:
    ray = tmp_path / "venv" / "bin" / "ray"
    ray.write_text("#!/bin/bash\necho 'port is taken' >&2\nexit 1\n")
    process = start("train", "voc", "--name", "first")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert "port is taken" in output
    assert "Ray did not start on localhost" in output
    assert not list(tmp_path.glob(".cosa-ray-*"))


def test_what_slurm_is_told() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE))
    assert "requeue" in options
    assert options["open-mode"] == "append"  # a requeued job goes on with the same log
    assert options["ntasks-per-node"] == "1"
    # To the script alone: Ray must live until the checkpoint is written.
    assert re.fullmatch(r"B:USR1@(\d+)", options["signal"])
