"""Reading a dataset: samples, labels, and one-sentence errors for what is wrong."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from tiny_sets import CLASSES, PALETTE, numbered_source, photo, regions, tiny_dataset

from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.importing import write_dataset
from cosa_ray.data.pictures import Broken, checked_image, checked_mask, decode_rgb, voc_palette
from cosa_ray.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "set"
    tiny_dataset(out, train=10, val=2)
    return out


def test_samples_are_what_was_imported(folder):
    dataset = open_dataset(str(folder))
    assert dataset.classes == CLASSES
    assert dataset.num_classes == 3
    train = dataset.split("train")
    assert len(train) == 10
    assert train.has_masks
    assert [shard.images for shard in train.card.shards] == [4, 4, 2]
    for index in (9, 0, 4, 3):
        sample = train[index]
        assert sample.id == f"train{index}"
        assert sample.image == photo(seed=index)  # byte for byte
        assert (sample.height, sample.width) == (30, 40)
        assert np.array_equal(sample.decode_mask(), regions(0, index % 3 + 1))
        assert np.array_equal(sample.labels, np.eye(3, dtype=np.float32)[index % 3])
        assert sample.decode_image().size == (40, 30)
    assert train.ids() == [f"train{index}" for index in range(10)]
    assert np.array_equal(train.labels(), np.stack([train[index].labels for index in range(10)]))
    assert train.labels().dtype == np.float32
    assert train.shapes().tolist() == [[30, 40]] * 10
    for beyond in (10, -1):
        with pytest.raises(IndexError):
            train[beyond]


def test_a_split_pickles_as_a_path(folder):
    train = open_dataset(str(folder)).split("train")
    train[0]
    data = pickle.dumps(train)
    assert len(data) < 3000
    assert pickle.loads(data)[7].id == "train7"


def test_missing_dataset_and_split_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"no dataset at .*nowhere.*cosa-ray data import"):
        open_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no split 'test': its splits are train, val"):
        open_dataset(str(folder)).split("test")


def change_card(out, **changes):
    card = json.loads((out / "dataset.json").read_text())
    card.update(changes)
    (out / "dataset.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "has dataset format 3, this version reads 1 and 2"),
        ({"format": "something"}, "is not the card of a cosa-ray dataset"),
        ({"classes": ["a", "b"]}, "damaged"),
        ({"more": 1}, "damaged .more"),
    ],
)
def test_a_wrong_card_is_refused(tmp_path, changes, message):
    tiny_dataset(tmp_path / "set", train=2)
    change_card(tmp_path / "set", **changes)
    with pytest.raises(UserError, match=message):
        open_dataset(str(tmp_path / "set"))


def test_a_card_cut_short_is_refused(tmp_path):
    tiny_dataset(tmp_path / "set", train=2)
    (tmp_path / "set/dataset.json").write_text('{"format": ')
    with pytest.raises(UserError, match="is damaged"):
        open_dataset(str(tmp_path / "set"))


def test_a_shard_cut_short_or_missing_is_refused_on_opening(tmp_path):
    tiny_dataset(tmp_path / "set", train=5)
    shard = tmp_path / "set/train-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"train-00001.arrow is \d+ bytes long instead of \d+"):
        open_dataset(str(tmp_path / "set"))
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001.arrow is missing"):
        open_dataset(str(tmp_path / "set"))


def test_a_damaged_shard_is_named_when_it_is_read(tmp_path):
    tiny_dataset(tmp_path / "set", train=5)
    shard = tmp_path / "set/train-00001.arrow"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    train = open_dataset(str(tmp_path / "set")).split("train")
    assert train[0].id == "train0"
    with pytest.raises(UserError, match=r"train-00001.arrow is damaged"):
        train[4]


def test_shards_of_another_class_count_are_refused(tmp_path):
    tiny_dataset(tmp_path / "set", train=5)
    card = json.loads((tmp_path / "set/dataset.json").read_text())
    card["classes"] = ["a", "b"]
    card["palette"] = card["palette"][:3]
    for split in card["splits"].values():
        split["images_per_class"] = split["images_per_class"][:2]
    (tmp_path / "set/dataset.json").write_text(json.dumps(card))
    train = open_dataset(str(tmp_path / "set")).split("train")
    with pytest.raises(UserError, match="2 classes of its card"):
        train[0]


def test_opening_touches_no_shard(tmp_path, monkeypatch):
    tiny_dataset(tmp_path / "set", train=12, shard_images=3)
    opened = []
    from cosa_ray.data import dataset as module

    real = module.map_shard
    monkeypatch.setattr(module, "map_shard", lambda *key: opened.append(key[0].name) or real(*key))
    train = open_dataset(str(tmp_path / "set")).split("train")
    assert opened == []
    train[7]
    train[8]
    assert opened == ["train-00002.arrow"]


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG")]
)
def test_pictures_of_other_modes_become_rgb(mode, kind):
    data = photo(kind=kind, mode=mode)
    stored, height, width = checked_image(data)
    assert stored == data
    assert (height, width) == (30, 40)
    assert decode_rgb(stored).mode == "RGB"


def test_sixteen_bit_pictures_are_scaled_not_clipped():
    import io

    values = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    pixels = np.asarray(decode_rgb(out.getvalue()))[..., 0]
    assert np.array_equal(pixels, values >> 8)


def test_other_formats_are_stored_without_loss():
    data = photo(kind="BMP")
    stored, _, _ = checked_image(data)
    assert stored[:4] == b"\x89PNG"
    assert np.array_equal(np.asarray(decode_rgb(stored)), np.asarray(decode_rgb(data)))


@pytest.mark.parametrize("data", [b"", b"hello", photo()[:400], photo(kind="PNG")[:900]])
def test_broken_pictures_are_found_by_decoding(data):
    with pytest.raises(Broken, match="cannot be decoded"):
        checked_image(data)


def png(array, mode=None):
    import io

    out = io.BytesIO()
    Image.fromarray(array, mode).save(out, "PNG")
    return out.getvalue()


def test_masks_by_index_and_by_colour():
    indices = regions(0, 1, 2, 3, 255)
    colours = np.zeros((256, 3), np.uint8)
    colours[:4] = PALETTE
    colours[255] = (224, 224, 192)
    by_colour = png(colours[indices])
    assert np.array_equal(checked_mask(by_colour, 30, 40, 3, PALETTE), indices)
    # A palette file whose indices mean nothing, and whose colours do.
    odd = Image.fromarray((indices % 13 + 9).astype(np.uint8))
    table = [0] * 768
    for index in (0, 1, 2, 3, 255):
        table[3 * (index % 13 + 9) : 3 * (index % 13 + 9) + 3] = [int(part) for part in colours[index]]
    odd.putpalette(table)
    import io

    out = io.BytesIO()
    odd.save(out, "PNG")
    assert np.array_equal(checked_mask(out.getvalue(), 30, 40, 3, PALETTE), indices)


def palette_png(indices, colours):
    """A palette PNG of 8 bits whose palette ends with `colours`: they are those of its first indices."""
    import io
    import struct
    import zlib

    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(bytes(range(256)) * 3)  # 256 colours, so that an index has 8 bits
    out = io.BytesIO()
    image.save(out, "PNG")
    before, _, rest = out.getvalue().partition(struct.pack(">I", 768) + b"PLTE")
    table = b"PLTE" + bytes(part for colour in colours for part in colour)
    return before + struct.pack(">I", len(table) - 4) + table + struct.pack(">I", zlib.crc32(table)) + rest[768 + 4 :]


def test_a_palette_file_with_its_indices_in_another_order_is_read_by_colour():
    """Indices 0..3 are all classes, but of other colours: what programs that optimise pictures leave behind."""
    truth = regions(0, 1, 2, 3, 255)
    order = [2, 0, 255, 3, 1]  # truth of the file's indices 0..4
    colours = [PALETTE[value] if value < 4 else (224, 224, 192) for value in order]
    stored = np.argsort(order)[np.searchsorted(np.sort(order), truth)]
    assert np.array_equal(checked_mask(palette_png(stored, colours), 30, 40, 3, PALETTE), truth)
    # 255 stays ignored when its colour is nobody's.
    assert np.array_equal(
        checked_mask(palette_png(np.where(truth == 255, 255, stored), colours), 30, 40, 3, PALETTE), truth
    )


def test_genuine_voc_palette_files_mean_the_same_by_colour_and_by_index():
    truth = regions(0, 1, 15, 20, 255)
    palette = voc_palette(21)
    assert np.array_equal(checked_mask(palette_png(truth, voc_palette(256)), 30, 40, 20, palette), truth)


@pytest.mark.parametrize("filler", [(), ((0, 0, 0),) * 252])
def test_indices_beyond_a_short_palette_are_not_black_background(filler):
    """Many programs write the classes' colours and fill up with black: 255 is ignored there, and 5 is class 5."""
    truth = regions(0, 1, 3, 255)
    assert np.array_equal(checked_mask(palette_png(truth, (*PALETTE, *filler)), 30, 40, 3, PALETTE), truth)
    for truth in (regions(0, 5, 6), regions(1, 5)):
        wide = voc_palette(8)
        assert np.array_equal(checked_mask(palette_png(truth, (*wide[:4], *filler)), 30, 40, 7, wide), truth)


