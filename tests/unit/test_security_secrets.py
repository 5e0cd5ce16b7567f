"""Planted secrets: none is in a run, in MLflow, in what is said, or in the parcel of a job."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from cosa_ray.cli.main import main
from cosa_ray.config.credentials import redacted, redacted_diff
from cosa_ray.config.load import load_config
from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.importing import write_dataset
from cosa_ray.errors import UserError
from cosa_ray.jobs import parcel
from cosa_ray.jobs.command import command_for
from cosa_ray.jobs.head import forwarded_environment
from cosa_ray.tracking.describe import describe, git_state, git_state_to_send
from cosa_ray.training.driver import train
from tests.unit.tiny_sets import numbered_source

Make = Callable[..., Config]
SECRET = "hunter2-planted"  # in everything that is planted here, and nowhere else
PLANTED = {
    "MLFLOW_TRACKING_PASSWORD": f"{SECRET}-1",
    "MLFLOW_TRACKING_TOKEN": f"{SECRET}-2",
    "AWS_SECRET_ACCESS_KEY": f"{SECRET}-3",
    "AWS_SESSION_TOKEN": f"{SECRET}-4",
    "RAY_AUTH_TOKEN": f"{SECRET}-5",
    "HF_TOKEN": f"{SECRET}-6",
    "SOME_API_KEY": f"{SECRET}-7",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a repository, in which secrets lie about, committed ones and others; and an environment."""
    folder = tmp_path / "project"
    folder.mkdir()

    def git(*words: str) -> None:
        who = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)

    git("init", "-q")
    for name in (".env", "mlflow.env", "credentials", "my_credentials.json", "key.pem", "code.py", "settings.yaml"):
        (folder / name).write_text("first\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    for name in (".env", "mlflow.env", "credentials", "my_credentials.json", "key.pem"):
        (folder / name).write_text(f"x {SECRET}\n")
    (folder / "code.py").write_text(f'client = connect(password="{SECRET}")\nposition_tokens = token_grid(2)\n')
    (folder / "settings.yaml").write_text(f"api_key: {SECRET}\nuri: https://me:{SECRET}@host/x?token={SECRET}\n")
    (folder / "not-added.txt").write_text(SECRET)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    return folder


def holding(places: Mapping[str, bytes]) -> list[str]:
    return [name for name, content in places.items() if SECRET.encode() in content]


def files(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_no_secret_is_in_a_run_its_store_or_what_is_said(
    project: Path, tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny(training__steps=2, training__warmup_iters=1, checkpoint__every=1, optimiser__warmup_steps=0)
    with caplog.at_level(logging.DEBUG):
        result = train(config, name="secret", local=True)
    out, err = capfd.readouterr()
    kept = {name: content for name, content in files(tmp_path).items() if not name.startswith(str(project))}
    assert result.state == "finished"
    assert any(name.endswith("mlflow.db") for name in kept)
    assert len([name for name in kept if "/mlartifacts/" in name]) > 3
    assert not holding({**kept, "log": caplog.text.encode(), "stdout": out.encode(), "stderr": err.encode()})


def test_a_diff_keeps_secrets_to_itself_and_code_as_it_is(project: Path, tiny: Make) -> None:
    _, diff = git_state(project)
    assert diff is not None
    assert SECRET.encode() not in diff
    assert b'+client = connect(password="***")\n+position_tokens = token_grid(2)\n' in diff
    assert b"+api_key: ***\n" in diff
    assert b".env" not in diff
    found = describe(tiny())
    assert SECRET not in repr((found.params, found.tags, found.artifacts, found.datasets, found.note))
    assert SECRET not in (git_state_to_send() or "")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('+PASSWORD = "hunter2hunter2"', '+PASSWORD = "***"'),
        ("+    api_key: 'hunter2hunter2',", "+    api_key: '***',"),
        ("+export AWS_SECRET_ACCESS_KEY=hunter2hunter2", "+export AWS_SECRET_ACCESS_KEY=***"),
        ("+key = AKIAABCDEFGHIJKLMNOP", "+key = ***"),
        ("+    token: PositionTokens", "+    token: PositionTokens"),
        ("+        token=position_token,", "+        token=position_token,"),
        ("+tokens = [token for token in sentence]", "+tokens = [token for token in sentence]"),
    ],
)
def test_what_of_a_diff_is_hidden(line: str, shown: str) -> None:
    assert redacted_diff(line) == shown


def test_what_a_text_says_of_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{SECRET}+/x")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/ada/token")
    monkeypatch.setenv("SHORT_TOKEN", "yes")
    said = f"yes: {SECRET}+/x of /home/ada/token at s3://a:b@c/d?X-Amz-Signature=1f2e and abfs://data@account/x"
    assert redacted(said) == "yes: *** of /home/ada/token at s3://c/d?X-Amz-Signature=*** and abfs://data@account/x"


