"""What an import may keep, overwrite and delete: mended sources, strict runs, and folders that are not its own."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
import socket

import numpy as np
import pytest
from tiny_sets import NumberedReader, numbered_source, photo, tiny_dataset

from cosa_ray.data.card import read_card
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.folder import folder_source
from cosa_ray.data.importing import write_dataset
from cosa_ray.data.remote import place
from cosa_ray.errors import UserError


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cut(source, out, shards, **keys):
    """Import until so many shards are done."""
    seen = []

    def progress(at):
        seen.append(at)
        if len(seen) == shards:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(source, str(out), local=True, shard_images=4, progress=progress, **keys)


@pytest.fixture
def own(tmp_path):
    """A folder with 12 images, of which 1 is damaged and 6 is missing."""
    root = tmp_path / "own"
    (root / "images").mkdir(parents=True)
    for number in range(12):
        (root / f"images/{number:02d}.jpg").write_bytes(photo(seed=number))
    (root / "images/01.jpg").write_bytes(b"no picture")
    (root / "images/06.jpg").unlink()
    (root / "classes.txt").write_text("cat\ndog\n")
    label(root, {})
    return root


def label(root, changed):
    lines = [f"{number:02d}.jpg,{changed.get(number, 'cat')}\n" for number in range(12)]
    (root / "labels.csv").write_text("image,labels\n" + "".join(lines))


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}


def test_an_interrupted_import_takes_in_what_was_mended_and_relabelled(own, tmp_path):
    cut(folder_source(str(own)), tmp_path / "out", 3)
    kept = stamps(tmp_path / "out")
    (own / "images/01.jpg").write_bytes(photo(seed=1))
    (own / "images/06.jpg").write_bytes(photo(seed=6))
    card = write_dataset(folder_source(str(own)), str(tmp_path / "out"), local=True, shard_images=4)
    assert card.splits["train"].images == 12
    assert card.splits["train"].put_aside == ()
    again = stamps(tmp_path / "out")
    assert [name for name in kept if kept[name] == again[name]] == ["train-00002.arrow"]  # nothing to mend in it

    cut(folder_source(str(own)), tmp_path / "second", 3)
    kept = stamps(tmp_path / "second")
    label(own, {5: "dog"})
    write_dataset(folder_source(str(own)), str(tmp_path / "second"), local=True, shard_images=4)
    labels = open_dataset(str(tmp_path / "second")).split("train").labels()
    assert np.flatnonzero(labels[:, 1]).tolist() == [5]
    again = stamps(tmp_path / "second")
    assert sorted(name for name in kept if kept[name] == again[name]) == ["train-00000.arrow", "train-00002.arrow"]


def test_an_interrupted_import_keeps_shards_whose_broken_samples_are_still_broken(own, tmp_path):
    cut(folder_source(str(own)), tmp_path / "out", 2)
    kept = stamps(tmp_path / "out")
    write_dataset(folder_source(str(own)), str(tmp_path / "out"), local=True, shard_images=4)
    assert kept.items() <= stamps(tmp_path / "out").items()
    write_dataset(folder_source(str(own)), str(tmp_path / "whole"), local=True, shard_images=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_strict_run_after_a_lenient_one_names_the_broken_sample_until_it_is_mended(own, tmp_path):
    cut(folder_source(str(own)), tmp_path / "out", 3)
    strict = {"local": True, "shard_images": 4, "strict": True}
    with pytest.raises(UserError, match=r"train 01: the image cannot be decoded .*mend it, or import without --strict"):
        write_dataset(folder_source(str(own)), str(tmp_path / "out"), **strict)
    (own / "images/01.jpg").write_bytes(photo(seed=1))
    with pytest.raises(UserError, match=r"train 06: there is no image"):
        write_dataset(folder_source(str(own)), str(tmp_path / "out"), **strict)
    (own / "images/06.jpg").write_bytes(photo(seed=6))
    assert write_dataset(folder_source(str(own)), str(tmp_path / "out"), **strict).splits["train"].images == 12


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_strict_run_leaves_no_half_written_shard(tmp_path, where):
    out = str(tmp_path / "out") if where == "local" else "memory://strict/out"
    with pytest.raises(UserError, match="train train6"):
        write_dataset(numbered_source(9, broken=(6,)), out, local=True, shard_images=4, strict=True)
    assert place(out).names() == ["train-00000.arrow"]
    for name in place(out).names(True):
        place(out).child(name).delete()


def test_a_relabelled_complete_set_is_not_taken_for_the_one_at_work(own, tmp_path, monkeypatch):
    """Killed between card and tidying, then the labels change: what is there is another dataset."""
    from cosa_ray.data import importing

    def die(target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importing, "tidy", die)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(folder_source(str(own)), str(tmp_path / "out"), local=True)
    label(own, {5: "dog"})
    with pytest.raises(UserError, match="already holds a complete dataset"):
        write_dataset(folder_source(str(own)), str(tmp_path / "out"), local=True)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat", "dog", "cat"), "made-up names the class 'cat' twice"),
        (("cat", " ", "dog"), "made-up has a class without a name"),
        (("cat", "BackGround", "dog"), "made-up has a class 'BackGround'"),
        (tuple(f"c{i}" for i in range(255)), "made-up has 255 classes"),
        ((), "made-up names no class"),
    ],
)
def test_classes_that_cannot_be_stored_are_refused_before_anything_is_written(tmp_path, classes, message):
    source = dataclasses.replace(numbered_source(3), classes=classes)
    with pytest.raises(UserError, match=message):
        write_dataset(source, str(tmp_path / "out"), local=True)
    assert not (tmp_path / "out").exists()


def test_as_many_classes_as_masks_can_tell_apart(tmp_path):
    classes = (*"abc", *(f"c{i}" for i in range(251)))
    source = dataclasses.replace(
        numbered_source(3), classes=classes, palette=tuple((i, 0, 0) for i in range(255)), reader=_Wide()
    )
    write_dataset(source, str(tmp_path / "out"), local=True)
    assert open_dataset(str(tmp_path / "out")).split("train")[0].labels.sum() == 1


class _Wide(NumberedReader):
    def __call__(self, sample):
        return super().__call__(sample)._replace(labels=(253,))


def test_a_refused_import_leaves_the_lock_of_the_one_at_work(tmp_path):
    """The holder has the lock and not yet the plan."""
    state = tmp_path / "out/_import"
    state.mkdir(parents=True)
    with open(state / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(2):
            with pytest.raises(UserError, match="another import is writing to"):
                tiny_dataset(tmp_path / "out", train=3)
            assert (state / "lock").exists()
    tiny_dataset(tmp_path / "out", train=3)
    assert not state.exists()


@pytest.mark.parametrize("mine", ["notes.txt", "deep/notes.txt", "lock", "plan.json", "train-00000.json"])
def test_a_folder_of_the_users_that_is_called_as_ours_is_left_alone(tmp_path, mine):
    file = tmp_path / "out/_import" / mine
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    with pytest.raises(UserError, match=r"_import is no folder of an import \(it holds .*: move it away, or choose"):
        tiny_dataset(tmp_path / "out", train=3)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "precious"


def test_what_others_put_beside_an_import_at_work_stays(tmp_path):
    cut(numbered_source(9), tmp_path / "out", 1)
    (tmp_path / "out/_import/notes.txt").write_text("precious")
    write_dataset(numbered_source(9), str(tmp_path / "out"), local=True, shard_images=4)
    assert contents(tmp_path / "out/_import") == {"notes.txt": b"precious"}
    assert read_card(place(tmp_path / "out")).splits["train"].images == 9


def test_a_node_that_does_not_see_the_source_says_so(own, tmp_path):
    """As on another node of a cluster: there is no such folder, which is not twelve broken images."""
    source = folder_source(str(own))
    shutil.rmtree(own / "images")
    expected = rf"node {socket.gethostname()} has no folder {own}/images: put the source where every node"
    with pytest.raises(UserError, match=expected):
        write_dataset(source, str(tmp_path / "out"), local=True)


def test_reports_of_another_version_are_made_again(tmp_path):
    cut(numbered_source(9), tmp_path / "out", 2)
    for file in (tmp_path / "out/_import").glob("train-*.json"):
        file.write_text(json.dumps({"images": 4}))
    assert write_dataset(numbered_source(9), str(tmp_path / "out"), local=True, shard_images=4).splits["train"].images
    tiny_dataset(tmp_path / "whole", train=9)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_of_shapes_are_bounded(seed):
    from cosa_ray.data.shapes import shapes_source

    with pytest.raises(UserError, match="the seed of shapes must be from 0"):
        shapes_source(seed=seed)
    assert shapes_source(train=1, val=1, size=32, seed=2**63 - 1).reader(("train-0", "train", 0)).width == 32
