"""VOC and COCO as they come by mail: lists of other programs, damaged annotations, files that lack fields."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_sets import coco_folder, index_png, photo, regions, voc_folder

from cosa_ray.data.coco import coco_source
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.importing import import_dataset, write_dataset
from cosa_ray.data.pictures import voc_palette
from cosa_ray.data.voc import voc_source
from cosa_ray.errors import UserError


@pytest.fixture
def voc(tmp_path):
    return voc_folder(tmp_path / "in") / "VOCdevkit/VOC2012"


@pytest.fixture
def coco(tmp_path):
    root = coco_folder(tmp_path / "in")
    return root, root / "annotations/instances_train2014.json"


def imported(kind, source, out, **options):
    card = import_dataset(kind, str(source), str(out), local=True, **options)
    return card, open_dataset(str(out))


# VOC


def lists(voc):
    return voc / "ImageSets/Segmentation"


def test_voc_lists_of_paths_as_deeplab_has_them(voc, tmp_path):
    (lists(voc) / "train_aug.txt").write_text(
        "/JPEGImages/2008_000003.jpg /SegmentationClassAug/2008_000003.png\n"
        "/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png\n"
    )
    (lists(voc) / "val.txt").write_text("\ufeff2007_000008\r\n2007_000009\r\n", encoding="utf-8")
    card, dataset = imported("voc", voc, tmp_path / "out")
    assert dataset.split("train").ids() == ["2008_000003", "2007_000001"]
    assert dataset.split("val").ids() == ["2007_000008", "2007_000009"]
    assert not any(split.put_aside for split in card.splits.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("2007_000008\n".encode("utf-16"), r"val.txt is not UTF-8 text: save it as UTF-8"),
        (b"2007_000008\n2007_000009\n2007_000008\n", r"val.txt names 2007_000008 twice"),
    ],
)
def test_voc_lists_that_cannot_be_used(voc, content, message):
    (lists(voc) / "val.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        voc_source(str(voc))


def test_voc_mask_folders_may_hold_other_files(voc):
    (voc / "SegmentationClassAug/._2008_000003.png").write_bytes(b"of a Mac")
    (voc / "SegmentationClassAug/readme.txt").write_text("masks")
    assert [sample.name for sample in voc_source(str(voc)).splits["train"]] == [
        "2007_000001",
        "2007_000002",
        "2008_000003",
        "2008_000004",
    ]


def test_voc_empty_annotations_are_no_labels(voc):
    for file in (voc / "Annotations").iterdir():
        file.unlink()
    (voc / "Annotations/readme.txt").write_text("none")
    assert voc_source(str(voc)).labels_from == "classes shown by the masks"
    with pytest.raises(UserError, match=r"has no Annotations/\*.xml, which labels 'xml' need"):
        voc_source(str(voc), labels="xml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"image_labels.json is no JSON \("),
        (b"[]", r"image_labels.json must be an object"),
        (b'{"2007_000001": "cat"}', r"image_labels.json has no list of class names for 2007_000001"),
        (b'{"2007_000001": [3]}', r"image_labels.json has no list of class names for 2007_000001"),
        (b'{"caf\xe9": []}', r"image_labels.json is not UTF-8 text"),
    ],
)
def test_voc_label_files_that_cannot_be_used(voc, content, message):
    (voc / "image_labels.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        voc_source(str(voc), labels="json")
    assert "\n" not in str(caught.value)


def test_voc_annotations_of_odd_encodings_and_masks_of_reordered_palettes(voc, tmp_path):
    (voc / "Annotations/2008_000003.xml").write_bytes(b'<?xml version="1.0" encoding="martian"?><annotation/>')
    (voc / "Annotations/2008_000004.xml").write_bytes(b'<?xml version="1.0" encoding="gb2312"?><annotation/>')
    colours = voc_palette(256)
    image = Image.fromarray(regions(0, 1, 2))
    image.putpalette([part for index in (255, 15, 0) for part in colours[index]])
    image.save(voc / "SegmentationClassAug/2007_000001.png")
    card, dataset = imported("voc", voc, tmp_path / "out")
    assert [item.id for item in card.splits["train"].put_aside] == ["2008_000003", "2008_000004"]
    assert all("its annotation cannot be read" in item.reason for item in card.splits["train"].put_aside)
    assert np.array_equal(dataset.split("train")[0].decode_mask(), regions(255, 15, 0))


def test_a_split_of_which_everything_was_put_aside_fails_the_import_and_goes_on_when_mended(voc, tmp_path):
    kept = (voc / "JPEGImages").rename(voc / "kept")
    shutil.copytree(kept, voc / "JPEGImages")
    for name in ("2007_000008", "2007_000009"):
        (voc / f"JPEGImages/{name}.jpg").unlink()
    with pytest.raises(
        UserError, match=r"none of the 2 images of split val of .*; the first, 2007_000008: there is no"
    ):
        imported("voc", voc, tmp_path / "out")
    assert not (tmp_path / "out/dataset.json").exists()
    shutil.rmtree(voc / "JPEGImages")
    kept.rename(voc / "JPEGImages")
    card, _ = imported("voc", voc, tmp_path / "out")
    assert {name: split.images for name, split in card.splits.items()} == {"train": 4, "val": 2}


# COCO


def change(file, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_coco_outlines_that_enclose_nothing_are_passed_over(coco, tmp_path):
    root, file = coco
    _, before = imported("coco", root, tmp_path / "before")

    def edit(content):
        for number, outline in enumerate(([], [[]], [[1, 2]], [[1, 2, 30, 30]], [[1, 2, 3, 4], [1, 1]])):
            content["annotations"].append(
                {"image_id": 9 if number else 25, "category_id": 1, "segmentation": outline, "area": 0}
            )

    change(file, edit)
    card, after = imported("coco", root, tmp_path / "after")
    assert not card.splits["train"].put_aside
    assert card.splits["train"].images == 3  # 25 has a label now, and a mask of background
    assert after.split("train").labels().tolist() == [[1, 1], [1, 0], [0, 1]]
    assert np.array_equal(after.split("train")[0].decode_mask(), before.split("train")[0].decode_mask())
    assert not after.split("train")[1].decode_mask().any()


def test_coco_area_and_size_are_optional(coco, tmp_path):
    root, file = coco
    _, before = imported("coco", root, tmp_path / "before")

    def edit(content):
        content["annotations"] = [
            {key: value for key, value in item.items() if key not in ("area", "iscrowd")}
            for item in content["annotations"]
        ]
        content["images"] = [{"id": image["id"], "file_name": image["file_name"]} for image in content["images"]]

    change(file, edit)
    _, after = imported("coco", root, tmp_path / "after")
    for index in range(2):
        assert np.array_equal(after.split("train")[index].decode_mask(), before.split("train")[index].decode_mask())


def test_coco_outlines_are_needed_for_masks_only(coco, tmp_path):
    root, file = coco
    change(file, lambda content: [item.pop("segmentation") for item in content["annotations"]])
    with pytest.raises(
        UserError, match=r"instances_train2014.json .*annotation 0 has no segmentation.*use masks 'none'"
    ):
        coco_source(str(root))
    card, _ = imported("coco", root, tmp_path / "out", masks="none")
    assert card.splits["train"].images_per_class == (1, 2)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content.pop("images"), "it has no list of images"),
        (lambda content: content["images"][1].pop("file_name"), "image 1 has no file_name"),
        (lambda content: content["images"][2].pop("id"), "image 2 has no id"),
        (lambda content: content["annotations"][1].pop("image_id"), "annotation 1 has no image_id"),
        (lambda content: content["annotations"][1].pop("category_id"), "annotation 1 has no image_id, or no category"),
        (lambda content: content["annotations"][0].update(category_id=5), "annotation 0 is of category 5"),
        (lambda content: content["categories"][0].pop("name"), "category 0 has no name"),
        (lambda content: content["categories"].append({"id": 1, "name": "x"}), "names 1 twice"),
        (lambda content: content["images"].append(content["images"][0]), "names COCO_train2014_000000000009.jpg twice"),
    ],
)
def test_coco_files_that_lack_something_say_what_in_a_sentence(coco, edit, message):
    root, file = coco
    change(file, edit)
    with pytest.raises(UserError, match=rf"instances_train2014.json .*{message}") as caught:
        coco_source(str(root))
    assert "\n" not in str(caught.value)


def test_coco_classes_that_cannot_be_stored_are_refused_before_the_import(coco, tmp_path):
    root, _ = coco
    for split in ("train", "val"):
        file = root / f"annotations/instances_{split}2014.json"
        change(file, lambda content: content["categories"].append({"id": 3, "name": "cat"}))
    with pytest.raises(UserError, match="names the class 'cat' twice"):
        imported("coco", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_coco_mask_folders_may_hold_other_files(coco, tmp_path):
    root, _ = coco
    shutil.rmtree(root / "annotations")
    for split in ("train", "val"):
        folder = root / f"SegmentationClass/{split}2014"
        folder.mkdir(parents=True)
        (folder / "000000000009.png").write_bytes(index_png(regions(0, 2), mode="L"))
        (folder / "._000000000025.png").write_bytes(b"of a Mac")
        (folder / "000000000030.txt").write_text("not a mask")
    card, dataset = imported("coco", root, tmp_path / "out")
    assert dataset.split("train").ids() == ["COCO_train2014_000000000009"]
    assert not card.splits["train"].put_aside


def test_coco_annotations_leave_the_memory_once_they_are_read(tmp_path):
    """Two splits of 4 MB of outlines each: what stays is a small part of one."""
    import gc
    import tracemalloc

    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2014").mkdir()
        outline = [[round(0.37 * index, 2) for index in range(60)]]
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "height": 30, "width": 40} for i in range(500)],
            "annotations": [
                {"image_id": i % 500, "category_id": 1, "segmentation": outline, "area": i} for i in range(10_000)
            ],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (tmp_path / f"annotations/instances_{split}2014.json").write_text(json.dumps(content))
    size = (tmp_path / "annotations/instances_val2014.json").stat().st_size
    assert size > 3_000_000
    tracemalloc.start()
    try:
        source = coco_source(str(tmp_path))
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 0.2 * size
    finally:
        tracemalloc.stop()
    first, last = source.splits["train"][0:1][0], source.splits["val"][499:500][0]
    assert (first.name, last.name, len(last.regions)) == ("0", "499", 20)
    assert len(source.splits["train"]) == 500


def test_a_local_source_with_a_question_mark(tmp_path):
    root = coco_folder(tmp_path / "what?")
    card = write_dataset(coco_source(str(root)), str(tmp_path / "out?"), local=True)
    assert card.splits["train"].images == 2
    assert photo(seed=9) == open_dataset(str(tmp_path / "out?")).split("train")[0].image
