"""Where runs are tracked: URIs, what is refused, and what never shows a password."""

from __future__ import annotations

import pickle

import pytest

from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.tracking.store import Store, Tracking, check_reachable, checked_uri, tracking_uri


def config(uri: str | None = None) -> Config:
    return Config.model_validate({"tracking": {"uri": uri}})


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def test_default_is_a_sqlite_file_here_with_its_whole_path(tmp_path) -> None:
    assert tracking_uri(config()) == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_relative_sqlite_path_becomes_absolute(tmp_path) -> None:
    assert tracking_uri(config("sqlite:///some/runs.db")) == f"sqlite:///{tmp_path}/some/runs.db"


def test_the_environment_goes_before_the_config(monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000/")
    assert tracking_uri(config("sqlite:////elsewhere.db")) == "http://tracking:5000"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("mlruns", "folder"),
        ("file:///tmp/mlruns", "folder"),
        ("ftp://host/x", "unknown scheme"),
        ("http://", "names no host"),
        ("http://host:port", "not a URL"),
        ("http://[::1", "not a URL"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
    ],
)
def test_a_wrong_uri_is_one_sentence_naming_where_it_was_given(monkeypatch, uri, says) -> None:
    with pytest.raises(UserError, match=r"^tracking\.uri .*" + says) as raised:
        tracking_uri(config(uri))
    assert "\n" not in str(raised.value)
    assert "sqlite:///path" in str(raised.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI "):
        tracking_uri(config())


@pytest.mark.parametrize(
    "uri", ["http://me:secret@host:5000", "postgresql+psycopg2://me:secret@host/db?password=secret"]
)
def test_a_password_is_kept_for_mlflow_and_shown_to_nobody(uri) -> None:
    tracking = Tracking(Store(checked_uri(uri, "x"), "e"), "run", "/runs/run", "/runs/run/spool")
    assert "secret" in pickle.loads(pickle.dumps(tracking)).store.uri
    assert "secret" not in f"{tracking!r} {tracking.uri} {tracking.store.shown}"
    assert "host" in tracking.uri


@pytest.mark.parametrize(
    "uri",
    [
        "htp://me:secret@host:5000",
        "http://me:sec/secret@host:5000",
        "me:secret@host:5000",
        "http://me:secret@[::1",
        "http://me:secret@",
    ],
)
def test_a_password_in_a_wrong_uri_is_not_repeated(uri) -> None:
    with pytest.raises(UserError) as raised:
        checked_uri(uri, "--uri")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("http://me:secret@host:5000", "API request to http://me:secret@host:5000/api failed\nbecause"),
        ("http://me:secret@host:5000", "HTTPConnectionPool at http://me:secret@host:5001/api (moved)"),
        ("postgresql://host/db?password=secret", "cannot connect to postgresql://host/db?password=secret"),
        ("postgresql://host/db?password=secret", "at postgresql+psycopg2://host/db?user=a&password=secret&ssl=on"),
    ],
)
def test_what_a_store_says_is_told_without_the_password(uri, text) -> None:
    said = Store(uri, "e").said(RuntimeError(text))
    assert "secret" not in said
    assert "host" in said
    assert "\n" not in said
    assert Store(uri, "e").said(RuntimeError()) == "RuntimeError"


def test_the_command_that_shows_a_store(monkeypatch, tmp_path) -> None:
    from cosa_ray.tracking.ui import command_to_show

    assert command_to_show(f"sqlite:///{tmp_path}/mlflow.db") == "cosa-ray ui"
    assert command_to_show("sqlite:////else where/mlflow.db") == "cosa-ray ui --uri 'sqlite:////else where/mlflow.db'"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    assert command_to_show("http://host:5000") == "cosa-ray ui"


def test_sqlite_is_refused_for_several_machines() -> None:
    here = Tracking(Store("sqlite:////x/mlflow.db", "e"), "run", "/runs/run", "/runs/run/spool")
    check_reachable(here, 1)
    with pytest.raises(UserError, match=r"2 machines cannot share .*/x/mlflow\.db"):
        check_reachable(here, 2)
    check_reachable(Tracking(Store("http://host:5000", "e"), "run", "/runs/run", "/runs/run/spool"), 2)
