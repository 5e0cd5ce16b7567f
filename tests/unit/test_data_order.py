"""Data order: a pure function of seed, step and global batch size."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosa_ray.data.order import Order, balancing, draw, worker_slice

SEEDS = st.integers(0, 2**63)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 40), batch=st.integers(1, 100), epochs=st.integers(1, 4))
def test_every_epoch_is_a_permutation_whatever_the_batch(seed, size, batch, epochs):
    steps = -(-epochs * size // batch)
    places = np.concatenate([Order(seed, size).indices(step, batch) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(places[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 40), step=st.integers(0, 10**6), batch=st.integers(1, 64))
def test_batch_size_only_cuts_the_same_row(seed, size, step, batch):
    one_by_one = [int(Order(seed, size).indices(step * batch + i, 1)[0]) for i in range(batch)]
    assert Order(seed, size).indices(step, batch).tolist() == one_by_one


@given(batch=st.integers(1, 200), world=st.integers(1, 20))
def test_worker_slices_cover_the_batch_in_order(batch, world):
    parts = [list(range(batch))[worker_slice(batch, rank, world)] for rank in range(world)]
    assert [place for part in parts for place in part] == list(range(batch))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_differ():
    first, second = (Order(7, 50).indices(step, 50).tolist() for step in (0, 1))
    assert first != second
    assert first != Order(8, 50).indices(0, 50).tolist()


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=40), epoch=st.integers(0, 1000))
def test_a_weighted_epoch_has_every_sample_its_share_of_times(seed, weights, epoch):
    size = len(weights)
    drawn = Order(seed, size, np.array(weights)).indices(epoch, size)
    shares = np.array(weights) * size / sum(weights)
    times = np.bincount(drawn, minlength=size)
    assert len(times) == size
    assert (np.abs(times - shares) < 1 + 1e-9).all()
    again = pickle.loads(pickle.dumps(Order(seed, size, np.array(weights))))
    assert again.indices(epoch, size).tolist() == drawn.tolist()


def test_a_weighted_draw_is_mixed_and_differs_by_epoch():
    """Copies are no more often side by side than by chance: of 400 samples ten make up three quarters of the weight."""
    order = Order(0, 400, np.where(np.arange(400) < 10, 117.0, 1.0))
    first, second = (order.indices(epoch, 400) for epoch in (0, 1))
    assert first.tolist() != second.tolist()
    assert (first[1:] == first[:-1]).mean() < 0.12  # 0.75² / 10 = 0.056 expected


def test_balanced_classes_are_drawn_alike():
    rng = np.random.default_rng(0)
    labels = np.zeros((900, 4), np.float32)
    labels[np.arange(900), rng.choice(4, 900, p=[0.7, 0.2, 0.07, 0.03])] = 1
    labels[:30] = 0  # without a label
    order = Order(3, 900, balancing(labels))
    counts = sum(labels[order.indices(epoch, 900)].sum(0) for epoch in range(5))
    assert counts.min() > 0.97 * counts.max()
    assert counts.sum() == pytest.approx(5 * 900 * 4 / 5, rel=0.01)  # the rest has none
    assert balancing(np.ones((3, 2))).tolist() == pytest.approx([2 / 3] * 3)


def test_draws_differ_in_every_key_and_repeat():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0)]
    values = [tuple(draw(*key).random(4)) for key in keys]
    assert len(set(values)) == len(keys)
    assert values == [tuple(draw(*key).random(4)) for key in keys]


def test_draws_of_neighbours_are_independent():
    uniform = np.array([draw(3, step, position).random() for step in range(40) for position in range(50)])
    assert abs(uniform.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.08
