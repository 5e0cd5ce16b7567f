"""The connection to a Ray head's Jobs API, with every way it can fail said in one sentence."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cosa_ray.config.credentials import holds_secret
from cosa_ray.errors import UserError
from cosa_ray.jobs.address import CURRENT, Found
from cosa_ray.tracking.store import checked_uri

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_CONNECT_SECONDS = 10.0


def connect(found: Found) -> JobSubmissionClient:
    """Client of the Jobs API of a cluster (http://HOST:PORT), reached, let in, and of our Ray version.

    The token is Ray's own: RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH, else the cluster's `token_path`, else
    ~/.ray/auth_token when RAY_AUTH_MODE=token. Raises UserError for an address that is none, an unreachable head,
    something that is not a Ray head, a missing or wrong token, and another Ray version.
    """
    url = _checked(found)
    _reach(found, url)
    _choose_token(found)
    import ray
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    try:
        with _only_address(url):
            client = JobSubmissionClient(url)
        version = requests.get(f"{url}/api/version", headers=client._headers, timeout=30).json()["ray_version"]
    except AuthenticationError as error:
        raise UserError(_refused(found, str(error))) from error
    except (requests.RequestException, RuntimeError, ConnectionError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{found.label}: something answers there but not a Ray head's Jobs API ({first_line(error)}); "
            "give the dashboard's port, 8265 unless `ray start --dashboard-port` says otherwise."
        ) from error
    if version.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise UserError(
            f"{found.label}: the head runs Ray {version} and this side Ray {ray.__version__}; "
            "install the same minor version on both."
        )
    return client


def _checked(found: Found) -> str:
    """The address without trailing slash; UserError unless it is http(s)://HOST:PORT."""
    url = found.cluster.address.rstrip("/")
    try:
        parts = urlsplit(url)
        well_formed = parts.scheme in ("http", "https") and parts.hostname and not parts.path and parts.port
    except ValueError:
        well_formed = False
    if not well_formed:
        raise UserError(f"{found.label}: expected http://HOST:PORT of the Ray dashboard, as http://127.0.0.1:8265.")
    return url


def _choose_token(found: Found) -> None:
    """Name the token to Ray, which reads its mode once, when it is imported: one that is named is meant to be used."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not named and found.cluster.token_path is not None:
        file = Path(found.cluster.token_path).expanduser()
        if not file.is_file():
            raise UserError(f"{CURRENT}: token_path {file} is no file; save the cluster's token there.")
        os.environ["RAY_AUTH_TOKEN_PATH"] = named = str(file.resolve())
    if named:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _reach(found: Found, url: str) -> None:
    """Open and close one connection: Ray's client has no timeout, so a dropped packet would hang it for minutes."""
    parts = urlsplit(url)
    try:
        socket.create_connection((str(parts.hostname), parts.port or 0), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"{found.label}: no connection ({error.strerror or error}); "
            "check host and port, that the head is up, and that its dashboard port is open or forwarded."
        ) from error


@contextmanager
def _only_address(url: str) -> Iterator[None]:
    """Ray lets RAY_ADDRESS override an explicit address; what was typed wins here."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _refused(found: Found, reason: str) -> str:
    """One sentence for a 401 (no token) or 403 (wrong token)."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return (
            f"{found.label}: the head wants a token and RAY_AUTH_MODE is not `token` here; "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token file."
        )
    if "failed" in reason.split("\n", 1)[0]:
        return (
            f"{found.label}: the head refused the token; "
            "point RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to this cluster's token."
        )
    return (
        f"{found.label}: the head wants a token and none was found; "
        "set RAY_AUTH_TOKEN_PATH to the cluster's token file, or RAY_AUTH_TOKEN."
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to a length that fits a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def forwarded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of this side that the job is given: the tracking server, and Ray Train's own settings.

    No credential is among them, because a job's environment is shown to everyone who sees the dashboard.
    Raises UserError when the tracking URI holds a password or is none.
    """
    wanted = ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    chosen = {
        name: value
        for name, value in environment.items()
        if value and (name in wanted or name.startswith("RAY_TRAIN_"))
    }
    if uri := chosen.get("MLFLOW_TRACKING_URI"):
        refuse_password(uri, "MLFLOW_TRACKING_URI")
        checked_uri(uri, "MLFLOW_TRACKING_URI")
    return chosen


def refuse_password(uri: str | None, where: str) -> None:
    """UserError when a tracking URI carries a user or a password: whoever sees the dashboard would read it."""
    if uri and (holds_secret(uri) or "@" in uri.partition("//")[2].partition("/")[0]):
        raise UserError(
            f"{where} holds a user or a password, which the cluster's job list would show; "
            "leave it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster."
        )
