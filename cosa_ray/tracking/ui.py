"""MLflow's own pages for a tracking store, served on loopback until they are no longer wanted."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Thread
from typing import IO
from urllib.parse import urlencode

from cosa_ray.config.credentials import redacted, without_credentials
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.tracking.store import checked_uri, sqlite_path, tracking_uri
from cosa_ray.tracking.views import PREFIX, RUNS, missing_views

# MLflow's default server has an assistant that runs commands for every user of this machine, and no setting that takes
# it away. It is in no other server: under gunicorn there are the pages and their API alone. The time limit is for a
# request that reads a large store; the control socket would be one more way in.
_SERVER = "--threads 16 --timeout 600 --no-control-socket"
START_SECONDS = 300.0
STOP_SECONDS = 10.0


def store_to_show(uri: str | None) -> str:
    """The store that pages are wanted for: the option's, else that of a run with the default config.

    Raises UserError for a malformed URI, and for a SQLite file that is not there.
    """
    chosen = checked_uri(uri, "--uri") if uri else tracking_uri(Config())
    path = sqlite_path(chosen)
    if path is not None and not path.is_file():
        raise UserError(f"there is no MLflow store at {path}; train a run from this folder first, or give --uri")
    return chosen


class Pages(AbstractContextManager["Pages"]):
    """An `mlflow server` on a store; ready when constructed, and gone with all its processes when closed.

    Job execution is off: MLflow would start eight more processes for features that are not used here. Raises UserError
    when the port is taken, RunFailed when the server does not come up.
    """

    def __init__(self, uri: str, *, host: str = "127.0.0.1", port: int = 5000, workers: int = 1) -> None:
        _check_port(host, port)
        path = sqlite_path(uri)
        artifacts = (path.parent if path else Path.cwd()) / "mlartifacts"
        command = [sys.executable, "-m", "mlflow", "server", "--artifacts-destination", artifacts.as_uri()]
        command += ["--workers", str(workers), "--host", host, "--port", str(port), "--gunicorn-opts", _SERVER]
        environment = {
            **os.environ,
            # Not on the command line, which every user of the machine can read: the URI may hold a password.
            "MLFLOW_BACKEND_STORE_URI": uri,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        environment.pop("MLFLOW_TRACKING_URI", None)
        shown = "127.0.0.1" if host == "0.0.0.0" else "[::1]" if host == "::" else f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{port}"
        # A session of its own: Ctrl-C reaches this process alone, which then ends the server and all it started.
        self.process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._uri = uri
        self._said: deque[str] = deque(maxlen=40)
        assert self.process.stdout is not None
        self._reader = Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def link(self, experiment: str = Config().tracking.experiment) -> str:
        """Address of an experiment's runs in the prepared view; of the front page when there is no such experiment.

        Without the workflow in the address MLflow opens its pages for language models, where runs are hard to find.
        An experiment made by an earlier version is given the views; where somebody deleted the view, MLflow's own
        choice of columns is shown.
        """
        query = urlencode({"experiment_name": experiment})
        try:
            found = json.loads(self._get(f"/api/2.0/mlflow/experiments/get-by-name?{query}", 30))["experiment"]
            number = found["experiment_id"]
            tags = {tag["key"]: tag["value"] for tag in found.get("tags", [])}
        except (OSError, ValueError, KeyError):
            return self.url
        address = f"{self.url}/#/experiments/{number}/runs?workflowType=machine_learning"
        with contextlib.suppress(OSError):  # a store that cannot be written to can be looked at all the same
            for key, value in missing_views(tags).items():
                self._post("/api/2.0/mlflow/experiments/set-experiment-tag", experiment_id=number, key=key, value=value)
                tags[key] = value
        return f"{address}&viewStateShareKey={RUNS}" if PREFIX + RUNS in tags else address

    def wait(self) -> None:
        """Return when the server ends by itself. Raises RunFailed with what it said."""
        code = self.process.wait()
        raise RunFailed(f"the MLflow server ended with code {code}: {self._last_words()}")

    def close(self) -> None:
        """End the server and every process it started."""
        for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and _group_lives(self.process):
                time.sleep(0.05)
        self.process.wait()
        self._reader.join(1)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self._reader.join(1)
                raise RunFailed(f"the MLflow server did not start: {self._last_words()}")
            try:
                self._get("/health", 2)
                return
            except OSError:
                time.sleep(0.1)
        raise RunFailed(f"the MLflow server did not answer in {START_SECONDS:.0f} s: {self._last_words()}")

    def _get(self, path: str, timeout: float) -> bytes:
        return self._answer(urllib.request.Request(self.url + path), timeout)

    def _post(self, path: str, **content: str) -> None:
        header = {"Content-Type": "application/json"}
        self._answer(urllib.request.Request(self.url + path, json.dumps(content).encode(), header), 30)

    def _answer(self, request: urllib.request.Request, timeout: float) -> bytes:
        # No proxy: the server is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout) as answer:
            return bytes(answer.read())

    def _read(self, stream: IO[str]) -> None:
        # Read on, or the server blocks once the pipe is full.
        for line in stream:
            self._said.append(redacted(line.strip(), self._uri))

    def _last_words(self) -> str:
        errors = [line for line in self._said if "error" in line.lower() or "exception" in line.lower()]
        return (errors or list(self._said) or ["it said nothing"])[-1]


def command_to_show(shown_uri: str) -> str:
    """The command that shows a store, given as people see it: with --uri only where `cosa-ray ui` means another."""
    here = without_credentials(tracking_uri(Config()))
    return "cosa-ray ui" if shown_uri == here else f"cosa-ray ui --uri {shlex.quote(shown_uri)}"


def shown(uri: str) -> str:
    """The store for people: a path for a SQLite file, else the URI without credentials."""
    return str(sqlite_path(uri) or without_credentials(uri))


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, OverflowError):
        raise UserError(f"{host}:{port} is no address of this machine; choose another --host or --port") from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise UserError(
                f"port {port} on {host} cannot be used ({error.strerror}); choose another with --port"
            ) from None


def _group_lives(leader: subprocess.Popen[str]) -> bool:
    """True while any process of the leader's group runs; reaps the leader."""
    leader.poll()
    try:
        os.killpg(leader.pid, 0)
    except ProcessLookupError:
        return False
    return True
