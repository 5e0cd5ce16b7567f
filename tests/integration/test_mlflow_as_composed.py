"""MLflow's server as Compose starts it, with accounts; SQLite and a folder in place of PostgreSQL and S3."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
import yaml

from tests.unit.cluster_files import CLUSTER
from tests.unit.test_cluster_mlflow import COMPOSE, FILLED, filled

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Server:
    """A running server: its address, its process, the administrator's password, and how Compose asks for its health."""

    address: str
    process: psutil.Process
    password: str
    healthcheck: list[str]

    def get(self, auth: tuple[str, str] | None, host: str | None = None) -> int:
        headers = {"Host": host} if host else {}
        url = f"{self.address}/api/2.0/mlflow/experiments/search?max_results=5"
        return requests.get(url, auth=auth, headers=headers, timeout=30).status_code


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    service = filled(COMPOSE, {**FILLED, "MLFLOW_ADMIN_PASSWORD": secrets.token_hex(16), "MLFLOW_HOST": "runs.test"})[
        "services"
    ]["mlflow"]

    def here(text: str) -> str:
        # One worker: each costs seconds of imports.
        text = (
            text.replace("--workers=4", "--workers=1")
            .replace("5000", port)
            .replace("0.0.0.0", "127.0.0.1")
            .replace("s3://mlflow", str(folder / "store"))
        )
        return re.sub(r"postgresql\S+", f"sqlite:///{folder}/mlflow.db", text)

    accounts = folder / "basic_auth.ini"
    accounts.write_text(here((CLUSTER / "mlflow" / "basic_auth.ini").read_text()))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment = {**clean, **service["environment"], "MLFLOW_AUTH_CONFIG_PATH": str(accounts)}
    command = [here(word) for word in service["command"]]
    with (folder / "log").open("w") as log:
        process = psutil.Popen([BIN / command[0], *command[1:]], env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 180
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            try:
                if requests.get(f"{address}/health", timeout=5).ok:
                    break
            except requests.RequestException:
                time.sleep(0.5)
        healthcheck = [here(word) for word in service["healthcheck"]["test"]]
        yield Server(address, process, service["environment"]["MLFLOW_AUTH_ADMIN_PASSWORD"], healthcheck)
    finally:
        family = [process, *process.children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for left in alive:
            left.kill()


def test_only_accounts_get_in_and_only_by_its_names(server: Server) -> None:
    admin = ("admin", server.password)
    assert server.get(None) == 401
    assert server.get(("admin", "password1234")) == 401
    assert server.get(admin) == 200
    assert server.get(admin, host="runs.test") == 200
    assert server.get(admin, host="another.test") == 403


def test_the_healthcheck_sees_a_server_that_is_there_and_one_that_is_not(server: Server) -> None:
    kind, program, *words = server.healthcheck
    assert (kind, program) == ("CMD", "python")
    assert subprocess.run([sys.executable, *words], timeout=30).returncode == 0
    elsewhere = [re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:1", word) for word in words]
    assert subprocess.run([sys.executable, *elsewhere], timeout=30, stderr=subprocess.DEVNULL).returncode != 0


def test_kubernetes_probes_what_the_server_answers_by_any_name(server: Server) -> None:
    deployment = list(yaml.safe_load_all((CLUSTER / "kubernetes" / "mlflow.yaml").read_text()))[1]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = deployment["spec"]["template"]["spec"]["containers"][0][probe]["httpGet"]["path"]
        # The kubelet asks by the pod's address.
        assert requests.get(server.address + path, headers={"Host": "10.1.2.3:5000"}, timeout=30).ok


def test_the_job_runner_is_left_out(server: Server) -> None:
    lines = [" ".join(process.cmdline()) for process in server.process.children(recursive=True)]
    assert [line for line in lines if "uvicorn" in line]
    assert not [line for line in lines if "huey" in line or "mlflow.server.jobs" in line]


def test_an_account_made_as_the_guide_says_tracks_a_run_with_a_picture(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.server
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.password)
    theirs = secrets.token_hex(16)
    mlflow.server.get_app_client("basic-auth", tracking_uri=server.address).create_user("cosa-ray", theirs)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "cosa-ray")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", theirs)
    client = MlflowClient(tracking_uri=server.address)
    run = client.create_run(client.create_experiment("cosa"))
    (tmp_path / "picture.txt").write_text("a picture")
    client.log_metric(run.info.run_id, "val/miou", 0.5, step=1)
    client.log_artifact(run.info.run_id, str(tmp_path / "picture.txt"))
    # Through the server: a client has no key of the store.
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert client.get_run(run.info.run_id).data.metrics == {"val/miou": 0.5}
    assert [each.path for each in client.list_artifacts(run.info.run_id)] == ["picture.txt"]


@pytest.mark.slow
def test_without_a_secret_the_server_does_not_start(server: Server, tmp_path: Path) -> None:
    service = filled(COMPOSE, FILLED)["services"]["mlflow"]
    for missing in ("MLFLOW_FLASK_SERVER_SECRET_KEY", "MLFLOW_AUTH_ADMIN_PASSWORD"):
        accounts = tmp_path / "basic_auth.ini"
        accounts.write_text(
            re.sub(
                r"postgresql\S+",
                f"sqlite:///{tmp_path}/{missing}.db",
                (CLUSTER / "mlflow" / "basic_auth.ini").read_text(),
            )
        )
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        environment = {**clean, **service["environment"], "MLFLOW_AUTH_CONFIG_PATH": str(accounts)}
        del environment[missing]
        ran = subprocess.run(
            [
                BIN / "mlflow",
                "server",
                "--app-name=basic-auth",
                "--port=1",
                f"--backend-store-uri=sqlite:///{tmp_path}/m.db",
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )
        assert ran.returncode
        assert missing in ran.stderr + ran.stdout
