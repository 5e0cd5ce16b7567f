"""Imports: shard by shard, in parallel on Ray or in this process, resumable, and never over something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cosa_ray.config.credentials import holds_secret, without_credentials
from cosa_ray.data.card import DatasetCard, Origin, SplitCard, write_card
from cosa_ray.data.claim import alone, claim, make_plan, tidy
from cosa_ray.data.remote import Place, place
from cosa_ray.data.shard_tasks import Job, run_jobs
from cosa_ray.data.source import Source, check_classes
from cosa_ray.errors import UserError

SHARD_IMAGES = 512  # images of a shard: for VOC and COCO 60 to 90 MB


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
    bytes; shards whose samples were changed or mended since are made anew. A sample that cannot be used is put aside by
    name, or with `strict` ends the import. Raises UserError for classes that cannot be stored, when no image of a split
    can be used, and when `out` is complete, belongs to another import or is not empty; RunFailed when a task fails.
    """
    check_classes(source.classes, source.uri or source.kind)
    target = place(out)
    plan = make_plan(source, shard_images)
    with alone(target):
        finished = claim(target, plan)
        if finished is not None:
            return finished
        jobs = _jobs(source, target, strict, shard_images)
        sizes = {split: len(samples) for split, samples in source.splits.items()}
        total, done, aside = sum(sizes.values()), 0, 0
        reports: dict[str, SplitCard] = {}
        for job, report in run_jobs(jobs, local):
            reports[job.name] = report
            done += len(job.samples)
            aside += len(report.put_aside)
            if progress is not None:
                progress(Progress(done, total, aside))
        splits = {split: _merged(split, reports, len(source.classes)) for split in sizes}
        _refuse_unusable(splits, sizes, source)
        card = DatasetCard(
            classes=source.classes,
            palette=source.palette,
            labels_from=source.labels_from,
            masks_from=source.masks_from,
            origin=Origin(kind=source.kind, source=_shown(source.uri), options=dict(source.options)),
            splits=splits,
        )
        write_card(card, target)
        tidy(target)
    return card


def _shown(uri: str | None) -> str | None:
    """Where the data came from, for a card that everybody reads who has the dataset."""
    return without_credentials(uri) if uri is not None and holds_secret(uri) else uri


def _refuse_unusable(splits: dict[str, SplitCard], sizes: dict[str, int], source: Source) -> None:
    """Raise UserError when a whole split was put aside, or the whole set has no image."""
    where = source.uri or source.kind
    if not any(split.images for split in splits.values()):
        broken = [item for split in splits.values() for item in split.put_aside]
        why = f"; the first, {broken[0].id}: {broken[0].reason}" if broken else ""
        raise UserError(f"none of the {sum(sizes.values())} images of {where} could be used{why}")
    for name, split in splits.items():
        if split.put_aside and not split.images:
            first = split.put_aside[0]
            raise UserError(
                f"none of the {sizes[name]} images of split {name} of {where} could be used; "
                f"the first, {first.id}: {first.reason}"
            )


def _jobs(source: Source, target: Place, strict: bool, shard_images: int) -> Iterator[Job]:
    for split, samples in source.splits.items():
        for number, start in enumerate(range(0, len(samples), shard_images)):
            yield Job(
                name=f"{split}-{number:05d}",
                split=split,
                samples=samples[start : start + shard_images],
                reader=source.reader,
                source=source.root,
                target=target,
                num_classes=len(source.classes),
                strict=strict,
                drop_without_labels=source.drop_without_labels,
            )


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
