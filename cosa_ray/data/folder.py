"""A folder of one's own: images, a CSV or JSON of image-level labels, masks where there are any."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

from cosa_ray.data.pictures import Broken, Palette, voc_palette
from cosa_ray.data.remote import Place, place
from cosa_ray.data.shard import Row
from cosa_ray.data.source import MAX_CLASSES, Source, check_classes, read_file, read_text, stored_row
from cosa_ray.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_YES = ("1", "1.0", "true", "yes", "x")
_SPLIT = re.compile(r"[A-Za-z0-9_-]+")  # part of the names of shards
_NO = ("", "0", "0.0", "false", "no", "-1", "-1.0")


class _Entry(NamedTuple):
    """A line of the label file."""

    image: str
    labels: tuple[str, ...]
    split: str


class _Sample(NamedTuple):
    name: str
    image: str | None  # path of the file under the images' folder; None when there is none
    mask: str | None
    labels: tuple[str, ...]


def folder_source(uri: str, *, labels: str | None = None, val_fraction: float = 0.0) -> Source:
    """Images and labels at `uri`.

    Images lie in `images/` (or in the folder itself), masks in `masks/` under the same names, as PNG of class indices
    or of the palette's colours. The label file, `labels.csv` or `labels.json` or the one named by `labels`:

    - CSV with the columns `image`, `labels` (names separated by `;`), optionally `split`; or with one column of 0 and 1
      for each class instead of `labels`;
    - JSON {image: [class, ...]}, or {split: {image: [class, ...]}}.

    Images are named in full, or without the ending where only one file has that name. Classes are those of
    `classes.txt` (one a line, optionally followed by its colour: `name r g b`, and optionally numbered; a first line
    `background` is allowed), else every name that occurs, sorted. Without splits everything is `train`, less the
    `val_fraction` of the images (chosen by a hash of the name) that become `val`.
    Raises UserError when the folder or the label file is not as described.
    """
    root = place(uri)
    if not root.is_folder():
        raise UserError(f"there is no folder {uri}: give the folder that holds the images and their label file")
    if not 0.0 <= val_fraction < 1.0:
        raise UserError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    file = _label_file(root, labels)
    entries, columns = _entries(file)
    classes, colours = _classes(root, file, columns or sorted({name for entry in entries for name in entry.labels}))
    images = root.child("images") if root.child("images").is_folder() else root
    there = _Files(images, ENDINGS)
    masks = _Files(root.child("masks"), (".png",))
    splits: dict[str, list[_Sample]] = {}
    named_before: set[str] = set()
    mask_of: dict[str, str] = {}
    for image, named, split in entries:
        found = there.find(image, file)
        stem = _stem(found or image)
        name = stem if found is None or len(there.stems[stem]) == 1 else found
        if name in named_before:
            raise UserError(f"{file.uri} names {image} twice: leave one line for each image")
        named_before.add(name)
        mask = None if found is None else masks.first(found) or masks.first(stem)
        if mask is not None and found is not None and mask_of.setdefault(mask, found) != found:
            raise UserError(
                f"the mask {mask} may belong to {mask_of[mask]} or to {found}: name the masks {mask_of[mask]}.png "
                f"and {found}.png"
            )
        if not split:
            split = "val" if _share(name) < val_fraction else "train"
        elif not _SPLIT.fullmatch(split):
            raise UserError(f"{file.uri} names the split {split!r}: use the letters a to z, digits, - and _")
        splits.setdefault(split, []).append(_Sample(name, found, mask, named))
    return Source(
        kind="folder",
        uri=uri,
        options={"labels": file.path.rpartition("/")[2], "val_fraction": val_fraction},
        classes=classes,
        palette=colours,
        labels_from=file.path.rpartition("/")[2],
        masks_from="masks" if masks.names else "none",
        splits=splits,
        reader=_Reader(images, root.child("masks"), classes, colours),
        root=images,
    )


def labels_by_image(uri: str) -> dict[str, tuple[str, ...]]:
    """Class names by image, the names without their endings, of a label file as `folder_source` takes it.

    Raises UserError when there is no such file, or it is not as described.
    """
    file = place(uri)
    if not file.exists() or file.is_folder():
        raise UserError(f"there is no label file {uri}: give a CSV or JSON file of image names and classes")
    entries, _ = _entries(file)
    return {_stem(entry.image): entry.labels for entry in entries}


def _stem(name: str) -> str:
    return name.rpartition(".")[0] if name.lower().endswith(ENDINGS) else name


class _Files:
    """The files of a folder, and of the folders in it, by name and by stem."""

    def __init__(self, folder: Place, endings: tuple[str, ...]) -> None:
        listed = (name for name in folder.names(True) if name.lower().endswith(endings))
        self.names = {name for name in listed if not name.rpartition("/")[2].startswith(".")}
        self.stems: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.names):
            self.stems[_stem(name)].append(name)

    def find(self, image: str, file: Place) -> str | None:
        """The file that the label file means: of that name, else the only one of that stem."""
        for wanted in (image, image.removeprefix("images/")):
            if wanted in self.names:
                return wanted
        for wanted in (_stem(image), _stem(image).removeprefix("images/")):
            if len(self.stems.get(wanted, ())) > 1:
                raise UserError(
                    f"{file.uri} names {image}, and there are {' and '.join(self.stems[wanted])}: write the full name"
                )
            if wanted in self.stems:
                return self.stems[wanted][0]
        return None

    def first(self, stem: str) -> str | None:
        """A file of this stem."""
        return next(iter(self.stems.get(stem, ())), None)


@dataclass(frozen=True)
class _Reader:
    images: Place
    masks: Place
    classes: tuple[str, ...]
    palette: Palette

    def __call__(self, sample: _Sample) -> Row:
        name, image, mask, named = sample
        if image is None:
            raise Broken("there is no image of this name")
        unknown = [label for label in named if label not in self.classes]
        if unknown:
            raise Broken(f"its label {unknown[0]!r} is not in classes.txt")
        picture = read_file(self.images.child(image), "image")
        drawn = None if mask is None else read_file(self.masks.child(mask), "mask")
        labels = [self.classes.index(label) for label in named]
        return stored_row(name, picture, drawn, labels, len(self.classes), self.palette)


def _label_file(root: Place, labels: str | None) -> Place:
    for name in (labels,) if labels else ("labels.csv", "labels.json"):
        if (file := root.child(name)).is_folder():
            raise UserError(f"{file.uri} is a folder: give the label file in it, a CSV or JSON")
        if file.exists():
            return file
    raise UserError(
        f"{root.uri} has no {labels or 'labels.csv or labels.json'}: write one, see `data import folder --help`"
    )


def _entries(file: Place) -> tuple[list[_Entry], list[str]]:
    """Lines of the label file, and the classes that its columns name (none for lists of names)."""
    text = read_text(file)
    try:
        return (_json_entries(text), []) if file.path.endswith(".json") else _csv_entries(text)
    except (ValueError, RecursionError, csv.Error) as error:  # of JSON, and those raised below
        raise UserError(f"{file.uri} cannot be used: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it names {key} twice")
        found[key] = value
    return found


def _json_entries(text: str) -> list[_Entry]:
    content = json.loads(text, object_pairs_hook=_once)
    if not isinstance(content, dict) or not content:
        raise ValueError("it must be an object {image: [class, ...]} or {split: {image: [class, ...]}}")
    nested = all(isinstance(value, dict) for value in content.values())
    entries = []
    for split, images in content.items() if nested else [("", content)]:
        for image, names in images.items():
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"the labels of {image} are not a list of names")
            if not all(name.strip() for name in names):
                raise ValueError(f"a label of {image} is empty")
            entries.append(_Entry(image, tuple(name.strip() for name in names), split))
    if not entries:
        raise ValueError("it names no image")
    return entries


def _csv_entries(text: str) -> tuple[list[_Entry], list[str]]:
    table = csv.DictReader(io.StringIO(text))
    fields = [field.strip() for field in table.fieldnames or ()]
    while fields and not fields[-1]:  # spreadsheets end lines with empty cells
        fields.pop()
    if "image" not in fields or len(fields) < 2:
        raise ValueError("its first line must name the columns: image, and labels or one column a class")
    if "" in fields:
        raise ValueError(f"column {fields.index('') + 1} has no name in its first line")
    twice = next((field for index, field in enumerate(fields) if field in fields[:index]), None)
    if twice is not None:
        raise ValueError(f"its first line names the column {twice!r} twice")
    table.fieldnames = fields
    columns = [] if "labels" in fields else [field for field in fields if field not in ("image", "split")]
    entries = []
    for row in table:
        more = next((cell.strip() for cell in row.get(None) or () if cell.strip()), None)
        if more is not None:
            raise ValueError(
                f"line {table.line_num} has more cells than its first line names columns ({more!r} is one too many; "
                "several labels go into one cell, with ; between them)"
            )
        image = (row["image"] or "").strip()
        if not image:
            raise ValueError(f"line {table.line_num} names no image")
        if columns:
            marks = {column: (row[column] or "").strip().lower() for column in columns}
            odd = next((mark for mark in marks.values() if mark not in _YES + _NO), None)
            if odd is not None:
                raise ValueError(f"line {table.line_num} has {odd!r} where 0 or 1 belongs")
            names = [column for column, mark in marks.items() if mark in _YES]
        else:
            names = [name.strip() for name in (row["labels"] or "").split(";") if name.strip()]
        entries.append(_Entry(image, tuple(names), (row.get("split") or "").strip()))
    if not entries:
        raise ValueError("it names no image")
    return entries, columns


def _classes(root: Place, labels: Place, occurring: list[str]) -> tuple[tuple[str, ...], Palette]:
    """Classes and colours of classes.txt, else of what the label file names."""
    file = root.child("classes.txt")
    if not file.exists():
        if not occurring:
            raise UserError(f"{root.uri} names no class: label at least one image, or list the classes in classes.txt")
        check_classes(occurring, labels.uri)
        return tuple(occurring), voc_palette(len(occurring) + 1)
    lines: list[list[str]] = []
    colours: dict[int, tuple[int, int, int]] = {}
    for words in filter(None, (line.split() for line in read_text(file).splitlines())):
        if len(words) > 3 and all(word.isdecimal() and int(word) < 256 for word in words[-3:]):
            red, green, blue = (int(word) for word in words[-3:])
            colours[len(lines)] = (red, green, blue)
            words = words[:-3]
        lines.append(words)
    for start in (0, 1):  # "0 background", "1 cat", ..., or from 1 without the background
        if all(len(words) > 1 and words[0] == str(start + number) for number, words in enumerate(lines)):
            lines = [words[1:] for words in lines]
            break
    names = [" ".join(words) for words in lines]
    if [name.lower() for name in names[:1]] != ["background"]:
        names.insert(0, "background")
        colours = {index + 1: colour for index, colour in colours.items()}
    check_classes(names[1:], file.uri)
    return tuple(names[1:]), _palette(names, colours, file)


def _palette(names: list[str], given: dict[int, tuple[int, int, int]], file: Place) -> Palette:
    """The given colours, and for the other names those of VOC, where they are free."""
    owners: dict[tuple[int, int, int], int] = {}
    for index, colour in given.items():
        if owners.setdefault(colour, index) != index:
            both = f"{names[owners[colour]]} and {names[index]}"
            raise UserError(f"{file.uri} gives {both} the colour {' '.join(map(str, colour))}: give each its own")
    default = voc_palette(len(names))
    for index in range(len(names)):
        if index not in given:
            owners.setdefault(default[index], index)
    free = (colour for colour in voc_palette(MAX_CLASSES + 1) if colour not in owners)
    of = {index: colour for colour, index in owners.items()}
    return tuple(of[index] if index in of else next(free) for index in range(len(names)))


def _share(name: str) -> float:
    """A number in [0, 1) that belongs to the name, for splitting without a draw."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]) / 2**56
