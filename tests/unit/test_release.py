"""The authors' checkpoints: read safely, refused when they do not fit, and the same numbers as their network."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosa_ray.errors import UserError
from cosa_ray.evaluation.trained import load_trained
from cosa_ray.training.evaluating import evaluate_run
from cosa_ray.training.models import find_model
from cosa_ray.training.predicting import predict
from cosa_ray.training.release import import_release
from cosa_ray.training.runs import find_run
from tests.unit.tiny_sets import photo


@pytest.fixture
def checkpoint(golden, tmp_path: Path) -> Path:
    """A .pth in the release's layout, with the golden network in it, wrapped as DDP saves."""
    arrays = golden("network")
    state = {f"module.{k.removeprefix('state::')}": torch.from_numpy(v) for k, v in arrays.items() if "state::" in k}
    file = tmp_path / "released.pth"
    torch.save({"model": state, "epoch": 3, "args": {"lr": 6e-5}}, file)
    return file


def five_class_set(folder: Path) -> str:
    from cosa_ray.data.importing import import_dataset

    out = str(folder / "shapes")
    import_dataset("shapes", None, out, train=4, val=6, size=64, local=True)
    return out


@pytest.mark.golden
def test_the_run_gives_the_releases_numbers(golden, checkpoint: Path, tmp_path: Path) -> None:
    arrays = golden("network")
    dataset = five_class_set(tmp_path)
    storage = str(tmp_path / "runs")
    found = import_release(
        str(checkpoint), name="released", heads=4, crop=64, dataset=dataset, storage=storage, track=False
    )
    assert (found.backbone["embed_dim"], found.backbone["depth"], found.backbone["patch_size"]) == (48, 5, 16)
    assert found.backbone["img_size"] == 64
    assert found.left_out == ["encoder.head.bias", "encoder.head.weight"]
    with find_model("released", storage=storage).open() as folder:
        trained = load_trained(folder)
        for network in (trained.online, trained.assignment):
            for size in ("native", "wide"):
                with torch.no_grad():
                    outputs = network(torch.from_numpy(arrays[f"{size}_x"]))
                for name, value in outputs._asdict().items():
                    np.testing.assert_allclose(value.numpy(), arrays[f"{size}_{name}"], atol=1e-5, rtol=0, err_msg=name)
    # What it is for: evaluate and predict take it.
    report = evaluate_run("released", protocol="single_scale", storage=storage, local=True)
    assert 0 <= report.metrics["val/single_scale/miou"] <= 1
    assert report.metrics["val/single_scale/miou"] == report.metrics["val/single_scale/miou_online"]
    (tmp_path / "x.jpg").write_bytes(photo(70, 50))
    predict("released", [str(tmp_path / "x.jpg")], out=str(tmp_path / "out"), storage=storage, local=True)
    assert Image.open(tmp_path / "out" / "masks" / "x.png").size == (70, 50)


@pytest.mark.golden
def test_an_imported_run_is_tracked_and_its_name_taken(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    dataset, storage = five_class_set(tmp_path), str(tmp_path / "runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    keys = {"heads": 4, "crop": 64, "dataset": dataset, "storage": storage}
    found = import_release(str(checkpoint), name="released", **keys)
    record = find_run("released", storage).record
    assert record.mlflow_run_id == found.mlflow_run_id
    assert record.state == "finished"
    from mlflow import MlflowClient

    run = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db").get_run(found.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["cosa_ray.kind"] == "release"
    with pytest.raises(UserError, match="exists already"):
        import_release(str(checkpoint), name="released", **keys)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("change", "keys", "said"),
    [
        ({}, {"heads": None}, "--heads"),
        ({}, {"heads": 5}, "does not divide"),
        ({}, {"dataset": None}, "--dataset"),
        ({"classifier.weight": None}, {}, "no tensor classifier.weight"),
        ({"aux_classifier.weight": None}, {}, "1 missing: aux_classifier.weight"),
        ({"surplus.weight": torch.zeros(2)}, {}, "1 unknown: surplus.weight"),
        ({"decoder.conv8.weight": torch.zeros(7, 512, 1, 1)}, {}, "another shape: decoder.conv8.weight"),
        ({"encoder.pos_embed": torch.zeros(1, 18, 48)}, {}, "no square grid"),
    ],
)
def test_what_does_not_fit_is_listed(checkpoint: Path, tmp_path: Path, change, keys, said) -> None:
    content = torch.load(checkpoint, weights_only=True)
    for key, value in change.items():
        if value is None:
            del content["model"][f"module.{key}"]
        else:
            content["model"][f"module.{key}"] = value
    torch.save(content, checkpoint)
    given = {"heads": 4, "crop": 64, "dataset": five_class_set(tmp_path), "storage": str(tmp_path / "runs"), **keys}
    with pytest.raises(UserError) as refused:
        import_release(str(checkpoint), name="released", track=False, **given)
    assert said in str(refused.value)
    assert not (tmp_path / "runs").exists()
    if "surplus.weight" in change:
        found = import_release(str(checkpoint), name="released", track=False, allow_unknown=True, **given)
        assert "surplus.weight" in found.left_out


class Malicious:
    """What a pickle can do: run anything."""

    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"model": Malicious()}))
    torch.save({"model": Malicious()}, tmp_path / "worse.pth")
    for name in ("bad.pth", "worse.pth"):
        with pytest.raises(UserError, match="not a torch checkpoint of plain tensors"):
            import_release(name, name="x", storage=str(tmp_path / "runs"), track=False)
    assert not (tmp_path / "touched").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no state dict"):
        import_release("list.pth", name="x", storage=str(tmp_path / "runs"), track=False)
