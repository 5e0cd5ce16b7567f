"""The shards of an import: one task each, in this process or on Ray, kept when an earlier run finished them."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from cosa_ray.config.credentials import keep_token_private
from cosa_ray.data.card import PutAside, SplitCard
from cosa_ray.data.claim import STATE, digest, drop_begun
from cosa_ray.data.pictures import Broken
from cosa_ray.data.remote import Place
from cosa_ray.data.shard import Row, write_shard
from cosa_ray.data.source import Reader
from cosa_ray.errors import RunFailed, UserError

_END_SECONDS = 30.0  # that tasks under way are given to end when the import stops


@dataclass(frozen=True)
class Job:
    """One shard to write; what a task is sent."""

    name: str
    split: str
    samples: Sequence[Any]
    reader: Reader
    source: Place | None  # folder that the reader reads
    target: Place
    num_classes: int
    strict: bool
    drop_without_labels: bool


class _Report(BaseModel):
    """What a finished task leaves for a later run: what its shard was made of, and what it holds."""

    samples: str
    result: SplitCard


def run_jobs(jobs: Iterator[Job], local: bool) -> Iterator[tuple[Job, SplitCard]]:
    """Do the jobs and yield each with its result; those on Ray in the order in which they end.

    Raises UserError for a broken sample of a strict job and for a source that is not on every node; RunFailed when a
    task fails.
    """
    if not local:
        yield from _on_ray(jobs)
        return
    for job in jobs:
        try:
            report = import_shard(job)
        except OSError as error:
            raise RunFailed(
                f"shard {job.name} could not be written ({error}); run the import again to go on"
            ) from error
        yield job, report


def import_shard(job: Job) -> SplitCard:
    """Write one shard and then its report; a shard that an earlier run finished is verified and kept."""
    if job.source is not None and job.source.local is not None and not job.source.is_folder():
        raise UserError(
            f"node {socket.gethostname()} has no folder {job.source.path}: put the source where every node of the "
            "cluster sees it, or import with --local"
        )
    report_place = job.target.child(STATE).child(f"{job.name}.json")
    made_of = digest(job.samples)
    earlier = _earlier(job, made_of, report_place)
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
                if job.strict:
                    raise UserError(f"{job.split} {sample[0]}: {error}; mend it, or import without --strict") from None
                aside.append(PutAside(id=sample[0], reason=str(error)))
                continue
            if job.drop_without_labels and not row.labels:
                without += 1
                continue
            masks += row.mask is not None
            for index in row.labels:
                counts[index] += 1
            yield row

    shard = write_shard(job.target, f"{job.name}.arrow", rows(), job.num_classes)
    result = SplitCard(
        images=shard.images,
        masks=masks,
        images_per_class=tuple(counts),
        without_labels=without,
        put_aside=tuple(aside),
        shards=(shard,),
    )
    report_place.write(_Report(samples=made_of, result=result).model_dump_json().encode())
    return result


def _earlier(job: Job, made_of: str, report_place: Place) -> SplitCard | None:
    """The result of an earlier run, when its shard is whole and would be made the same again."""
    if not report_place.exists():
        return None
    try:
        report = _Report.model_validate_json(report_place.read())
    except ValidationError:
        return None
    result = report.result
    shard = result.shards[0]
    written = job.target.child(shard.file)
    if report.samples != made_of or not written.exists() or written.size() != shard.bytes:
        return None
    if not _still_aside(job, result):
        return None
    found = hashlib.sha256()
    with job.target.filesystem.open_input_stream(written.path) as stream:
        while piece := stream.read(1 << 22):
            found.update(piece)
    return result if found.hexdigest() == shard.sha256 else None


def _still_aside(job: Job, result: SplitCard) -> bool:
    """False when a strict import must name a broken sample, or a sample that was put aside has changed since."""
    aside = {item.id: item.reason for item in result.put_aside}
    if job.strict and aside:
        return False
    for sample in job.samples:
        if sample[0] in aside:
            try:
                job.reader(sample)
            except Broken as error:
                if str(error) == aside[sample[0]]:
                    continue
            return False
    return True


def _on_ray(jobs: Iterator[Job]) -> Iterator[tuple[Job, SplitCard]]:
    """Reports as tasks end, with at most two tasks a CPU under way, so that nothing piles up."""
    import ray

    mine = not ray.is_initialized()
    if mine:
        address = None if os.environ.get("RAY_ADDRESS") else "local"
        if address is not None:
            keep_token_private()
        quiet: dict[str, Any] = {} if address is None else {"include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **quiet)
    under_way: dict[Any, Job] = {}
    try:
        task = ray.remote(num_cpus=1, max_retries=2)(import_shard)
        limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        for job in jobs:
            under_way[task.remote(job)] = job
            if len(under_way) >= limit:
                yield _next(under_way)
        while under_way:
            yield _next(under_way)
    finally:
        for reference in under_way:
            ray.cancel(reference)
        if under_way:
            # Cancelled tasks still drop their half-written files, and must not write once the folder is let go.
            ray.wait(list(under_way), num_returns=len(under_way), timeout=_END_SECONDS, fetch_local=False)
            drop_begun(next(iter(under_way.values())).target)  # an interrupt while a file is being opened leaves it
        if mine:
            ray.shutdown()


def _next(under_way: dict[Any, Job]) -> tuple[Job, SplitCard]:
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
