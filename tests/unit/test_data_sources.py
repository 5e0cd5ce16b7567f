"""The importers' readings of VOC, COCO, a folder of one's own, and the generated shapes."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from skimage.morphology import binary_dilation, disk
from tiny_sets import coco_folder, index_png, photo, regions, voc_folder

from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.importing import import_dataset
from cosa_ray.data.shapes import context_of, draw_picture, shapes_source
from cosa_ray.errors import UserError


def imported(kind, source, out, **options):
    card = import_dataset(kind, None if source is None else str(source), str(out), local=True, **options)
    return card, open_dataset(str(out))


def labels_of(dataset, split):
    part = dataset.split(split)
    return {part[i].id: [dataset.classes[c] for c in np.flatnonzero(part[i].labels)] for i in range(len(part))}


# VOC


def test_voc_train_is_the_augmented_set_by_the_rule_and_labels_are_all_objects(tmp_path):
    card, dataset = imported("voc", voc_folder(tmp_path / "in"), tmp_path / "out")
    assert labels_of(dataset, "train") == {
        "2007_000001": ["aeroplane", "person"],  # the person is not in the mask
        "2007_000002": ["person"],
        "2008_000003": ["car"],
        "2008_000004": ["dog"],
    }
    assert labels_of(dataset, "val") == {"2007_000008": ["tvmonitor"], "2007_000009": ["bird"]}
    assert card.origin.options["train_from"] == "SegmentationClassAug less val.txt"
    assert card.labels_from.startswith("Annotations/*.xml")
    assert card.masks_from == "train: SegmentationClassAug; val: SegmentationClass"
    assert np.array_equal(dataset.split("train")[0].decode_mask(), regions(0, 1, 255))  # mode P: indices, not colours
    assert card.splits["train"].images_per_class[14] == 2
    assert len(card.classes) == 20
    assert card.palette[20] == (0, 64, 128)


def test_voc_labels_from_masks_and_from_the_label_file(tmp_path):
    root = voc_folder(tmp_path / "in")
    _, dataset = imported("voc", root / "VOCdevkit/VOC2012", tmp_path / "masks", labels="masks")
    assert labels_of(dataset, "train")["2007_000001"] == ["aeroplane"]
    assert labels_of(dataset, "train")["2008_000004"] == []
    table = {name: ["cat"] for name in ("2007_000001", "2007_000002", "2008_000003", "2007_000008", "2007_000009")}
    (root / "VOCdevkit/VOC2012/image_labels.json").write_text(json.dumps(table))
    card, dataset = imported("voc", root / "VOCdevkit", tmp_path / "json", labels="json")
    assert labels_of(dataset, "val") == {"2007_000008": ["cat"], "2007_000009": ["cat"]}
    assert [(item.id, item.reason) for item in card.splits["train"].put_aside] == [
        ("2008_000004", "image_labels.json does not name it")
    ]


def test_voc_train_aug_list_is_preferred(tmp_path):
    root = voc_folder(tmp_path / "in")
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt").write_text("2008_000003\n2007_000001\n")
    _, dataset = imported("voc", root, tmp_path / "out")
    assert dataset.split("train").ids() == ["2008_000003", "2007_000001"]


def test_voc_without_annotations_augmented_masks_or_train(tmp_path):
    root = voc_folder(tmp_path / "in")
    base = root / "VOCdevkit/VOC2012"
    for folder in ("Annotations", "SegmentationClassAug"):
        shutil.rmtree(base / folder)
    card, dataset = imported("voc", root, tmp_path / "official")
    assert dataset.split("train").ids() == ["2007_000001", "2007_000002"]
    assert card.labels_from == "classes shown by the masks"
    (base / "ImageSets/Segmentation/train.txt").unlink()
    card, dataset = imported("voc", root, tmp_path / "val only")
    assert list(card.splits) == ["val"]
    with pytest.raises(UserError, match=r"has no Annotations/\*.xml, which labels 'xml' need"):
        imported("voc", root, tmp_path / "refused", labels="xml")
    with pytest.raises(UserError, match="is not a VOC folder: it needs JPEGImages"):
        imported("voc", tmp_path, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_voc_broken_samples_are_put_aside_by_name(tmp_path):
    root = voc_folder(tmp_path / "in")
    base = root / "VOCdevkit/VOC2012"
    lists = base / "ImageSets/Segmentation"
    (lists / "train_aug.txt").write_text("2007_000001\n2007_000002\n2008_000003\n2008_000004\n2008_000005\n")
    shutil.copy(base / "JPEGImages/2007_000009.jpg", base / "JPEGImages/2008_000005.jpg")
    shutil.copy(base / "Annotations/2007_000009.xml", base / "Annotations/2008_000005.xml")
    (base / "JPEGImages/2007_000001.jpg").write_bytes(photo()[:300])
    (base / "JPEGImages/2007_000002.jpg").unlink()
    (base / "SegmentationClassAug/2008_000003.png").write_bytes(index_png(regions(0, 31)))
    (base / "Annotations/2008_000004.xml").write_text("<annotation><object><name>unicorn</name></object></annotation>")
    (base / "Annotations/2007_000008.xml").write_text("<annotation>")
    card, dataset = imported("voc", root, tmp_path / "out")
    reasons = {item.id: item.reason for split in card.splits.values() for item in split.put_aside}
    assert sorted(reasons) == ["2007_000001", "2007_000002", "2007_000008", "2008_000003", "2008_000004"]
    assert "cannot be decoded" in reasons["2007_000001"]
    assert reasons["2007_000002"] == "there is no image 2007_000002.jpg"
    assert "annotation cannot be read" in reasons["2007_000008"]
    assert "holds 31, beyond the 20 classes" in reasons["2008_000003"]
    assert reasons["2008_000004"] == "its label 'unicorn' is no class of VOC"
    assert dataset.split("train").ids() == ["2008_000005"]
    assert dataset.split("val").ids() == ["2007_000009"]
    with pytest.raises(UserError, match=r"train 2007_000001: the image cannot be decoded"):
        imported("voc", root, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict/dataset.json").exists()


# COCO


def test_coco_labels_count_crowds_and_images_without_labels_are_left_out(tmp_path):
    card, dataset = imported("coco", coco_folder(tmp_path / "in"), tmp_path / "out")
    assert card.classes == ("person", "cat")  # by category id
    assert labels_of(dataset, "train") == {
        "COCO_train2014_000000000009": ["person", "cat"],
        "COCO_train2014_000000000030": ["cat"],
    }
    for split in card.splits.values():
        assert (split.images, split.without_labels, split.masks) == (2, 1, 2)
    mask = dataset.split("val")[0].decode_mask()
    expected = np.zeros((30, 40), np.uint8)
    expected[:, :20] = 2
    expected[5:10, 5:10] = 1  # the smaller object lies on top, although the file names it first
    assert np.array_equal(mask, expected)
    crowd = dataset.split("val")[1].decode_mask()
    assert np.array_equal(crowd, np.repeat([[2] * 20 + [0] * 20], 30, axis=0))


def test_coco_masks_from_png_and_labels_still_from_the_annotations(tmp_path):
    root = coco_folder(tmp_path / "in")
    for split in ("train", "val"):
        folder = root / "SegmentationClass" / f"{split}2014"
        folder.mkdir(parents=True)
        (folder / "000000000009.png").write_bytes(index_png(regions(0, 2, 255), mode="L"))
        (folder / f"COCO_{split}2014_000000000030.png").write_bytes(index_png(regions(2), mode="L"))
    card, dataset = imported("coco", root, tmp_path / "out")
    assert card.masks_from == "train: SegmentationClass/train2014; val: SegmentationClass/val2014"
    assert np.array_equal(dataset.split("train")[0].decode_mask(), regions(0, 2, 255))
    assert labels_of(dataset, "train")["COCO_train2014_000000000009"] == ["person", "cat"]
    shutil.rmtree(root / "annotations")
    card, dataset = imported("coco", root, tmp_path / "no annotations")
    assert card.labels_from == "classes shown by the masks"
    assert labels_of(dataset, "val") == {
        "COCO_val2014_000000000009": ["bicycle"],
        "COCO_val2014_000000000030": ["bicycle"],
    }
    assert len(card.classes) == 80


def test_coco_without_masks_and_not_coco(tmp_path):
    root = coco_folder(tmp_path / "in")
    _, dataset = imported("coco", root, tmp_path / "out", masks="none")
    assert not dataset.split("train").has_masks
    assert dataset.split("train")[0].mask is None
    with pytest.raises(UserError, match="has no mask"):
        dataset.split("train")[0].decode_mask()
    with pytest.raises(UserError, match="is not a COCO folder"):
        imported("coco", tmp_path / "out", tmp_path / "refused")
    (root / "annotations/instances_val2014.json").write_text("{}")
    with pytest.raises(UserError, match=r"instances_val2014.json is not a COCO annotation file"):
        imported("coco", root, tmp_path / "refused")


# a folder of one's own


@pytest.fixture
def own(tmp_path):
    root = tmp_path / "own"
    (root / "images/deep").mkdir(parents=True)
    (root / "masks").mkdir()
    for seed, name in enumerate(("a.jpg", "b.png", "deep/c.jpg", "d.bmp")):
        (root / "images" / name).write_bytes(
            photo(seed=seed, kind={"jpg": "JPEG", "png": "PNG", "bmp": "BMP"}[name[-3:]])
        )
    (root / "masks/a.png").write_bytes(index_png(regions(0, 1)))
    return root


def test_folder_with_a_csv_of_names(own, tmp_path):
    (own / "labels.csv").write_text(
        "image,labels,split\na.jpg,dog;cat,train\nb,cat,val\ndeep/c.jpg,,train\nd.bmp,dog,test\n"
    )
    card, dataset = imported("folder", own, tmp_path / "out")
    assert card.classes == ("cat", "dog")
    assert labels_of(dataset, "train") == {"a": ["cat", "dog"], "deep/c": []}
    assert labels_of(dataset, "val") == {"b": ["cat"]}
    assert labels_of(dataset, "test") == {"d": ["dog"]}
    assert card.splits["train"].masks == 1
    assert not dataset.split("train").has_masks


def test_folder_with_a_csv_of_columns(own, tmp_path):
    (own / "labels.csv").write_text("image,dog,cat,cow\na.jpg,1,0,0\nb.png,0,1,0\n")
    card, dataset = imported("folder", own, tmp_path / "out")
    assert card.classes == ("dog", "cat", "cow")
    assert labels_of(dataset, "train") == {"a": ["dog"], "b": ["cat"]}


@pytest.mark.parametrize("nested", [False, True])
def test_folder_with_json(own, tmp_path, nested):
    table = {"a.jpg": ["dog"], "b.png": ["cat"]}
    (own / "labels.json").write_text(json.dumps({"val": table} if nested else table))
    _, dataset = imported("folder", own, tmp_path / "out")
    assert labels_of(dataset, "val" if nested else "train") == {"a": ["dog"], "b": ["cat"]}


def test_folder_classes_file_gives_order_and_colours(own, tmp_path):
    (own / "classes.txt").write_text("background\ndog 10 20 30\nsea lion\n")
    (own / "labels.csv").write_text("image,labels\na.jpg,dog\nb.png,sea lion\ndeep/c.jpg,zebra\nmissing.jpg,dog\n")
    colours = np.zeros((30, 40, 3), np.uint8)
    colours[10:] = (10, 20, 30)
    from PIL import Image

    Image.fromarray(colours).save(own / "masks/b.png")
    card, dataset = imported("folder", own, tmp_path / "out")
    assert card.classes == ("dog", "sea lion")
    assert card.palette[1] == (10, 20, 30)
    assert np.array_equal(dataset.split("train")[1].decode_mask(), (colours[..., 0] > 0).astype(np.uint8))
    assert {item.id: item.reason for item in card.splits["train"].put_aside} == {
        "deep/c": "its label 'zebra' is not in classes.txt",
        "missing": "there is no image of this name",
    }


def test_folder_val_fraction_depends_on_the_name_only(own, tmp_path):
    from cosa_ray.data.folder import folder_source

    (own / "labels.csv").write_text("image,labels\n" + "".join(f"i{n}.jpg,cat\n" for n in range(400)))
    splits = folder_source(str(own), val_fraction=0.25).splits
    assert 70 < len(splits["val"]) < 130
    assert len(splits["val"]) + len(splits["train"]) == 400
    (own / "labels.csv").write_text("image,labels\n" + "".join(f"i{n}.jpg,cat\n" for n in range(100)))
    fewer = {sample.name for sample in folder_source(str(own), val_fraction=0.25).splits["val"]}
    assert fewer <= {sample.name for sample in splits["val"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("picture,labels\na,b\n", "its first line must name the columns"),
        ("image,labels\n", "it names no image"),
        ("image,cat\na.jpg,maybe\n", "line 2 has 'maybe' where 0 or 1 belongs"),
        ("image,labels\na.jpg,cat\na.png,cat\n", "names a.png twice"),
        ("image,labels,split\na.jpg,cat,../x\n", "names the split '../x'"),
    ],
)
def test_folder_label_files_that_cannot_be_used(own, tmp_path, content, message):
    (own / "labels.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        imported("folder", own, tmp_path / "out")


def test_folder_without_labels(own, tmp_path):
    with pytest.raises(UserError, match=r"has no labels.csv or labels.json"):
        imported("folder", own, tmp_path / "out")


# shapes


def test_shapes_depend_on_seed_split_and_index_only(tmp_path):
    _, big = imported("shapes", None, tmp_path / "big", train=12, val=3, size=48, shard_images=5)
    _, small = imported("shapes", None, tmp_path / "small", train=5, val=2, size=48)
    for split, count in (("train", 5), ("val", 2)):
        for index in range(count):
            first, second = (dataset.split(split)[index] for dataset in (big, small))
            assert (first.image, first.mask) == (second.image, second.mask)
    assert len({big.split(split)[0].image for split in ("train", "val")}) == 2
    _, other = imported("shapes", None, tmp_path / "other", train=1, val=1, size=48, seed=1)
    assert other.split("train")[0].image != big.split("train")[0].image


def test_shapes_masks_hold_the_objects_and_only_them():
    shown = np.zeros(6, int)
    context_differs = 0
    for index in range(60):
        plain, mask = draw_picture(np.random.default_rng(index), 96, "plain")
        coexist, same = draw_picture(np.random.default_rng(index), 96, "coexist")
        assert np.array_equal(mask, same)  # a context is background
        assert plain.shape == (96, 96, 3)
        classes = np.unique(mask)
        assert 2 <= len(classes) <= 4
        shown[classes] += 1
        pixels = np.bincount(mask.ravel(), minlength=6)[1:]
        assert pixels[pixels > 0].min() > 60  # nothing is a sliver
        # Paired classes stand on something else than the plain background, the others never cause a patch.
        if np.isin(classes, (1, 3, 5)).any():
            far = np.abs(plain.astype(int) - coexist).mean(2)[mask == 0]
            context_differs += (far > 40).mean() > 0.02
    assert shown[1:].min() >= 10
    assert context_differs >= 20


def test_shapes_know_where_their_patches_are():
    """Against the pictures themselves: beside the objects, the variants differ there and, but for noise, only there."""
    options = {"variant": "coexist", "size": 96, "seed": 4}
    alone = 0
    for index in range(30):
        plain, coexist = (
            shapes_source(**{**options, "variant": variant, "train": 1, "val": 30}).reader(("x", "val", index))
            for variant in ("plain", "coexist")
        )
        context = context_of(options, f"val-{index:06d}")
        mask = np.asarray(Image.open(io.BytesIO(coexist.mask)))
        first, second = (np.asarray(Image.open(io.BytesIO(row.image))).astype(int) for row in (plain, coexist))
        free = ~binary_dilation(mask > 0, disk(2))
        differ = np.abs(first - second).mean(2)
        outside = free & ~binary_dilation(context, disk(5))
        assert differ[outside].mean() < 25
        if (context & free).sum() > 50:
            assert differ[context & free].mean() > 2 * differ[outside].mean()
            alone += 1
    assert alone >= 10
    assert context_of({**options, "variant": "plain"}, "val-000000") is None


def test_shapes_refuse_what_they_cannot_draw(tmp_path):
    with pytest.raises(UserError, match="no variant 'rings' of shapes: choose plain or coexist"):
        imported("shapes", None, tmp_path / "out", variant="rings")
