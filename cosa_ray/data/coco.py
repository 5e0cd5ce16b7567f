"""MS COCO in the layout of 2014: labels and masks from instances_*.json, or masks from PNG files."""

from __future__ import annotations

import json
import pickle
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cosa_ray.data.pictures import Broken, Palette, checked_image, encode_indices, voc_palette
from cosa_ray.data.remote import Place, fetch, leaves, place
from cosa_ray.data.shard import Row
from cosa_ray.data.source import Samples, Source, check_names, read_file, read_text, stored_row
from cosa_ray.data.subsets import read_list
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
VAL_PART = "val_part"  # the subset of val that the authors' code evaluates on while it trains


class _Region(NamedTuple):
    """An annotated object: 0-based class, and its outline as COCO writes it (polygons or run lengths), pickled."""

    label: int
    outline: bytes


class _Sample(NamedTuple):
    name: str
    image: str
    mask: str | None  # PNG
    size: tuple[int, int] | None  # height and width the JSON says
    labels: tuple[int, ...] | None  # None without a JSON
    regions: tuple[_Region, ...] | None  # largest first; None when the masks are not made of them


def coco_source(uri: str, *, masks: str = "auto", year: str = "2014") -> Source:
    """COCO at `uri`: images in {train,val}<year>, images/... or JPEGImages/..., annotations/instances_*<year>.json.

    Image-level labels are the categories of every annotation, crowds included; images without any are left out, which
    gives the 82,081 training and 40,137 validation images of 2014. `masks`: json = rasterised from the annotations, the
    largest first, so that small objects lie on top; png = SegmentationClass/{train,val}<year>/*.png of class indices
    (without a JSON, labels come from them too); auto = png where that folder is, else json. The annotations of one
    split at a time are in memory while they are read; afterwards they are in a temporary file.
    Raises UserError for a folder that is not COCO, or lacks what is asked for.
    """
    if masks not in MASKS:
        raise UserError(f"there is no mask source {masks!r}: choose one of {', '.join(MASKS)}")
    root = place(uri)
    splits: dict[str, Samples] = {}
    classes: tuple[str, ...] = CLASSES
    used = {}
    with_json = True
    for split in ("train", "val"):
        folder = _images(root, f"{split}{year}")
        if folder is None:
            continue
        file = root.child("annotations").child(f"instances_{split}{year}.json")
        annotated = file.exists()
        pngs = root.child("SegmentationClass").child(f"{split}{year}")
        listed = [name for name in pngs.names() if name.endswith(".png") and not name.startswith(".")]
        drawn = {name.rpartition(".")[0]: name for name in listed} if masks in ("auto", "png") else {}
        chosen = "png" if drawn else "json" if masks in ("auto", "json") and annotated else "none"
        if masks not in ("auto", chosen) or (not annotated and chosen == "none"):
            raise UserError(
                f"{root.uri} has neither what masks {masks!r} need for {split}{year}: "
                f"annotations/{file.path.rpartition('/')[2]}, or SegmentationClass/{split}{year}/*.png"
            )
        if annotated:
            annotations = _Annotations(file, chosen == "json")
            if splits and annotations.classes != classes:
                raise UserError(f"{file.uri} does not have the categories of the other split: import one at a time")
            classes = annotations.classes
            samples = annotations.samples(folder)
        else:
            with_json = False
            samples = _drawn_only(root, folder, drawn)
        if chosen == "png":
            samples = _with_masks(samples, drawn, f"SegmentationClass/{split}{year}")
        splits[split] = _Spooled(samples)
        where = {"png": f"SegmentationClass/{split}{year}", "json": file.path.rpartition("/")[2], "none": "none"}
        used[split] = where[chosen]
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
        root=root,
    )


def val_part_list(uri: str, given: str | None = None) -> str | None:
    """Path or URI of the list of the subset val_part: `given`, else val_part.txt in the COCO folder, if it is there.

    Raises UserError for a list that cannot be read or is empty: better than after hours of importing.
    """
    found = place(given) if given is not None else place(uri).child(f"{VAL_PART}.txt")
    if given is None and not found.exists():
        return None
    read_list(found)
    return found.uri


