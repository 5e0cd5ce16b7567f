"""A dataset opened for reading: memory-mapped shards, any sample in O(1), nothing decoded until asked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from cosa_ray.data.card import (
    CARD,
    SUBSETS,
    DatasetCard,
    Origin,
    ShardCard,
    SplitCard,
    SubsetCard,
    read_card,
    write_card,
)
from cosa_ray.data.pictures import decode_indices, decode_rgb
from cosa_ray.data.remote import NotThere, Place, cached, fetch, place, reaching, say_copy
from cosa_ray.data.shard import map_shard
from cosa_ray.errors import UserError


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its labels: `labels` float32 (C,), `image` encoded, `mask` PNG of class indices or None."""

    id: str
    image: bytes
    mask: bytes | None
    labels: np.ndarray
    height: int
    width: int

    def decode_image(self) -> Image.Image:
        """The picture in RGB. Raises UserError when its bytes are damaged."""
        try:
            return decode_rgb(self.image)
        except Exception as error:
            raise UserError(
                f"image {self.id} cannot be decoded ({error}): check the dataset with `data check`"
            ) from None

    def decode_mask(self) -> np.ndarray:
        """Class indices, uint8 (H, W): 0 background, 1..C, 255 ignored. Raises UserError without a mask."""
        if self.mask is None:
            raise UserError(f"image {self.id} has no mask: choose a split that has masks")
        try:
            return decode_indices(self.mask)
        except Exception as error:
            raise UserError(
                f"mask {self.id} cannot be decoded ({error}): check the dataset with `data check`"
            ) from None


class Split:
    """The samples of one split, or of a subset of it, by index.

    Pickles as a path, so loader processes map the same pages themselves. `card` is the whole split's.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        card: SplitCard,
        classes: tuple[str, ...],
        subset: SubsetCard | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.folder = folder
        self.name = name
        self.card = card
        self.classes = classes
        self.subset = subset
        self._origin = origin
        self._counts: SplitCard | SubsetCard = subset or card
        self._ends = np.cumsum([shard.images for shard in card.shards], dtype=np.int64)
        self._tables: dict[int, pa.Table] = {}
        self._rows: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}, "_rows": None}

    def __len__(self) -> int:
        return self._counts.images

    @property
    def num_classes(self) -> int:
        """Number of classes C, background left out."""
        return len(self.classes)

    @property
    def has_masks(self) -> bool:
        """True when every image has a mask."""
        return 0 < self._counts.images == self._counts.masks

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, 0-based. Raises IndexError beyond the end, UserError for a damaged shard."""
        if not 0 <= index < len(self):
            raise IndexError(f"split {self.name} has {len(self)} images, there is no image {index}")
        whole = index if self.subset is None else int(self._places(self.subset)[index])
        shard = int(np.searchsorted(self._ends, whole, side="right"))
        table = self._table(shard)
        row = whole - (int(self._ends[shard - 1]) if shard else 0)
        name, image, mask, labels, height, width = (column[row] for column in table.columns)
        return Sample(
            id=name.as_py(),
            image=image.as_py(),
            mask=mask.as_py(),
            labels=_numbers(labels.values, np.uint8).astype(np.float32),
            height=height.as_py(),
            width=width.as_py(),
        )

    def context(self, sample: Sample) -> np.ndarray | None:
        """Where a sample's classes have what mostly comes with them (rails, of trains), bool (H, W), objects included.

        None where the dataset does not know, as all but made-up shapes that coexist.
        """
        if self._origin is None or self._origin.kind != "shapes":
            return None
        from cosa_ray.data.shapes import context_of

        return context_of(self._origin.options, sample.id)

    def labels(self) -> np.ndarray:
        """Image-level labels of the whole split, float32 (N, C), without touching an image."""
        flat = _joined([chunk.flatten() for chunk in self._chunks("labels")], np.uint8)
        return self._mine(flat.reshape(-1, self.num_classes).astype(np.float32))

    def ids(self) -> list[str]:
        """Ids of the whole split, in order."""
        return self._all_ids() if self.subset is None else subset_ids(self.folder, self.subset)

    def masked(self) -> np.ndarray:
        """Which images have a mask, bool (N,)."""
        null = [value for chunk in self._chunks("mask") for value in chunk.is_null().to_pylist()]
        return self._mine(~np.array(null, bool))

    def shapes(self) -> np.ndarray:
        """Height and width of every image, int64 (N, 2)."""
        columns = [_joined(self._chunks(key), np.int32) for key in ("height", "width")]
        return self._mine(np.stack(columns, axis=1).astype(np.int64))

    def _mine(self, values: np.ndarray) -> np.ndarray:
        """Of values for every image of the whole split, those of this one's images."""
        return values if self.subset is None else values[self._places(self.subset)]

    def _places(self, subset: SubsetCard) -> np.ndarray:
        """Places of the subset's images in the whole split, int64 (N,)."""
        if self._rows is None:
            where = {name: row for row, name in enumerate(self._all_ids())}
            ids = subset_ids(self.folder, subset)
            missing = [name for name in ids if name not in where]
            if missing:
                raise UserError(
                    f"subset {self.name} of {self.folder} names {len(missing)} images that split {subset.of} does not "
                    f"have, the first {missing[0]}: copy the dataset again"
                )
            self._rows = np.array([where[name] for name in ids], np.int64)
        return self._rows

    def _all_ids(self) -> list[str]:
        return [name for chunk in self._chunks("id") for name in chunk.to_pylist()]

    def _chunks(self, key: str) -> list[Any]:
        return [chunk for shard in range(len(self._ends)) for chunk in self._table(shard).column(key).chunks]

    def _table(self, shard: int) -> pa.Table:
        if shard not in self._tables:
            card = self.card.shards[shard]
            self._tables[shard] = map_shard(self.folder / card.file, card, self.num_classes)
        return self._tables[shard]


