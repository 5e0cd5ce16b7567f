"""What is written about a run: parameters, code, environment, datasets; and no secret."""

from __future__ import annotations

import json
import pickle
import subprocess
import uuid

import pytest
import yaml

from cosa_ray.config.schema import Config
from cosa_ray.data.importing import import_dataset
from cosa_ray.tracking.describe import DIFF_BYTES, describe, environment, git_state, parameters


def leaves(content, prefix=""):
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_parameters_are_every_leaf_of_the_config() -> None:
    config = Config()
    found = parameters(config)
    assert set(found) == set(leaves(config.model_dump()))
    assert found["optimiser.lr"] == "6e-05"
    assert found["assignment.scales"] == "[1.0, 0.5, 1.5]"
    assert found["pseudo_labels.policy"] == "reliability"
    assert found["tracking.uri"] == "null"
    assert all(isinstance(value, str) for value in found.values())


def test_no_password_in_what_is_logged() -> None:
    secret = uuid.uuid4().hex
    config = Config.model_validate({"tracking": {"tags": {"team": "vision"}}})
    # No file can bring this in any more, but a config can be made in code.
    tracking = config.tracking.model_copy(update={"uri": f"http://me:{secret}@host:5000"})
    config = config.model_copy(update={"tracking": tracking})
    found = describe(config, {"trial": "3"})
    assert secret.encode() not in pickle.dumps(found)
    assert found.params["tracking.uri"] == "http://host:5000"
    assert found.tags["team"] == "vision"
    assert found.tags["trial"] == "3"
    assert yaml.safe_load(found.artifacts["config.yaml"])["seed"] == 0


def test_datasets_are_told_apart_by_their_content(tmp_path) -> None:
    digests = []
    for seed in (0, 1, 0):
        folder = tmp_path / f"shapes{len(digests)}"
        import_dataset("shapes", None, str(folder), local=True, train=4, val=2, size=32, seed=seed)
        found = describe(Config.model_validate({"data": {"dataset": str(folder)}}))
        train, val = found.datasets
        assert (train["context"], val["context"]) == ("train", "val")
        assert train["dataset"]["name"] == f"{folder.name}/train"
        assert json.loads(train["dataset"]["profile"])["images"] == 4
        assert json.loads(train["dataset"]["source"]) == {"uri": str(folder)}
        assert len(train["dataset"]["digest"]) <= 36
        assert "dataset.json" in found.artifacts
        digests.append((train["dataset"]["digest"], val["dataset"]["digest"]))
    assert digests[0] == digests[2]
    assert len({*digests[0], *digests[1]}) == 4


def test_a_dataset_that_is_not_there_is_left_out(tmp_path) -> None:
    assert describe(Config.model_validate({"data": {"dataset": str(tmp_path / "none")}})).datasets == []


@pytest.fixture
def repository(tmp_path):
    def git(*words: str) -> str:
        who = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q", "-b", "trunk")
    (tmp_path / "code.py").write_text("one = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return tmp_path, git


def test_git_state_clean_then_dirty(repository) -> None:
    folder, git = repository
    tags, diff = git_state(folder)
    assert tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD").strip()
    assert tags["mlflow.source.git.branch"] == "trunk"
    assert (tags["cosa_ray.git.dirty"], diff) == ("false", None)
    (folder / "code.py").write_text("one = 2\n")
    tags, diff = git_state(folder)
    assert tags["cosa_ray.git.dirty"] == "true"
    assert diff is not None
    assert b"-one = 1\n+one = 2" in diff


def test_a_huge_diff_is_cut(repository) -> None:
    folder, _ = repository
    (folder / "code.py").write_text("x = 0\n" * 200_000)
    diff = git_state(folder)[1]
    assert diff is not None
    assert len(diff) < DIFF_BYTES + 100
    assert diff.endswith(b"[cut here: the diff is longer]\n")


def test_without_a_repository_nothing_is_said(tmp_path) -> None:
    assert git_state(tmp_path) == ({}, None)


def test_environment_names_the_versions_that_matter() -> None:
    import torch

    found = environment()
    assert torch.__version__.split("+")[0] == found["packages"]["torch"].split("+")[0]
    assert {"torch", "timm", "ray", "mlflow"} <= set(found["packages"])
    assert found["cpus"] >= 1
    json.dumps(found)