class _Spooled:
    """The samples of a split, kept in a temporary file: outlines take as much room as the annotation file itself."""

    def __init__(self, samples: Iterable[_Sample]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # open for as long as the samples are
        self._ends = array("Q", [0])
        for sample in samples:
            self._file.write(pickle.dumps(tuple(sample)))
            self._ends.append(self._file.tell())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, part: slice) -> list[_Sample]:
        found = []
        for index in range(len(self))[part]:
            self._file.seek(self._ends[index])
            found.append(_Sample(*pickle.loads(self._file.read(self._ends[index + 1] - self._ends[index]))))
        return found


@dataclass(frozen=True)
class _Reader:
    root: Place
    num_classes: int
    palette: Palette

    def __call__(self, sample: _Sample) -> Row:
        if sample.labels == ():
            return Row(sample.name, b"", None, (), 0, 0)  # will be left out: not worth reading
        image = read_file(self.root.child(sample.image), "image")
        if sample.regions is None:
            mask = None if sample.mask is None else read_file(self.root.child(sample.mask), "mask")
            return stored_row(sample.name, image, mask, sample.labels, self.num_classes, self.palette)
        stored, height, width = checked_image(image)
        if sample.size not in (None, (height, width)):
            raise Broken(f"the image is {width} x {height} and its annotation {sample.size[1]} x {sample.size[0]}")
        indices = rasterise(sample.regions, height, width)
        return Row(sample.name, stored, encode_indices(indices), sample.labels or (), height, width)


def rasterise(regions: tuple[_Region, ...], height: int, width: int) -> np.ndarray:
    """Mask of class indices, uint8 (height, width), of annotated regions; later regions lie on top. Raises Broken.

    Outlines that enclose nothing (no polygon of three points or more) are passed over.
    """
    from pycocotools import mask as coco_mask

    indices = np.zeros((height, width), np.uint8)
    for label, written in regions:
        outline = pickle.loads(written)
        try:
            if isinstance(outline, list):
                polygons = [points for points in outline if len(points) >= 6]  # pycocotools takes 4 numbers for a box
                if not polygons:
                    continue
                runs = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
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
    """What is needed of an instances_*.json: images, categories, and the outlines as bytes."""

    def __init__(self, file: Place, outlines: bool) -> None:
        self._file = file
        self._outlines = outlines
        try:
            content = json.loads(read_text(place(fetch(file.uri))), object_hook=self._slim)
        except (ValueError, RecursionError) as error:
            raise self._wrong(f"it is no JSON: {error}") from None
        if not isinstance(content, dict):
            raise self._wrong("it is no object")
        images, annotations, categories = (self._list(content, key) for key in ("images", "annotations", "categories"))
        ids = [self._field(category, "id", f"category {i}") for i, category in enumerate(categories)]
        names = [self._field(category, "name", f"category {i}") for i, category in enumerate(categories)]
        if not all(isinstance(key, int) for key in ids) or not all(isinstance(name, str) for name in names):
            raise self._wrong("its categories need a number as id and a name")
        check_names(map(str, ids), f"{file.uri} (categories)")
        self.classes = tuple(name for _, name in sorted(zip(ids, names, strict=True)))
        label = {key: index for index, key in enumerate(sorted(ids))}
        self._images = [
            (self._field(image, "id", f"image {i}"), self._field(image, "file_name", f"image {i}"), _size(image))
            for i, image in enumerate(images)
        ]
        if not all(isinstance(key, int | str) and isinstance(name, str) for key, name, _ in self._images):
            raise self._wrong("its images need a number as id and a file_name")
        outside = next((name for _, name, _ in self._images if leaves(name) or name.startswith("/")), None)
        if outside is not None:
            raise self._wrong(f"its image {outside} is not in the folder of the images")
        check_names((name for _, name, _ in self._images), file.uri)
        self._of_image: dict[Any, list[_Slim]] = defaultdict(list)
        for i, annotation in enumerate(annotations):
            if not isinstance(annotation, _Slim) or not isinstance(annotation.image, int | str):
                raise self._wrong(f"annotation {i} has no image_id, or no category_id")
            if not isinstance(annotation.label, int) or annotation.label not in label:
                raise self._wrong(f"annotation {i} is of category {annotation.label}, which is not in its categories")
            if outlines and annotation.outline is None:
                raise self._wrong(f"annotation {i} has no segmentation, which masks 'json' need: use masks 'none'")
            self._of_image[annotation.image].append(annotation._replace(label=label[annotation.label]))

    def samples(self, folder: str) -> Iterator[_Sample]:
        """The images in the file's order, with their regions, largest first. Frees what it has given."""
        for key, name, size in self._images:
            found = sorted(self._of_image.pop(key, ()), key=lambda item: -item.area)
            regions = tuple(_Region(item.label, item.outline or b"") for item in found) if self._outlines else None
            labels = tuple(sorted({item.label for item in found}))
            yield _Sample(name.rpartition(".")[0], f"{folder}/{name}", None, size, labels, regions)

    def _slim(self, entry: dict[str, Any]) -> Any:
        """Told every object of the JSON as it ends: an annotation's numbers become bytes before the next is read."""
        if "image_id" not in entry or "category_id" not in entry:
            return entry
        outline = entry.get("segmentation") if self._outlines else None
        area = entry.get("area")
        if not isinstance(area, int | float):
            area = _area(outline)
        written = None if outline is None else pickle.dumps(outline)
        return _Slim(entry["image_id"], entry["category_id"], area, written)

    def _list(self, content: dict[str, Any], key: str) -> list[Any]:
        if not isinstance(content.get(key), list):
            raise self._wrong(f"it has no list of {key}")
        return list(content[key])

    def _field(self, entry: Any, key: str, what: str) -> Any:
        if not isinstance(entry, dict) or key not in entry:
            raise self._wrong(f"{what} has no {key}")
        return entry[key]

    def _wrong(self, why: str) -> UserError:
        return UserError(f"{self._file.uri} is not a COCO annotation file ({why}): download or write it again")


