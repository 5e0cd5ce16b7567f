"""What a job is sent: the resolved file and the package, nothing else, with paths that outlive the job's folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cosa_ray.config.load import flatten, load_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.jobs import parcel
from cosa_ray.jobs.command import Command, Verb, command_for


def command(verb: Verb, file: str | Path, overrides: list[str] | None = None, *, tracked: bool = True) -> Command:
    return command_for(verb, {"file": str(file), "set_": overrides or []}, "/shared", tracked=tracked)


def test_the_package_runs_from_the_parcel_alone(tmp_path: Path) -> None:
    parcel.pack(tmp_path, {"x.yaml": "seed: 3\n"}, package=True)
    assert {path.name for path in tmp_path.iterdir()} == {"x.yaml", "cosa_ray"}
    assert not list(tmp_path.rglob("__pycache__"))
    code = "import cosa_ray; from cosa_ray.config.load import *; print(cosa_ray.__file__, load_config('x.yaml').seed)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [str(tmp_path.resolve() / "cosa_ray" / "__init__.py"), "3"]


def test_only_the_source_of_the_package_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, target = tmp_path / "package", tmp_path / "target"
    sent = ["__init__.py", "py.typed", "_experiments/shapes.yaml"]
    kept = ["mlflow.db", "key.pem", ".env", ".hidden/x.py", "runs/weights.pt", "__pycache__/a.cpython-311.pyc"]
    for name in [*sent, *kept]:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("x")
    target.mkdir()
    monkeypatch.setattr(parcel, "_PACKAGE", package)
    parcel.pack(target, {}, package=True)
    assert {str(p.relative_to(target / "package")) for p in target.rglob("*") if p.is_file()} == set(sent)


def test_the_package_that_is_sent_knows_its_commit(tmp_path: Path) -> None:
    """Where the job runs there is no repository; the state of the code goes along, and only the package's changes."""
    import json

    from cosa_ray.tracking.describe import GIT_FILE, git_state_to_send

    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout

    if not (root / ".git").exists():
        pytest.skip("no repository")
    state = git_state_to_send()
    assert state is not None
    changed = [
        line.split(" b/")[-1] for line in json.loads(state)["diff"].splitlines() if line.startswith("diff --git")
    ]
    assert all(name.startswith("cosa_ray/") for name in changed)
    parcel.pack(tmp_path, {GIT_FILE: state}, package=True)
    code = "import json; from cosa_ray.tracking.describe import git_state; print(json.dumps(git_state()[0]))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    tags = json.loads(ran.stdout)
    assert tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD").strip()
    assert tags["cosa_ray.git.dirty"] == ("true" if git("status", "--porcelain").strip() else "false")


def test_installed_sends_the_file_only(tmp_path: Path) -> None:
    parcel.pack(tmp_path, {"x.yaml": ""}, package=False)
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


def test_nothing_of_the_working_folder_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, target = tmp_path / "project", tmp_path / "target"
    target.mkdir()
    (project / "datasets").mkdir(parents=True)
    for name in (".env", "credentials.json", "datasets/big.arrow", "mlflow.db"):
        (project / name).write_text("secret")
    (project / "x.yaml").write_text("seed: 3\n")
    monkeypatch.chdir(project)
    sent = command("train", "x.yaml", tracked=False)
    packed = parcel.pack(target, sent.files, package=True)
    assert sent.words[1] == "x.yaml"
    files = [path for path in target.rglob("*") if path.is_file()]
    assert (packed.files, packed.bytes) == (len(files), sum(path.stat().st_size for path in files))
    assert not [path for path in target.rglob("*") if path.is_file() and path.read_text(errors="replace") == "secret"]


def test_a_parcel_over_the_limit_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcel, "LIMIT_BYTES", 2 * 1024 * 1024)
    with pytest.raises(
        UserError, match=r"is 5 MiB and Ray takes at most 2 MiB; largest: b\.yaml \(3.0 MiB\), a\.yaml \(2.0"
    ):
        parcel.pack(tmp_path, {"a.yaml": "#" * 2 * 2**20, "b.yaml": "#" * 3 * 2**20, "c.yaml": ""}, package=False)


def test_relative_paths_start_at_the_clusters_folder() -> None:
    config = Config.model_validate(
        {
            "storage": "runs",
            "init_from": "old/run",
            "data": {"dataset": "datasets/voc"},
            "model": {"checkpoint": "s3://bucket/w.safetensors"},
        }
    )
    moved = parcel.for_cluster(config, "/shared/me", tracking_from_environment=False)
    changed = {k: v for k, v in flatten(moved).items() if v != flatten(config)[k]}
    assert changed == {
        "storage": "/shared/me/runs",
        "init_from": "/shared/me/old/run",
        "data.dataset": "/shared/me/datasets/voc",
        "tracking.uri": "sqlite:////shared/me/mlflow.db",
    }
    assert parcel.for_cluster(config, "/shared/me", tracking_from_environment=True).tracking.uri is None
    home = Config.model_validate({"storage": "~/runs", "data": {"dataset": "~/voc"}})
    moved = parcel.for_cluster(home, "/shared/me", tracking_from_environment=True)
    assert (moved.storage, moved.data.dataset) == ("~/runs", "~/voc"), "the home folder is that of the cluster"
    with pytest.raises(UserError, match="absolute folder"):
        parcel.for_cluster(config, "me", tracking_from_environment=False)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///mlflow.db", "sqlite:////shared/mlflow.db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("sqlite:///~/mlflow.db", "sqlite:///~/mlflow.db"),
        ("http://tracking:5000", "http://tracking:5000"),
    ],
)
def test_absolute_tracking(uri: str, expected: str) -> None:
    assert parcel.absolute_tracking(uri, "/shared") == expected


def test_extends_and_overrides_are_worked_in(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("training: {steps: 50, warmup_iters: 5}\noptimiser: {warmup_steps: 3}\n")
    (tmp_path / "x.yaml").write_text("extends: base.yaml\nseed: 4\n")
    alone = tmp_path / "alone"
    alone.mkdir()
    files = command("train", tmp_path / "x.yaml", ["training.steps=60"]).files
    parcel.pack(alone, files, package=False)
    sent = load_config(alone / "x.yaml")
    assert (sent.training.steps, sent.training.warmup_iters, sent.seed) == (60, 5, 4)
    assert sent.storage == "/shared/runs"


def test_a_sweep_arrives_with_its_base(tmp_path: Path) -> None:
    from cosa_ray.tuning.sweepfile import load_sweep

    overrides = ["trials=3", "training.batch_size=4"]
    sent = command("tune", "shapes", overrides)
    parcel.pack(tmp_path, sent.files, package=False)
    sweep, base = load_sweep(tmp_path / sent.words[1])
    here, here_base = load_sweep("shapes", overrides)
    assert sweep.space == here.space
    assert sweep.trials == 3
    expected = {**flatten(here_base), "storage": "/shared/runs", "data.dataset": "/shared/datasets/shapes"}
    assert flatten(base) == expected
    # A promotion asks the base itself how long a run is, so what the sweep changes stays apart from it.
    assert sweep.set == {**here.set, "training.batch_size": 4}
    assert flatten(load_config(tmp_path / sweep.base))["training.steps"] == load_config("shapes").training.steps


def test_a_wrong_sweep_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("base: shapes\nspace: {losses.cam_to_seg: {uniform: [-1, 1]}}\n")
    with pytest.raises(UserError, match=r"losses\.cam_to_seg"):
        command("tune", tmp_path / "s.yaml")
