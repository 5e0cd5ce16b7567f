"""Imports: resumable to the same bytes, never over something else, in bounded memory; the doctor."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from tiny_sets import NumberedReader, numbered_source, tiny_dataset

from cosa_ray.data import importing
from cosa_ray.data.check import check_dataset
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.importing import Progress, import_dataset, write_dataset
from cosa_ray.data.remote import place
from cosa_ray.errors import UserError


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupt_after(shards):
    seen = []

    def progress(at):
        seen.append(at)
        if len(seen) == shards:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_import_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    source = numbered_source(14, broken=(5,))
    write_dataset(source, str(tmp_path / "whole"), local=True, shard_images=4)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(source, str(tmp_path / "cut"), local=True, shard_images=4, progress=interrupt_after(2))
    assert not (tmp_path / "cut/dataset.json").exists()
    with pytest.raises(UserError, match="an import into it was interrupted: run the same import again"):
        open_dataset(str(tmp_path / "cut"))
    # One finished shard is damaged meanwhile, and a task was killed while it wrote.
    damaged = tmp_path / "cut/train-00001.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (tmp_path / "cut/.train-00002.arrow.99.part").write_bytes(b"half")
    read = []
    real = NumberedReader.__call__
    monkeypatch.setattr(NumberedReader, "__call__", lambda self, sample: read.append(sample[0]) or real(self, sample))
    write_dataset(source, str(tmp_path / "cut"), local=True, shard_images=4)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert "train0" not in read  # the first shard was kept
    assert "train4" in read  # the damaged one was written again


def test_progress_and_what_was_put_aside(tmp_path):
    seen = []
    card = write_dataset(
        numbered_source(9, val=2, broken=(1, 6)), str(tmp_path / "a"), local=True, shard_images=4, progress=seen.append
    )
    assert seen == [Progress(4, 11, 1), Progress(8, 11, 2), Progress(9, 11, 2), Progress(11, 11, 3)]
    assert [item.id for item in card.splits["train"].put_aside] == ["train1", "train6"]
    assert card.splits["train"].images == 7
    assert card.splits["train"].images_per_class == (2, 2, 3)
    assert open_dataset(str(tmp_path / "a")).split("train").ids() == [f"train{i}" for i in (0, 2, 3, 4, 5, 7, 8)]


def test_strict_names_the_broken_sample_and_a_later_lenient_run_finishes(tmp_path):
    source = numbered_source(9, broken=(6,))
    with pytest.raises(UserError, match=r"train train6: the image cannot be decoded .*mend it"):
        write_dataset(source, str(tmp_path / "a"), local=True, shard_images=4, strict=True)
    card = write_dataset(source, str(tmp_path / "a"), local=True, shard_images=4)
    assert card.splits["train"].images == 8
    with pytest.raises(KeyboardInterrupt):
        write_dataset(source, str(tmp_path / "b"), local=True, shard_images=4, progress=interrupt_after(2))
    with pytest.raises(UserError, match="train train6"):
        write_dataset(source, str(tmp_path / "b"), local=True, shard_images=4, strict=True)


def test_nothing_is_overwritten(tmp_path):
    tiny_dataset(tmp_path / "complete", train=5)
    before = contents(tmp_path / "complete")
    with pytest.raises(UserError, match=r"already holds a complete dataset .folder, 7 images.*choose another folder"):
        tiny_dataset(tmp_path / "complete", train=5)
    assert contents(tmp_path / "complete") == before

    with pytest.raises(KeyboardInterrupt):
        write_dataset(numbered_source(9), str(tmp_path / "cut"), local=True, progress=interrupt_after(1))
    with pytest.raises(UserError, match=r"interrupted import of something else .differs in samples"):
        write_dataset(numbered_source(8), str(tmp_path / "cut"), local=True)
    with pytest.raises(UserError, match=r"differs in shard_images"):
        write_dataset(numbered_source(9), str(tmp_path / "cut"), local=True, shard_images=3)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty .it holds notes.txt"):
        tiny_dataset(tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"notes.txt": b"precious"}
    with pytest.raises(UserError, match="is a file"):
        tiny_dataset(tmp_path / "mine/notes.txt")


def test_a_run_killed_between_card_and_tidying_is_tidied(tmp_path, monkeypatch):
    source = numbered_source(5)
    real = importing.write_card

    def die(card, target):
        real(card, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, "write_card", die)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(source, str(tmp_path / "a"), local=True)
    monkeypatch.undo()
    card = write_dataset(source, str(tmp_path / "a"), local=True)
    write_dataset(source, str(tmp_path / "b"), local=True)
    assert card.splits["train"].images == 5
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_two_imports_into_one_folder_do_not_mix(tmp_path):
    inside, go = threading.Event(), threading.Event()

    def wait(at):
        inside.set()
        go.wait(30)

    first = threading.Thread(
        target=write_dataset, args=(numbered_source(5), str(tmp_path / "a")), kwargs={"local": True, "progress": wait}
    )
    first.start()
    inside.wait(30)
    with pytest.raises(UserError, match="another import is writing to"):
        tiny_dataset(tmp_path / "a", train=5)
    go.set()
    first.join()
    assert len(open_dataset(str(tmp_path / "a")).split("train")) == 5


def test_a_writer_holds_a_batch_of_rows_and_not_the_shard(tmp_path):
    """Rows are made while earlier ones are already on their way to the disk."""
    from cosa_ray.data.shard import Row, write_shard

    on_disk = []
    target = place(tmp_path)

    def rows():
        for index in range(1000):
            if index % 100 == 0:
                on_disk.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
            yield Row(str(index), bytes(10_000), None, (0,), 1, 1)

    card = write_shard(target, "x.arrow", rows(), 2)
    assert card.bytes == (tmp_path / "x.arrow").stat().st_size
    held = [index * 100 * 10_000 - size for index, size in enumerate(on_disk)]
    assert max(held) <= 64 * 10_000 + 10_000


def test_unknown_kind_and_missing_source(tmp_path):
    with pytest.raises(UserError, match="there is no importer 'ade'"):
        import_dataset("ade", "x", str(tmp_path / "a"))
    with pytest.raises(UserError, match="`data import voc` needs the folder"):
        import_dataset("voc", None, str(tmp_path / "a"))


# the doctor


def test_check_counts_and_finds_nothing_wrong(tmp_path):
    tiny_dataset(tmp_path / "a", train=9, val=3, broken=(4,))
    seen = []
    report = check_dataset(str(tmp_path / "a"), lambda done, total: seen.append((done, total)))
    assert report.ok
    train = report.splits["train"]
    assert (train.images, train.masks, train.without_labels) == (8, 8, 0)
    assert train.images_per_class == [3, 2, 3]
    assert train.pixels_per_class == [8 * 600, 3 * 600, 2 * 600, 3 * 600]
    assert train.height == [30, 30, 30]
    assert train.width == [40, 40, 40]
    assert [item.id for item in train.put_aside] == ["train4"]
    assert train.disagreements == []
    assert seen[-1] == (11, 11)


def test_check_names_disagreements(tmp_path, monkeypatch):
    source = numbered_source(4)
    real = NumberedReader.__call__

    def other(self, sample):
        row = real(self, sample)
        return row._replace(labels=(0, 2)) if sample[0] == "train1" else row

    monkeypatch.setattr(NumberedReader, "__call__", other)
    write_dataset(source, str(tmp_path / "a"), local=True)
    report = check_dataset(str(tmp_path / "a"))
    (found,) = report.splits["train"].disagreements
    assert (found.id, found.only_in_labels, found.only_in_mask) == ("train1", ["cat", "bird"], ["dog"])
    assert report.ok  # labels may name what the mask lacks: that is no damage


@pytest.mark.parametrize("how", ["flipped", "short", "missing"])
def test_check_finds_damage_and_still_reports_the_rest(tmp_path, how):
    tiny_dataset(tmp_path / "a", train=9)
    shard = tmp_path / "a/train-00001.arrow"
    data = shard.read_bytes()
    if how == "missing":
        shard.unlink()
    else:
        middle = len(data) // 2
        shard.write_bytes(
            data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if how == "flipped" else data[:-5]
        )
    report = check_dataset(str(tmp_path / "a"))
    assert not report.ok
    assert len(report.damage) == 1
    assert "train-00001.arrow" in report.damage[0]
    assert report.splits["train"].images == 5
    assert report.splits["val"].images == 2


# the contact sheet and the card


def test_contact_sheet_has_a_row_an_image_and_the_palette(tmp_path):
    from cosa_ray.config.schema import Views
    from cosa_ray.data.show import contact_sheet

    tiny_dataset(tmp_path / "a", train=3)
    sheet = contact_sheet(open_dataset(str(tmp_path / "a")), "train", views=Views(crop=64), images=5)
    one = contact_sheet(open_dataset(str(tmp_path / "a")), "train", views=Views(crop=64), images=1)
    assert sheet.width == one.width
    assert sheet.height > 2 * one.height
    colours = {colour for _, colour in one.getcolors(1 << 20)}
    assert colours & {(200, 0, 0), (0, 200, 0), (0, 0, 200)}
    with pytest.raises(UserError, match="its splits are train, val"):
        contact_sheet(open_dataset(str(tmp_path / "a")), "test", views=Views())


def test_contact_sheet_goes_on_to_the_next_step_beyond_a_batch(tmp_path):
    """Every row shows the very views that training sees, whatever the number of rows."""
    from cosa_ray.config.schema import Views
    from cosa_ray.data.loader import training_batches
    from cosa_ray.data.show import contact_sheet

    tiny_dataset(tmp_path / "a", train=9)
    dataset = open_dataset(str(tmp_path / "a"))
    views = Views(crop=192, short_side=192)  # a cell of the sheet, without padding
    keys = {"seed": 3, "views": views, "batch_size": 4}
    sheet = np.asarray(contact_sheet(dataset, "train", images=7, **keys))
    batches = list(training_batches(dataset.split("train"), start_step=0, stop_step=2, **keys))
    for row in range(7):
        step, position = divmod(row, 4)
        if batches[step].box[position].tolist() != [0, 192, 0, 192]:
            continue
        top = 24 + row * (192 + 22 + 8)
        for column, view in ((2, batches[step].weak), (3, batches[step].strong)):
            left = 8 + column * (192 + 8)
            assert np.array_equal(sheet[top : top + 192, left : left + 192], view[position].numpy().transpose(1, 2, 0))
    assert (batches[1].box[:3] == batches[1].box.new_tensor([0, 192, 0, 192])).all(1).any()


def test_the_line_of_progress_counts_what_was_put_aside(tmp_path, capsys):
    from cosa_ray.cli.data import import_progress

    with import_progress("folder") as progress:
        write_dataset(numbered_source(9, broken=(1, 6)), str(tmp_path / "a"), local=True, progress=progress)
    assert capsys.readouterr().err == "import folder: 11 of 11 images, 3 put aside\n"


def test_the_card_says_where_things_came_from(tmp_path):
    card = tiny_dataset(tmp_path / "a", train=3)
    written = json.loads((tmp_path / "a/dataset.json").read_text())
    assert written == card.model_dump(mode="json")
    assert written["labels_from"] == "the test"
    assert written["splits"]["train"]["shards"][0]["file"] == "train-00000.arrow"
    assert np.all([len(shard["sha256"]) == 64 for shard in written["splits"]["train"]["shards"]])
