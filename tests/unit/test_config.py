"""The experiment schema: files, extends, overrides, and the sentence a wrong one gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cosa_ray.config.load import apply_overrides, dump_config, flatten, keys, load_config, merge
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content)
    return path


def test_file_states_only_differences(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "a.yaml", "losses: {cam_to_seg: 0.3}\n"))
    assert config.losses.cam_to_seg == 0.3
    assert config == Config().model_copy(update={"losses": config.losses})


def test_extends_merges_and_the_child_wins(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "training: {steps: 100, warmup_iters: 20}\noptimiser: {warmup_steps: 5, lr: 1e-3}\n")
    config = load_config(write(tmp_path, "child.yaml", "extends: base.yaml\ntraining: {steps: 50}\n"))
    assert (config.training.steps, config.training.warmup_iters) == (50, 20)
    assert config.optimiser.lr == 1e-3, "YAML 1.1 reads 1e-3 as text; the schema must still take it"


def test_overrides_come_last_and_are_yaml(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "assignment: {scales: [1.0]}\n")
    config = load_config(file, ["assignment.scales=[1.0, 0.5]", "model.checkpoint=w.pth", "seed=3"])
    assert config.assignment.scales == (1.0, 0.5)
    assert config.model.checkpoint == "w.pth"
    assert config.seed == 3


@pytest.mark.parametrize(("said", "meant"), [("true", "both"), ("false", "none"), ("assignment", "assignment")])
def test_compile_understands_what_earlier_versions_wrote(tmp_path: Path, said: str, meant: str) -> None:
    assert load_config(write(tmp_path, "a.yaml", f"training: {{compile: {said}}}\n")).training.compile == meant


def test_resolved_config_round_trips(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "a.yaml", "model: {backbone_args: {depth: 2}}\nseed: 9\n"))
    assert load_config(write(tmp_path, "b.yaml", dump_config(config))) == config


@pytest.mark.parametrize(
    ("content", "overrides", "words"),
    [
        ("losses: {cam_to_segg: 1}", [], ["losses.cam_to_segg", "losses.cam_to_seg", "a.yaml"]),
        ("cam_to_seg: 1", [], ["cam_to_seg", "losses.cam_to_seg"]),
        ("seed: many", [], ["seed", "many"]),
        ("training: {compile: online}", [], ["training.compile", "assignment", "online"]),
        ("pseudo_labels: {threshold: 1.5}", [], ["pseudo_labels.threshold", "1.5"]),
        ("training: {batch_size: 1}\nworkers: 2", [], ["training.batch_size", "2 workers"]),
        ("pseudo_labels: {policy: two_threshold}", [], ["contrastive.threshold"]),
        ("pseudo_labels: {low: 0.8}", [], ["pseudo_labels.low/high"]),
        ("training: {steps: 10}", [], ["warmup_iters"]),
        ("views: {scale: [2, 1]}", [], ["views.scale"]),
        ("- 1\n- 2", [], ["a.yaml", "list"]),
        ("a: [1", [], ["a.yaml", "line", "YAML"]),
        ("", ["seed"], ["--set seed", "key=value"]),
        ("", ["losses.cam=1"], ["losses.cam"]),
        ("extends: nowhere.yaml", [], ["nowhere.yaml"]),
        ("extends: a.yaml", [], ["a.yaml", "extends itself"]),
    ],
)
def test_wrong_input_gets_one_sentence(tmp_path: Path, content: str, overrides: list[str], words: list[str]) -> None:
    file = write(tmp_path, "a.yaml", content)
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    def walk(model: type) -> None:
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                assert field.annotation.__doc__
                walk(field.annotation)
            else:
                assert field.description, f"{model.__name__}.{name} has no description"

    walk(Config)


def test_flatten_and_keys_name_the_same_leaves() -> None:
    flat = flatten(Config())
    assert flat["losses.cam_to_seg"] == 0.1
    assert set(flat) <= set(keys(Config))
    assert yaml.safe_load(dump_config(Config()))["losses"]["cam_to_seg"] == flat["losses.cam_to_seg"]


def test_apply_overrides_checks_again() -> None:
    assert apply_overrides(Config(), {"losses.contrastive": 0.0}).losses.contrastive == 0.0
    with pytest.raises(UserError, match="contrastve"):
        apply_overrides(Config(), {"losses.contrastve": 0.0})


def test_merge_leaves_its_arguments_alone() -> None:
    base = {"a": {"b": 1}}
    assert merge(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}


@pytest.mark.parametrize(
    "uri", ["http://me:hunter2@host:5000", "http://hunter2@host", "postgresql://host/db?password=hunter2"]
)
def test_a_password_cannot_get_into_a_config(tmp_path, uri) -> None:
    (tmp_path / "x.yaml").write_text(f"tracking: {{uri: '{uri}'}}\n")
    with pytest.raises(UserError, match=r"x\.yaml: tracking\.uri holds a password.*MLFLOW_TRACKING_URI") as raised:
        load_config(tmp_path / "x.yaml")
    assert "hunter2" not in str(raised.value)
    assert load_config("shapes", ["tracking.uri=postgresql://me@host/db"]).tracking.uri == "postgresql://me@host/db"


@pytest.mark.parametrize("key", ["what?", "a//b", "../a", "/a", ".", "x" * 251, "a=b", ""])
def test_a_tag_that_mlflow_refuses_is_refused_at_once(key) -> None:
    """By MLflow's own rule: the tags of a batch with one such key are all lost."""
    validation = pytest.importorskip("mlflow.utils.validation")
    exceptions = pytest.importorskip("mlflow.exceptions")
    if key:
        with pytest.raises(exceptions.MlflowException):
            validation._validate_tag(key, "1")
    with pytest.raises(ValueError, match=r"tracking\.tags"):
        Config.model_validate({"tracking": {"tags": {"team": "vision", key: "1"}}})
    for good in ("team", "a/b c.d-e:f_1", ".hidden", "x" * 250):
        validation._validate_tag(good, "1")
        assert Config.model_validate({"tracking": {"tags": {good: "1"}}}).tracking.tags == {good: "1"}


@pytest.mark.parametrize("bounds", [[0.0, 0.95], [0.05, 1.0], [0.6, 0.4], [0.5, 0.5]])
def test_threshold_bounds_leave_a_threshold_to_move(bounds) -> None:
    with pytest.raises(ValueError, match=r"dynamic_threshold\.bounds|greater than 0|less than 1"):
        Config.model_validate({"dynamic_threshold": {"bounds": bounds}})


def test_workers_do_not_share_a_gpu() -> None:
    def config(workers: int, gpus: float) -> Config:
        return Config.model_validate({"workers": workers, "resources": {"gpus_per_worker": gpus}})

    for workers, gpus in ((1, 0.25), (1, 2.0), (3, 0.0), (3, 1.0)):
        assert config(workers, gpus).resources.gpus_per_worker == gpus
    with pytest.raises(ValueError, match="must be whole with 2 workers, because each needs a GPU of its own"):
        config(2, 0.5)
    with pytest.raises(ValueError, match="must be whole or below 1"):
        config(1, 1.5)
