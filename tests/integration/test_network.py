"""Two hosts with a cable between them and a shared folder: network namespaces, each with addresses of its own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config
from cosa_ray.training.driver import train
from cosa_ray.training.runs import read_run
from tests.conftest import history
from tests.integration.team_server import Process

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
Make = Callable[..., Config]
BINARIES = Path(sys.executable).parent
GCS, MLFLOW = 6379, 5000


@dataclass
class Host:
    """A network namespace with one address."""

    name: str
    address: str
    environment: dict[str, str] = field(default_factory=dict)

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", "-n", self.name, *words], check=True)

    def command(self, *words: object) -> list[str]:
        return ["ip", "netns", "exec", self.name, *map(str, words)]

    def start(self, log: Path, *words: object) -> Process:
        return Process(self.command(*words), log, self.environment)

    def reaches(self, url: str) -> bool:
        ask = f"import urllib.request as r; r.urlopen({url!r}, timeout=3)"
        command = self.command(sys.executable, "-c", ask)
        return not subprocess.run(command, capture_output=True, check=False, env=self.environment).returncode


@contextmanager
def cable() -> Iterator[tuple[Host, Host]]:
    """Two namespaces and a pair of interfaces between them."""
    tag = secrets.token_hex(3)
    hosts = Host(f"cosa-a-{tag}", "10.231.7.1"), Host(f"cosa-b-{tag}", "10.231.7.2")
    with ExitStack() as stack:
        for host in hosts:
            made = subprocess.run(["ip", "netns", "add", host.name], check=False, capture_output=True)
            if made.returncode:
                pytest.skip("network namespaces cannot be made here")
            stack.callback(subprocess.run, ["ip", "netns", "delete", host.name], check=False)
        ends = [word for host in hosts for word in ("name", "eth0", "netns", host.name)]
        subprocess.run(["ip", "link", "add", *ends[:4], "type", "veth", "peer", *ends[4:]], check=True)
        for host in hosts:
            host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
            host.ip("link", "set", "lo", "up")
            host.ip("link", "set", "eth0", "up")
        yield hosts


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts that form a Ray cluster with a token, one CPU each; MLflow's server is on the first."""
    if os.getuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    with cable() as pair, ExitStack() as stack:
        # A socket's path may have 107 characters, fewer than pytest's folders take.
        short = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True))
        head, other = pair
        for host in pair:
            host.environment = {
                **clean,
                "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(token),
                # The name of this machine is that of an address that the namespaces do not have.
                "GLOO_SOCKET_IFNAME": "eth0",
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            }
        store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
        store += ["--artifacts-destination", str(tmp_path / "artifacts"), "--workers", "1"]
        server = ["-m", "mlflow", "server", "--host", head.address, "--port", MLFLOW, *store]
        mlflow = stack.enter_context(head.start(tmp_path / "mlflow.log", sys.executable, *server))
        start = [BINARIES / "ray", "start", "--num-cpus=1", "--block", "--disable-usage-stats"]
        first = ["--head", f"--port={GCS}", f"--temp-dir={short}", "--dashboard-host=127.0.0.1"]
        ray = head.start(tmp_path / "head.log", *start, *first, f"--node-ip-address={head.address}")
        stack.enter_context(ray)
        mlflow.wait_until(lambda: other.reaches(f"http://{head.address}:{MLFLOW}/health"))
        ray.wait_until(lambda: nodes(head) == 1)
        joined = [f"--address={head.address}:{GCS}", f"--node-ip-address={other.address}"]
        stack.enter_context(other.start(tmp_path / "other.log", *start, *joined))
        ray.wait_until(lambda: nodes(head) == 2)
        yield pair


def nodes(head: Host) -> int:
    """Machines of the cluster, asked of Ray."""
    ask = "import ray; ray.init('auto', logging_level='ERROR'); print(sum(node['Alive'] for node in ray.nodes()))"
    environment = {**head.environment, "RAY_ADDRESS": f"{head.address}:{GCS}"}
    command = head.command(sys.executable, "-c", ask)
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return int(said.stdout.split()[-1]) if said.returncode == 0 else 0


def run(head: Host, folder: Path, config: Config, name: str) -> dict[str, Any]:
    """Train from the first host, as somebody there would."""
    (folder / f"{name}.yaml").write_text(dump_config(config))
    words = ["-m", "cosa_ray.cli.main", "train", f"{name}.yaml", "--name", name, "--json"]
    environment = {**head.environment, "RAY_ADDRESS": f"{head.address}:{GCS}"}
    command = head.command(sys.executable, *words)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def curve(database: Path, run_id: str) -> list[tuple[int, float]]:
    return history(f"sqlite:///{database}", run_id, "train/loss")


def test_two_hosts_train_as_one(hosts: tuple[Host, Host], tiny: Make, tmp_path: Path) -> None:
    head, other = hosts
    assert not other.reaches("http://127.0.0.1:8265"), "the dashboard is on the head's loopback alone"
    server = f"http://{head.address}:{MLFLOW}"
    both = {"workers": 2, "resources__cpus_per_worker": 0.9}
    result = run(head, tmp_path, tiny(tracking__uri=server, **both), "both")
    assert result["state"] == "finished"
    alone = tiny()
    expected = train(alone, name="alone", local=True)
    one = history(str(alone.tracking.uri), str(expected.mlflow_run_id), "train/loss")
    two = curve(tmp_path / "server.db", result["mlflow_run_id"])
    assert [step for step, _ in two] == [step for step, _ in one]
    assert [value for _, value in two] == pytest.approx([value for _, value in one], rel=1e-4)


def test_a_cut_cable(hosts: tuple[Host, Host], tiny: Make, tmp_path: Path) -> None:
    """The second host is cut off for good: the run goes on with the worker that is left, and no step is missing."""
    head, other = hosts
    server = f"http://{head.address}:{MLFLOW}"
    steps = {"training__steps": 48, "checkpoint__every": 4, "evaluation__every": 24}
    elastic = {"workers": {"min": 1, "max": 2, "look_every": 5.0}, "resources__cpus_per_worker": 0.9}
    config = tiny(tracking__uri=server, resources__hang_seconds=30.0, **elastic, **steps)
    cut: list[int] = []

    def cut_it() -> None:
        folder = f"{config.storage}/cut"
        while (found := read_run(folder)) is None or found.step < 12:
            time.sleep(0.1)
        other.ip("link", "set", "eth0", "down")
        cut.append(found.step)

    threading.Thread(target=cut_it, daemon=True).start()
    result = run(head, tmp_path, config, "cut")
    assert cut
    assert cut[0] < 48
    assert result["state"] == "finished"
    alone = tiny(**steps)
    expected = train(alone, name="alone", local=True)
    one = history(str(alone.tracking.uri), str(expected.mlflow_run_id), "train/loss")
    two = curve(tmp_path / "server.db", result["mlflow_run_id"])
    assert [step for step, _ in two] == [step for step, _ in one]
    assert [value for _, value in two] == pytest.approx([value for _, value in one], rel=1e-3)
