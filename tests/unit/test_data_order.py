"""Data order: a pure function of seed, step and global batch size."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cosa_ray.data.order import batch_indices, draw, worker_slice

SEEDS = st.integers(0, 2**63)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 40), batch=st.integers(1, 100), epochs=st.integers(1, 4))
def test_every_epoch_is_a_permutation_whatever_the_batch(seed, size, batch, epochs):
    steps = -(-epochs * size // batch)
    places = np.concatenate([batch_indices(seed, step, batch, size) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(places[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 40), step=st.integers(0, 10**6), batch=st.integers(1, 64))
def test_batch_size_only_cuts_the_same_row(seed, size, step, batch):
    one_by_one = [int(batch_indices(seed, step * batch + i, 1, size)[0]) for i in range(batch)]
    assert batch_indices(seed, step, batch, size).tolist() == one_by_one


@given(batch=st.integers(1, 200), world=st.integers(1, 20))
def test_worker_slices_cover_the_batch_in_order(batch, world):
    parts = [list(range(batch))[worker_slice(batch, rank, world)] for rank in range(world)]
    assert [place for part in parts for place in part] == list(range(batch))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_differ():
    first, second = (batch_indices(7, step, 50, 50).tolist() for step in (0, 1))
    assert first != second
    assert first != batch_indices(8, 0, 50, 50).tolist()


def test_draws_differ_in_every_key_and_repeat():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0)]
    values = [tuple(draw(*key).random(4)) for key in keys]
    assert len(set(values)) == len(keys)
    assert values == [tuple(draw(*key).random(4)) for key in keys]


def test_draws_of_neighbours_are_independent():
    uniform = np.array([draw(3, step, position).random() for step in range(40) for position in range(50)])
    assert abs(uniform.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.08
