"""Batches: the same bits for any number of processes, ranks and restarts, against plain single-sample code."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
from tiny_sets import tiny_dataset

from cosa_ray.config.schema import Views
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.loader import Resize, TrainingBatch, evaluation_batches, training_batches
from cosa_ray.data.order import Order, balancing, draw
from cosa_ray.data.views import two_views
from cosa_ray.errors import UserError

VIEWS = Views(crop=24)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "set"
    tiny_dataset(out, train=10)
    return open_dataset(str(out)).split("train")


def batches(split, start=0, stop=6, rank=0, world=1, processes=0, batch_size=5, **more):
    return list(
        training_batches(
            split,
            seed=3,
            views=VIEWS,
            batch_size=batch_size,
            start_step=start,
            stop_step=stop,
            rank=rank,
            world=world,
            processes=processes,
            **more,
        )
    )


def same(first: TrainingBatch, second: TrainingBatch) -> bool:
    return first.step == second.step and all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


def test_a_batch_is_its_samples_one_by_one(split):
    for batch in batches(split, stop=4):
        assert batch.weak.dtype == batch.strong.dtype == torch.uint8
        assert batch.position.tolist() == list(range(5))
        for position, index in enumerate(Order(3, 10).indices(batch.step, 5)):
            sample = split[int(index)]
            weak, strong, box = two_views(sample.decode_image(), VIEWS, draw(3, batch.step, position))
            assert np.array_equal(batch.weak[position], weak)
            assert np.array_equal(batch.strong[position], strong)
            assert np.array_equal(batch.box[position], box)
            assert np.array_equal(batch.labels[position], sample.labels)


def test_a_balanced_run_draws_by_the_labels_of_its_split(split):
    labels = np.stack([split[index].labels for index in range(10)])
    order = Order(3, 10, balancing(labels))
    for processes in (0, 1):
        for batch in batches(split, stop=4, sampling="balanced", processes=processes):
            chosen = order.indices(batch.step, 5)
            assert np.array_equal(batch.labels, labels[chosen])
            weak, _, _ = two_views(split[int(chosen[2])].decode_image(), VIEWS, draw(3, batch.step, 2))
            assert np.array_equal(batch.weak[2], weak)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_hold_slices_of_the_same_batch(split, world):
    whole = batches(split)
    parts = [batches(split, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(whole):
        joined = [torch.cat([part[step][field] for part in parts]) for field in range(1, 6)]
        assert same(batch, TrainingBatch(step, *joined))


def test_a_restart_goes_on_with_the_same_batches(split):
    whole = batches(split)
    assert all(same(a, b) for a, b in zip(whole[3:], batches(split, start=3), strict=True))
    assert batches(split, start=6) == []


def test_a_batch_may_be_larger_than_the_set(split):
    (batch,) = batches(split, stop=1, batch_size=23)
    assert batch.weak.shape == (23, 3, 24, 24)


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_change_no_bit_and_end(split, processes):
    before = set(multiprocessing.active_children())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert all(same(a, b) for a, b in zip(batches(split), batches(split, processes=processes), strict=True))
    assert torch.equal(state, torch.get_rng_state())  # the training's random state is left alone
    unfinished = training_batches(
        split, seed=3, views=VIEWS, batch_size=5, start_step=0, stop_step=1000, rank=0, world=1, processes=processes
    )
    next(unfinished)
    assert len(set(multiprocessing.active_children()) - before) == processes
    unfinished.close()
    assert set(multiprocessing.active_children()) == before


def test_a_damaged_sample_is_a_sentence_also_from_a_process(tmp_path):
    tiny_dataset(tmp_path / "set", train=8, shard_images=8)
    shard = tmp_path / "set/train-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[: len(data) // 2] = b"\1" * (len(data) // 2)
    shard.write_bytes(bytes(data))
    damaged = open_dataset(str(tmp_path / "set")).split("train")
    for processes in (0, 1):
        with pytest.raises(UserError) as caught:
            batches(damaged, processes=processes)
        assert "\n" not in str(caught.value)


def test_impossible_batches_are_refused_up_front(split):
    with pytest.raises(UserError, match="a global batch of 2 gives no sample to some of 3 workers"):
        batches(split, batch_size=2, world=3)


@pytest.mark.parametrize("processes", [0, 1])
def test_evaluation_batches_keep_order_and_original_masks(split, processes):
    order = [7, 0, 9, 3, 3]
    found = list(evaluation_batches(split, order, resize=Resize("square", 16), batch_size=2, processes=processes))
    assert [batch.index for batch in found] == [[7, 0], [9, 3], [3]]
    assert [name for batch in found for name in batch.ids] == [f"train{index}" for index in order]
    for batch in found:
        assert batch.images.shape == (len(batch.index), 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert batch.shapes == [(30, 40)] * len(batch.index)
        for row, index in enumerate(batch.index):
            sample = split[index]
            resized = sample.decode_image().resize((16, 16), 2)
            assert np.array_equal(batch.images[row].permute(1, 2, 0), np.asarray(resized))
            assert np.array_equal(batch.masks[row], sample.decode_mask())
            assert np.array_equal(batch.labels[row], sample.labels)
    assert list(evaluation_batches(split, [], resize=Resize("square", 16), batch_size=2, processes=processes)) == []
