"""Linters over cluster/, and what holds for every file of it."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.unit.cluster_files import BIN, CLUSTER, GUIDE, ROOT, files

DOCKERFILES = [path for path in files() if path.name == "Dockerfile"]
SCRIPTS = [path for path in files() if path.suffix == ".sbatch"]


def lint(tool: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / tool, *words], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_linters_find_nothing() -> None:
    assert len(DOCKERFILES) == 2
    for done in (
        lint("yamllint", "--strict", CLUSTER),
        lint("hadolint", *DOCKERFILES),
        lint("shellcheck", *SCRIPTS),
    ):
        assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("tool", "name", "content", "finding"),
    [
        ("yamllint", "x.yaml", "a: 1\na: 2\n", "duplication"),
        ("hadolint", "Dockerfile", "FROM debian:latest\nRUN cd /tmp\n", "DL3007"),
        ("shellcheck", "x.sh", "#!/bin/bash\nrm -rf $1/*\n", "SC2086"),
    ],
)
def test_linters_find_a_defect(tool: str, name: str, content: str, finding: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    done = lint(tool, *(["--strict"] if tool == "yamllint" else []), tmp_path / name)
    assert done.returncode
    assert finding in done.stdout


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(CLUSTER)))
def test_a_file_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    assert text.startswith(("#", '"""'))
    if path.suffix in (".yaml", ".sbatch") or path.name == "Dockerfile":
        head = re.sub(r"^#!.*\n", "", text).partition("\n\n")[0]
        assert re.search(r"\A# What: +\S(?:.|\n)*\n# Change: +\S(?:.|\n)*\n# Use: +\S", head), head


# What a line looks like in which somebody wrote a secret down: a telling name, and one word as its value.
SECRET = re.compile(
    r"(?i)(?:password|secret_?key|access_?key|token)\S*[\"']?"
    r"[ \t]*[:=][ \t]*[\"']?(?!\.\.\.)[\w/+-]{6,}[\"']?$"
)
HARMLESS = re.compile(r"secretKeyRef|--from-file=|RAY_AUTH_TOKEN_PATH=|token_path:|secretName: cosa-ray-token")


def given_away(text: str) -> list[str]:
    """Lines that hold a secret, or a path or a package index of one machine."""
    lines = [line for line in text.splitlines() if SECRET.search(line) and not HARMLESS.search(line)]
    return lines + re.findall(r"/root/\S*|/home/(?!cosa\b|mlflow\b)\S*|\S*index-url\S*", text)


@pytest.mark.parametrize("path", [*files(), GUIDE], ids=lambda path: path.name)
def test_no_secret_and_no_machine_is_in_a_file(path: Path) -> None:
    assert given_away(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "POSTGRES_PASSWORD=changeme",
        "  PGPASSWORD: hunter22",
        'token: "abcdef123"',
        "cd /root/x",
        "--index-url https://x",
    ],
)
def test_a_secret_is_found(line: str) -> None:
    assert given_away(line)


def unavailable(dockerfile: Path) -> list[str]:
    """What a Dockerfile copies and is not there, or not let through by its .dockerignore."""
    rules = [
        line
        for line in Path(f"{dockerfile}.dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert rules[0] == "*", "an allow-list"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    found = []
    copied = [
        source
        for words in re.findall(r"^COPY (.*)$", dockerfile.read_text(), re.MULTILINE)
        for source in words.split()[:-1]
    ]
    for source in copied:
        if not (ROOT / source).exists() or not any(fnmatch.fnmatch(source, rule) for rule in allowed):
            found.append(source)
    # And nothing more than that is let through.
    return found + [rule for rule in allowed if rule not in copied]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_a_build_sees_what_it_copies_and_nothing_else(path: Path) -> None:
    assert unavailable(path) == []


def test_a_forgotten_file_of_a_build_is_found(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("COPY README.md nothing.txt ./\n")
    (tmp_path / "Dockerfile.dockerignore").write_text("*\n!nothing.txt\n!LICENSE\n")
    assert unavailable(tmp_path / "Dockerfile") == ["README.md", "nothing.txt", "LICENSE"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_a_build_stops_without_a_base_by_digest_and_never_ends_as_root(path: Path) -> None:
    text = path.read_text()
    bases = re.findall(r"^FROM (.*)$", text, re.MULTILINE)
    assert len(bases) == 1
    required = re.fullmatch(r"\$\{(\w+):\?must_be_given_by_digest\S*\}", bases[0])
    assert required
    assert re.search(rf"^ARG {required[1]}$", text, re.MULTILINE), "no default"
    users = re.findall(r"^USER (.*)$", text, re.MULTILINE)
    assert users[-1:] == ["1000"]


def test_packages_of_images_do_not_fight_with_the_pins() -> None:
    """What an image installs under constraints.txt is in it, or is new; a second version would stop the build."""
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for folder in ("docker", "mlflow"):
        for line in (CLUSTER / folder / "requirements.txt").read_text().splitlines():
            name, _, version = line.partition("==")
            assert line.startswith("#") or not version or pins.get(name, version) == version
    # s3fs is of the same release as fsspec.
    assert f"s3fs=={pins['fsspec']}\n" in (CLUSTER / "docker" / "requirements.txt").read_text()


def test_local_settings_are_not_committed() -> None:
    ignored = subprocess.run(
        ["git", "check-ignore", "cluster/current.yaml", "cluster/mlflow/.env", ".cosa-ray-12/token"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if ignored.returncode == 128:
        pytest.skip("not a git checkout")
    assert len(ignored.stdout.split()) == 3


def test_the_example_of_the_guide_is_what_current_yaml_takes() -> None:
    example = yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)[0])
    assert set(example) <= {"address", "folder", "installed", "python", "token_path"}


def test_the_guide_names_files_that_exist() -> None:
    named = set(re.findall(r"cluster/[\w./-]*\w", GUIDE.read_text())) - {"cluster/current.yaml"}
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []
