"""Named subsets of a split: chosen by id, listed beside the card, read wherever a split is."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from tiny_sets import NumberedReader, coco_folder, numbered_source, tiny_dataset

import cosa_ray
from cosa_ray.cli.main import main
from cosa_ray.config.schema import Views
from cosa_ray.data.card import DatasetCard
from cosa_ray.data.check import check_dataset
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.importing import import_dataset, write_dataset
from cosa_ray.data.loader import training_batches
from cosa_ray.data.order import Order
from cosa_ray.data.subsets import add_subset
from cosa_ray.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """train0..train9 and val0..val10, in shards of four."""
    tiny_dataset(tmp_path / "set", val=11)
    return tmp_path / "set"


def everything(folder):
    """Every file of a dataset with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(first, second):
    assert (first.id, first.image, first.mask) == (second.id, second.image, second.mask)
    assert (first.height, first.width) == (second.height, second.width)
    assert np.array_equal(first.labels, second.labels)


def test_a_subset_is_read_as_a_split(folder):
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    card = cosa_ray.add_subset(str(folder), "part", of="val", ids=["val9", "val0", "val5", "val4"])
    assert card == open_dataset(str(folder)).card
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.arrow")} == shards  # nothing copied, nothing moved
    dataset = open_dataset(str(folder))
    whole, part = dataset.split("val"), dataset.split("part")
    assert part.ids() == ["val0", "val4", "val5", "val9"]  # the split's order
    assert (part.name, len(part), part.num_classes, part.has_masks) == ("part", 4, 3, True)
    for index, place in enumerate((0, 4, 5, 9)):
        assert_same(part[index], whole[place])
    assert np.array_equal(part.labels(), whole.labels()[[0, 4, 5, 9]])
    assert np.array_equal(part.shapes(), whole.shapes()[[0, 4, 5, 9]])
    assert np.array_equal(part.masked(), [True] * 4)
    for beyond in (4, -1):
        with pytest.raises(IndexError, match="split part has 4 images"):
            part[beyond]
    with pytest.raises(UserError, match=r"no split 'test': its splits are train, val, its subsets part$"):
        dataset.split("test")


def test_a_subset_pickles_as_a_path(folder):
    add_subset(str(folder), "part", of="train", first=9)
    part = open_dataset(str(folder)).split("part")
    fresh = len(pickle.dumps(part))
    assert part[8].id == "train8"
    assert len(pickle.dumps(part)) == fresh
    assert pickle.loads(pickle.dumps(part))[8].id == "train8"


def test_training_batches_are_of_the_subsets_images(folder):
    add_subset(str(folder), "part", of="train", ids=["train2", "train3", "train7"])
    part = open_dataset(str(folder)).split("part")
    batches = training_batches(part, seed=3, views=Views(crop=16), batch_size=2, start_step=0, stop_step=3)
    for step, batch in enumerate(batches):
        numbers = [(2, 3, 7)[index] for index in Order(3, 3).indices(step, 2)]
        assert batch.labels.argmax(1).tolist() == [number % 3 for number in numbers]
    assert step == 2


def test_opening_a_subset_touches_no_shard(folder, monkeypatch):
    from cosa_ray.data import dataset as module

    add_subset(str(folder), "part", random=3)
    opened = []
    monkeypatch.setattr(module, "map_shard", lambda *key: opened.append(key))
    assert len(open_dataset(str(folder)).split("part")) == 3
    assert opened == []


def test_the_first_and_random_ones(folder):
    card = add_subset(str(folder), "start", first=5)
    assert open_dataset(str(folder)).split("start").ids() == [f"val{index}" for index in range(5)]
    assert (card.subsets["start"].origin, card.subsets["start"].of) == ("first 5", "val")
    add_subset(str(folder), "all", random=11)
    assert open_dataset(str(folder)).split("all").ids() == open_dataset(str(folder)).split("val").ids()


def test_two_halves_are_the_whole(folder, capsys):
    assert run(capsys, "data", "subset", folder, "chosen", "--random", 5)[0] == 0
    assert run(capsys, "data", "subset", folder, "rest", "--rest-of", "chosen")[0] == 0
    dataset = open_dataset(str(folder))
    chosen, rest = (set(dataset.split(name).ids()) for name in ("chosen", "rest"))
    assert (len(chosen), len(rest)) == (5, 6)
    assert chosen | rest == set(dataset.split("val").ids())
    assert dataset.card.subsets["rest"].origin == "what chosen leaves out"
    add_subset(str(folder), "all", first=11)
    before = everything(folder)
    for subset, of, message in (
        ("all", "val", "all of val: it leaves no image out"),
        ("nothing", "val", r"no subset 'nothing' of val: there are chosen, rest, all"),
        ("chosen", "train", r"no subset 'chosen' of train: there are none"),
    ):
        with pytest.raises(UserError, match=message):
            add_subset(str(folder), "more", of=of, rest_of=subset)
    assert everything(folder) == before


def test_a_random_subset_does_not_depend_on_order_and_grows(tmp_path):
    """The draw is of the ids: another order of the same images gives the same ones."""
    source = numbered_source(3, val=60)
    turned = replace(source, splits={**source.splits, "val": source.splits["val"][::-1]})
    for name, each in (("a", source), ("b", turned)):
        write_dataset(each, str(tmp_path / name), local=True)
        for count, seed in ((12, 0), (30, 0), (12, 1)):
            add_subset(str(tmp_path / name), f"of{count}-{seed}", random=count, seed=seed)
    first, second = (open_dataset(str(tmp_path / name)) for name in "ab")
    for subset in first.card.subsets:
        assert set(first.split(subset).ids()) == set(second.split(subset).ids())
    small, large, other = (set(first.split(name).ids()) for name in ("of12-0", "of30-0", "of12-1"))
    assert (len(small), len(large), len(other)) == (12, 30, 12)
    assert small < large
    assert small != other


def test_random_subsets_take_every_image_alike():
    """Over many seeds each of 20 images is drawn about equally often (binomial, 5 standard deviations)."""
    from cosa_ray.data.subsets import _drawn

    ids = [f"image{index}" for index in range(20)]
    counts = np.zeros(20)
    for seed in range(2000):
        counts[_drawn(ids, 5, seed)] += 1
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


@pytest.mark.parametrize(
    "text",
    [
        "COCO_val2014_000000000009\nCOCO_val2014_000000000030\n",
        "COCO_val2014_000000000030.jpg\r\n\r\nCOCO_val2014_000000000009.JPG\r\n",
        "val2014/COCO_val2014_000000000009.jpg\n/data/coco/val2014/COCO_val2014_000000000030.jpg",
        "000000000009\n000000000030\n",
        "SegmentationClass/val2014/000000000009.png\n30\n",
        "\ufeffCOCO_val2014_000000000009\n  COCO_val2014_000000000030  \n",
    ],
)
def test_lists_may_spell_coco_names_as_they_like(tmp_path, text):
    import_dataset("coco", str(coco_folder(tmp_path / "in")), str(tmp_path / "set"), local=True)
    (tmp_path / "val_part.txt").write_bytes(text.encode())
    card = add_subset(str(tmp_path / "set"), "val_part", ids=tmp_path / "val_part.txt")
    assert open_dataset(str(tmp_path / "set")).split("val_part").ids() == [
        "COCO_val2014_000000000009",
        "COCO_val2014_000000000030",
    ]
    assert card.subsets["val_part"].origin == "list val_part.txt"


def test_numbers_that_two_images_share_are_not_guessed(tmp_path):
    source = numbered_source(1, val=0)
    names = [("7", 1), ("007", 2), ("a/9.b", 3)]
    write_dataset(replace(source, splits={"val": names}), str(tmp_path / "set"), local=True)
    with pytest.raises(UserError, match=r"^1 of the 1 images of ids are not in split val .*, the first 07: mend"):
        add_subset(str(tmp_path / "set"), "part", ids=["07"])
    add_subset(str(tmp_path / "set"), "part", ids=["a/9.b.png", "007"])
    assert open_dataset(str(tmp_path / "set")).split("part").ids() == ["007", "a/9.b"]


@pytest.mark.parametrize(
    ("name", "choice", "message"),
    [
        ("part", {"ids": ["val1", "valx", "valy"]}, r"^2 of the 3 images of ids are not in split val .* first valx"),
        ("part", {"ids": ["val1", "val1"]}, "^val1 stands twice in ids: leave one"),
        ("part", {"ids": ["val1", "x/val1.jpg"]}, r"^val1 stands twice in ids \(as val1 and x/val1.jpg\)"),
        ("part", {"ids": []}, "ids has none"),
        ("part", {"ids": "nowhere.txt"}, "there is no list nowhere.txt"),
        ("part", {"first": 12}, r"split val of .* has 11 images, and 12 were asked for"),
        ("part", {"random": 0}, "and 0 were asked for"),
        ("part", {"first": -1}, "and -1 were asked for"),
        ("part", {}, "give exactly one"),
        ("part", {"first": 1, "random": 1}, "give exactly one"),
        ("part", {"first": 1, "of": "test"}, r"subset of 'test', which is not there: its splits are train, val"),
        ("val", {"first": 1}, "has a split val already"),
        ("../x", {"first": 1}, r"cannot be named '../x'"),
        ("", {"first": 1}, "cannot be named ''"),
        ("val_subset_500", {"first": 1}, "which metrics call what evaluation.subset takes"),
    ],
)
def test_what_cannot_be_a_subset_is_refused_and_leaves_nothing(folder, monkeypatch, name, choice, message):
    monkeypatch.chdir(folder.parent)
    before = everything(folder)
    with pytest.raises(UserError, match=message) as caught:
        add_subset(str(folder), name, **choice)
    assert "\n" not in str(caught.value)
    assert everything(folder) == before
    assert not (folder / "_import").exists()


def test_a_list_without_a_name_and_a_folder_without_a_dataset_are_refused(folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"empty.txt names no image"):
        add_subset(str(folder), "part", ids=str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="no dataset at"):
        add_subset(str(tmp_path / "none"), "part", first=1)
    assert not (tmp_path / "none").exists()


def test_a_name_keeps_its_images(folder):
    add_subset(str(folder), "part", ids=["val3", "val8"])
    before = everything(folder)
    add_subset(str(folder), "part", ids=["val8.jpg", "val3"])  # the same images, however they are named
    assert everything(folder) == before
    with pytest.raises(UserError, match=r"another subset part \(2 images of val, ids\): choose another name"):
        add_subset(str(folder), "part", first=2)
    with pytest.raises(UserError, match=r"subset of 'part', which is a subset itself"):
        add_subset(str(folder), "smaller", of="part", first=1)
    assert everything(folder) == before
    (folder / "subsets/part.txt").unlink()
    add_subset(str(folder), "part", ids=["val3", "val8"])
    assert everything(folder) == before


def test_has_masks_is_of_the_subsets_images(tmp_path):
    class Every(NumberedReader):
        def __call__(self, sample):
            row = super().__call__(sample)
            return row._replace(mask=None) if sample[1] % 2 else row

    write_dataset(replace(numbered_source(2, val=6), reader=Every()), str(tmp_path / "set"), local=True)
    add_subset(str(tmp_path / "set"), "even", ids=["val0", "val4"])
    card = add_subset(str(tmp_path / "set"), "start", first=3)
    dataset = open_dataset(str(tmp_path / "set"))
    assert [dataset.split(name).has_masks for name in ("val", "even", "start")] == [False, True, False]
    assert card.subsets["start"].masks == 2
    assert dataset.split("start").masked().tolist() == [True, False, True]


def test_cards_without_subsets_are_of_the_format_that_earlier_versions_read(folder):
    first = json.loads((folder / "dataset.json").read_text())
    assert first["version"] == 1
    assert "subsets" not in first
    add_subset(str(folder), "part", first=1)
    second = json.loads((folder / "dataset.json").read_text())
    assert second["version"] == 2
    assert {key: value for key, value in second.items() if key not in ("version", "subsets")} == {
        key: value for key, value in first.items() if key != "version"
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "format 1 has no subsets"),
        ({"of": "test"}, "subset part is of a split test, which is not there"),
        ({"ids_file": "../outside.txt"}, "should match pattern"),
        ({"ids_file": "subsets/../../outside.txt"}, "should match pattern"),
        ({"images": 0}, "greater than or equal to 1"),
        ({"name": "val"}, "val is a split and a subset"),
    ],
)
def test_a_card_that_makes_no_sense_is_refused(folder, change, message):
    add_subset(str(folder), "part", first=1)
    card = json.loads((folder / "dataset.json").read_text())
    card["version"] = change.pop("version", 2)
    card["subsets"] = {change.pop("name", "part"): {**card["subsets"]["part"], **change}}
    with pytest.raises(ValueError, match=message):
        DatasetCard.model_validate(card)
    (folder / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="is damaged"):
        open_dataset(str(folder))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), r"part.txt of a subset cannot be read \(No such file"),
        (lambda file: file.write_text("val0\n"), "part.txt of a subset does not have the checksum of its card"),
    ],
)
def test_a_damaged_list_is_said_when_the_subset_is_asked_for(folder, spoil, message):
    add_subset(str(folder), "part", first=3)
    spoil(folder / "subsets/part.txt")
    dataset = open_dataset(str(folder))
    assert len(dataset.split("val").ids()) == 11
    with pytest.raises(UserError, match=message):
        dataset.split("part")
    report = check_dataset(str(folder))
    (damage,) = report.damage
    assert "part.txt" in damage


def test_images_that_the_split_lost_are_named(folder, tmp_path):
    """A card and its lists beside the shards of another import: the checksums are right, the ids are not there."""
    add_subset(str(folder), "part", ids=["val1", "val9", "val10"])
    tiny_dataset(tmp_path / "other", val=9)
    card = json.loads((tmp_path / "other/dataset.json").read_text())
    card |= {key: json.loads((folder / "dataset.json").read_text())[key] for key in ("version", "subsets")}
    (tmp_path / "other/dataset.json").write_text(json.dumps(card))
    shutil.copytree(folder / "subsets", tmp_path / "other/subsets")
    part = open_dataset(str(tmp_path / "other")).split("part")
    with pytest.raises(UserError, match=r"subset part of .* names 2 images that split val does not have.*first val9"):
        part[0]
    report = check_dataset(str(tmp_path / "other"))
    assert report.subsets["part"].missing == ["val9", "val10"]
    assert report.damage == ["subset part names 2 images that split val does not have, the first val9"]


def test_check_lists_subsets(folder):
    assert check_dataset(str(folder)).subsets == {}
    add_subset(str(folder), "part", first=3)
    add_subset(str(folder), "few", of="train", random=2, seed=5)
    report = check_dataset(str(folder))
    assert report.ok
    found = {name: (part.of, part.images, part.masks, part.missing) for name, part in report.subsets.items()}
    assert found == {"part": ("val", 3, 3, []), "few": ("train", 2, 2, [])}


# Remote


@pytest.fixture
def memory(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("COSA_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def test_a_remote_subset_comes_without_its_shards_again(memory):
    write_dataset(numbered_source(5, val=4), "memory://bucket/set", local=True)
    before = open_dataset("memory://bucket/set")
    shards = {path: path.stat().st_mtime_ns for path in before.folder.glob("*.arrow")}
    add_subset("memory://bucket/set", "part", ids=["val3", "val1"])
    assert memory.cat("/bucket/set/subsets/part.txt") == b"val1\nval3\n"
    after = open_dataset("memory://bucket/set")
    assert {path: path.stat().st_mtime_ns for path in after.folder.glob("*.arrow")} == shards
    assert [sample.id for sample in (after.split("part")[0], after.split("part")[1])] == ["val1", "val3"]
    add_subset("memory://bucket/set", "more", first=2)
    assert list(open_dataset("memory://bucket/set").card.subsets) == ["part", "more"]
    assert check_dataset("memory://bucket/set").ok


def test_a_remote_list_that_lies_is_refused_and_one_that_is_away_leaves_the_copy(memory, caplog):
    write_dataset(numbered_source(5, val=4), "memory://bucket/set", local=True)
    add_subset("memory://bucket/set", "part", first=2)
    kept = memory.cat("/bucket/set/subsets/part.txt")
    memory.pipe_file("/bucket/set/subsets/part.txt", b"val0\nval2\n")
    with pytest.raises(UserError, match=r"subsets/part.txt does not have the checksum its card says"):
        open_dataset("memory://bucket/set")
    memory.rm("/bucket/set/subsets/part.txt")
    copy = open_dataset("memory://bucket/set")  # of before the subset: add_subset made it
    assert (copy.card.subsets, len(copy.split("val"))) == ({}, 4)
    assert "using the copy of this node" in caplog.text
    memory.pipe_file("/bucket/set/subsets/part.txt", kept)
    assert open_dataset("memory://bucket/set").split("part").ids() == ["val0", "val1"]
    memory.rm("/bucket/set", recursive=True)
    assert open_dataset("memory://bucket/set").split("part").ids() == ["val0", "val1"]


def test_a_remote_that_cannot_be_written_is_a_sentence(memory, monkeypatch):
    write_dataset(numbered_source(5), "memory://bucket/set", local=True)

    class Denied(Exception):
        pass

    real = type(memory)._open

    def refuse(self, path, mode="rb", **keys):
        if "w" in mode:
            raise Denied("403 Forbidden")
        return real(self, path, mode, **keys)

    monkeypatch.setattr(type(memory), "_open", refuse)
    with pytest.raises(UserError, match=r"^cannot write to memory://bucket/set \(403 Forbidden\): make the subset"):
        add_subset("memory://bucket/set", "part", first=1)


# The command line


def run(capsys, *words):
    """Exit code, stdout and stderr of a command run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(str(ended.value.code)), captured.out, captured.err


def test_a_subset_from_the_command_line(folder, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("val2.jpg\nval7.jpg\n")
    code, out, err = run(capsys, "data", "subset", folder, "val_part", "--of", "val", "--ids", tmp_path / "list.txt")
    assert (code, out) == (0, "")
    said = "subset val_part: 2 of the 11 images of val, 2 with a mask (list list.txt); listed in subsets/val_part.txt\n"
    assert err == said
    code, out, err = run(capsys, "data", "subset", folder, "few", "--of", "train", "--random", 3, "--seed", 4, "--json")
    found = json.loads(out)
    assert (code, found["name"], found["images"], found["origin"]) == (0, "few", 3, "3 at random, seed 4")
    code, out, err = run(capsys, "data", "check", folder)
    assert code == 0
    assert "and 2 lists of subsets have the checksums of the card" in out
    assert "list list.txt" in out
    code, out, err = run(capsys, "data", "check", folder, "--json")
    assert json.loads(out)["subsets"]["val_part"]["missing"] == []
    code, out, err = run(capsys, "data", "show", folder, tmp_path / "sheet.png", "--split", "val_part", "--images", 2)
    assert (code, (tmp_path / "sheet.png").read_bytes()[:4]) == (0, b"\x89PNG")
    (folder / "subsets/few.txt").write_text("train0\n")
    code, out, err = run(capsys, "data", "check", folder)
    assert code == 1
    assert "few.txt of a subset does not have the checksum" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["part"], "--ids, --first, --random and --rest-of"),
        (["part", "--first", "2", "--random", "2"], "--ids, --first, --random and --rest-of"),
        (["part", "--ids", "nowhere.txt"], "nowhere.txt"),
        (["part", "--first", "99"], "11 images"),
        (["part", "--first", "2", "--of", "test"], "'test'"),
        (["train", "--first", "2"], "has a split train"),
        (["a/b", "--first", "2"], "'a/b'"),
        (["part", "--random", "many"], "--random"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(folder, capsys, monkeypatch, words, said):
    monkeypatch.chdir(folder.parent)
    before = everything(folder)
    code, out, err = run(capsys, "data", "subset", folder, *words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert said in err
    assert everything(folder) == before


def test_importing_coco_makes_val_part(tmp_path, capsys):
    source = coco_folder(tmp_path / "in")
    (tmp_path / "list.txt").write_text("COCO_val2014_000000000030\n")
    words = ("data", "import", "coco", source, tmp_path / "given", "--local", "--json", "--val-part")
    code, out, err = run(capsys, *words, tmp_path / "list.txt")
    assert (code, json.loads(out)["card"]["subsets"]["val_part"]["images"]) == (0, 1), err
    assert open_dataset(str(tmp_path / "given")).split("val_part").ids() == ["COCO_val2014_000000000030"]
    code, out, err = run(capsys, "data", "import", "coco", source, tmp_path / "without", "--local", "--json")
    assert code == 0
    assert "subsets" not in json.loads(out)["card"]
    (source / "val_part.txt").write_text("COCO_val2014_000000000009\n")
    code, out, err = run(capsys, "data", "import", "coco", source, tmp_path / "found", "--local")
    assert code == 0
    assert "subset val_part: 1 of the 2 images of val" in err
    assert open_dataset(str(tmp_path / "found")).split("val_part").ids() == ["COCO_val2014_000000000009"]


def test_a_bad_list_for_an_import(tmp_path, capsys):
    """An unreadable one is found before the import, one of other images after it: the set is whole then."""
    source, out = coco_folder(tmp_path / "in"), tmp_path / "out"
    words = ("data", "import", "coco", source, out, "--local", "--val-part")
    code, _, err = run(capsys, *words, tmp_path / "nowhere.txt")
    assert (code, len(err.splitlines()), out.exists()) == (2, 1, False)
    (tmp_path / "list.txt").write_text("COCO_val2014_000000000025\n")  # has no label, so it is not in val
    code, _, err = run(capsys, *words, tmp_path / "list.txt")
    assert code == 2
    assert "is imported, without its subset val_part" in err
    assert "1 of the 1 images of list list.txt are not in split val" in err
    assert len(open_dataset(str(out)).split("val")) == 2


# Runs and experiments


def test_a_run_evaluates_on_a_subset_and_its_metrics_say_so(tiny, tiny_dataset, tmp_path):
    shutil.copytree(tiny_dataset, tmp_path / "set")
    add_subset(str(tmp_path / "set"), "val_part", random=5)
    config = tiny(data__dataset=str(tmp_path / "set"), data__val_split="val_part", training__steps=10)
    result = cosa_ray.train(config, name="part", local=True, track=False)
    assert result.best_metrics["val_part/images"] == 5
    assert {name.split("/")[0] for name in result.best_metrics} - {"train"} == {"val_part"}
    again = cosa_ray.evaluate_run("part", split="val_part", storage=config.storage, local=True, track=False)
    assert again.metrics["val_part/miou"] == pytest.approx(result.best_metrics["val_part/miou"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("voc_release", {"aux": -4, "low": 0.25, "high": 0.70, "high_aux": None, "steps": 32_000, "warmup": 6_000}),
        ("voc_release_log", {"aux": -3, "low": 0.20, "high": 0.70, "high_aux": None, "steps": 32_000, "warmup": 6_000}),
        ("coco_release", {"aux": -4, "low": 0.25, "high": 0.65, "high_aux": 0.70, "steps": 60_000, "warmup": 10_000}),
    ],
)
def test_the_releases_settings(name, expected):
    config = cosa_ray.load_config(name)
    labels, training = config.pseudo_labels, config.training
    found = {"aux": config.model.aux, "low": labels.low, "high": labels.high, "high_aux": labels.high_aux}
    assert found | {"steps": training.steps, "warmup": training.warmup_iters} == expected
    assert training.batch_size == (8 if "coco" in name else 4)
    assert labels.policy == "two_threshold"
    assert (config.dynamic_threshold.enabled, config.losses.contrastive) == (False, 0.0)
