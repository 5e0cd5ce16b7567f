"""What an importer brings: the classes, the samples of each split by name, and how one of them is read."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cosa_ray.data.pictures import IGNORED, Broken, Palette, checked_image, checked_mask, classes_in, encode_indices
from cosa_ray.data.remote import Place
from cosa_ray.data.shard import Row
from cosa_ray.errors import UserError

MAX_CLASSES = IGNORED - 1  # mask values are bytes: 0 is background, 255 ignored

# What is wrong with one file, where other errors (no memory, no network) are wrong with all of them.
_OF_A_FILE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class Source:
    """A set to import. Pickled to the tasks without its samples; each task is sent the samples of its shard.

    `root` is the folder that the reader reads: tasks on other nodes make sure that it is there before they start.
    """

    kind: str
    uri: str | None
    options: Mapping[str, Any]
    classes: tuple[str, ...]
    palette: Palette
    labels_from: str
    masks_from: str
    splits: Mapping[str, Samples]
    reader: Reader
    drop_without_labels: bool = field(default=False, kw_only=True)
    root: Place | None = field(default=None, kw_only=True)


class Samples(Protocol):
    """The samples of a split: tuples of plain values, the name first; a list, or something that makes them."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Sequence[Any]: ...


class Reader(Protocol):
    """Reads one sample; picklable."""

    def __call__(self, sample: Any) -> Row:
        """The stored row of a sample. Raises Broken when it cannot be used."""


def read_file(place: Place, what: str) -> bytes:
    """Bytes of a file of the source. Raises Broken when it is not there or unreadable, OSError for other failures."""
    name = place.uri.rpartition("/")[2]
    try:
        return place.read()
    except FileNotFoundError:
        raise Broken(f"there is no {what} {name}") from None
    except OSError as error:
        if place.local is None or error.errno not in _OF_A_FILE:
            raise
        raise Broken(f"the {what} {name} cannot be read ({error.strerror})") from None


def read_text(file: Place) -> str:
    """A text file of the source. Raises FileNotFoundError without it, UserError when it is no UTF-8 text."""
    try:
        text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{file.uri} cannot be read ({error.strerror or error}): give a text file") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # of UTF-16 without its mark
        raise UserError(f"{file.uri} is not UTF-8 text: save it as UTF-8")
    return text


def check_classes(classes: Sequence[str], where: str) -> None:
    """Raise UserError unless the names found at `where` can be the classes of a dataset."""
    if not classes:
        raise UserError(f"{where} names no class: a dataset needs at least one")
    if len(classes) > MAX_CLASSES:
        raise UserError(
            f"{where} has {len(classes)} classes, and masks of bytes have room for {MAX_CLASSES}: use fewer"
        )
    if not all(name.strip() for name in classes):
        raise UserError(f"{where} has a class without a name: give every class a name")
    for index, name in enumerate(classes):
        if name.lower() == "background":
            raise UserError(f"{where} has a class {name!r}: leave it out, the background is no class")
        if name in classes[:index]:
            raise UserError(f"{where} names the class {name!r} twice: give every class a name of its own")


def check_names(names: Iterable[str], where: str) -> None:
    """Raise UserError when the list of images at `where` names one of them twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{where} names {name} twice: leave one entry for each image")
        seen.add(name)


def stored_row(
    name: str,
    image: bytes,
    mask: bytes | None,
    labels: Sequence[int] | None,
    num_classes: int,
    palette: Palette,
) -> Row:
    """Check a sample by decoding it and bring it to the stored form; labels None takes the classes of the mask."""
    stored, height, width = checked_image(image)
    indices = None if mask is None else checked_mask(mask, height, width, num_classes, palette)
    if labels is None:
        if indices is None:
            raise Broken("there is neither a label nor a mask to take it from")
        labels = classes_in(indices)
    encoded = None if indices is None else encode_indices(indices)
    return Row(name, stored, encoded, tuple(sorted(set(labels))), height, width)
