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


class Order:
    """Which samples the steps of a run take: an endless row of epochs that batches are cut from."""

    def __init__(self, seed: int, size: int, weights: np.ndarray | None = None) -> None:
        """Of `size` samples. Without weights an epoch is a permutation; with them (size,) a draw in their proportion.

        Raises ValueError for no samples.
        """
        if size < 1:
            raise ValueError("an order needs at least one sample")
        self.seed, self.size = seed, size
        self.weights = weights
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)

    def __reduce__(self) -> tuple[type[Order], tuple[int, int, np.ndarray | None]]:
        return Order, (self.seed, self.size, self.weights)

    def indices(self, step: int, batch_size: int) -> np.ndarray:
        """Samples of a step's global batch, int64 (batch_size,), each below `size`.

        Position i of step s is place ``s * batch_size + i`` of the row; a batch may span epochs, and may be larger than
        the set. Ours.
        """
        places = step * batch_size + np.arange(batch_size, dtype=np.int64)
        epochs, within = np.divmod(places, self.size)
        indices = np.empty(batch_size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            indices[here] = self._epoch(epoch)[within[here]]
        return indices

    def _make_epoch(self, epoch: int) -> np.ndarray:
        generator = _generator(self.seed, _PERMUTATION, epoch, self.size)
        order = generator.permutation(self.size).astype(np.int64)
        if self.weights is not None:
            # Evenly spaced points over the weights laid end to end: a sample comes its share of times, rounded up or
            # down, which varies less than independent draws. Copies would lie side by side, so the draw is mixed.
            ends = np.cumsum(self.weights[order])
            points = (generator.random() + np.arange(self.size)) * (ends[-1] / self.size)
            drawn = np.searchsorted(ends, points, side="right").clip(max=self.size - 1)
            order = order[drawn[generator.permutation(self.size)]]
        order.setflags(write=False)
        return order


def balancing(labels: np.ndarray) -> np.ndarray:
    """Weights (N,) by which every class is drawn about as often, from image-level labels (N, C). Ours.

    An image counts 1/n for each of its classes, of which n images have it; those without any are a class of their own.
    """
    labels = np.concatenate([labels, 1 - labels.max(1, keepdims=True, initial=0)], 1).astype(np.float64)
    return np.asarray((labels / labels.sum(0).clip(min=1)).sum(1))


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
