"""A team's tracking server for tests and benchmarks: MLflow with users, PostgreSQL below it, artifacts in S3 (moto)."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import requests

START_SECONDS = 180.0
BUCKET = "runs"
# moto takes any; MLflow's server and boto3 ask for some.
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
CLIENT = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


def postgres_programs() -> Path | None:
    """Folder of the newest PostgreSQL's programs: Debian keeps them off the PATH."""
    found = [place for place in Path("/usr/lib/postgresql").glob("*/bin") if (place / "initdb").exists()]
    if found:
        return max(found, key=lambda place: int(re.sub(r"\D.*", "", place.parent.name) or 0))
    initdb = shutil.which("initdb")
    return Path(initdb).resolve().parent if initdb else None


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(true: Callable[[], bool], seconds: float = 120.0) -> None:
    """Raises AssertionError when it is not true in time."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


class Process(AbstractContextManager["Process"]):
    """A server with its output in a file, in a session of its own; gone with all it started when closed."""

    def __init__(self, command: Sequence[str], output: Path, environment: Mapping[str, str], **more: Any) -> None:
        self.output = output
        with output.open("ab") as stream:
            self.popen = subprocess.Popen(
                command, env=dict(environment), stdout=stream, stderr=stream, start_new_session=True, **more
            )

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Raises RuntimeError with the end of the output when the server ends or is not ready in time."""
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if self.popen.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.popen.args} did not start: {self.output.read_text()[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """End it and everything it started as a machine that fails does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, then make it."""
        self.popen.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(15)
        self.kill()

    def __exit__(self, *_: object) -> None:
        self.stop()


class PlainServer(AbstractContextManager["PlainServer"]):
    """MLflow's server on SQLite and a folder, without users, which can be away for a while."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url, self._folder = f"http://127.0.0.1:{port}", folder
        self._command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
        self._command += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
        self._command += ["--artifacts-destination", str(folder / "artifacts")]
        self.start()

    def start(self) -> None:
        """Start it, on its port of before."""
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._process = Process(self._command, self._folder / "mlflow.log", environment, cwd=self._folder)
        self._process.wait_until(lambda: answers(f"{self.url}/health"))

    def away(self, seconds: float) -> None:
        """Kill it, and bring it back after so many seconds."""
        self._process.kill()
        time.sleep(seconds)
        self.start()

    def __exit__(self, *_: object) -> None:
        self._process.kill()


class Postgres(AbstractContextManager["Postgres"]):
    """A PostgreSQL of its own on loopback; `durable` waits for the disk, as only a machine that fails needs."""

    def __init__(self, programs: Path, *, durable: bool = False) -> None:
        self._programs, self.port, self.password = programs, free_port(), secrets.token_urlsafe(12)
        # Not below pytest's folder, which only its owner may enter: as root, PostgreSQL runs as another user.
        self.folder = Path(tempfile.mkdtemp(prefix="team-pg-"))
        self._as: dict[str, Any] = _unprivileged(self.folder)
        secret = self.folder / "password"
        secret.write_text(self.password)
        if self._as:
            shutil.chown(secret, self._as["user"], self._as["group"])
        data = self.folder / "data"
        words = ["initdb", "-D", data, "-U", "postgres", "-A", "scram-sha-256", "--locale=C", "-E", "UTF8", "--no-sync"]
        self._run(*words, f"--pwfile={secret}")
        secret.unlink()
        words = ["-D", data, "-p", self.port, "-k", self.folder, "-c", "listen_addresses=127.0.0.1"]
        words += [] if durable else ["-c", "fsync=off", "-c", "full_page_writes=off"]
        self._command = [str(programs / "postgres"), *map(str, words)]
        self.start()

    def start(self) -> None:
        """Start it, after it was killed too: what it has accepted is there again."""
        self.process = Process(self._command, self.folder / "log", os.environ, cwd=self.folder, **self._as)
        self.process.wait_until(self._answers)

    def uri(self, database: str) -> str:
        """SQLAlchemy URI of a database; the driver is named because from 2.1 on SQLAlchemy takes another by itself."""
        return f"postgresql+psycopg2://postgres:{self.password}@127.0.0.1:{self.port}/{database}"

    def query(self, database: str, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of a statement, asked of PostgreSQL itself."""
        import psycopg2

        connection = psycopg2.connect(self.uri(database).replace("+psycopg2", ""))
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement, values or None)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def __exit__(self, *_: object) -> None:
        self.process.stop(signal.SIGINT)  # "fast": it does not wait for its clients
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        import psycopg2

        try:
            return self.query("postgres", "SELECT 1") == [(1,)]
        except psycopg2.OperationalError:
            return False

    def _run(self, program: str, *words: object) -> None:
        command = [str(self._programs / program), *map(str, words)]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False, **self._as)
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr}")


