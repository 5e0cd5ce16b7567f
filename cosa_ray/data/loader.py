"""Batches for training and evaluation: the same bits for any number of loader processes, workers and restarts."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.forkserver import ensure_running
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Batches

from cosa_ray.config.schema import Sampling, Views
from cosa_ray.data.dataset import Split
from cosa_ray.data.order import Order, balancing, draw, worker_slice
from cosa_ray.data.views import two_views
from cosa_ray.errors import UserError

Batch = TypeVar("Batch")


class TrainingBatch(NamedTuple):
    """One worker's part of a step's global batch: views uint8 (B, 3, S, S), labels float32 (B, C), box int64 (B, 4).

    `position` int64 (B,) is each sample's place in the global batch, the key of its random draws.
    """

    step: int
    weak: torch.Tensor
    strong: torch.Tensor
    labels: torch.Tensor
    box: torch.Tensor
    position: torch.Tensor


class Resize(NamedTuple):
    """How an image is brought in: `square` size x size, `short_side` = size with the ratio kept, or `own` size."""

    rule: str
    size: int

    def of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of an image of this size once it is brought in."""
        if self.rule == "square":
            return self.size, self.size
        if self.rule == "own":
            return height, width
        scale = self.size / min(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))


class EvaluationBatch(NamedTuple):
    """Images resized to uint8 (B, 3, h, w), with labels (B, C) and masks and shapes (H, W) of the original size.

    contexts: bool (H, W), see `Split.context`; None of images without a mask, and where the dataset does not know.
    """

    index: list[int]  # type: ignore[assignment]  # tuple.index goes unused
    ids: list[str]
    images: torch.Tensor
    labels: torch.Tensor
    masks: list[np.ndarray | None]
    contexts: list[np.ndarray | None]
    shapes: list[tuple[int, int]]


class _Made(Batches, Generic[Batch]):
    """Batch number i is make(i); an error of the user travels as a value, because DataLoader would reword it."""

    def __init__(self, make: Callable[[int], Batch], count: int) -> None:
        self._make = make
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Batch | UserError:
        try:
            return self._make(number)
        except UserError as error:
            return error


class _TrainingStep:
    """Makes a worker's batch of a step; what a loader process is sent."""

    def __init__(self, split: Split, order: Order, views: Views, batch_size: int, start: int, part: slice) -> None:
        self._split = split
        self._order = order
        self._views = views
        self._batch_size = batch_size
        self._start = start
        self._part = part

    def __call__(self, number: int) -> TrainingBatch:
        step = self._start + number
        indices = self._order.indices(step, self._batch_size)
        positions = np.arange(self._batch_size, dtype=np.int64)[self._part]
        side = self._views.crop
        weak, strong = np.empty((2, len(positions), 3, side, side), np.uint8)
        labels = np.empty((len(positions), self._split.num_classes), np.float32)
        box = np.empty((len(positions), 4), np.int64)
        for row, position in enumerate(positions):
            sample = self._split[int(indices[position])]
            rng = draw(self._order.seed, step, int(position))
            weak[row], strong[row], box[row] = two_views(sample.decode_image(), self._views, rng)
            labels[row] = sample.labels
        return TrainingBatch(step, *(torch.from_numpy(array) for array in (weak, strong, labels, box, positions)))


class _EvaluationPart:
    """Makes the evaluation batch number i; what a loader process is sent."""

    def __init__(self, split: Split, indices: Sequence[int], resize: Resize, batch_size: int) -> None:
        self._split = split
        self._indices = [int(index) for index in indices]
        self._resize = resize
        self._batch_size = batch_size

    def __call__(self, number: int) -> EvaluationBatch:
        index = self._indices[number * self._batch_size : (number + 1) * self._batch_size]
        samples = [self._split[i] for i in index]
        height, width = self._resize.of(samples[0].height, samples[0].width)
        images = np.empty((len(samples), 3, height, width), np.uint8)
        for row, sample in enumerate(samples):
            resized = sample.decode_image().resize((width, height), Image.Resampling.BILINEAR)
            images[row] = np.asarray(resized).transpose(2, 0, 1)
        return EvaluationBatch(
            index=index,
            ids=[sample.id for sample in samples],
            images=torch.from_numpy(images),
            labels=torch.from_numpy(np.stack([sample.labels for sample in samples])),
            masks=[None if sample.mask is None else sample.decode_mask() for sample in samples],
            contexts=[None if sample.mask is None else self._split.context(sample) for sample in samples],
            shapes=[(sample.height, sample.width) for sample in samples],
        )


def order_of(split: Split, seed: int, sampling: Sampling) -> Order:
    """The order in which training with a seed takes a split's samples."""
    return Order(seed, len(split), balancing(split.labels()) if sampling == "balanced" else None)


def training_batches(
    split: Split,
    *,
    seed: int,
    views: Views,
    batch_size: int,
    start_step: int,
    stop_step: int,
    sampling: Sampling = "even",
    rank: int = 0,
    world: int = 1,
    processes: int = 0,
) -> Iterator[TrainingBatch]:
    """This rank's part of the global batches of steps start_step..stop_step-1, in order.

    `processes` loader processes work ahead (0: none, in this process); they end with the iterator. Raises UserError for
    an empty split, fewer samples in a batch than ranks, or a damaged sample.
    """
    if not len(split):
        raise UserError(f"split {split.name} of {split.folder} has no images: import it again, or choose another split")
    if batch_size < world:
        raise UserError(f"a global batch of {batch_size} gives no sample to some of {world} workers: use fewer workers")
    part = worker_slice(batch_size, rank, world)
    make = _TrainingStep(split, order_of(split, seed, sampling), views, batch_size, start_step, part)
    return _batches(_Made(make, max(0, stop_step - start_step)), processes)


def evaluation_batches(
    split: Split, indices: Sequence[int], *, resize: Resize, batch_size: int, processes: int = 0
) -> Iterator[EvaluationBatch]:
    """The samples `indices` of the split, in order; the last batch may be smaller, and one of another rule than square
    holds one image."""
    batch_size = batch_size if resize.rule == "square" else 1
    count = -(-len(indices) // batch_size)
    return _batches(_Made(_EvaluationPart(split, indices, resize, batch_size), count), min(processes, count))


def _batches(made: _Made[Batch], processes: int) -> Iterator[Batch]:
    context: Any = None
    if processes:
        # Not fork: a training worker has threads (Ray, MLflow, OpenMP) whose locks a forked child would inherit held.
        # Not spawn: each child would import torch anew, where the fork server has done it once for all.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        ensure_running()  # its imports take seconds; meanwhile the caller builds its network
    loader: DataLoader = DataLoader(
        made,
        batch_size=None,
        num_workers=processes,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_quiet if processes else None,
        multiprocessing_context=context,
        prefetch_factor=2 if processes else None,
        # A generator of its own: DataLoader draws a seed, and must not take it from the training's random state.
        generator=torch.Generator(),
    )
    return _until_closed(loader)


def _until_closed(loader: DataLoader) -> Iterator[Any]:
    batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        del batches  # ends the loader processes now, also when the consumer stops early


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _quiet(_: int) -> None:
    # Ctrl-C reaches the whole process group: the trainer decides when to stop, and still needs its batches until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
