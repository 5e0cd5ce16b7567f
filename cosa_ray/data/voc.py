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
from cosa_ray.data.source import Source, read_file, stored_row
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
    augmented, official = ({name[:-4] for name in root.child(folder).names()} for folder in (_AUGMENTED, _OFFICIAL))
    val = _names(lists, "val.txt")
    train, train_from = _train(lists, augmented, val)
    if not train and not val:
        raise UserError(f"{root.uri} has no list of images: it needs ImageSets/Segmentation/train.txt or val.txt")
    chosen = _labels_from(root, labels)
    table = json.loads(root.child(LABEL_FILE).read()) if chosen == "json" else None

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


def _names(lists: Place, file: str) -> list[str]:
    try:
        text = lists.child(file).read().decode()
    except FileNotFoundError:
        return []
    return [line.split()[0] for line in text.splitlines() if line.strip()]


def _train(lists: Place, augmented: set[str], val: list[str]) -> tuple[list[str], str]:
    for file in ("train_aug.txt", "trainaug.txt"):
        if names := _names(lists, file):
            return names, file
    if val and (names := sorted(augmented - set(val))):
        return names, f"{_AUGMENTED} less val.txt"
    names = _names(lists, "train.txt")
    return names, "train.txt" if names else "none"


def _labels_from(root: Place, labels: str) -> str:
    there = {
        "xml": root.child("Annotations").is_folder(),
        "json": root.child(LABEL_FILE).exists(),
        "masks": root.child(_OFFICIAL).is_folder() or root.child(_AUGMENTED).is_folder(),
    }
    needs = {"xml": "Annotations", "json": LABEL_FILE, "masks": f"{_OFFICIAL} or {_AUGMENTED}"}
    if labels == "auto":
        found = next((kind for kind, present in there.items() if present), None)
        if found is None:
            raise UserError(f"{root.uri} has no labels: it needs Annotations, {LABEL_FILE}, or masks")
        return found
    if labels not in there:
        raise UserError(f"there is no label source {labels!r}: choose one of {', '.join(LABELS)}")
    if not there[labels]:
        raise UserError(f"{root.uri} has no {needs[labels]}, which labels {labels!r} need: use labels 'auto'")
    return labels


def _objects(xml: bytes) -> list[str]:
    try:
        tree = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise Broken(f"its annotation cannot be read ({error})") from None
    return [(element.findtext("name") or "").strip() for element in tree.iter("object")]


def _indices(names: Iterable[str]) -> tuple[int, ...]:
    unknown = [name for name in names if name not in CLASSES]
    if unknown:
        raise Broken(f"its label {unknown[0]!r} is no class of VOC")
    return tuple(CLASSES.index(name) for name in names)