def test_colours_that_are_not_the_sets_leave_a_palette_file_to_its_indices():
    truth = regions(0, 1, 2)
    strange = [PALETTE[0], PALETTE[2], (9, 9, 9)]
    assert np.array_equal(checked_mask(palette_png(truth, strange), 30, 40, 3, PALETTE), truth)


def test_sixteen_bit_masks_do_not_wrap():
    import io

    out = io.BytesIO()
    Image.fromarray(regions(0, 1).astype(np.uint16) * 257).save(out, "PNG")
    with pytest.raises(Broken, match="holds 257, beyond"):
        checked_mask(out.getvalue(), 30, 40, 300, voc_palette(256) * 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(regions(0, 4, width=30, height=40)), "30 x 40 and the image 40 x 30: .* EXIF rotation"),
        (png(regions(0, 4)), "holds 4, beyond the 3 classes"),
        (png(regions(0, 1, width=41)), "the mask is 41 x 30 and the image 40 x 30"),
        (png(np.full((30, 40, 3), 9, np.uint8)), "no class of the palette .#090909"),
        (b"x", "the mask cannot be decoded"),
    ],
)
def test_masks_that_cannot_be_used_say_why(data, message):
    with pytest.raises(Broken, match=message):
        checked_mask(data, 30, 40, 3, PALETTE)


def test_voc_palette_is_the_published_one():
    assert voc_palette(256)[1] == (128, 0, 0)
    assert voc_palette(256)[15] == (192, 128, 128)
    assert voc_palette(256)[20] == (0, 64, 128)
    assert voc_palette(256)[255] == (224, 224, 192)


def test_a_set_of_which_nothing_is_usable_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none of the 3 images of made-up could be used; the first, train0"):
        write_dataset(numbered_source(2, val=1, broken=(0, 1)), str(tmp_path / "set"), local=True)
