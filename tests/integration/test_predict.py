"""What is done with a finished run: evaluation under protocols, prediction, pseudo-labels, registry."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.importing import import_dataset
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.evaluation.description import Description
from cosa_ray.evaluation.report import Report, read_per_image
from cosa_ray.evaluation.trained import load_trained
from cosa_ray.training.driver import train
from cosa_ray.training.evaluating import evaluate_run
from cosa_ray.training.models import find_model, register_run
from cosa_ray.training.predicting import predict
from cosa_ray.training.runs import find_run
from cosa_ray.training.session import Progress
from cosa_ray.training.state import TrainState
from tests.conftest import ROOT, history, tiny_config
from tests.unit.tiny_sets import photo, voc_folder


def by_hand(run: Path, picture: Image.Image, network: str = "assignment") -> np.ndarray:
    """Segmentation logits (K, H, W) of one picture: the run's single scale with flip, nothing shared with the code."""
    return maps_by_hand(run, picture, network)[0]


def maps_by_hand(run: Path, picture: Image.Image, network: str = "assignment") -> tuple[np.ndarray, np.ndarray]:
    """(segmentation logits (K, H, W), probabilities of the classes (C,)) of one picture."""
    import torch.nn.functional as F

    trained = load_trained(run / find_run(str(run)).best().name)
    net = trained.online if network == "online" else trained.assignment
    side = trained.config.views.crop
    pixels = np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
    image = net.normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
    total, logits = torch.zeros(1), []
    with torch.no_grad():
        assert tuple(trained.config.evaluation.scales) == (1.0,)
        for flip in (False, True) if trained.config.evaluation.flip else (False,):
            found = net(image.flip(-1) if flip else image)
            logits.append(found.cls[0].numpy())
            seg = found.seg
            seg = F.interpolate(seg.flip(-1) if flip else seg, size=(side, side), mode="bilinear", align_corners=False)
            total = total + seg
    size = (picture.height, picture.width)
    whole = F.interpolate(total, size=size, mode="bilinear", align_corners=False)[0].numpy()
    return whole, 1 / (1 + np.exp(-np.mean(logits, 0)))


