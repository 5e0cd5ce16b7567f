"""Jobs on a real Ray head with token authentication: success, failure, refusal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config
from tests.unit.tiny_sets import photo

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
    return cosa_ray(head, folder, "submit", *words, "--address", head.address, **environment)


def cosa_ray(head: Head, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cosa_ray.cli.main", *words],
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

    at = ["--address", head.address]
    listed = json.loads(cosa_ray(head, project, "jobs", "list", "--json", *at).stdout)["jobs"]
    assert [each["id"] for each in listed if each["name"] == "from-job"] == [job["job"]]
    said = cosa_ray(head, project, "jobs", "status", job["job"], *at).stdout
    assert said.startswith(f"job {job['job']} (train x.yaml as from-job): succeeded, exit code 0")
    assert "step 12/12" in cosa_ray(head, project, "jobs", "logs", job["job"], *at).stdout
    wrong = cosa_ray(head, project, "jobs", "stop", job["job"][:-1], *at)
    assert wrong.returncode == 2
    assert f"did you mean {job['job']}?" in wrong.stderr


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
def test_a_study_as_a_job(head: Head, project: Path) -> None:
    rows = "rows: [{name: without, set: {losses.contrastive: 0.0}}, {name: with, set: {losses.contrastive: 0.1}}]\n"
    (project / "a.yaml").write_text(f"base: x.yaml\n{rows}")
    ran = submit(head, project, "ablate", "a.yaml", "--seeds", "1", "--name", "job-study")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    study = json.loads((project / "runs" / "job-study" / "ablation" / "ablation.json").read_text())
    assert [row["name"] for row in study["rows"]] == ["without", "with"]
    assert all(math.isfinite(row["metrics"]["val/miou"]["mean"]) for row in study["rows"])


@dataclass
class Relay:
    """A TCP relay to the head whose connections can be cut, as a network's are."""

    port: int
    target: int
    cuts: int = 0
    pairs: list[tuple[socket.socket, socket.socket]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            self.pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Reset every open connection."""
        self.cuts += 1
        while self.pairs:
            for each in self.pairs.pop():
                with contextlib.suppress(OSError):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def relay(head: Head) -> Iterator[Relay]:
    listener = socket.create_server(("127.0.0.1", 0))
    made = Relay(listener.getsockname()[1], int(head.address.rsplit(":", 1)[1]))
    threading.Thread(target=made.run, args=(listener,), daemon=True).start()
    yield made
    listener.close()
    made.cut()


@pytest.mark.slow
def test_a_job_is_watched_stopped_and_continued(head: Head, project: Path, relay: Relay) -> None:
    """Detached, listed, followed over a connection that breaks, left by Ctrl-C, stopped, and sent again."""
    (project / "cluster").mkdir()
    # The cluster is named by the file, its token too.
    token = head.environment["RAY_AUTH_TOKEN_PATH"]
    (project / "cluster" / "current.yaml").write_text(f"address: {relay.address}\ntoken_path: {token}\n")
    tokenless = {"RAY_AUTH_TOKEN_PATH": ""}
    words = ["train", "x.yaml", "--set", "training.steps=2000", "--name", "long"]
    sent = cosa_ray(head, project, "submit", *words, "--detach", "--json", **tokenless)
    assert sent.returncode == 0, sent.stderr
    job = json.loads(sent.stdout)
    assert (job["status"], job["name"]) == ("PENDING", "long")
    assert 0 < job["bytes"] < 5 * 2**20
    assert f"cosa-ray jobs logs {job['job']} --follow\n" in sent.stderr

    process = subprocess.Popen(
        [sys.executable, "-m", "cosa_ray.cli.main", "jobs", "logs", job["job"], "--follow"],
        cwd=project,
        env={**head.environment, "PYTHONPATH": str(ROOT), **tokenless},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    steps: list[str] = []
    for line in process.stdout:
        if "step " in line:
            steps.append(line)
            if len(steps) == 3:
                break
            relay.cut()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert relay.cuts == 2
    assert len(set(steps)) == 3, "a line is shown once, however often the connection breaks"
    assert process.returncode == 130
    assert "goes on" in said

    there = json.loads(cosa_ray(head, project, "jobs", "status", job["job"], "--json", **tokenless).stdout)
    assert (there["status"], there["verb"], there["name"], there["exit_code"]) == ("RUNNING", "train", "long", None)
    command = said.split("Stop it with: cosa-ray ")[1].splitlines()[0].split()
    stopped = cosa_ray(head, project, *command, "--json", **tokenless)
    assert stopped.returncode == 0, stopped.stderr
    assert json.loads(stopped.stdout)["status"] == "STOPPED"
    # Ray ends a job by SIGTERM, which a run answers with a checkpoint, and gives it the time to.
    record = project / "runs" / "long"
    assert json.loads((record / "run.json").read_text())["state"] == "stopped"
    (last,) = {each["step"] for each in json.loads((record / "checkpoints.json").read_text())["checkpoints"][-1:]}
    again = cosa_ray(head, project, "jobs", "stop", job["job"], **tokenless)
    assert "has ended already" in again.stderr

    resumed = json.loads(
        cosa_ray(head, project, "submit", *words, "--resume", "--detach", "--json", **tokenless).stdout
    )
    end = time.monotonic() + 120
    while not (
        reached := re.findall(r"step (\d+)/2000", cosa_ray(head, project, "jobs", "logs", resumed["job"]).stdout)
    ):
        assert time.monotonic() < end
    assert int(reached[0]) >= last, "it goes on from its checkpoint"
    assert cosa_ray(head, project, "jobs", "stop", resumed["job"], **tokenless).returncode == 0
    listed = json.loads(cosa_ray(head, project, "jobs", "list", "--json", **tokenless).stdout)["jobs"]
    assert [each["status"] for each in listed if each["name"] == "long"] == ["STOPPED", "STOPPED"]
    shown = cosa_ray(head, project, "jobs", "list", **tokenless).stdout
    assert job["job"] in shown
    wrong = cosa_ray(head, project, "jobs", "status", job["job"][:-1], **tokenless)
    assert wrong.returncode == 2
    assert f"did you mean {job['job']}?" in wrong.stderr


@pytest.mark.slow
def test_a_run_is_evaluated_and_predicts_as_a_job(head: Head, project: Path, trained_run: Path) -> None:
    (project / "mine.yaml").write_text("scales: [1.0]\nsubset: 6\n")
    ran = submit(head, project, "evaluate", str(trained_run), "--protocol", "mine.yaml", "--no-track")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert list((trained_run / "evaluations").glob("*mine*"))
    (project / "pictures").mkdir()
    (project / "pictures" / "a.jpg").write_bytes(photo(60, 40, seed=1))
    ran = submit(head, project, "predict", str(trained_run), "pictures", "--no-overlays")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (project / "predictions" / "a.png").is_file() or list((project / "predictions").rglob("a.png"))


@pytest.mark.slow
def test_a_node_without_the_packages_says_so(head: Head, project: Path) -> None:
    """A bare virtual environment as the cluster's Python."""
    bare = project / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    ran = submit(head, project, "train", "x.yaml", "--python", str(bare / "bin" / "python"))
    assert ran.returncode == 2
    assert "lacks torch>=2.11 (none there)" in ran.stdout


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
