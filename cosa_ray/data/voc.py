"""PASCAL VOC 2012 in the devkit's layout, augmented masks and label files included where they are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple
from xml.etree import ElementTree

from cosa_ray.data.pictures import Broken, voc_palette
from cosa_ray.data.remote import Place, place
from cosa_ray.data.shard import Row
from cosa_ray.data.source import Source, check_names, read_file, read_text, stored_row
from cosa_ray.errors import UserError

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
LABELS = ("auto", "xml", "masks", "json")
LABEL_FILE = "image_labels.json"

_PALETTE = voc_palette(len(CLASSES) + 1)
_AUGMENTED = "SegmentationClassAug"
_OFFICIAL = "SegmentationClass"


class _Sample(NamedTuple):
    name: str
    mask: str | None  # folder of its mask
    labels: tuple[str, ...] | None  # from the label file


def voc_source(uri: str, *, labels: str = "auto") -> Source:
    """VOC 2012 at `uri`: VOCdevkit/VOC2012, or a folder that holds it.

    `train` is train_aug where the folder has it (ImageSets/Segmentation/train_aug.txt or trainaug.txt, else every name
    in SegmentationClassAug that is not in val.txt: 10,582 images), otherwise train.txt; `val` is val.txt with the
    official masks. `labels`: xml = every object of Annotations, difficult ones too; masks = classes the mask shows;
    json = image_labels.json ({name: [class, ...]}); auto = the first of xml, json, masks that is there.
    Raises UserError for a folder that is not VOC, or lacks what is asked for.
    """
    root = _root(uri)
    lists = root.child("ImageSets").child("Segmentation")
    augmented, official = (_masks(root.child(folder)) for folder in (_AUGMENTED, _OFFICIAL))
    val = _names(lists, "val.txt")
    train, train_from = _train(lists, augmented, val)
    if not train and not val:
        raise UserError(f"{root.uri} has no list of images: it needs ImageSets/Segmentation/train.txt or val.txt")
    chosen = _labels_from(root, labels, bool(augmented or official))
    table = _table(root.child(LABEL_FILE)) if chosen == "json" else None

    def sample(name: str, folders: Iterable[tuple[str, set[str]]]) -> _Sample:
        mask = next((folder for folder, names in folders if name in names), None)
        named = None if table is None or name not in table else tuple(table[name])
        return _Sample(name, mask, named)

    splits = {}
    if train:
        order = ((_AUGMENTED, augmented), (_OFFICIAL, official))
        splits["train"] = [sample(name, order) for name in train]
    if val:
        order = ((_OFFICIAL, official), (_AUGMENTED, augmented))
        splits["val"] = [sample(name, order) for name in val]
    used = {split: sorted({item.mask for item in items if item.mask}) for split, items in splits.items()}
    masks_from = "; ".join(f"{split}: {' and '.join(folders) or 'none'}" for split, folders in used.items())
    said = {
        "xml": "Annotations/*.xml (every object, difficult ones too)",
        "json": LABEL_FILE,
        "masks": "classes shown by the masks",
    }
    return Source(
        kind="voc",
        uri=uri,
        options={"labels": chosen, "train_from": train_from},
        classes=CLASSES,
        palette=_PALETTE,
        labels_from=said[chosen],
        masks_from=masks_from,
        splits=splits,
        reader=_Reader(root, chosen),
        root=root,
    )


@dataclass(frozen=True)
class _Reader:
    root: Place
    labels: str

    def __call__(self, sample: _Sample) -> Row:
        name, folder, named = sample
        image = read_file(self.root.child("JPEGImages").child(f"{name}.jpg"), "image")
        mask = None if folder is None else read_file(self.root.child(folder).child(f"{name}.png"), "mask")
        labels = None
        if self.labels == "xml":
            labels = _indices(_objects(read_file(self.root.child("Annotations").child(f"{name}.xml"), "annotation")))
        elif self.labels == "json":
            if named is None:
                raise Broken(f"{LABEL_FILE} does not name it")
            labels = _indices(named)
        return stored_row(name, image, mask, labels, len(CLASSES), _PALETTE)


def _root(uri: str) -> Place:
    given = place(uri)
    for inside in ("", "VOC2012", "VOCdevkit/VOC2012"):
        root = given.child(inside) if inside else given
        if root.child("JPEGImages").is_folder():
            return root
    raise UserError(f"{uri} is not a VOC folder: it needs JPEGImages, in itself or in VOCdevkit/VOC2012")


def _masks(folder: Place) -> set[str]:
    return {name[:-4] for name in folder.names() if name.endswith(".png") and not name.startswith(".")}


def _names(lists: Place, file: str) -> list[str]:
    """Names of a list: alone in a line, or as DeepLab's lists have them, /JPEGImages/x.jpg /SegmentationClass/x.png."""
    try:
        text = read_text(lists.child(file))
    except FileNotFoundError:
        return []
    paths = [line.split()[0] for line in text.splitlines() if line.strip()]
    names = [path.rpartition("/")[2].removesuffix(".jpg") for path in paths]
    check_names(names, lists.child(file).uri)
    return names


def _table(file: Place) -> dict[str, list[str]]:
    try:
        table = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.uri} is no JSON ({error}): write {{name: [class, ...]}}") from None
    if not isinstance(table, dict):
        raise UserError(
            f"{file.uri} must be an object {{name: [class, ...]}}: write one list of classes for each image"
        )
    for name, named in table.items():
        if not isinstance(named, list) or not all(isinstance(label, str) for label in named):
            raise UserError(f"{file.uri} has no list of class names for {name}: write {{name: [class, ...]}}")
    return table


def _train(lists: Place, augmented: set[str], val: list[str]) -> tuple[list[str], str]:
    for file in ("train_aug.txt", "trainaug.txt"):
        if names := _names(lists, file):
            return names, file
    if val and (names := sorted(augmented - set(val))):
        return names, f"{_AUGMENTED} less val.txt"
    names = _names(lists, "train.txt")
    return names, "train.txt" if names else "none"


def _labels_from(root: Place, labels: str, masks: bool) -> str:
    there = {
        "xml": any(name.endswith(".xml") for name in root.child("Annotations").names()),
        "json": root.child(LABEL_FILE).exists(),
        "masks": masks,
    }
    needs = {"xml": "Annotations/*.xml", "json": LABEL_FILE, "masks": f"{_OFFICIAL} or {_AUGMENTED}"}
    if labels == "auto":
        found = next((kind for kind, present in there.items() if present), None)
        if found is None:
            raise UserError(f"{root.uri} has no labels: it needs Annotations/*.xml, {LABEL_FILE}, or masks")
        return found
    if labels not in there:
        raise UserError(f"there is no label source {labels!r}: choose one of {', '.join(LABELS)}")
    if not there[labels]:
        raise UserError(f"{root.uri} has no {needs[labels]}, which labels {labels!r} need: use labels 'auto'")
    return labels


def _objects(xml: bytes) -> list[str]:
    try:
        tree = ElementTree.fromstring(xml)
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the latter two of its encoding
        raise Broken(f"its annotation cannot be read ({error})") from None
    return [(element.findtext("name") or "").strip() for element in tree.iter("object")]


def _indices(names: Iterable[str]) -> tuple[int, ...]:
    unknown = [name for name in names if name not in CLASSES]
    if unknown:
        raise Broken(f"its label {unknown[0]!r} is no class of VOC")
    return tuple(CLASSES.index(name) for name in names)
