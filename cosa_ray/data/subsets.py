"""Named subsets of a split: chosen once, listed by id beside the card, and read wherever a split is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from cosa_ray.data.card import SUBSETS, DatasetCard, SubsetCard, read_card, write_card
from cosa_ray.data.claim import alone
from cosa_ray.data.dataset import Dataset, Split, open_dataset
from cosa_ray.data.remote import Place, place, reaching
from cosa_ray.data.source import read_text
from cosa_ray.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9_-]+")  # part of a file's name and of the metrics'
_OF_CONFIG = re.compile(r".*_subset_\d+")  # what metrics call the part of a split that evaluation.subset takes
_ENDING = re.compile(r"\.(jpe?g|png)$", re.IGNORECASE)
_COCO = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d+)")


def add_subset(
    dataset: str | os.PathLike[str],
    name: str,
    *,
    of: str = "val",
    ids: str | os.PathLike[str] | Iterable[str] | None = None,
    first: int | None = None,
    random: int | None = None,
    seed: int = 0,
    rest_of: str | None = None,
) -> DatasetCard:
    """Give some images of the split `of` the name `name`, copying none; returns the card, which says so from then on.

    One of four chooses them: `ids`, the names themselves or the path or URI of a list with one a line (folders, the
    endings .jpg and .png, and the leading part or the leading zeros of COCO's names make no difference); `first`, the
    split's first n; `random`, n drawn with `seed` by the hash of their ids, so that neither the split's order nor a
    library's version changes the draw, and a larger n adds to a smaller one; `rest_of`, a subset, those of the split
    that it leaves out. They stay in the split's order. The same
    subset may be added again; another one of its name is refused, because metrics carry the name. A remote dataset is
    copied to this node first, as for training.
    Raises UserError for a bad or taken name, ids that are not in the split or stand twice, none or too many images, and
    a dataset that cannot be written.
    """
    uri = os.fspath(dataset)
    if sum(choice is not None for choice in (ids, first, random, rest_of)) != 1:
        raise UserError("a subset needs one of ids, first, random and rest_of, which say its images: give exactly one")
    _check_name(name)
    listed, origin = (None, "") if ids is None else _listed(ids)
    opened, where = open_dataset(uri), place(uri)
    samples = _whole(opened, name, of)
    there = samples.ids()
    split = f"split {of} of {uri}"
    if listed is not None:
        rows = _matched(listed, there, split, origin)
    elif first is not None:
        rows, origin = list(range(_at_most(first, there, split))), f"first {first}"
    elif rest_of is not None:
        rows, origin = _left(opened, rest_of, samples), f"what {rest_of} leaves out"
    else:
        count = _at_most(random or 0, there, split)
        rows, origin = _drawn(there, count, seed), f"{count} at random, seed {seed}"
    with contextlib.nullcontext() if where.local is None else alone(where):
        with reaching(uri):
            card = read_card(where)
        return _write(where, card, name, samples, rows, origin)


def read_list(file: Place) -> list[str]:
    """Lines of a list of images, empty ones left out. Raises UserError when there is no list, or it names none."""
    try:
        lines = read_text(file).splitlines()
    except FileNotFoundError:
        raise UserError(f"there is no list {file.uri}: give a text file with the id of one image a line") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"{file.uri} names no image: give a text file with the id of one image a line")
    return names


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"a subset cannot be named {name!r}: use the letters a to z, digits, - and _")
    if _OF_CONFIG.fullmatch(name):
        raise UserError(
            f"a subset cannot be named {name}, which metrics call what evaluation.subset takes: choose another name"
        )


def _listed(ids: str | os.PathLike[str] | Iterable[str]) -> tuple[list[str], str]:
    if isinstance(ids, str | os.PathLike):
        file = place(ids)
        return read_list(file), f"list {file.path.rpartition('/')[2]}"
    names = list(ids)
    if not names:
        raise UserError("a subset needs images, and ids has none: give at least one")
    return names, "ids"


def _whole(dataset: Dataset, name: str, of: str) -> Split:
    """The split to choose from."""
    splits = dataset.card.splits
    if name in splits:
        raise UserError(f"{dataset.uri} has a split {name} already: give the subset another name")
    if of not in splits:
        what = "is a subset itself" if of in dataset.card.subsets else "is not there"
        raise UserError(
            f"{dataset.uri} cannot give a subset of {of!r}, which {what}: its splits are {', '.join(splits)}"
        )
    return dataset.split(of)


def _at_most(count: int, there: list[str], split: str) -> int:
    if not 1 <= count <= len(there):
        raise UserError(f"{split} has {len(there)} images, and {count} were asked for: choose from 1 to {len(there)}")
    return count


def _drawn(there: list[str], count: int, seed: int) -> list[int]:
    keys = [hashlib.sha256(f"{seed} {name}".encode()).digest() for name in there]
    return sorted(sorted(range(len(there)), key=lambda row: (keys[row], there[row]))[:count])


def _left(dataset: Dataset, subset: str, samples: Split) -> list[int]:
    """Places of the images that a subset of the split leaves out."""
    card = dataset.card.subsets.get(subset)
    if card is None or card.of != samples.name:
        known = ", ".join(name for name, each in dataset.card.subsets.items() if each.of == samples.name) or "none"
        raise UserError(f"{dataset.uri} has no subset {subset!r} of {samples.name}: there are {known}")
    taken = set(dataset.split(subset).ids())
    rows = [row for row, name in enumerate(samples.ids()) if name not in taken]
    if not rows:
        raise UserError(f"subset {subset} of {dataset.uri} is all of {samples.name}: it leaves no image out")
    return rows


def _matched(names: list[str], there: list[str], split: str, source: str) -> list[int]:
    """Places of the images that a list means, ascending."""
    exact = {name: row for row, name in enumerate(there)}
    numbers = [None if (match := _COCO.fullmatch(name)) is None else int(match[1]) for name in there]
    shared = Counter(numbers)
    by_number = {number: row for row, number in enumerate(numbers) if number is not None and shared[number] == 1}
    named: dict[int, str] = {}
    missing = []
    for name in names:
        row = next((exact[spelling] for spelling in _spellings(name) if spelling in exact), None)
        if row is None:
            bare = _COCO.fullmatch([*_spellings(name)][-1])
            row = by_number.get(int(bare[1])) if bare else None
        if row is None:
            missing.append(name)
        elif row in named:
            spelled = "" if named[row] == name else f" (as {named[row]} and {name})"
            raise UserError(f"{there[row]} stands twice in {source}{spelled}: leave one entry for each image")
        else:
            named[row] = name
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names)} images of {source} are not in {split}, the first {missing[0]}: "
            "mend the list, or choose another split"
        )
    return sorted(named)


def _spellings(name: str) -> Iterator[str]:
    """What an image of a list may be called in the dataset, the likeliest first; its bare name last."""
    last = name.rpartition("/")[2]
    yield from (name, _ENDING.sub("", name), last, _ENDING.sub("", last))


def _write(where: Place, card: DatasetCard, name: str, samples: Split, rows: list[int], origin: str) -> DatasetCard:
    """The list first, then the card that names it."""
    there = samples.ids()
    ids = [there[row] for row in rows]
    odd = next((each for each in ids if "\n" in each), None)
    if odd is not None:
        raise UserError(f"image {odd!r} has a line break in its id, and lists have one id a line: rename it and import")
    data = "".join(f"{each}\n" for each in ids).encode()
    subset = SubsetCard(
        of=samples.name,
        ids_file=f"{SUBSETS}/{name}.txt",
        images=len(ids),
        masks=int(np.count_nonzero(samples.masked()[rows])),
        sha256=hashlib.sha256(data).hexdigest(),
        origin=origin,
    )
    earlier = card.subsets.get(name)
    if earlier is not None and (earlier.of, earlier.sha256) != (subset.of, subset.sha256):
        raise UserError(
            f"{where.uri} has another subset {name} ({earlier.images} images of {earlier.of}, {earlier.origin}): "
            "choose another name, because metrics carry it"
        )
    changed = DatasetCard(**{**dict(card), "version": 2, "subsets": {**card.subsets, name: earlier or subset}})
    try:
        where.child(SUBSETS).make_folder()
        where.child(subset.ids_file).write(data)
        if earlier is None:
            write_card(changed, where)
    except Exception as error:
        # Each kind of store has exceptions of its own.
        raise UserError(f"cannot write to {where.uri} ({error}): make the subset where it can be written") from None
    return changed
