"""What an importer brings: the classes, the samples of each split by name, and how one of them is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cosa_ray.data.pictures import Broken, Palette, checked_image, checked_mask, classes_in, encode_indices
from cosa_ray.data.remote import Place
from cosa_ray.data.shard import Row


@dataclass(frozen=True)
class Source:
    """A set to import. Pickled to the tasks without its samples; each task is sent the samples of its shard."""

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


class Samples(Protocol):
    """The samples of a split: tuples whose first entry is the name; a list, or something that makes them."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Sequence[Any]: ...


class Reader(Protocol):
    """Reads one sample; picklable."""

    def __call__(self, sample: Any) -> Row:
        """The stored row of a sample. Raises Broken when it cannot be used."""


def read_file(place: Place, what: str) -> bytes:
    """Bytes of a file of the source. Raises Broken when it is not there; any other failure ends the import."""
    try:
        return place.read()
    except FileNotFoundError:
        raise Broken(f"there is no {what} {place.uri.rpartition('/')[2]}") from None


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
