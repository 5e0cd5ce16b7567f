"""The command line: wrong input gets one sentence and exit code 2, before anything starts."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text

from cosa_ray.cli.main import app, main
from cosa_ray.cli.resume import command_to_resume


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    captured = capsys.readouterr()
    return int(str(ended.value.code)), captured.out, captured.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "nowhere"], ["no experiment file nowhere"]),
        (["train", "shape"], ["shapes.yaml"]),
        (["train", "shapes", "--set", "losses.cam_to_segg=1"], ["losses.cam_to_seg"]),
        (["train", "shapes", "--set", "seed"], ["--set seed"]),
        (["train", "shapes", "--set", "data.dataset=nowhere"], ["nowhere", "cosa-ray data import"]),
        (["train", "shapes", "--resume"], ["--name"]),
        (["train", "shapes", "--name", "../x"], ["run name"]),
        (["train", "shapes", "--local", "--set", "workers=2"], ["--local", "workers"]),
        (["train", "shapes", "--resume", "--name", "never"], ["never"]),
        (["evaluate", "never"], ["no run never"]),
        (["predict", "never", "a.jpg"], ["no run never"]),
        (["predict", "never", "a.jpg", "--network", "both"], ["--network both", "assignment or online"]),
        (["pseudo-labels", "never", "--source", "cams"], ["--source cams"]),
        (["register", "never", "--name", "x"], ["no run never"]),
        (["register", "never", "--name", "x", "--alias", "v1"], ["alias 'v1'"]),
        (["import-release", "nowhere.pth"], ["nowhere.pth"]),
        (["data", "check", "nowhere"], ["nowhere"]),
        (["config", "show", "nowhere"], ["nowhere"]),
        (["tune", "nowhere"], ["nowhere"]),
        (["submit", "train", "shapes", "--address", "http://127.0.0.1:9"], ["127.0.0.1:9"]),
    ],
)
def test_mistakes(
    words: list[str],
    said: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(words, capsys)
    assert code == 2, err
    assert out == ""
    sentence = err.strip().splitlines()
    assert len(sentence) == 1, err
    for word in said:
        assert word in sentence[0]
    assert not list(tmp_path.glob("runs/*")), "a refused command leaves nothing behind"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train"], ["missing argument", "cosa-ray train --help"]),
        (["frobnicate"], ["frobnicate", "cosa-ray --help"]),
        (["train", "shapes", "--no-such-flag"], ["--no-such-flag"]),
        (["train", "shapes", "--nam", "x"], ["--name"]),
        (["data", "import", "shapes"], ["OUT", "cosa-ray data import shapes --help"]),
        (["ui", "--port", "many"], ["--port"]),
        (["ui", "--port", "99999"], ["--port", "65535"]),
        (["submit", "trian", "shapes", "--address", "x"], ["trian", "train"]),
        (["ablate", "terms", "--name", "x", "--retry-failed"], ["--retry-failed", "add --resume"]),
    ],
)
def test_bad_flags(words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(words, capsys)
    assert code == 2
    assert out == ""
    (sentence,) = err.splitlines()
    assert sentence.startswith("cosa-ray: ")
    assert sentence.endswith(".")
    for word in said:
        assert word in sentence


@pytest.mark.parametrize(("words", "expected"), [(["--version"], 0), (["train", "--help"], 0), ([], 2), (["data"], 2)])
def test_help_and_version(words: list[str], expected: int, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(words, capsys)
    assert code == expected
    assert "cosa-ray" in out + err
    assert "cosa-ray: " not in err


def test_help_loses_no_bracket_to_markup() -> None:
    """Rich takes `[class, ...]` for a style of its own and shows nothing, unless it is escaped."""

    def sentences(command: Any) -> Iterator[str]:
        yield command.help or ""
        yield from (parameter.help or "" for parameter in command.params if hasattr(parameter, "help"))
        for below in getattr(command, "commands", {}).values():
            yield from sentences(below)

    found = [each for each in sentences(typer.main.get_command(app)) if "[" in each]
    assert len(found) >= 4
    for sentence in found:
        assert Text.from_markup(sentence).plain == sentence.replace("\\[", "[")


@pytest.mark.parametrize(
    ("given", "more"),
    [
        (["train", "shapes", "--set", "losses.contrastive=0.2", "--local", "--no-track", "--json"], {"name": "first"}),
        (["tune", "my sweep.yaml", "--set", "space.optimiser.lr={loguniform: [1e-4, 1e-2]}"], {"name": "first"}),
        (["tune", "shapes", "--name", "first", "--resume", "--retry-failed"], {}),
        (["train", "--json", "--", "-odd.yaml"], {"name": "first"}),
        (
            ["ablate", "terms", "--seeds", "5", "--base", "shapes_coexist", "--protocol", "multi_scale"],
            {"name": "first"},
        ),
        (
            ["promote", "runs/a", "--seeds", "2", "--protocol", "a", "--protocol", "b", "--alias", "c"],
            {"name": "first"},
        ),
    ],
    ids=["train", "tune", "again", "dashed", "ablate", "promote"],
)
def test_the_command_to_resume_says_all_that_was_said(given: list[str], more: dict[str, Any]) -> None:
    command: Any = typer.main.get_command(app)

    def parsed(words: list[str]) -> Any:
        verb, *rest = words
        return command.commands[verb].make_context(verb, rest)

    before = parsed(given)
    first, *words = shlex.split(command_to_resume(before, "first"))
    assert first == "cosa-ray"
    assert words[0] == given[0]
    assert parsed(words).params == {**before.params, **more, "resume": True}


def test_config_show_prints_every_setting_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cosa_ray.cli.main", "config", "show", "shapes", "--set", "seed=7", "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=tmp_path,
    )
    config = json.loads(done.stdout)
    assert config["seed"] == 7
    assert config["model"]["stem"] == "convolutional"


def test_verbose_shows_the_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cosa_ray.cli.main", "train", "nowhere", "--verbose"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr
