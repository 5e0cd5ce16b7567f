"""The data doctor: what a dataset holds, whether its bytes are right, and where labels and masks disagree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from cosa_ray.data.card import PutAside, ShardCard, SplitCard, SubsetCard
from cosa_ray.data.dataset import Sample, Split, locate_dataset, subset_ids, wrong_size
from cosa_ray.data.pictures import IGNORED
from cosa_ray.data.remote import file_sha256
from cosa_ray.data.shard import map_shard
from cosa_ray.errors import UserError

_Counts = Annotated[list[int], Field(default_factory=list)]


class Disagreement(BaseModel):
    """An image whose labels and mask do not name the same classes."""

    id: str
    only_in_labels: list[str]
    only_in_mask: list[str]


class SplitReport(BaseModel):
    """What a split holds. Pixels are counted over the masks; sizes are [smallest, median, largest], pixels."""

    images: int
    masks: int
    bytes: int
    images_per_class: _Counts
    pixels_per_class: _Counts = Field(description="Background first.")
    ignored_pixels: int = 0
    without_labels: int = Field(0, description="Images here that no label names a class of.")
    left_out_without_labels: int = 0
    height: _Counts
    width: _Counts
    disagreements: list[Disagreement] = Field(default_factory=list)
    put_aside: list[PutAside] = Field(default_factory=list)


class SubsetReport(BaseModel):
    """What a subset names; `missing` are the ids that its split does not hold."""

    of: str
    images: int
    masks: int
    origin: str
    missing: list[str] = Field(default_factory=list)


class CheckReport(BaseModel):
    """The result of `cosa-ray data check`; `damage` is empty when every shard, mask and list is what the card says."""

    dataset: str
    classes: list[str]
    palette: list[str]
    labels_from: str
    masks_from: str
    shards: int
    splits: dict[str, SplitReport]
    subsets: dict[str, SubsetReport]
    damage: list[str]

    @property
    def ok(self) -> bool:
        """True when nothing is damaged."""
        return not self.damage


class _Found(NamedTuple):
    """What one mask shows."""

    pixels: np.ndarray
    disagreement: Disagreement | None
    damage: str | None


def check_dataset(uri: str, progress: Callable[[int, int], None] | None = None) -> CheckReport:
    """Verify every checksum, read every mask, count everything. `progress` is told images done and in all.

    Images are not decoded again: they were at the import, and the checksums say that they have not changed since.
    Raises UserError when there is no dataset at `uri`.
    """
    folder, card = locate_dataset(uri)
    damage: list[str] = []
    splits: dict[str, SplitReport] = {}
    ids: dict[str, set[str]] = {}
    total = sum(split.images for split in card.splits.values())
    done = 0
    for name, split in card.splits.items():
        whole = []
        for shard in split.shards:
            wrong = _damage(folder, shard, len(card.classes))
            if wrong:
                damage.append(wrong)
            else:
                whole.append(shard)
        report = _empty(split, len(card.classes))
        splits[name] = report
        readable = split.model_copy(
            update={"shards": tuple(whole), "images": sum(shard.images for shard in whole)},
        )
        samples = Split(folder, name, readable, card.classes)
        _count(samples, report)
        ids[name] = set(samples.ids()) if any(subset.of == name for subset in card.subsets.values()) else set()
        for found in _masks(samples):
            if found.damage:
                damage.append(f"split {name}, {found.damage}")
            else:
                report.masks += bool(found.pixels.sum())
                report.ignored_pixels += int(found.pixels[IGNORED])
                for index in range(len(card.classes) + 1):
                    report.pixels_per_class[index] += int(found.pixels[index])
                if found.disagreement:
                    report.disagreements.append(found.disagreement)
            done += 1
            if progress is not None:
                progress(done, total)
        if len(whole) == len(split.shards):
            same = report.images_per_class == list(split.images_per_class) and report.masks == split.masks
            if not same and not damage:
                damage.append(f"split {name} does not hold the counts of its card")
    subsets = {}
    for name, subset in card.subsets.items():
        subsets[name], found_wrong = _subset(folder, name, subset, ids[subset.of])
        damage += found_wrong
    return CheckReport(
        dataset=uri,
        classes=list(card.classes),
        palette=[hex_colour(colour) for colour in card.palette],
        labels_from=card.labels_from,
        masks_from=card.masks_from,
        shards=sum(len(split.shards) for split in card.splits.values()),
        splits=splits,
        subsets=subsets,
        damage=damage,
    )


def hex_colour(colour: tuple[int, int, int]) -> str:
    """#rrggbb."""
    red, green, blue = colour
    return f"#{red:02x}{green:02x}{blue:02x}"


