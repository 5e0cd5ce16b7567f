"""One shard of a dataset: an uncompressed Arrow IPC file, written as a stream and read through a memory map."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cosa_ray.data.card import ShardCard
from cosa_ray.data.remote import Place
from cosa_ray.errors import UserError

_ROWS = 64  # rows of a record batch: what a writer holds in memory


class Row(NamedTuple):
    """A sample as it is stored: encoded image, mask as PNG of class indices or None, 0-based classes."""

    id: str
    image: bytes
    mask: bytes | None
    labels: tuple[int, ...]
    height: int
    width: int


def shard_schema(num_classes: int) -> pa.Schema:
    """Columns of a shard; labels are a multi-hot row of `num_classes` bytes."""
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("image", pa.large_binary(), nullable=False),
            pa.field("mask", pa.large_binary(), nullable=True),
            pa.field("labels", pa.list_(pa.uint8(), num_classes), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
        ]
    )


def write_shard(target: Place, name: str, rows: Iterable[Row], num_classes: int) -> ShardCard:
    """Write `rows` as the shard `name` in the folder `target`, holding 64 rows in memory at a time."""
    schema = shard_schema(num_classes)
    count = 0
    with target.child(name).writer() as out:
        with pa.PythonFile(out, mode="w") as sink, pa.ipc.new_file(sink, schema) as writer:
            waiting: list[Row] = []
            for row in rows:
                waiting.append(row)
                count += 1
                if len(waiting) == _ROWS:
                    writer.write_batch(_record_batch(waiting, schema, num_classes))
                    waiting = []
            if waiting:
                writer.write_batch(_record_batch(waiting, schema, num_classes))
        return ShardCard(file=name, images=count, bytes=out.bytes, sha256=out.sha256)


def _record_batch(rows: list[Row], schema: pa.Schema, num_classes: int) -> pa.RecordBatch:
    labels = np.zeros((len(rows), num_classes), np.uint8)
    for index, row in enumerate(rows):
        labels[index, list(row.labels)] = 1
    return pa.record_batch(
        [
            pa.array([row.id for row in rows], pa.string()),
            pa.array([row.image for row in rows], pa.large_binary()),
            pa.array([row.mask for row in rows], pa.large_binary()),
            pa.FixedSizeListArray.from_arrays(pa.array(labels.ravel()), num_classes),
            pa.array([row.height for row in rows], pa.int32()),
            pa.array([row.width for row in rows], pa.int32()),
        ],
        schema=schema,
    )


def map_shard(path: Path, card: ShardCard, num_classes: int) -> pa.Table:
    """The shard as a table over a memory map: nothing is read until a value is taken. Raises UserError when damaged."""
    again = "check the dataset with `cosa-ray data check`, and import it again"
    try:
        table: Any = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing: {again}") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"shard {path} is damaged ({str(error).splitlines()[0]}): {again}") from None
    if table.schema != shard_schema(num_classes):
        raise UserError(f"shard {path} does not have the columns or the {num_classes} classes of its card: {again}")
    if table.num_rows != card.images:
        raise UserError(f"shard {path} has {table.num_rows} images and its card says {card.images}: {again}")
    return table
