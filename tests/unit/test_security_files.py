"""Files that somebody hands in: none of them runs code, and no name in them leads out of its folder."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from cosa_ray.cli.main import main
from cosa_ray.config.load import load_config
from cosa_ray.config.protocol import load_protocol
from cosa_ray.config.schema import Config
from cosa_ray.data.card import DatasetCard
from cosa_ray.data.coco import coco_source
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.folder import folder_source
from cosa_ray.data.importing import write_dataset
from cosa_ray.data.remote import fetch, leaves, place
from cosa_ray.data.shard import map_shard
from cosa_ray.data.source import Source
from cosa_ray.data.voc import voc_source
from cosa_ray.errors import UserError
from cosa_ray.evaluation.batch import BatchPrediction, items_of, items_of_split
from cosa_ray.evaluation.description import read_config
from cosa_ray.evaluation.prediction import scores_npz
from cosa_ray.training.runs import find_run
from cosa_ray.training.state import TrainState, backbone_weights
from cosa_ray.training.storage import CheckpointStore, RunFolder
from tests.unit.tiny_sets import CLASSES, PALETTE, NumberedReader, coco_folder, photo, tiny_dataset, voc_folder, xml

Make = Callable[..., Config]


class Payload:
    """What a pickle can do: run anything. This one makes the file `ran` in the working folder."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


