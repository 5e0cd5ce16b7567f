"""Small sets in the layouts that the importers read, written for the tests."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from cosa_ray.data.card import DatasetCard
from cosa_ray.data.importing import write_dataset
from cosa_ray.data.source import Source, stored_row

CLASSES = ("cat", "dog", "bird")
PALETTE = ((0, 0, 0), (200, 0, 0), (0, 200, 0), (0, 0, 200))


def photo(width: int = 40, height: int = 30, seed: int = 0, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """An encoded picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def index_png(indices: np.ndarray, mode: str = "P") -> bytes:
    """A PNG of class indices, with a palette as VOC's files have."""
    image = Image.fromarray(indices.astype(np.uint8))
    if mode == "P":
        image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def regions(*values: int, width: int = 40, height: int = 30) -> np.ndarray:
    """A mask whose rows show the values one after the other."""
    return np.repeat(np.array(values, np.uint8), -(-height // len(values)))[:height, None].repeat(width, 1)


def xml(*names: str, difficult: int = 1) -> str:
    """A VOC annotation."""
    objects = "".join(
        f"<object><name>{name}</name><part><name>head</name></part><difficult>{difficult}</difficult></object>"
        for name in names
    )
    return f"<annotation><filename>x.jpg</filename>{objects}</annotation>"


def voc_folder(root: Path) -> Path:
    """A VOC2012 folder: 3 train, 2 val, 2 more in SegmentationClassAug; XML labels say more than the masks."""
    base = root / "VOCdevkit" / "VOC2012"
    names = {"train": ["2007_000001", "2007_000002"], "val": ["2007_000008", "2007_000009"]}
    more = ["2008_000003", "2008_000004"]
    masks = {"2007_000001": (0, 1, 255), "2007_000002": (15, 0), "2007_000008": (0, 20), "2007_000009": (3, 3)}
    extra = {"2008_000003": (0, 7), "2008_000004": (0, 0)}
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "Annotations", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for split, listed in names.items():
        (base / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(listed) + "\n")
    classes = {"2007_000001": ("aeroplane", "person"), "2007_000002": ("person",), "2007_000008": ("tvmonitor",)}
    classes |= {"2007_000009": ("bird",), "2008_000003": ("car",), "2008_000004": ("dog", "dog")}
    for seed, name in enumerate([*names["train"], *names["val"], *more]):
        (base / "JPEGImages" / f"{name}.jpg").write_bytes(photo(seed=seed))
        (base / "Annotations" / f"{name}.xml").write_text(xml(*classes[name]))
        if name in masks:
            (base / "SegmentationClass" / f"{name}.png").write_bytes(index_png(regions(*masks[name])))
        both = {**masks, **extra}
        (base / "SegmentationClassAug" / f"{name}.png").write_bytes(index_png(regions(*both[name]), mode="L"))
    return root


def coco_folder(root: Path) -> Path:
    """A COCO 2014 folder: polygons, run lengths, a crowd, and an image without annotations in each split."""
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": 17, "name": "cat"}, {"id": 1, "name": "person"}]
    for split in ("train", "val"):
        (root / f"{split}2014").mkdir()
        images, annotations = [], []
        for number in (9, 25, 30):
            name = f"COCO_{split}2014_{number:012d}.jpg"
            (root / f"{split}2014" / name).write_bytes(photo(seed=number))
            images.append({"id": number, "file_name": name, "height": 30, "width": 40})
        box = [[0, 0, 20, 0, 20, 30, 0, 30]]
        inner = [[5, 5, 10, 5, 10, 10, 5, 10]]
        crowd = {"counts": [0, 600, 600], "size": [30, 40]}
        annotations.append({"image_id": 9, "category_id": 1, "segmentation": inner, "area": 25, "iscrowd": 0})
        annotations.append({"image_id": 9, "category_id": 17, "segmentation": box, "area": 600, "iscrowd": 0})
        annotations.append({"image_id": 30, "category_id": 17, "segmentation": crowd, "area": 600, "iscrowd": 1})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(content))
    return root


class NumberedReader:
    """Makes sample (name, number): a picture of noise, a mask of two classes; number -1 is broken."""

    def __call__(self, sample):
        name, number = sample
        mask = index_png(regions(0, number % 3 + 1))
        image = b"no picture" if number < 0 else photo(seed=number)
        return stored_row(name, image, mask, [number % 3], len(CLASSES), PALETTE)


def numbered_source(train: int, val: int = 2, broken: tuple[int, ...] = ()) -> Source:
    """A source of `train` and `val` made-up samples."""

    def samples(split: str, count: int) -> list[tuple[str, int]]:
        return [(f"{split}{i}", -1 if i in broken else i) for i in range(count)]

    return Source(
        kind="folder",
        uri="made-up",
        options={},
        classes=CLASSES,
        palette=PALETTE,
        labels_from="the test",
        masks_from="the test",
        splits={"train": samples("train", train), "val": samples("val", val)},
        reader=NumberedReader(),
    )


def tiny_dataset(out: Path, train: int = 10, shard_images: int = 4, **keys) -> DatasetCard:
    """Write a dataset of made-up samples at `out`."""
    return write_dataset(numbered_source(train, **keys), str(out), local=True, shard_images=shard_images)