def _numbers(array: Any, kind: type[np.generic]) -> np.ndarray:
    """The values of an Arrow array without nulls, not copied. Its own to_numpy imports pandas: seconds a process."""
    if not len(array):
        return np.zeros(0, kind)
    return np.frombuffer(array.buffers()[1], kind)[array.offset : array.offset + len(array)]


def _joined(arrays: list[Any], kind: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *(_numbers(array, kind) for array in arrays)])


class Dataset:
    """A dataset on this machine: its card and its splits."""

    def __init__(self, folder: Path, card: DatasetCard, uri: str) -> None:
        self.folder = folder
        self.card = card
        self.uri = uri

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, background left out."""
        return self.card.classes

    @property
    def num_classes(self) -> int:
        """Number of classes C, background left out."""
        return len(self.card.classes)

    def split(self, name: str) -> Split:
        """The split or subset `name`. Raises UserError naming those there are, or for a damaged list of a subset."""
        if (subset := self.card.subsets.get(name)) is not None:
            subset_ids(self.folder, subset)  # what is wrong with it should be said now, not by a loader process
            return Split(self.folder, name, self.card.splits[subset.of], self.classes, subset, self.card.origin)
        if name not in self.card.splits:
            there = ", ".join(self.card.splits) or "none"
            there += f", its subsets {', '.join(self.card.subsets)}" if self.card.subsets else ""
            raise UserError(f"{self.uri} has no split {name!r}: its splits are {there}")
        return Split(self.folder, name, self.card.splits[name], self.classes, origin=self.card.origin)


def locate_dataset(uri: str) -> tuple[Path, DatasetCard]:
    """Folder on this machine and card of a dataset; a remote one is copied once a node.

    When the remote cannot be reached, the newest copy of this node serves. Raises UserError when there is no dataset.
    """
    try:
        where = place(uri)
        with reaching(uri):
            card = read_card(where)
        folder = fetch(uri, {shard.file: shard.sha256 for split in card.splits.values() for shard in split.shards})
        if where.local is None:
            for subset in card.subsets.values():
                _fetch_list(where, folder, subset)
    except NotThere as error:
        copy = cached(uri, having=CARD)
        if copy is None:
            raise
        say_copy(uri, str(error), copy)
        return copy, read_card(place(copy))
    if where.local is None:
        write_card(card, place(folder))  # after what it names, as everywhere; it may change without the shards
    return folder, card


def _fetch_list(remote: Place, folder: Path, subset: SubsetCard) -> None:
    """Copy the list of a subset beside the shards; not with them, for a subset more does not make other shards."""
    target = folder / subset.ids_file
    if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == subset.sha256:
        return
    origin = remote.child(subset.ids_file)
    with reaching(origin.uri):
        data = origin.read()
    if hashlib.sha256(data).hexdigest() != subset.sha256:
        raise UserError(f"{origin.uri} does not have the checksum its card says: it is damaged, copy the dataset again")
    (folder / SUBSETS).mkdir(exist_ok=True)
    place(target).write(data)


def subset_ids(folder: Path, subset: SubsetCard) -> list[str]:
    """Ids of a subset, in order. Raises UserError when its list is missing, or not the one of its card."""
    file = folder / subset.ids_file
    again = "copy the dataset again, or make the subset again"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"list {file} of a subset cannot be read ({error.strerror}): {again}") from None
    if hashlib.sha256(data).hexdigest() != subset.sha256:
        raise UserError(f"list {file} of a subset does not have the checksum of its card: {again}")
    ids = data.decode().split("\n")[:-1]
    if len(set(ids)) != subset.images:
        raise UserError(f"list {file} of a subset does not name the {subset.images} images its card says: {again}")
    return ids


def open_dataset(uri: str) -> Dataset:
    """Open a dataset folder or URI; reads the card and the sizes of the shards only.

    Raises UserError when there is no dataset, it is of another format version, or a shard is missing or cut short.
    """
    folder, card = locate_dataset(uri)
    for split in card.splits.values():
        for shard in split.shards:
            if damage := wrong_size(folder, shard):
                raise UserError(f"{damage}: copy the dataset again, or import it again")
    return Dataset(folder, card, uri)


def wrong_size(folder: Path, shard: ShardCard) -> str | None:
    """What is wrong with a shard's file at first sight, None when nothing is."""
    path = folder / shard.file
    if not path.exists():
        return f"shard {path} is missing"
    size = path.stat().st_size
    return None if size == shard.bytes else f"shard {path} is {size} bytes long instead of {shard.bytes}"