class _Slim(NamedTuple):
    """What is kept of an annotation."""

    image: Any
    label: Any  # the category's id, then its index
    area: float
    outline: bytes | None


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    height, width = image.get("height"), image.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _area(outline: Any) -> float:
    """Pixels inside an outline, where the file does not say; overlaps of its polygons count twice."""
    from pycocotools import mask as coco_mask

    try:
        if isinstance(outline, dict):
            counts = outline["counts"]
            return float(sum(counts[1::2]) if isinstance(counts, list) else coco_mask.area(outline))
        total = 0.0
        for points in outline or ():
            x, y = np.array(points[0::2], float), np.array(points[1::2], float)
            total += abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
        return total
    except Exception:
        return 0.0  # an outline that cannot be read is reported with its image, when it is drawn


def _drawn_only(root: Place, folder: str, drawn: dict[str, str]) -> Iterator[_Sample]:
    """The images that have a mask, where nothing else lists them."""
    there = {name.rpartition(".")[0]: name for name in root.child(folder).names() if not name.startswith(".")}
    split = folder.rpartition("/")[2]
    for stem in drawn:
        if full := there.get(stem) or there.get(f"COCO_{split}_{stem}"):
            yield _Sample(full.rpartition(".")[0], f"{folder}/{full}", None, None, None, None)


def _with_masks(samples: Iterable[_Sample], drawn: dict[str, str], inside: str) -> Iterator[_Sample]:
    for sample in samples:
        yield sample._replace(mask=_drawn(sample.name, drawn, inside))


def _images(root: Place, split: str) -> str | None:
    return next(
        (folder for folder in (split, f"images/{split}", f"JPEGImages/{split}") if root.child(folder).is_folder()), None
    )


def _drawn(name: str, drawn: dict[str, str], inside: str) -> str:
    file = drawn.get(name) or drawn.get(name.rpartition("_")[2]) or f"{name}.png"
    return f"{inside}/{file}"
