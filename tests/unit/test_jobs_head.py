"""Reaching a Ray head: each way it can go wrong is one sentence that says what to do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cosa_ray.errors import RunFailed, UserError
from cosa_ray.jobs import submit
from cosa_ray.jobs.address import find_cluster
from cosa_ray.jobs.head import connect, forwarded_environment, refuse_password
from cosa_ray.jobs.submit import JobEnd, _follow, exit_code


@pytest.fixture
def answering() -> Iterator:
    """Start HTTP servers that answer every request with one status and body; yields the function that does."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "http://host", "http://:8265", "http://host:8265/x", "auto"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UserError, match="expected http://HOST:PORT"):
        connect(find_cluster(address))


def test_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UserError, match="no connection"):
        connect(find_cluster(f"http://127.0.0.1:{port}"))


@pytest.mark.parametrize(("status", "body"), [(404, b""), (200, b"<html>"), (500, b"{}"), (200, b"{}")])
def test_something_else_listens(answering, status: int, body: bytes) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError) as caught:
        connect(find_cluster(answering(status, body)))
    assert "not a Ray head's Jobs API" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_ray_version(answering) -> None:
    ray = pytest.importorskip("ray")
    address = answering(200, json.dumps({"version": "4", "ray_version": "2.41.0", "ray_commit": ""}).encode())
    with pytest.raises(UserError, match=rf"runs Ray 2\.41\.0 and this side Ray {ray.__version__}"):
        connect(find_cluster(address))


@pytest.mark.parametrize(
    ("status", "environment", "words"),
    [
        (401, {}, "RAY_AUTH_MODE is not `token` here"),
        (401, {"RAY_AUTH_MODE": "token"}, "none was found"),
        (403, {"RAY_AUTH_TOKEN": "a" * 64}, "refused the token"),
    ],
)
def test_tokens(answering, tmp_path, status: int, environment: dict[str, str], words: str) -> None:
    """In a process of its own: Ray reads its authentication settings once."""
    pytest.importorskip("ray")
    code = (
        "import sys\nfrom cosa_ray.errors import UserError\nfrom cosa_ray.jobs.head import connect\n"
        "from cosa_ray.jobs.address import find_cluster\n"
        "try:\n    connect(find_cluster(sys.argv[1]))\nexcept UserError as error:\n    print(error)\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    ran = subprocess.run(
        [sys.executable, "-c", code, answering(status, b"no")],
        env={**clean, "HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert words in ran.stdout
    assert ran.stdout.count("\n") == 1


def test_what_a_job_is_given_of_the_environment() -> None:
    given = forwarded_environment(
        {
            "MLFLOW_TRACKING_URI": "http://tracking:5000",
            "MLFLOW_TRACKING_PASSWORD": "secret",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
            "RAY_AUTH_TOKEN": "secret",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "HOME": "/home/me",
        }
    )
    assert given == {"MLFLOW_TRACKING_URI": "http://tracking:5000", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:hunter2@tracking:5000",
        "http://hunter2@tracking:5000",
        "postgresql://hunter2@database/mlflow",
        "postgresql://database/mlflow?user=me&password=hunter2",
        "http://me:hunter2@[::1",
    ],
)
def test_a_password_in_the_tracking_uri_is_refused_without_being_shown(uri: str) -> None:
    for refuse in (lambda: forwarded_environment({"MLFLOW_TRACKING_URI": uri}), lambda: refuse_password(uri, "x")):
        with pytest.raises(UserError, match="a password") as caught:
            refuse()
        assert "hunter2" not in str(caught.value)
    refuse_password("http://tracking:5000", "tracking.uri")
    refuse_password("sqlite:////home/me@work/mlflow.db", "tracking.uri")


def test_a_malformed_tracking_uri_is_one_sentence() -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not a URL"):
        forwarded_environment({"MLFLOW_TRACKING_URI": "http://[::1"})


@pytest.mark.parametrize(
    ("status", "driver", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", None, 1),
        ("FAILED", -9, 137),
        ("STOPPED", None, 1),
        ("STOPPED", 0, 1),
    ],
)
def test_exit_codes(status: str, driver: int | None, expected: int) -> None:
    assert exit_code(status, driver) == expected


class Flaky:
    """A Jobs client whose connection breaks: each entry of `tails` is what one connection yields before it ends."""

    def __init__(self, tails: list[list[str | Exception]], log: str, status: str = "SUCCEEDED") -> None:
        from ray.job_submission import JobStatus

        self.tails, self.log, self.status = tails, log, JobStatus(status)

    async def tail_job_logs(self, job_id: str):
        for piece in self.tails.pop(0) if self.tails else [ConnectionError("gone")]:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def get_job_info(self, job_id: str):
        from types import SimpleNamespace

        return SimpleNamespace(status=self.status, driver_exit_code=0, message="Job finished, last available logs: ...")

    def get_job_logs(self, job_id: str) -> str:
        return self.log


def test_a_broken_connection_repeats_nothing_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(submit, "_POLL_SECONDS", 0.0)
    client = Flaky([["one ", "two "], ["one two thr", "ee "]], "one two three four")
    client.tails[0].append(ConnectionError("reset"))
    written: list[str] = []
    end = _follow(client, find_cluster("http://head:1"), "job", written.append)
    assert "".join(written) == "one two three four"
    assert end == JobEnd("SUCCEEDED", 0, "Job finished")


def test_a_lost_head_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(submit, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(submit, "_LOST_AFTER_SECONDS", 0.1)
    with pytest.raises(RunFailed, match=r"lost the head at http://head:1 .*\(gone\)"):
        _follow(Flaky([["one"]], "", "RUNNING"), find_cluster("http://head:1"), "job", lambda text: None)
