"""A folder of one's own: images, a CSV or JSON of image-level labels, masks where there are any."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from typing import NamedTuple

from cosa_ray.data.pictures import Broken, Palette, voc_palette
from cosa_ray.data.remote import Place, place
from cosa_ray.data.shard import Row
from cosa_ray.data.source import Source, read_file, stored_row
from cosa_ray.errors import UserError

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_YES = ("1", "1.0", "true", "yes", "x")
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

    Classes are those of `classes.txt` (one a line, optionally followed by its colour: `name r g b`; a first line
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
    classes, colours = _classes(root, columns or sorted({name for entry in entries for name in entry.labels}))
    images = root.child("images") if root.child("images").is_folder() else root
    there = {name.rpartition(".")[0]: name for name in images.names(True) if name.lower().endswith(_ENDINGS)}
    masks = {name.rpartition(".")[0]: name for name in root.child("masks").names(True) if name.lower().endswith(".png")}
    splits: dict[str, list[_Sample]] = {}
    seen: set[str] = set()
    for image, named, split in entries:
        stem = image.rpartition(".")[0] if image.lower().endswith(_ENDINGS) else image
        stem = stem if stem in there else stem.removeprefix("images/")
        if stem in seen:
            raise UserError(f"{file.uri} names {image} twice: leave one line for each image")
        seen.add(stem)
        if not split:
            split = "val" if _share(stem) < val_fraction else "train"
        splits.setdefault(split, []).append(_Sample(stem, there.get(stem), masks.get(stem), named))
    for split in splits:
        if not split.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"{file.uri} names the split {split!r}: use letters, digits, - and _")
    return Source(
        kind="folder",
        uri=uri,
        options={"labels": file.path.rpartition("/")[2], "val_fraction": val_fraction},
        classes=classes,
        palette=colours,
        labels_from=file.path.rpartition("/")[2],
        masks_from="masks" if masks else "none",
        splits=splits,
        reader=_Reader(images, root.child("masks"), classes, colours),
    )


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
        if (file := root.child(name)).exists():
            return file
    raise UserError(
        f"{root.uri} has no {labels or 'labels.csv or labels.json'}: write one, see `data import folder --help`"
    )


def _entries(file: Place) -> tuple[list[_Entry], list[str]]:
    """Lines of the label file, and the classes that its columns name (none for lists of names)."""
    try:
        text = file.read().decode("utf-8-sig")
        return (_json_entries(text), []) if file.path.endswith(".json") else _csv_entries(text)
    except (ValueError, csv.Error) as error:  # of encoding, of JSON, and those raised below
        raise UserError(f"{file.uri} cannot be used: {error}") from None


def _json_entries(text: str) -> list[_Entry]:
    content = json.loads(text)
    if not isinstance(content, dict) or not content:
        raise ValueError("it must be an object {image: [class, ...]} or {split: {image: [class, ...]}}")
    nested = all(isinstance(value, dict) for value in content.values())
    entries = []
    for split, images in content.items() if nested else [("", content)]:
        for image, names in images.items():
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"the labels of {image} are not a list of names")
            entries.append(_Entry(image, tuple(names), split))
    return entries


def _csv_entries(text: str) -> tuple[list[_Entry], list[str]]:
    table = csv.DictReader(io.StringIO(text))
    fields = [field.strip() for field in table.fieldnames or ()]
    if "image" not in fields or len(fields) < 2:
        raise ValueError("its first line must name the columns: image, and labels or one column a class")
    table.fieldnames = fields
    columns = [] if "labels" in fields else [field for field in fields if field not in ("image", "split")]
    entries = []
    for row in table:
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


def _classes(root: Place, occurring: list[str]) -> tuple[tuple[str, ...], Palette]:
    file = root.child("classes.txt")
    if not file.exists():
        if not occurring:
            raise UserError(f"{root.uri} names no class: label at least one image, or list the classes in classes.txt")
        return tuple(occurring), voc_palette(len(occurring) + 1)
    names: list[str] = []
    colours: dict[int, tuple[int, int, int]] = {}
    for line in file.read().decode("utf-8-sig").splitlines():
        words = line.split()
        if not words:
            continue
        if len(words) > 3 and all(word.isdigit() and int(word) < 256 for word in words[-3:]):
            red, green, blue = (int(word) for word in words[-3:])
            colours[len(names)] = (red, green, blue)
            words = words[:-3]
        if len(words) > 1 and words[0] == str(len(names)):  # "0 background"
            words = words[1:]
        names.append(" ".join(words))
    if names[:1] != ["background"]:
        names.insert(0, "background")
        colours = {index + 1: colour for index, colour in colours.items()}
    if len(names) < 2 or len(set(names)) != len(names):
        raise UserError(f"{file.uri} must name every class once, one a line")
    default = voc_palette(len(names))
    return tuple(names[1:]), tuple(colours.get(index, default[index]) for index in range(len(names)))


def _share(name: str) -> float:
    """A number in [0, 1) that belongs to the name, for splitting without a draw."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]) / 2**56
