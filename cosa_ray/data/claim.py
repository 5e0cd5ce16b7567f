"""Whose an import's folder is: the plan in it, the lock on it, and what may be deleted afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from cosa_ray.data.card import CARD, DatasetCard, read_card
from cosa_ray.data.remote import Place, place
from cosa_ray.data.source import Source
from cosa_ray.errors import UserError

STATE = "_import"  # folder inside the dataset while the import is under way: the plan, and a report for each shard

_PLAN = "plan.json"
_LOCK = "lock"
_OURS = re.compile(r"plan\.json|lock|.+-\d{5,}\.json|\..+\.part")
_CONTENTS = "contents"  # of the plan: may differ when an import goes on, for shards know what they were made of


def make_plan(source: Source, shard_images: int) -> dict[str, Any]:
    """What an import must agree on with an interrupted one to go on with it."""
    names, contents = {}, {}
    for split, samples in source.splits.items():
        named, whole = hashlib.sha256(), hashlib.sha256()
        for start in range(0, len(samples), shard_images):
            part = samples[start : start + shard_images]
            named.update("".join(f"{sample[0]}\n" for sample in part).encode())
            whole.update(digest(part).encode())
        names[split] = f"{len(samples)} {named.hexdigest()[:16]}"
        contents[split] = whole.hexdigest()[:16]
    plan = {
        "kind": source.kind,
        "source": None if source.uri is None else place(source.uri).path,  # however it was written
        "options": dict(source.options),
        "classes": source.classes,
        "palette": source.palette,
        "labels": source.labels_from,
        "masks": source.masks_from,
        "shard_images": shard_images,
        "samples": names,
        _CONTENTS: contents,
    }
    return dict(json.loads(json.dumps(plan)))


def digest(samples: Sequence[Any]) -> str:
    """Of everything that samples say: names, files, labels."""
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(f"{tuple(sample)!r}\n".encode(errors="backslashreplace"))
    return whole.hexdigest()


@contextlib.contextmanager
def alone(target: Place) -> Iterator[None]:
    """Hold a local `target` against a second import; object stores have no locks."""
    if target.exists() and not target.is_folder():
        raise UserError(f"{target.uri} is a file: give a folder to import into")
    _refuse_another_folder(target.child(STATE))
    if target.local is None:
        yield
        return
    from filelock import FileLock, Timeout

    state = target.local / STATE
    made = [folder for folder in (target.local, state) if not folder.exists()]
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {target.uri} ({error.strerror}): choose another folder") from None
    lock = FileLock(state / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another import is writing to {target.uri}: wait for it, or choose another folder") from None
    try:
        yield
    finally:
        # What a refused import made, and nothing else, goes again.
        if not (state / _PLAN).exists():
            (state / _LOCK).unlink(missing_ok=True)
            for folder in reversed(made):
                with contextlib.suppress(OSError):
                    folder.rmdir()
        lock.release()


def _refuse_another_folder(state: Place) -> None:
    """Raise UserError when the user has a folder of the name that imports use."""
    if _plan_in(state) is not None:
        return
    names = state.names()
    others = [*state.folders(), *(name for name in names if name != _LOCK or state.child(name).size())]
    if others:
        raise UserError(
            f"{state.uri} is no folder of an import (it holds {others[0]}), and imports need that name: "
            "move it away, or choose another folder"
        )


def _plan_in(state: Place) -> dict[str, Any] | None:
    if not state.child(_PLAN).exists():
        return None
    try:
        plan = json.loads(state.child(_PLAN).read())
    except ValueError:
        return None
    return plan if isinstance(plan, dict) and "shard_images" in plan else None


def claim(target: Place, plan: dict[str, Any]) -> DatasetCard | None:
    """Take `target` for this plan; the card when an earlier run of the same plan had only its tidying left.

    Raises UserError when `target` is complete, holds another import, or is not empty.
    """
    earlier = _plan_in(target.child(STATE))
    if target.child(CARD).exists():
        card = read_card(target)
        if earlier is not None:
            tidy(target)
        if earlier == plan:
            return card
        images = sum(split.images for split in card.splits.values())
        raise UserError(
            f"{target.uri} already holds a complete dataset ({card.origin.kind}, {images} images): "
            "choose another folder, or delete it first"
        )
    if earlier is None:
        others = [name for name in (*target.names(), *target.folders()) if name != STATE]
        if others:
            raise UserError(f"{target.uri} is not empty (it holds {others[0]}): choose an empty or a new folder")
    else:
        differs = ", ".join(key for key in plan if key != _CONTENTS and earlier.get(key) != plan[key])
        if differs:
            raise UserError(
                f"{target.uri} holds an interrupted import of something else (differs in {differs}): "
                "run that one again, choose another folder, or delete it first"
            )
    if earlier != plan:
        target.child(STATE).make_folder()
        target.child(STATE).child(_PLAN).write(json.dumps(plan, indent=1).encode())
    return None


def drop_begun(target: Place) -> None:
    """Delete what tasks that were killed or interrupted had begun to write."""
    for name in target.names():
        if name.startswith(".") and name.endswith(".part"):
            with contextlib.suppress(FileNotFoundError):
                target.child(name).delete()


def tidy(target: Place) -> None:
    """Delete what an import leaves beside the dataset, and nothing that someone else put there."""
    drop_begun(target)
    state = target.child(STATE)
    names = state.names()
    if all(_OURS.fullmatch(name) for name in names) and not state.folders():
        state.delete()
        return
    for name in sorted(names, key=lambda name: name == _PLAN):  # the plan last: it says that the others are ours
        if _OURS.fullmatch(name):
            state.child(name).delete()