@contextlib.contextmanager
def bucket_server(folder: Path, bucket: str) -> Iterator[Process]:
    """moto's S3 as a process, with a bucket; what processes need to reach it is in the environment for the block."""
    import boto3

    port = free_port()
    before = {key: os.environ.get(key) for key in (*KEYS, "AWS_ENDPOINT_URL")}
    os.environ.update({**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    try:
        with Process(command, folder / "s3.log", os.environ) as process:
            process.wait_until(lambda: answers(f"http://127.0.0.1:{port}"))
            boto3.resource("s3").Bucket(bucket).create()
            yield process
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


class TeamServer(AbstractContextManager["TeamServer"]):
    """MLflow with basic authentication on PostgreSQL and S3, all on loopback; ready when constructed."""

    def __init__(self, folder: Path, *, durable: bool = False, workers: int = 2, remember: int = 60) -> None:
        """remember: seconds for which a password stays checked (`auth_cache_ttl_seconds`); a check is 0.15 s of CPU."""
        programs = postgres_programs()
        if programs is None:
            raise FileNotFoundError("PostgreSQL is not installed (Debian: apt-get install postgresql)")
        self.folder, self._workers, self.port = folder, workers, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin, self.passwords = "admin", {"admin": secrets.token_urlsafe(12)}
        self._server: Process | None = None
        with ExitStack() as stack:
            self.postgres = stack.enter_context(Postgres(programs, durable=durable))
            for name in ("mlflow", "auth"):
                self.postgres.query("postgres", f"CREATE DATABASE {name}")
            port = free_port()
            self.endpoint = f"http://127.0.0.1:{port}"
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
            self.s3 = stack.enter_context(Process(command, folder / "s3.log", os.environ | KEYS))
            self.s3.wait_until(lambda: answers(self.endpoint))
            self.bucket().create()
            settings = {"default_permission": "READ", "database_uri": self.postgres.uri("auth")}
            settings |= {"admin_username": self.admin, "auth_cache_ttl_seconds": str(remember)}
            settings["authorization_function"] = "mlflow.server.auth:authenticate_request_basic_auth"
            lines = [f"{key} = {value}" for key, value in settings.items()]
            self._auth = folder / "auth.ini"
            self._auth.touch(0o600)
            self._auth.write_text("\n".join(["[mlflow]", *lines]).replace("%", "%%"))
            self._key = secrets.token_urlsafe(24)
            stack.callback(self.kill)
            self.start()
            self._stack = stack.pop_all()

    def start(self) -> None:
        """Start MLflow's server, on its port of before."""
        environment = {key: value for key, value in os.environ.items() if key not in CLIENT}
        environment |= {
            **KEYS,
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
            "MLFLOW_BACKEND_STORE_URI": self.postgres.uri("mlflow"),
            "MLFLOW_AUTH_CONFIG_PATH": str(self._auth),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.passwords[self.admin],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self._key,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--serve-artifacts"]
        command += ["--artifacts-destination", f"s3://{BUCKET}/artifacts", "--workers", str(self._workers)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self._server = Process(command, self.folder / "mlflow.log", environment, cwd=self.folder)
        self._server.wait_until(lambda: answers(f"{self.url}/health"))

    def kill(self) -> None:
        """Kill MLflow's server with all its processes, as kill -9 does."""
        if self._server is not None:
            self._server.kill()
            self._server = None

    def user(self, name: str) -> str:
        """Make a user who is no administrator, through MLflow; returns the password."""
        self.passwords[name] = secrets.token_urlsafe(12)
        self._ask_as_admin("2.0/mlflow/users/create", username=name, password=self.passwords[name])
        return self.passwords[name]

    def grant(self, name: str, kind: str, thing: str, permission: str | None) -> None:
        """Give a user a permission on an experiment or a registered model (kind), in place of an earlier one."""
        if kind == "experiment":
            ((thing,),) = self.postgres.query(
                "mlflow", "SELECT CAST(experiment_id AS TEXT) FROM experiments WHERE name = %s", thing
            )
        given = {"username": name, "resource_type": kind, "resource_id": thing}
        with contextlib.suppress(requests.HTTPError):
            self._ask_as_admin("3.0/mlflow/users/permissions/revoke", **given)
        if permission is not None:
            self._ask_as_admin("3.0/mlflow/users/permissions/grant", **given, permission=permission)

    def environment(self, name: str | None) -> dict[str, str]:
        """What a client's environment has of this server; None: without credentials."""
        values = (self.url,) if name is None else (self.url, name, self.passwords[name])
        return dict(zip(CLIENT, values, strict=False))

    @contextlib.contextmanager
    def client_of(self, name: str | None) -> Iterator[None]:
        """This process as a client of a user, for the block."""
        before = {key: os.environ.pop(key, None) for key in CLIENT}
        os.environ.update(self.environment(name))
        try:
            yield
        finally:
            for key, value in before.items():
                os.environ.pop(key, None)
                if value is not None:
                    os.environ[key] = value

    def bucket(self) -> Any:
        """The bucket that artifacts end in, as boto3 sees it."""
        import boto3

        names = ("aws_access_key_id", "aws_secret_access_key", "region_name")
        service = boto3.resource("s3", endpoint_url=self.endpoint, **dict(zip(names, KEYS.values(), strict=True)))
        return service.Bucket(BUCKET)

    def objects(self, run_id: str) -> dict[str, int]:
        """Path below the run's artifacts and size of every object in the bucket that is of a run."""
        place = f"/{run_id}/artifacts/"
        found = [each for each in self.bucket().objects.all() if place in each.key]
        return {each.key.partition(place)[2]: each.size for each in found}

    def points(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """Every point of a metric in PostgreSQL, by time of logging."""
        statement = "SELECT step, value FROM metrics WHERE run_uuid = %s AND key = %s ORDER BY timestamp, step"
        return [(int(step), float(value)) for step, value in self.postgres.query("mlflow", statement, run_id, key)]

    def run_ids(self, name: str) -> list[str]:
        """Ids of the runs with this name, in PostgreSQL."""
        rows = self.postgres.query("mlflow", "SELECT run_uuid FROM runs WHERE name = %s ORDER BY start_time", name)
        return [str(run_id) for (run_id,) in rows]

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _ask_as_admin(self, path: str, **content: str) -> None:
        # Not by MLflow's client of this interface, which starts a server of its own in this process.
        who = (self.admin, self.passwords[self.admin])
        answer = requests.post(f"{self.url}/api/{path}", json=content, auth=who, timeout=60)
        answer.raise_for_status()


def _unprivileged(folder: Path) -> dict[str, Any]:
    """Whom to run PostgreSQL as, which refuses root; the folder becomes theirs."""
    if os.getuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    os.chown(folder, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