URI = f"s3://ada:{SECRET}@bucket/x"


@pytest.mark.parametrize("key", ["storage", "data.dataset", "model.checkpoint", "init_from", "tracking.uri"])
@pytest.mark.parametrize("uri", [URI, f"https://host/x?X-Amz-Signature={SECRET}", f"https://host/x?sig={SECRET}"])
def test_no_uri_of_a_config_holds_a_password(key: str, uri: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("{" + key.replace(".", ": {") + f": '{uri}'" + "}" * (1 + key.count(".")))
    for attempt in (
        lambda: load_config(tmp_path / "x.yaml"),
        lambda: load_config("shapes", [f"{key}={uri}"]),
    ):
        with pytest.raises(UserError, match=f"{key} holds a password") as refused:
            attempt()
        assert SECRET not in str(refused.value)


def test_uris_without_a_password_are_taken() -> None:
    for uri in ("s3://bucket/x?endpoint_override=http%3A%2F%2Fhost", "abfs://data@account.host/x", "memory://x", "a@b"):
        assert load_config("shapes", [f"data.dataset={uri}"]).data.dataset == uri


def test_a_card_does_not_tell_how_its_source_was_opened(tmp_path: Path) -> None:
    from dataclasses import replace

    write_dataset(replace(numbered_source(2), uri=f"memory://ada:{SECRET}@bucket/x"), str(tmp_path / "set"), local=True)
    assert not holding(files(tmp_path))
    assert open_dataset(str(tmp_path / "set")).card.origin.source == "memory://bucket/x"


def test_no_secret_is_in_a_parcel(project: Path, tmp_path: Path) -> None:
    (project / "mine.yaml").write_text("extends: shapes.yaml\nseed: 3\n")
    made = command_for("train", {"file": "mine.yaml", "name": "first"}, str(project), tracked=False)
    target = tmp_path / "parcel"
    target.mkdir()
    parcel.pack(target, {**made.files, "git-state.json": git_state_to_send() or ""}, package=True)
    assert not holding({**files(target), "words": repr(made.words).encode()})
    assert SECRET not in repr(forwarded_environment(os.environ))
    assert not {path.name for path in target.iterdir()} & {path.name for path in project.iterdir()} - {"mine.yaml"}
    for verb, given in (
        ("evaluate", {"run": "first", "dataset": URI}),
        ("predict", {"model": "first", "images": [URI]}),
        ("predict", {"model": URI, "images": ["x"]}),
        ("predict", {"model": "first", "images": ["x"], "out": URI}),
    ):
        with pytest.raises(UserError, match="which the cluster's job list would show") as refused:
            command_for(verb, given, "/shared", tracked=True)  # type: ignore[arg-type]
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize("verbose", [False, True], ids=["a sentence", "a traceback"])
@pytest.mark.parametrize(
    ("words", "uri"),
    [
        (["config", "show", "nowhere"], None),
        (["config", "show", "shapes", "--set", f"data.dataset={URI}"], None),
        (["train", "shapes", "--local", "--set", "data.dataset=SET"], f"ftp://me:{SECRET}@host"),
        (["compare", "a", "b"], f"http://me:{SECRET}@127.0.0.1:1"),
        (["predict", "models:/x@y", "z.jpg", "--local"], f"http://me:{SECRET}@127.0.0.1:1"),
        (["data", "check", f"https://me:{SECRET}@127.0.0.1:1/x"], None),
        (["submit", "train", "shapes", "--address", "http://127.0.0.1:1"], f"http://me:{SECRET}@127.0.0.1:1"),
        (["submit", "evaluate", "first", "--dataset", URI, "--address", "http://127.0.0.1:1"], None),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_what_fails_says_no_secret(
    words: list[str],
    uri: str | None,
    verbose: bool,
    project: Path,
    tiny_dataset: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    line = [word.replace("SET", tiny_dataset) for word in words] + ["--verbose"] * verbose
    with pytest.raises(SystemExit) as end:
        main(line)
    out, err = capfd.readouterr()
    assert end.value.code in (1, 2), err
    assert SECRET not in out + err
    assert ("Traceback" in err) == verbose


def test_show_says_no_secret(project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cosa_ray.cli.main", "config", "show", "shapes", "--verbose"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
