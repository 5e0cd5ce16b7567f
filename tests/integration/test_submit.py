"""Jobs on a real Ray head with token authentication: success, failure, refusal."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
Make = Callable[..., Config]


@dataclass(frozen=True)
class Head:
    """A running head: its address, and the environment of somebody who holds its token."""

    address: str
    environment: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head` with two CPUs on loopback, stopped by process id."""
    import requests

    folder = tmp_path_factory.mktemp("head")
    (folder / "token").write_text(secrets.token_hex(32))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    environment = {
        **clean,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
    }
    dashboard = free_port()
    options = {
        "port": free_port(),
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "num-cpus": 2,
    }
    # A socket's path may have 107 characters, fewer than pytest's folders take.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as short:
        options["temp-dir"] = short
        ray = Path(sys.executable).parent / "ray"
        words = [str(ray), "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard", "true"]
        words += [f"--{key}={value}" for key, value in options.items()]
        with (folder / "head.log").open("w") as log:
            process = psutil.Popen(words, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
        try:
            address, end = f"http://127.0.0.1:{dashboard}", time.monotonic() + 180
            bearer = {"Authorization": f"Bearer {(folder / 'token').read_text()}"}
            while True:
                assert process.poll() is None, (folder / "head.log").read_text()
                assert time.monotonic() < end
                try:
                    if requests.get(f"{address}/api/jobs/", headers=bearer, timeout=5).ok:
                        break
                except requests.RequestException:
                    pass
                time.sleep(0.5)
            yield Head(address, {**clean, "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "HOME": str(folder)})
        finally:
            family = [process, *process.children(recursive=True)]
            process.send_signal(signal.SIGTERM)
            # By itself it would wait half a minute for jobs that have ended.
            _, alive = psutil.wait_procs(family, timeout=5)
            for left in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            psutil.wait_procs(alive, timeout=10)


def submit(head: Head, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cosa_ray.cli.main", "submit", *words, "--address", head.address],
        cwd=folder,
        env={**head.environment, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def project(tmp_path: Path, tiny: Make) -> Path:
    """A folder to submit from: an experiment with relative paths, and things that must not leave it."""
    config = tiny(storage="runs", training__steps=12, tracking__uri=None)
    (tmp_path / "x.yaml").write_text(dump_config(config))
    (tmp_path / ".env").write_text("SECRET=hunter2\n")
    return tmp_path


def test_a_job_trains_and_its_results_outlive_it(head: Head, project: Path) -> None:
    ran = submit(head, project, "train", "x.yaml", "--set", "seed=5", "--name", "from-job", "--json")
    assert ran.returncode == 0, ran.stderr
    job = json.loads(ran.stdout)
    assert (job["status"], job["exit_code"]) == ("SUCCEEDED", 0)
    assert "step 12/12" in ran.stderr  # the log was followed
    record = json.loads((project / "runs" / "from-job" / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["mlflow_run_id"]
    assert "seed: 5" in (project / "runs" / "from-job" / "config.yaml").read_text()
    assert (project / "mlflow.db").exists()
    from mlflow import MlflowClient

    from cosa_ray.tracking.describe import git_state

    # The job has no repository; it knows its commit by what was sent with the package.
    tags = MlflowClient(tracking_uri=f"sqlite:///{project}/mlflow.db").get_run(record["mlflow_run_id"]).data.tags
    assert {key: tags.get(key) for key in git_state()[0]} == git_state()[0]


def test_a_failing_job_returns_its_exit_code(head: Head, project: Path) -> None:
    """Right here, wrong there: only the job can find that the dataset is missing. 2 is the user's mistake."""
    ran = submit(head, project, "train", "x.yaml", "--set", "data.dataset=nowhere")
    assert ran.returncode == 2
    assert "nowhere" in ran.stdout
    assert "exit code 2" in ran.stderr


@pytest.mark.slow
def test_a_diverging_job_returns_one(head: Head, project: Path) -> None:
    ran = submit(head, project, "train", "x.yaml", "--set", "optimiser.lr=1.0e+30", "--name", "diverging")
    assert ran.returncode == 1
    assert "not finite" in ran.stdout


@pytest.mark.slow
def test_a_sweep_as_a_job(head: Head, project: Path) -> None:
    (project / "s.yaml").write_text("base: x.yaml\nspace: {losses.cam_to_seg: {uniform: [0.1, 0.2]}}\ntrials: 2\n")
    ran = submit(head, project, "tune", "s.yaml", "--name", "job-sweep")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads((project / "runs" / "job-sweep" / "sweep.json").read_text())
    assert [trial["state"] for trial in result["trials"]] == ["finished", "finished"]
    assert (project / "runs" / "job-sweep" / "best.yaml").exists()


@pytest.mark.slow
def test_ctrl_c_stops_following_not_the_job(head: Head, project: Path) -> None:
    words = ["train", "x.yaml", "--set", "training.steps=2000", "--name", "long", "--address", head.address]
    process = subprocess.Popen(
        [sys.executable, "-m", "cosa_ray.cli.main", "submit", *words],
        cwd=project,
        env={**head.environment, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "step " in line:
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    command = said.split("Stop it with: ")[1].splitlines()[0].split()
    assert "goes on" in said
    ray = str(Path(sys.executable).parent / "ray")
    stopped = subprocess.run(
        [ray, *command[1:]],
        env={**head.environment, "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert stopped.returncode == 0, stopped.stderr
    # Ray ends a job by SIGTERM, which a run answers with a checkpoint, and gives it the time to.
    record = project / "runs" / "long" / "run.json"
    end = time.monotonic() + 120
    while (state := json.loads(record.read_text())["state"]) != "stopped" and time.monotonic() < end:
        time.sleep(0.5)
    assert state == "stopped"
    assert json.loads((record.parent / "checkpoints.json").read_text())["checkpoints"]


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "refused the token"),
        ({"RAY_AUTH_TOKEN_PATH": ""}, "RAY_AUTH_MODE is not `token` here"),
    ],
)
def test_without_the_right_token_nothing_is_sent(
    head: Head, project: Path, environment: dict[str, str], sentence: str
) -> None:
    ran = submit(head, project, "train", "x.yaml", **environment)
    assert ran.returncode == 2
    assert sentence in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_wrong_file_is_refused_here(head: Head, project: Path) -> None:
    ran = submit(head, project, "train", "x.yaml", "--set", "training.stepz=3")
    assert ran.returncode == 2
    assert "training.steps" in ran.stderr
