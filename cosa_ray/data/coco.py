"""MS COCO in the layout of 2014: labels and masks from instances_*.json, or masks from PNG files."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cosa_ray.data.pictures import Broken, Palette, checked_image, classes_in, encode_indices, voc_palette
from cosa_ray.data.remote import Place, fetch, place
from cosa_ray.data.shard import Row
from cosa_ray.data.source import Source, read_file, stored_row
from cosa_ray.errors import UserError

# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
MASKS = ("auto", "json", "png", "none")


class _Region(NamedTuple):
    """An annotated object: 0-based class, and its outline as COCO writes it (polygons or run lengths)."""

    label: int
    outline: Any


class _Sample(NamedTuple):
    name: str
    image: str
    mask: str | None  # PNG
    size: tuple[int, int] | None  # height and width the JSON says
    regions: tuple[_Region, ...] | None  # largest first; None without a JSON


def coco_source(uri: str, *, masks: str = "auto", year: str = "2014") -> Source:
    """COCO at `uri`: images in {train,val}<year>, images/... or JPEGImages/..., annotations/instances_*<year>.json.

    Image-level labels are the categories of every annotation, crowds included; images without any are left out, which
    gives the 82,081 training and 40,137 validation images of 2014. `masks`: json = rasterised from the annotations, the
    largest first, so that small objects lie on top; png = SegmentationClass/{train,val}<year>/*.png of class indices
    (without a JSON, labels come from them too); auto = png where that folder is, else json. The annotations of a split
    are held in memory while it is imported, as pycocotools does; images and masks are not.
    Raises UserError for a folder that is not COCO, or lacks what is asked for.
    """
    if masks not in MASKS:
        raise UserError(f"there is no mask source {masks!r}: choose one of {', '.join(MASKS)}")
    root = place(uri)
    splits: dict[str, list[_Sample]] = {}
    classes: tuple[str, ...] = CLASSES
    used = {}
    with_json = True
    for split in ("train", "val"):
        folder = _images(root, f"{split}{year}")
        if folder is None:
            continue
        file = root.child("annotations").child(f"instances_{split}{year}.json")
        annotations = _Annotations(file) if file.exists() else None
        pngs = root.child("SegmentationClass").child(f"{split}{year}")
        drawn = {name.rpartition(".")[0]: name for name in pngs.names()} if masks in ("auto", "png") else {}
        chosen = "png" if drawn else "json" if masks in ("auto", "json") and annotations else "none"
        if masks not in ("auto", chosen) or (annotations is None and chosen == "none"):
            raise UserError(
                f"{root.uri} has neither what masks {masks!r} need for {split}{year}: "
                f"annotations/{file.path.rpartition('/')[2]}, or SegmentationClass/{split}{year}/*.png"
            )
        if annotations is not None:
            if splits and annotations.classes != classes:
                raise UserError(f"{file.uri} does not have the categories of the other split: import one at a time")
            classes = annotations.classes
            listed = annotations.samples(folder, chosen == "json")
        else:
            with_json = False
            listed = [_Sample(name.rpartition(".")[0], f"{folder}/{name}", None, None, None) for name in drawn.values()]
            there = {name.rpartition(".")[0]: name for name in root.child(folder).names()}
            listed = [
                sample._replace(name=full.rpartition(".")[0], image=f"{folder}/{full}")
                for sample in listed
                if (full := there.get(sample.name) or there.get(f"COCO_{split}{year}_{sample.name}"))
            ]
        if chosen == "png":
            inside = f"SegmentationClass/{split}{year}"
            listed = [sample._replace(mask=_drawn(sample.name, drawn, inside)) for sample in listed]
        splits[split] = listed
        used[split] = {"png": f"SegmentationClass/{split}{year}", "json": file.path.rpartition("/")[2], "none": "none"}[
            chosen
        ]
    if not splits:
        raise UserError(f"{uri} is not a COCO folder: it needs train{year} or val{year} and annotations")
    palette = voc_palette(len(classes) + 1)
    return Source(
        kind="coco",
        uri=uri,
        options={"masks": masks, "year": year},
        classes=classes,
        palette=palette,
        labels_from="annotations (every object, crowds too)" if with_json else "classes shown by the masks",
        masks_from="; ".join(f"{split}: {where}" for split, where in used.items()),
        splits=splits,
        reader=_Reader(root, len(classes), palette),
        drop_without_labels=True,
    )


@dataclass(frozen=True)
class _Reader:
    root: Place
    num_classes: int
    palette: Palette

    def __call__(self, sample: _Sample) -> Row:
        name, file, png, size, regions = sample
        labels = None if regions is None else tuple({region.label for region in regions})
        if labels == ():
            return Row(name, b"", None, (), 0, 0)  # will be left out: not worth reading
        image = read_file(self.root.child(file), "image")
        if png is not None:
            mask = read_file(self.root.child(png), "mask")
            return stored_row(name, image, mask, labels, self.num_classes, self.palette)
        if size is None or regions is None or all(region.outline is None for region in regions):
            return stored_row(name, image, None, labels, self.num_classes, self.palette)
        stored, height, width = checked_image(image)
        if (height, width) != size:
            raise Broken(f"the image is {width} x {height} and its annotation {size[1]} x {size[0]}")
        indices = rasterise(regions, height, width)
        return Row(name, stored, encode_indices(indices), tuple(sorted(labels or classes_in(indices))), height, width)


def rasterise(regions: tuple[_Region, ...], height: int, width: int) -> np.ndarray:
    """Mask of class indices, uint8 (height, width), of annotated regions; later regions lie on top. Raises Broken."""
    from pycocotools import mask as coco_mask

    indices = np.zeros((height, width), np.uint8)
    for label, outline in regions:
        try:
            if isinstance(outline, list):
                runs = coco_mask.merge(coco_mask.frPyObjects(outline, height, width))
            elif isinstance(outline["counts"], list):
                runs = coco_mask.frPyObjects(outline, height, width)
            else:
                runs = outline
            inside = coco_mask.decode(runs).astype(bool)
            indices[inside] = label + 1
        except Exception as error:
            # pycocotools reports a malformed outline by whatever its C code trips over first.
            raise Broken(f"an outline of its annotation cannot be read ({error})") from None
    return indices


class _Annotations:
    """What is needed of an instances_*.json."""

    def __init__(self, file: Place) -> None:
        try:
            content = json.loads(fetch(file.uri).read_bytes())
            categories = sorted(content["categories"], key=lambda category: category["id"])
            self.classes = tuple(category["name"] for category in categories)
            self._label = {category["id"]: index for index, category in enumerate(categories)}
            self._images = content["images"]
            self._of_image: dict[int, list[tuple[float, _Region]]] = defaultdict(list)
            for annotation in content["annotations"]:
                region = _Region(self._label[annotation["category_id"]], annotation["segmentation"])
                self._of_image[annotation["image_id"]].append((annotation["area"], region))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{file.uri} is not a COCO annotation file ({error}): download it again") from None

    def samples(self, folder: str, outlines: bool) -> list[_Sample]:
        """The images in the file's order, with their regions, largest first."""
        listed = []
        for image in self._images:
            found = sorted(self._of_image.get(image["id"], ()), key=lambda item: -item[0])
            regions = tuple(region if outlines else region._replace(outline=None) for _, region in found)
            name = image["file_name"]
            stem = name.rpartition(".")[0]
            listed.append(_Sample(stem, f"{folder}/{name}", None, (image["height"], image["width"]), regions))
        return listed


def _images(root: Place, split: str) -> str | None:
    return next(
        (folder for folder in (split, f"images/{split}", f"JPEGImages/{split}") if root.child(folder).is_folder()), None
    )


def _drawn(name: str, drawn: dict[str, str], inside: str) -> str:
    file = drawn.get(name) or drawn.get(name.rpartition("_")[2]) or f"{name}.png"
    return f"{inside}/{file}"
