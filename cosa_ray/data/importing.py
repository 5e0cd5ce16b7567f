"""Imports: shard by shard, in parallel on Ray or in this process, resumable, and never over something else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cosa_ray.data.card import CARD, DatasetCard, Origin, PutAside, SplitCard, read_card, write_card
from cosa_ray.data.pictures import Broken
from cosa_ray.data.remote import Place, place
from cosa_ray.data.shard import Row, write_shard
from cosa_ray.data.source import Reader, Source
from cosa_ray.errors import RunFailed, UserError

SHARD_IMAGES = 512  # images of a shard: for VOC and COCO 60 to 90 MB

_STATE = "_import"  # folder inside the dataset while the import is under way: the plan, and a report for each shard


class Progress(NamedTuple):
    """How far an import is, in samples of the source."""

    done: int
    total: int
    put_aside: int


def import_dataset(
    kind: str,
    source: str | None,
    out: str,
    *,
    strict: bool = False,
    local: bool = False,
    progress: Callable[[Progress], None] | None = None,
    shard_images: int = SHARD_IMAGES,
    **options: Any,
) -> DatasetCard:
    """Import `source` as a dataset at `out` (paths or URIs) and return its card.

    `kind` is shapes (no source), voc, coco or folder; `options` are those of shapes_source, voc_source, coco_source and
    folder_source. `local` works in this process instead of on Ray. Raises what write_dataset raises, and UserError for
    a source that is not of its kind.
    """
    return write_dataset(
        _source(kind, source, options), out, strict=strict, local=local, progress=progress, shard_images=shard_images
    )


def _source(kind: str, source: str | None, options: dict[str, Any]) -> Source:
    if kind == "shapes":
        from cosa_ray.data.shapes import shapes_source

        return shapes_source(**options)
    if source is None:
        raise UserError(f"`data import {kind}` needs the folder or URI to import")
    if kind == "voc":
        from cosa_ray.data.voc import voc_source

        return voc_source(source, **options)
    if kind == "coco":
        from cosa_ray.data.coco import coco_source

        return coco_source(source, **options)
    if kind == "folder":
        from cosa_ray.data.folder import folder_source

        return folder_source(source, **options)
    raise UserError(f"there is no importer {kind!r}: choose shapes, voc, coco or folder")


@dataclass(frozen=True)
class _Job:
    """One shard to write; what a task is sent."""

    name: str
    split: str
    samples: Sequence[Any]
    reader: Reader
    target: Place
    num_classes: int
    strict: bool
    drop_without_labels: bool


def write_dataset(
    source: Source,
    out: str,
    *,
    strict: bool = False,
    local: bool = False,
    progress: Callable[[Progress], None] | None = None,
    shard_images: int = SHARD_IMAGES,
) -> DatasetCard:
    """Write the dataset of `source` at `out`; the card comes last, so a folder with a card is complete.

    Memory is bounded by what one shard's task holds (64 samples), times the tasks at work, whatever the size of the
    set. Running it again after an interruption goes on after the shards whose checksums are right and ends in the same
    bytes. A sample that cannot be used is put aside by name, or with `strict` ends the import. Raises UserError when
    `out` is complete, belongs to another import or is not empty; RunFailed when a task fails.
    """
    target = place(out)
    plan = _plan(source, shard_images)
    with _alone(target):
        finished = _claim(target, plan)
        if finished is not None:
            return finished
        jobs = _jobs(source, target, strict, shard_images)
        sizes = {split: len(samples) for split, samples in source.splits.items()}
        total, done, aside = sum(sizes.values()), 0, 0
        reports: dict[str, SplitCard] = {}
        for job, report in _run(jobs, local):
            if strict and report.put_aside:
                first = report.put_aside[0]
                raise UserError(f"{job.split} {first.id}: {first.reason}; mend it, or import without --strict")
            reports[job.name] = report
            done += len(job.samples)
            aside += len(report.put_aside)
            if progress is not None:
                progress(Progress(done, total, aside))
        splits = {split: _merged(split, reports, len(source.classes)) for split in sizes}
        if not any(split.images for split in splits.values()):
            reasons = [
                f"; the first, {item.id}: {item.reason}" for split in splits.values() for item in split.put_aside
            ]
            why = reasons[0] if reasons else ""
            raise UserError(f"none of the {total} images of {source.uri or source.kind} could be used{why}")
        card = DatasetCard(
            classes=source.classes,
            palette=source.palette,
            labels_from=source.labels_from,
            masks_from=source.masks_from,
            origin=Origin(kind=source.kind, source=source.uri, options=dict(source.options)),
            splits=splits,
        )
        for name in target.names():
            if name.startswith(".") and name.endswith(".part"):  # of a task that was killed
                target.child(name).delete()
        write_card(card, target)
        target.child(_STATE).delete()
    return card


def _plan(source: Source, shard_images: int) -> dict[str, Any]:
    """What an import must agree on with an interrupted one to go on with it."""
    names = {}
    for split, samples in source.splits.items():
        digest = hashlib.sha256()
        for start in range(0, len(samples), shard_images):
            for sample in samples[start : start + shard_images]:
                digest.update(f"{sample[0]}\n".encode())
        names[split] = f"{len(samples)} {digest.hexdigest()[:16]}"
    plan = {
        "kind": source.kind,
        "source": None if source.uri is None else place(source.uri).path,  # however it was written
        "options": dict(source.options),
        "classes": source.classes,
        "labels": source.labels_from,
        "masks": source.masks_from,
        "shard_images": shard_images,
        "samples": names,
    }
    return dict(json.loads(json.dumps(plan)))


@contextlib.contextmanager
def _alone(target: Place) -> Iterator[None]:
    """Hold a local `target` against a second import; object stores have no locks."""
    if target.local is None:
        yield
        return
    from filelock import FileLock, Timeout

    if target.exists() and not target.is_folder():
        raise UserError(f"{target.uri} is a file: give a folder to import into")
    made = [folder for folder in (target.local, target.local / _STATE) if not folder.exists()]
    try:
        (target.local / _STATE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {target.uri} ({error.strerror}): choose another folder") from None
    try:
        with FileLock(target.local / _STATE / "lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"another import is writing to {target.uri}: wait for it, or choose another folder") from None
    finally:
        # What a refused import made, and nothing else, goes again.
        if not (target.local / _STATE / "plan.json").exists():
            (target.local / _STATE / "lock").unlink(missing_ok=True)
            for folder in reversed(made):
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _claim(target: Place, plan: dict[str, Any]) -> DatasetCard | None:
    """Take `target` for this plan; the card when an earlier run of the same plan had only its tidying left."""
    state = target.child(_STATE).child("plan.json")
    earlier = json.loads(state.read()) if state.exists() else None
    if target.child(CARD).exists():
        card = read_card(target)
        target.child(_STATE).delete()
        if earlier == plan:
            return card
        images = sum(split.images for split in card.splits.values())
        raise UserError(
            f"{target.uri} already holds a complete dataset ({card.origin.kind}, {images} images): "
            "choose another folder, or delete it first"
        )
    if earlier is not None and earlier != plan:
        differs = ", ".join(key for key in plan if earlier.get(key) != plan[key])
        raise UserError(
            f"{target.uri} holds an interrupted import of something else (differs in {differs}): "
            "run that one again, choose another folder, or delete it first"
        )
    if earlier is None:
        others = [name for name in (*target.names(), *target.folders()) if name != _STATE]
        if others:
            raise UserError(f"{target.uri} is not empty (it holds {others[0]}): choose an empty or a new folder")
        target.child(_STATE).make_folder()
        state.write(json.dumps(plan, indent=1).encode())
    return None


def _jobs(source: Source, target: Place, strict: bool, shard_images: int) -> Iterator[_Job]:
    for split, samples in source.splits.items():
        for number, start in enumerate(range(0, len(samples), shard_images)):
            yield _Job(
                name=f"{split}-{number:05d}",
                split=split,
                samples=samples[start : start + shard_images],
                reader=source.reader,
                target=target,
                num_classes=len(source.classes),
                strict=strict,
                drop_without_labels=source.drop_without_labels,
            )


def _import_shard(job: _Job) -> SplitCard:
    """Write one shard and then its report; a shard that an earlier run finished is verified and kept."""
    report_place = job.target.child(_STATE).child(f"{job.name}.json")
    earlier = _earlier(job, report_place)
    if earlier is not None:
        return earlier
    aside: list[PutAside] = []
    counts = [0] * job.num_classes
    masks = without = 0

    def rows() -> Iterator[Row]:
        nonlocal masks, without
        for sample in job.samples:
            try:
                row = job.reader(sample)
            except Broken as error:
                aside.append(PutAside(id=sample[0], reason=str(error)))
                if job.strict:
                    return
                continue
            if job.drop_without_labels and not row.labels:
                without += 1
                continue
            masks += row.mask is not None
            for index in row.labels:
                counts[index] += 1
            yield row

    shard = write_shard(job.target, f"{job.name}.arrow", rows(), job.num_classes)
    report = SplitCard(
        images=shard.images,
        masks=masks,
        images_per_class=tuple(counts),
        without_labels=without,
        put_aside=tuple(aside),
        shards=(shard,),
    )
    if not (job.strict and aside):  # a strict import stops here: the shard is not whole
        report_place.write(report.model_dump_json().encode())
    return report


def _earlier(job: _Job, report_place: Place) -> SplitCard | None:
    if not report_place.exists():
        return None
    report = SplitCard.model_validate_json(report_place.read())
    shard = report.shards[0]
    written = job.target.child(shard.file)
    if not written.exists() or written.size() != shard.bytes:
        return None
    digest = hashlib.sha256()
    with job.target.filesystem.open_input_stream(written.path) as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return report if digest.hexdigest() == shard.sha256 else None


def _merged(split: str, reports: dict[str, SplitCard], num_classes: int) -> SplitCard:
    parts = [reports[name] for name in sorted(reports) if name.rpartition("-")[0] == split]
    return SplitCard(
        images=sum(part.images for part in parts),
        masks=sum(part.masks for part in parts),
        images_per_class=tuple(sum(part.images_per_class[index] for part in parts) for index in range(num_classes)),
        without_labels=sum(part.without_labels for part in parts),
        put_aside=tuple(item for part in parts for item in part.put_aside),
        shards=tuple(shard for part in parts for shard in part.shards),
    )


def _run(jobs: Iterator[_Job], local: bool) -> Iterator[tuple[_Job, SplitCard]]:
    if not local:
        yield from _on_ray(jobs)
        return
    for job in jobs:
        try:
            report = _import_shard(job)
        except OSError as error:
            raise RunFailed(
                f"shard {job.name} could not be written ({error}); run the import again to go on"
            ) from error
        yield job, report


def _on_ray(jobs: Iterator[_Job]) -> Iterator[tuple[_Job, SplitCard]]:
    """Reports as tasks end, with at most two tasks a CPU under way, so that nothing piles up."""
    import ray

    mine = not ray.is_initialized()
    if mine:
        address = None if os.environ.get("RAY_ADDRESS") else "local"
        quiet: dict[str, Any] = {} if address is None else {"include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **quiet)
    under_way: dict[Any, _Job] = {}
    try:
        task = ray.remote(num_cpus=1, max_retries=2)(_import_shard)
        limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        for job in jobs:
            under_way[task.remote(job)] = job
            if len(under_way) >= limit:
                yield _next(under_way)
        while under_way:
            yield _next(under_way)
    finally:
        if mine:
            ray.shutdown()
        else:
            for reference in under_way:
                ray.cancel(reference)


def _next(under_way: dict[Any, _Job]) -> tuple[_Job, SplitCard]:
    import ray

    (reference,), _ = ray.wait(list(under_way), num_returns=1)
    job = under_way.pop(reference)
    try:
        report: SplitCard = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise RunFailed(f"shard {job.name} failed ({error.cause}); run the import again to go on") from error
    except ray.exceptions.RayError as error:
        raise RunFailed(f"shard {job.name} failed ({error}); run the import again to go on") from error
    shard = report.shards[0]
    written = job.target.child(shard.file)
    if not written.exists() or written.size() != shard.bytes:
        raise RunFailed(
            f"shard {shard.file} was written by another node to its own disk, not to {job.target.uri}: "
            "import into a folder or URI that every node shares"
        )
    return job, report