@pytest.fixture(autouse=True)
def _nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every test of this file works in a folder of its own, in which no payload may leave its mark."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield
    assert not Path("ran").exists()


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code of a command line, and what it said on stderr."""
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0), capsys.readouterr().err


def test_the_payload_works() -> None:
    pickle.loads(pickle.dumps(Payload()))
    assert Path("ran").exists()
    Path("ran").unlink()


def malicious(file: Path, how: str) -> Path:
    """A checkpoint with the payload: as torch writes it, as it once did, or as a bare pickle."""
    content = {"model": {"w": torch.zeros(1)}, "more": Payload()}
    if how == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    return file


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_no_checkpoint_that_is_handed_in_runs(
    how: str, tmp_path: Path, tiny: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    file = malicious(tmp_path / "bad.pth", how)
    code, said = told(capsys, "import-release", str(file), "--name", "x", "--storage", str(tmp_path / "runs"))
    assert (code, said.count("\n")) == (2, 1)
    assert "not a torch checkpoint of plain tensors" in said
    with pytest.raises(UserError, match="not a safetensors file nor a plain torch state dict"):
        backbone_weights(tiny(model__checkpoint=str(file)))
    shutil.copy(file, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        backbone_weights(tiny(model__checkpoint=str(tmp_path / "bad.safetensors")))
    state = TrainState(tiny(), 5, torch.device("cpu"), initialise=False)
    malicious(tmp_path / "state.pt", how)
    with pytest.raises(UserError, match=r"state\.pt: not the state of a run"):
        state.load(tmp_path)


@pytest.mark.parametrize("text", ["!!python/object/apply:pathlib.Path.touch [ran]", "!!python/name:os.system"])
def test_no_yaml_makes_objects(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tagged = f"seed: 1\nstorage: {text}\n"
    for name in ("x.yaml", "config.yaml"):
        (tmp_path / name).write_text(tagged)
    (tmp_path / "run.json").write_text(json.dumps({"name": "r", "metric": "val/miou"}))
    code, said = told(capsys, "config", "show", str(tmp_path / "x.yaml"))
    assert (code, said.count("\n")) == (2, 1)
    assert "line 2: not valid YAML" in said
    for attempt in (
        lambda: load_config("shapes", [f"storage={text}"]),
        lambda: load_protocol(tmp_path / "x.yaml"),
        lambda: find_run(str(tmp_path)).config(),
        lambda: read_config(tmp_path),
    ):
        with pytest.raises(UserError, match="not valid YAML"):
            attempt()


def test_scores_are_read_without_pickle() -> None:
    data = scores_npz(np.zeros((3, 4, 4), np.float16), ("../a", "b"))
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        assert {key: arrays[key].dtype.kind for key in arrays.files}
        assert "O" not in {arrays[key].dtype.kind for key in arrays.files}


@pytest.mark.parametrize("ending", ["jpg", "png", "csv", "json", "txt", "xml", "arrow"])
def test_a_pickle_under_another_ending_is_no_such_file(ending: str, tmp_path: Path) -> None:
    data = pickle.dumps({"x": Payload()})
    folder = tmp_path / "given"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.jpg").write_bytes(data if ending in ("jpg", "png") else photo())
    (folder / "labels.csv").write_text("image,labels\na.jpg,cat\n")
    if ending in ("csv", "json"):
        (folder / "labels.csv").unlink()
        (folder / f"labels.{ending}").write_bytes(data)
    if ending == "txt":
        (folder / "classes.txt").write_bytes(data)
    if ending == "xml":
        folder = voc_folder(tmp_path)
        (folder / "VOCdevkit/VOC2012/Annotations/2007_000001.xml").write_bytes(data)
        card = write_dataset(voc_source(str(folder)), str(tmp_path / "out"), local=True)
        assert [each.id for each in card.splits["train"].put_aside] == ["2007_000001"]
        return
    if ending == "arrow":
        (tmp_path / "x.arrow").write_bytes(data)
        card = tiny_dataset(tmp_path / "out")
        with pytest.raises(UserError, match="damaged"):
            map_shard(tmp_path / "x.arrow", card.splits["train"].shards[0], 3)
        return
    with pytest.raises(UserError):
        write_dataset(folder_source(str(folder)), str(tmp_path / "out"), local=True)


def test_ray_s_pickled_column_in_a_shard_is_not_read(tmp_path: Path) -> None:
    """Once Ray Data is imported, Arrow knows a type whose values are pickles."""
    card = tiny_dataset(tmp_path / "out")
    extension = pytest.importorskip("ray.data._internal.object_extensions.arrow").ArrowPythonObjectType()
    storage = pa.array([pickle.dumps(Payload())], pa.large_binary())
    column = pa.ExtensionArray.from_storage(extension, storage)
    table = pa.table({"id": column})
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="does not have the columns"):
        map_shard(tmp_path / "x.arrow", card.splits["train"].shards[0], 3)


def test_an_annotation_fetches_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2hunter2")
    root = voc_folder(tmp_path)
    entity = f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]>'
    text = entity + xml("cat").replace("<name>cat</name>", "<name>&x;</name>")
    (root / "VOCdevkit/VOC2012/Annotations/2007_000001.xml").write_text(text)
    card = write_dataset(voc_source(str(root)), str(tmp_path / "out"), local=True)
    assert "hunter2" not in card.model_dump_json()
    assert [each.id for each in card.splits["train"].put_aside] == ["2007_000001"]


OUTSIDE = ("../x", "a/../../x", "..", "..\\x", "a\\..\\..\\x")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    assert leaves(name)
    with pytest.raises(UserError, match="leads out of"):
        place(tmp_path).child(name)
    with pytest.raises(UserError, match="leads out of"):
        RunFolder(str(tmp_path)).join(name)


@pytest.mark.parametrize("name", ["x", "a/b", "..x", "x..", "a..b/c", "/x", "C:\\x", "...", ""])
def test_a_name_that_stays_is_taken(name: str, tmp_path: Path) -> None:
    assert not leaves(name)
    assert Path(place(tmp_path).child(name).path).resolve().is_relative_to(tmp_path)


@pytest.mark.parametrize("where", ["shard", "split", "subset", "list"])
def test_a_card_names_nothing_outside_its_folder(where: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    tiny_dataset(folder)
    whole = (folder / "dataset.json").read_text()
    subset = {"of": "val", "ids_file": "subsets/s.txt", "images": 1, "masks": 0, "sha256": "0" * 64, "origin": "x"}
    for name in (*OUTSIDE, "/etc/passwd", ".", "...", "", "a b", "x\n"):
        content = json.loads(whole)
        if where == "shard":
            content["splits"]["train"]["shards"][0]["file"] = name
        elif where == "split":
            content["splits"][name] = content["splits"].pop("train")
        else:
            given = subset if where == "subset" else {**subset, "ids_file": f"subsets/{name}.txt"}
            content.update(version=2, subsets={name if where == "subset" else "s": given})
        (folder / "dataset.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="is damaged"):
            open_dataset(str(folder))


def test_a_remote_listing_writes_nothing_outside_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("COSA_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/set/a", b"a")
    listed = {"/set/a": {"size": 1}, "/set/../../../escaped": {"size": 1}}
    monkeypatch.setattr(type(memory), "find", lambda self, path, **keys: listed)
    with pytest.raises(UserError, match="leads out of"):
        fetch("memory://set")
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("name", ["../outside.jpg", "/outside.jpg", "a/../../outside.jpg", "..\\outside.jpg"])
def test_an_annotation_file_of_coco_names_nothing_outside(name: str, tmp_path: Path) -> None:
    root = coco_folder(tmp_path / "coco")
    (tmp_path / "coco/outside.jpg").write_bytes(photo())
    file = root / "annotations/instances_train2014.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = name
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not in the folder of the images"):
        coco_source(str(root))


def test_a_list_of_voc_names_nothing_outside(tmp_path: Path) -> None:
    root = voc_folder(tmp_path)
    (root / "VOCdevkit/outside.jpg").write_bytes(photo())
    lists = root / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    (lists / "train_aug.txt").write_text(
        "../../outside\n/JPEGImages/../../outside.jpg x\n2007_000001\n".replace(" x", "")
    )
    with pytest.raises(UserError, match="names outside twice"):
        voc_source(str(root))
    (lists / "train_aug.txt").write_text("../../outside\n..\n2007_000001\n")
    card = write_dataset(voc_source(str(root)), str(tmp_path / "out"), local=True)
    assert {each.id for each in card.splits["train"].put_aside} == {"outside", ".."}


def test_a_label_file_names_nothing_outside(tmp_path: Path) -> None:
    root = tmp_path / "given"
    (root / "images").mkdir(parents=True)
    (root / "images/a.jpg").write_bytes(photo())
    (tmp_path / "outside.jpg").write_bytes(photo())
    rows = "a.jpg,cat\n../../outside.jpg,cat\n/outside.jpg,cat\n..\\..\\outside.jpg,cat\n"
    (root / "labels.csv").write_text(f"image,labels\n{rows}")
    card = write_dataset(folder_source(str(root)), str(tmp_path / "out"), local=True)
    assert card.splits["train"].images == 1
    assert len(card.splits["train"].put_aside) == 3
    with pytest.raises(UserError, match="leads out of"):
        folder_source(str(root), labels="../labels.csv")


def set_with_ids(folder: Path, *names: str) -> str:
    """A data set whose images are called so, as an importer of somebody else may have written it."""
    samples = {"train": [(name, n) for n, name in enumerate(names)]}
    source = Source("made", None, {}, CLASSES, PALETTE, "made up", "made up", samples, NumberedReader())
    write_dataset(source, str(folder), local=True)
    return str(folder)


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_prediction_of_a_set_is_written_outside(name: str, tmp_path: Path) -> None:
    split = open_dataset(set_with_ids(tmp_path / "set", "a", name)).split("train")
    with pytest.raises(UserError, match="outside the folder of the predictions"):
        items_of_split(split, labels_given=False)


def test_predictions_lie_in_their_folder_whatever_pictures_are_called(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True)
    names = ["C:\\windows\\x", "....", "-rf", "a\\b", "deep/é", "x.y"]
    for name in names:
        (pictures / f"{name}.jpg").write_bytes(photo())
    (tmp_path / "elsewhere.jpg").write_bytes(photo())
    (pictures / "link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    split = open_dataset(set_with_ids(tmp_path / "set", "/etc/absolute", "a/b")).split("train")
    items = [*items_of([str(pictures)]), *items_of_split(split, labels_given=False)]
    out = tmp_path / "out"
    wanted = BatchPrediction(items=items, open_model=lambda: None, protocol=None, out=str(out))  # type: ignore[arg-type, return-value]
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    for number in range(len(items)):
        row = {"item": number, "reason": "", "classes": "[]", "height": 1, "width": 1}
        wanted.write({**row, "mask": b"m", "overlay": b"", "scores": b""})
    made = {file for file in tmp_path.rglob("*") if file.is_file()} - before
    assert len(made) == len(items) == 9
    assert all(file.resolve().is_relative_to(out / "masks") for file in made)


@pytest.mark.parametrize("name", [*OUTSIDE, "/etc", "", "checkpoints/../../x", "other/step_00000001"])
def test_an_index_of_checkpoints_deletes_nothing_else(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "x").write_text("precious")
    entries = [{"name": name, "step": 1, "metrics": {}}]
    (tmp_path / "run/checkpoints.json").write_text(json.dumps({"checkpoints": entries}))
    store = CheckpointStore(RunFolder(str(tmp_path / "run")), "val/miou")
    for attempt in (store.entries, store.drop_full_states, lambda: store.register("checkpoints/step_2", 2, {})):
        with pytest.raises(UserError, match="which is no checkpoint of it"):
            attempt()
    assert (tmp_path / "x").read_text() == "precious"
    assert (tmp_path / "run/checkpoints.json").is_file()


@pytest.mark.parametrize("name", ["..", "../x", "/x", ".hidden", "a/b", "a\\b", "a b", "a'b", "x\n"])
def test_names_of_runs_sweeps_and_protocols(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "shapes", "--local", "--no-track"], ["tune", "sweeps/shapes", "--no-track"]):
        code, said = told(capsys, *words, "--name", name)
        assert code == 2
        assert "use up to 100 letters" in said
    assert not list(Path().iterdir())
    strange = tmp_path / "a b.yaml"
    strange.write_text("flip: false\n")
    with pytest.raises(UserError, match="the file's name names every metric"):
        load_protocol(strange)


def test_a_picture_that_is_a_bomb_is_put_aside(tmp_path: Path) -> None:
    """A few kilobytes that would be gigabytes of pixels."""
    root = tmp_path / "given"
    root.mkdir()
    (root / "a.jpg").write_bytes(photo())
    out = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(out, "PNG")
    (root / "b.png").write_bytes(out.getvalue())
    (root / "labels.csv").write_text("image,labels\na.jpg,cat\nb.png,cat\n")
    card = write_dataset(folder_source(str(root)), str(tmp_path / "out"), local=True)
    assert [each.id for each in card.splits["train"].put_aside] == ["b"]


def test_a_run_that_was_handed_over_is_read_without_running_it(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole folder with the payload in every file that this package reads: sentences, and nothing else."""
    for name in ("config.yaml", "run.json", "checkpoints.json"):
        folder = tmp_path / name.partition(".")[0]
        shutil.copytree(trained_run, folder)
        (folder / name).write_bytes(pickle.dumps(Payload()))
        code, said = told(capsys, "evaluate", str(folder), "--local", "--no-track")
        assert (code, said.count("\n")) in ((1, 1), (2, 1)), said


def test_the_card_of_an_earlier_version_is_still_read() -> None:
    """The names that importers give: none of them is refused now."""
    shard = {"file": "train-00000.arrow", "images": 0, "bytes": 0, "sha256": "0" * 64}
    part = {"images": 0, "masks": 0, "images_per_class": [0], "shards": [shard]}
    card = {"classes": ["a"], "palette": [[0, 0, 0], [1, 1, 1]], "labels_from": "", "masks_from": ""}
    found = DatasetCard.model_validate(
        {**card, "origin": {"kind": "x", "source": None}, "splits": {"train": part, "val_2": part, "test-dev": part}}
    )
    assert sorted(found.splits) == ["test-dev", "train", "val_2"]