def restricted(logits: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """The mask (H, W) of logits (K, H, W) of which only the background and some classes (from 0) count."""
    kept = [0, *(index + 1 for index in classes)]
    return np.array(kept)[logits[kept].argmax(0)]


def test_masks_are_the_networks_argmax_at_the_pictures_own_size(
    trained_run: Path, pictures: Path, tmp_path: Path
) -> None:
    shown: list[tuple[int, int, int]] = []
    out = tmp_path / "out"
    result = predict(
        str(trained_run), [str(pictures)], out=str(out), network="assignment", scores=True, local=True,
        show=lambda *at: shown.append(at),
    )  # fmt: skip
    assert result.images == 3
    assert sorted(name for name, _ in result.skipped) == ["broken", "empty"]
    assert shown[-1] == (5, 5, 2)
    classes = find_run(str(trained_run)).config()
    palette = open_dataset(classes.data.dataset).card.palette
    for name, ending in (("a", "jpg"), ("b", "png"), ("below/c", "webp")):
        picture = Image.open(pictures / f"{name}.{ending}")
        mask = Image.open(out / "masks" / f"{name}.png")
        assert mask.mode == "P"
        assert mask.size == picture.size
        logits = by_hand(trained_run, picture)
        values = np.asarray(mask)
        assert (values == logits.argmax(0)).mean() > 0.999
        assert tuple(mask.getpalette()[3:6]) == palette[1]
        with np.load(out / "scores" / f"{name}.npz", allow_pickle=False) as saved:
            assert saved["classes"].tolist()[0] == "background"
            shares = np.exp(logits - logits.max(0)) / np.exp(logits - logits.max(0)).sum(0)
            np.testing.assert_allclose(saved["scores"].astype(np.float32), shares, atol=2e-3)
        with Image.open(out / "overlays" / f"{name}.jpg") as overlay:
            assert overlay.size == picture.size
    document = json.loads((out / "predictions.json").read_text())
    assert set(document["pictures"]) == {"a", "b", "below/c"}
    assert "cannot be decoded" in dict(map(tuple, document["skipped"]))["broken"]


def test_pictures_and_masks_may_be_at_uris(trained_run: Path, pictures: Path, tmp_path: Path) -> None:
    out = f"file://{tmp_path}/out"
    result = predict(str(trained_run), [f"file://{pictures}/a.jpg", f"file://{pictures}/below"], out=out, local=True)
    assert (result.images, result.skipped) == (2, [])
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["a.png", "c.png"]
    with pytest.raises(UserError, match="holds predictions already"):
        predict(str(trained_run), [f"file://{pictures}/a.jpg"], out=out, local=True)


def test_a_run_is_evaluated_while_it_trains(tiny: Callable[..., Config]) -> None:
    """Its newest checkpoint is read from outside; the run goes on and ends as it would have."""
    alone = train(tiny(), name="alone", local=True, track=False)
    config = tiny()
    found: list[Report] = []

    def show(progress: Progress) -> None:
        if progress.step >= 15 and not found:
            found.append(
                evaluate_run("busy", protocol="single_scale", storage=config.storage, which="last", local=True)
            )

    import cosa_ray.training.loop as loop

    before, loop.PROGRESS_SECONDS = loop.PROGRESS_SECONDS, 0.0
    try:
        result = train(config, name="busy", local=True, show=show)
    finally:
        loop.PROGRESS_SECONDS = before
    (report,) = found
    assert report.step in (10, 15)
    assert result.mlflow_run_id is not None
    assert result.tracking_uri is not None
    points = history(result.tracking_uri, result.mlflow_run_id, "val/single_scale/miou")
    assert points == [(report.step, pytest.approx(report.metrics["val/single_scale/miou"]))]
    assert result.last_metrics["val/miou"] == alone.last_metrics["val/miou"]
    steps = [step for step, _ in history(result.tracking_uri, result.mlflow_run_id, "train/loss")]
    assert steps == list(range(1, 21))


def test_nothing_is_overwritten_and_mistakes_are_found_first(trained_run: Path, pictures: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    predict(str(trained_run), [str(pictures / "a.jpg")], out=out, local=True)
    before = (tmp_path / "out" / "masks" / "a.png").read_bytes()
    run, picture = str(trained_run), [str(pictures / "b.png")]
    for wrong, said in (
        ({"out": out}, "holds predictions already"),
        ({"images": []}, "give pictures"),
        ({"images": [str(pictures / "none.jpg")]}, "none.jpg"),
        ({"dataset": "nowhere"}, "one of the two"),
        ({"labels_given": True}, "--labels FILE"),
        ({"voc_test": True}, "20 classes"),
        ({"presence": 1.0}, "--presence 1: give a probability"),
        ({"protocol": "none"}, "single_scale"),
        ({"source": "cam"}, "classes"),
        ({"labels": str(pictures / "notes.txt")}, "notes.txt"),
    ):
        given = {"images": picture, "out": str(tmp_path / "other"), "local": True, **wrong}
        with pytest.raises(UserError, match=said):
            predict(run, given.pop("images"), **given)
        assert not (tmp_path / "other").exists(), wrong
    assert (tmp_path / "out" / "masks" / "a.png").read_bytes() == before
    with pytest.raises(RunFailed, match="none of the 1 pictures"):
        predict(run, [str(pictures / "broken.jpg")], out=str(tmp_path / "third"), local=True)


def test_labels_restrict_the_mask(trained_run: Path, pictures: Path, tmp_path: Path) -> None:
    classes = find_run(str(trained_run)).config()
    names = open_dataset(classes.data.dataset).classes
    file = tmp_path / "labels.csv"
    file.write_text(f"image,labels\na.jpg,{names[2]}\nb.png,{names[0]};{names[4]}\n")
    images = [str(pictures / "a.jpg"), str(pictures / "b.png")]
    predict(str(trained_run), images, out=str(tmp_path / "out"), labels=str(file), local=True)
    for name, ending, allowed in (("a", "jpg", [2]), ("b", "png", [0, 4])):
        values = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{name}.png"))
        logits = by_hand(trained_run, Image.open(pictures / f"{name}.{ending}"))
        assert (values == restricted(logits, allowed)).mean() > 0.999
    file.write_text("image,labels\na.jpg,unicorn\nb.png,unicorn\n")
    with pytest.raises(UserError, match="unicorn"):
        predict(str(trained_run), images, out=str(tmp_path / "x"), labels=str(file), local=True)


def test_classes_that_the_classifier_does_not_see_are_left_out(
    trained_run: Path, pictures: Path, tmp_path: Path
) -> None:
    logits, shares = maps_by_hand(trained_run, Image.open(pictures / "a.jpg"))
    shown = np.unique(logits.argmax(0)[logits.argmax(0) > 0]) - 1
    presence = float(shares[shown].min()) + 1e-3  # so that a class of the plain mask goes
    seen = np.flatnonzero(shares >= presence).tolist()
    assert len(seen) < len(shares)
    given = {"network": "assignment", "overlays": False, "local": True, "presence": presence}
    predict(str(trained_run), [str(pictures / "a.jpg")], out=str(tmp_path / "out"), **given)
    values = np.asarray(Image.open(tmp_path / "out" / "masks" / "a.png"))
    assert (values == restricted(logits, seen)).mean() > 0.999
    assert (values != logits.argmax(0)).any()
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["presence"] == presence
    # Classes that are known count instead.
    file = tmp_path / "labels.json"
    names = open_dataset(find_run(str(trained_run)).config().data.dataset).classes
    file.write_text(json.dumps({"a.jpg": [names[shown[0]]]}))
    predict(str(trained_run), [str(pictures / "a.jpg")], out=str(tmp_path / "known"), labels=str(file), **given)
    values = np.asarray(Image.open(tmp_path / "known" / "masks" / "a.png"))
    assert (values == restricted(logits, [shown[0]])).mean() > 0.999


def test_pseudo_labels_of_a_split_from_both_sources(trained_run: Path, tmp_path: Path) -> None:
    config = find_run(str(trained_run)).config()
    split = open_dataset(config.data.dataset).split("val")
    for source in ("segmentation", "cam"):
        out = tmp_path / source
        result = predict(
            str(trained_run), out=str(out), dataset=config.data.dataset, split="val", labels_given=True,
            source=source, overlays=False, local=True,
        )  # fmt: skip
        assert result.images == len(split)
        assert not (out / "overlays").exists()
        for index in range(len(split)):
            sample = split[index]
            values = np.asarray(Image.open(out / "masks" / f"{sample.id}.png"))
            assert values.shape == (sample.height, sample.width)
            allowed = {0, *(np.flatnonzero(sample.labels) + 1).tolist()}
            assert set(np.unique(values).tolist()) <= allowed
    with pytest.raises(UserError, match="no split 'test'"):
        predict(str(trained_run), out=str(tmp_path / "x"), dataset=config.data.dataset, split="test", local=True)


def test_voc_test_archive_has_the_servers_layout(tmp_path: Path) -> None:
    """A model of VOC's 20 classes, random weights: what goes to the server is what lies in the folder."""
    source = voc_folder(tmp_path / "source")
    import_dataset("voc", str(source), str(tmp_path / "voc"), local=True)
    card = open_dataset(str(tmp_path / "voc")).card
    config = tiny_config(str(tmp_path / "voc"), tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    thresholds = {"background": 0.4, "background_aux": 0.4}
    described = Description("untrained", 20, list(card.classes), {}, "assignment", 0.0, thresholds)
    TrainState(config, 20, torch.device("cpu")).save(model, card, described)
    images = tmp_path / "images"
    images.mkdir()
    for number in (8, 9):
        (images / f"2008_00000{number}.jpg").write_bytes(photo(50, 40, seed=number))
    result = predict(str(model), [str(images)], out=str(tmp_path / "out"), voc_test=True, local=True)
    with tarfile.open(result.archive) as archive:
        names = archive.getnames()
        assert names == [f"results/VOC2012/Segmentation/comp6_test_cls/2008_00000{number}.png" for number in (8, 9)]
        stored = archive.extractfile(names[0])
        assert stored is not None
        data = stored.read()
    assert data == (tmp_path / "out" / "masks" / "2008_000008.png").read_bytes()
    mask = Image.open(io.BytesIO(data))
    assert (mask.mode, mask.size) == ("P", (50, 40))
    assert mask.getpalette()[3:6] == [128, 0, 0], "VOC's colour of aeroplane"
    # A picture too few is no entry; what was predicted stays, and is written down.
    (images / "2008_000010.jpg").write_bytes(b"broken")
    with pytest.raises(RunFailed, match="2008_000010 was skipped"):
        predict(str(model), [str(images)], out=str(tmp_path / "more"), voc_test=True, local=True)
    assert not (tmp_path / "more" / "results.tgz").exists()
    assert set(json.loads((tmp_path / "more" / "predictions.json").read_text())["pictures"]) == {
        "2008_000008",
        "2008_000009",
    }
    (images / "below").mkdir()
    (images / "below" / "2008_000008.jpg").write_bytes(photo(50, 40))
    with pytest.raises(UserError, match="different names"):
        predict(str(model), [str(images)], out=str(tmp_path / "third"), voc_test=True, local=True)


def test_numbers_of_other_data_or_another_protocol_do_not_take_a_name(trained_run: Path, tmp_path: Path) -> None:
    import_dataset("shapes", None, str(tmp_path / "others"), train=4, val=5, size=48, seed=9, local=True)
    run = str(trained_run)
    keys = {"local": True, "track": False}
    own = evaluate_run(run, protocol="single_scale", **keys)
    others = evaluate_run(run, protocol="single_scale", dataset=str(tmp_path / "others"), **keys)
    assert (own.prefix, others.prefix) == ("val/single_scale", "others.val/single_scale")
    assert Path(own.folder or "", "result.json").exists()
    assert json.loads(Path(own.folder or "", "result.json").read_text())["metrics"] == pytest.approx(own.metrics)
    # The same data somewhere else is the run's own.
    moved = tmp_path / "moved"
    shutil.copytree(find_run(run).config().data.dataset, moved)
    assert evaluate_run(run, protocol="single_scale", dataset=str(moved), **keys).prefix == "val/single_scale"
    file = tmp_path / "mine.yaml"
    file.write_text("scales: [1.0]\nflip: false\n")
    before = evaluate_run(run, protocol=str(file), **keys)
    file.write_text("scales: [0.5]\nflip: false\n")
    with pytest.raises(UserError, match="another protocol of that name"):
        evaluate_run(run, protocol=str(file), **keys)
    saved = json.loads(Path(before.folder or "", "result.json").read_text())
    assert saved["protocol"]["scales"] == [1.0]


def test_a_report_says_everything_and_is_in_mlflow(trained_run: Path) -> None:
    report = evaluate_run(str(trained_run), protocol="multi_scale", local=True)
    assert report.prefix == "val/multi_scale"
    metrics = report.metrics
    for name in ("miou", "miou_online", "miou_labels_given", "miou_online_labels_given", "cam_miou_at_0.5"):
        value = metrics[f"val/multi_scale/{name}"]
        assert metrics[f"val/multi_scale/{name}_ci_low"] <= value <= metrics[f"val/multi_scale/{name}_ci_high"]
    assert {row["class"] for row in report.per_class["miou"]} >= {"background"}
    assert len(report.curves["cam"]) == len(report.curve_thresholds) == 99
    assert report.worst[0][1] <= report.best[0][1]
    folder = Path(report.folder or "")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"result.json", "per_class.csv", "per_image.arrow", "worst.png", "best.png", "threshold_curve.png"}
    assert names >= {"confusion_miou.csv", "confusion_miou.png", "confusion_miou_online.png"}
    saved = json.loads((folder / "result.json").read_text())
    assert saved["metrics"] == pytest.approx(metrics)
    ids, totals = read_per_image(folder / "per_image.arrow")
    assert len(ids) == metrics["val/multi_scale/images"]
    hits, truth, predicted = totals["miou"].sum(0)
    iou = [h / (t + p - h) for h, t, p in zip(hits, truth, predicted, strict=True) if t]
    assert np.mean(iou) == pytest.approx(metrics["val/multi_scale/miou"])
    record = find_run(str(trained_run)).record
    assert record.tracking_uri is not None
    assert record.mlflow_run_id is not None
    assert history(record.tracking_uri, record.mlflow_run_id, "val/multi_scale/miou") == [
        (report.step, pytest.approx(metrics["val/multi_scale/miou"]))
    ]
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=record.tracking_uri)
    place = f"evaluations/val.multi_scale/step_{report.step:08d}"
    assert {Path(file.path).name for file in client.list_artifacts(record.mlflow_run_id, place)} == names
    # Once more: the same numbers, and no second point.
    again = evaluate_run(str(trained_run), protocol="multi_scale", local=True)
    assert again.metrics == metrics
    assert len(history(record.tracking_uri, record.mlflow_run_id, "val/multi_scale/miou")) == 1


BLOCK_RAY = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "optuna", "skimage", "pycocotools", "typer", "fsspec", "filelock"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
"""


def test_a_registered_model_is_loaded_without_ray_and_without_pickle(
    trained_run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registered = register_run(str(trained_run), name="shapes-model", aliases=["best", "demo"])
    assert "MLFLOW_TRACKING_URI" not in os.environ, "later runs of this process go where they would have gone"
    assert registered.uri == "models:/shapes-model@best"
    record = find_run(str(trained_run)).record
    assert record.tracking_uri is not None
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=record.tracking_uri)
    version = client.get_model_version_by_alias("shapes-model", "demo")
    assert not (Path.cwd() / "mlruns").exists(), "the model lies where the run's artifacts do"
    run = client.get_run(record.mlflow_run_id or "")
    assert run.info.status == "FINISHED"
    (output,) = run.outputs.model_outputs
    assert output.model_id in version.source
    assert version.run_id == record.mlflow_run_id
    config = find_run(str(trained_run)).config()
    card = open_dataset(config.data.dataset).card
    assert json.loads(version.tags["cosa_ray.classes"]) == list(card.classes)
    assert json.loads(version.tags["cosa_ray.palette"]) == [list(colour) for colour in card.palette]
    assert "val/miou" in json.loads(version.tags["cosa_ray.metrics"])
    # From a folder that is not the project's, with Ray and pickled models forbidden.
    script = BLOCK_RAY + (
        "import json, base64, pandas as pd, mlflow\n"
        f"mlflow.set_tracking_uri({record.tracking_uri!r})\n"
        f"model = mlflow.pyfunc.load_model({registered.uri!r})\n"
        f"data = [open(path, 'rb').read() for path in {[str(pictures / 'a.jpg'), str(pictures / 'b.png')]!r}]\n"
        "found = model.predict(pd.DataFrame({'image': data}), params={'network': 'assignment'})\n"
        "seen = model.predict(pd.DataFrame({'image': data}), params={'network': 'assignment', 'presence': 0.999})\n"
        "assert seen['classes'].tolist() == [[], []]\n"
        "import cosa_ray, sys\n"
        "assert 'ray' not in sys.modules\n"
        "print(json.dumps({'masks': [base64.b64encode(m).decode() for m in found['mask']],\n"
        "  'height': found['height'].tolist(), 'inputs': model.metadata.get_input_schema().input_names(),\n"
        "  'code': cosa_ray.__file__}))\n"
    )
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "CUDA_VISIBLE_DEVICES": ""}
    # -P and -I would also hide the environment's packages; a folder of its own is enough to leave the checkout out.
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    assert found["inputs"] == ["image", "labels"]
    assert not Path(found["code"]).is_relative_to(ROOT), "the model brings its own code"
    import base64

    masks = [np.asarray(Image.open(io.BytesIO(base64.b64decode(mask)))) for mask in found["masks"]]
    for mask, name in zip(masks, ("a.jpg", "b.png"), strict=True):
        logits = by_hand(trained_run, Image.open(pictures / name))
        assert (mask == logits.argmax(0)).mean() > 0.999
    # And by its name through `predict`.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", record.tracking_uri)
    result = predict(
        "models:/shapes-model@demo",
        [str(pictures / "a.jpg")],
        out=str(tmp_path / "out"),
        network="assignment",
        local=True,
    )
    assert os.environ["MLFLOW_TRACKING_URI"] == record.tracking_uri
    assert result.images == 1
    assert (np.asarray(Image.open(tmp_path / "out" / "masks" / "a.png")) == masks[0]).all()
    with (
        pytest.raises(UserError, match="no model models:/shapes-model@none"),
        find_model("models:/shapes-model@none").open(),
    ):
        pass
    with pytest.raises(UserError, match="alias"):
        register_run(str(trained_run), name="shapes-model", aliases=["latest"])
