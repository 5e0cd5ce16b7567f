"""The token of clusters that are started on this machine is its owner's alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cosa_ray.config.credentials import keep_token_private


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_token_is_made_for_its_owner_alone(home: Path) -> None:
    before = os.umask(0o022)
    try:
        keep_token_private()
    finally:
        os.umask(before)
    file = home / ".ray/auth_token"
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert len(file.read_text()) == 64
    assert [each.name for each in file.parent.iterdir()] == ["auth_token"]


def test_a_token_that_ray_made_is_kept_and_closed(home: Path) -> None:
    file = home / ".ray/auth_token"
    file.parent.mkdir()
    file.write_text("of ray")
    file.chmod(0o644)
    keep_token_private()
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("of ray", 0o600)


def test_a_token_of_elsewhere_is_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/elsewhere")
    keep_token_private()
    assert not list(home.iterdir())


def test_a_home_that_is_no_folder_is_no_failure(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("HOME", str(home / "file"))
    keep_token_private()