def _damage(folder: Path, shard: ShardCard, num_classes: int) -> str | None:
    if wrong := wrong_size(folder, shard):
        return wrong
    if file_sha256(folder / shard.file) != shard.sha256:
        return f"shard {folder / shard.file} does not have the checksum of its card"
    try:
        map_shard(folder / shard.file, shard, num_classes)
    except UserError as error:
        return str(error)
    return None


def _subset(folder: Path, name: str, subset: SubsetCard, there: set[str]) -> tuple[SubsetReport, list[str]]:
    """What a subset names, and what is wrong with it."""
    report = SubsetReport(of=subset.of, images=subset.images, masks=subset.masks, origin=subset.origin)
    try:
        report.missing = [each for each in subset_ids(folder, subset) if each not in there]
    except UserError as error:
        return report, [str(error)]
    count = len(report.missing)
    first = f"subset {name} names {count} images that split {subset.of} does not have, the first " if count else ""
    return report, [first + report.missing[0]] if count else []


def _empty(split: SplitCard, num_classes: int) -> SplitReport:
    return SplitReport(
        images=0,
        masks=0,
        bytes=sum(shard.bytes for shard in split.shards),
        images_per_class=[0] * num_classes,
        pixels_per_class=[0] * (num_classes + 1),
        left_out_without_labels=split.without_labels,
        height=[],
        width=[],
        put_aside=list(split.put_aside),
    )


def _count(samples: Split, report: SplitReport) -> None:
    report.images = len(samples)
    if not len(samples):
        return
    labels = samples.labels()
    report.images_per_class = [int(count) for count in labels.sum(0)]
    report.without_labels = int((labels.sum(1) == 0).sum())
    shapes = samples.shapes()
    for key, sides in (("height", shapes[:, 0]), ("width", shapes[:, 1])):
        setattr(report, key, [int(sides.min()), int(np.median(sides)), int(sides.max())])


def _masks(samples: Split) -> Iterator[_Found]:
    """What the masks show, in order; decoding releases the interpreter's lock, so threads help."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for start in range(0, len(samples), 256):
            part = range(start, min(start + 256, len(samples)))
            yield from threads.map(lambda index: _look(samples[index], samples.classes), part)


def _look(sample: Sample, classes: tuple[str, ...]) -> _Found:
    nothing = np.zeros(256, np.int64)
    if sample.mask is None:
        return _Found(nothing, None, None)
    try:
        mask = sample.decode_mask()
    except UserError as error:
        return _Found(nothing, None, str(error))
    if mask.shape != (sample.height, sample.width):
        return _Found(nothing, None, f"mask {sample.id} is not as large as its image")
    pixels = np.bincount(mask.ravel(), minlength=256)
    if pixels[len(classes) + 1 : IGNORED].any():
        return _Found(nothing, None, f"mask {sample.id} holds values that are no class")
    shown = pixels[1 : len(classes) + 1] > 0
    said = sample.labels > 0
    if (shown == said).all():
        return _Found(pixels, None, None)
    names = np.array(classes)
    difference = Disagreement(
        id=sample.id, only_in_labels=names[said & ~shown].tolist(), only_in_mask=names[shown & ~said].tolist()
    )
    return _Found(pixels, difference, None)
