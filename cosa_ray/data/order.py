"""Data order as a pure function of (seed, step, global batch size): no worker, process or restart changes it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# Philox is a counter-based generator: one key a run, and the counter says which draw. Word 0 of the counter is the one
# that a generator advances, so words 1..3 name streams of 2**64 blocks that never meet.
_KEY = 0xC05A
_PERMUTATION = 0
_DRAW = 1


def _generator(seed: int, kind: int, a: int, b: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, _KEY], counter=[0, b, a, kind]))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    order = _generator(seed, _PERMUTATION, epoch, size).permutation(size).astype(np.int64)
    order.setflags(write=False)
    return order


def batch_indices(seed: int, step: int, batch_size: int, size: int) -> np.ndarray:
    """Samples of a step's global batch, int64 (batch_size,), each below `size`.

    Position i of step s is place ``s * batch_size + i`` of an endless row of epochs, each a permutation of its own; a
    batch may span epochs, and may be larger than the set. Ours.
    """
    if size < 1:
        raise ValueError("batch_indices needs at least one sample")
    places = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs, within = np.divmod(places, size)
    indices = np.empty(batch_size, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        indices[here] = _permutation(seed, epoch, size)[within[here]]
    return indices


def draw(seed: int, step: int, position: int, stream: int = 0) -> np.random.Generator:
    """The generator of one sample's random draws: `position` is its place in the global batch of `step`.

    `stream` (below 65536) separates draws of different purposes for the same sample; the views use 0. Ours.
    """
    return _generator(seed, _DRAW + stream, step, position)


def worker_slice(batch_size: int, rank: int, world: int) -> slice:
    """Contiguous slice of the global batch that worker `rank` of `world` takes; the first ones take one more. Ours."""
    base, extra = divmod(batch_size, world)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))
