"""The simulation of benchmarks/scaling_model.py against queueing theory, counting, and sums by hand."""

from __future__ import annotations

import math
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

import scaling
from scaling_model import (
    Clock,
    Constants,
    Link,
    Scenario,
    Station,
    cache_seconds,
    simulate_server,
    simulate_sweep,
    step_parts,
)

NOTHING = Constants(**{each.name: 0.0 for each in fields(Constants)} | {"serialise_rate": 1e9, "gradient_bytes": 1.0})


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_the_wait_before_one_server_is_that_of_m_d_1(load: float) -> None:
    """Pollaczek and Khinchine: arrivals at random, a fixed service s: the mean wait is s load / 2 (1 - load)."""
    clock = Clock()
    station, service = Station(clock), 2.0
    for at in np.cumsum(np.random.default_rng(0).exponential(service / load, 60_000)):
        clock.after(float(at), lambda: station.ask(service))
    clock.run()
    assert station.wait() == pytest.approx(service * load / (2 * (1 - load)), rel=0.05)
    assert station.used() == pytest.approx(load, rel=0.02)
    assert station.arrived == station.served == 60_000


def test_customers_at_once_wait_their_turn() -> None:
    clock = Clock()
    station = Station(clock, servers=2)
    ended: list[float] = []
    for _ in range(5):
        station.ask(3.0, lambda: ended.append(clock.now))
    clock.run()
    assert ended == [3.0, 3.0, 6.0, 6.0, 9.0]
    assert station.waits == [0.0, 0.0, 3.0, 3.0, 6.0]
    assert station.used() == pytest.approx(15 / 18)


def test_a_link_is_shared_evenly_and_nothing_is_lost() -> None:
    """100 bytes at 10 a second, and 300 that come 5 s later: 50 alone, then 5 each a second until the first is done."""
    clock = Clock()
    link = Link(clock, 10.0)
    ended: dict[str, float] = {}
    link.send(100, lambda: ended.update(first=clock.now))
    clock.after(5.0, lambda: link.send(300, lambda: ended.update(second=clock.now)))
    clock.run()
    assert ended == {"first": pytest.approx(15.0), "second": pytest.approx(40.0)}
    assert link.bytes == 400
    # And with a rate of one's own below the share, nobody slows anybody down.
    clock = Clock()
    link = Link(clock, 10.0, each=2.0)
    for _ in range(4):
        link.send(20, lambda: None)
    clock.run()
    assert link.seconds == pytest.approx([10.0] * 4)


def test_a_sweep_by_hand() -> None:
    """4 trials on 2 GPUs, each 1 s of start, 10 steps of 0.1 s and 5 images of 0.2 s, one checkpoint of 3 s."""
    known = replace(NOTHING, train_image_s=0.1, eval_image_s=0.2, startup_s=1.0, state_bytes=1e9)
    at = Scenario(gpus=2, batch=1, steps=10, eval_every=10, checkpoint_every=10, eval_images=5, trials=4)
    at = replace(at, storage_rate=1e9, network_rate=1e9, mtbf_hours=math.inf)
    found = simulate_sweep(known, at)
    # Alone: 1 + 1 + 1 + 1 to write + 1 to upload; two upload at once, so 2.
    assert found.hours * 3600 == pytest.approx(2 * 6.0)
    assert found.ideal_hours * 3600 == pytest.approx(2 * 5.0)
    assert found.upload_s == pytest.approx(2.0)
    assert found.storage_used == pytest.approx(4 / 12)
    assert found.gpu_idle == pytest.approx(1 - 4 * 4 / (2 * 12))
    assert found.checkpoint_bytes == (2 * 3 + 2) * 1e9


def test_a_driver_that_takes_all_the_time_sets_the_pace() -> None:
    """100 trials that take nothing themselves, each a start, a report and an end of 2 s: 600 s in a row."""
    known = replace(NOTHING, driver_event_s=2.0)
    at = Scenario(gpus=8, batch=1, steps=1, eval_every=1, checkpoint_every=1, eval_images=1, trials=100)
    found = simulate_sweep(known, at)
    assert found.hours * 3600 == pytest.approx(600)
    assert found.driver_used == pytest.approx(1)
    assert found.first == "driver (100 %)"


@pytest.mark.parametrize("key", ["driver_event_s", "mlflow_point_s", "state_bytes", "display_trial_s", "startup_s"])
def test_more_of_anything_never_makes_a_sweep_shorter(key: str) -> None:
    # Storage for all at once: trials that a slow driver has pulled apart would get in each other's way less.
    at = Scenario(gpus=64, steps=600, eval_every=150, checkpoint_every=150, eval_images=100, storage_rate=1e15)
    at, known = replace(at, trials=300), replace(Constants(), display_trial_s=1e-3)
    hours = [simulate_sweep(replace(known, **{key: times * getattr(known, key)}), at) for times in (0.0, 1.0, 5.0)]
    times = [each.hours for each in hours]
    assert times == sorted(times)
    assert all(each.hours >= each.ideal_hours - 1e-9 for each in hours)
    waits = [simulate_sweep(known, replace(at, gpus=gpus)).driver_wait for gpus in (8, 64, 256)]
    assert waits == sorted(waits)


def test_a_step_by_hand() -> None:
    known = replace(NOTHING, train_image_s=0.5, eval_image_s=1.0, gradient_bytes=4e8, overlap=0.1, collective_s=1e-4)
    at = Scenario(batch=8, eval_images=101, eval_every=100, network_rate=1e9, link_rate=1e9, mtbf_hours=math.inf)
    parts = step_parts(known, at, 4)
    assert parts["compute"] == pytest.approx(1.0)
    assert parts["gradients"] == pytest.approx(2 * 3 / 4 * 0.4 + 4e-4 - 0.1)
    assert parts["evaluation"] == pytest.approx(26 / 100)  # 26, 25, 25 and 25 images
    assert step_parts(known, at, 3)["compute"] == pytest.approx(1.5)  # 3, 3 and 2 images: the slowest counts
    assert step_parts(known, at, 1)["gradients"] == 0
    with pytest.raises(ValueError, match="1 to 8 GPUs, not for 9"):
        step_parts(known, at, 9)
    # Once in 10 hours a node's 20 s: 1 s of steps costs 20 / 36,000 s.
    failing = replace(at, mtbf_hours=10.0, eval_images=0, checkpoint_every=1)
    quick = replace(known, train_image_s=0.125, startup_s=20.0, gradient_bytes=0.0, collective_s=0.0)
    assert step_parts(quick, failing, 1)["failures"] == pytest.approx((20 + 0.5) / 36_000)


def test_the_copies_of_a_dataset_share_the_storage() -> None:
    at = Scenario(gpus=8, dataset_bytes=2e9, network_rate=1e9, storage_rate=4e9)
    assert cache_seconds(at) == pytest.approx(2.0)
    assert cache_seconds(replace(at, gpus=64)) == pytest.approx(4.0)


def test_the_server_is_a_closed_queue() -> None:
    """Two workers that never rest: as many points a second as they take, from two runs on."""
    known = replace(NOTHING, mlflow_point_s=1e-3)
    for runs, rate in ((1, 1_000), (2, 2_000), (16, 2_000)):
        assert simulate_server(known, runs, 3_000, 500, 2)["points_a_second"] == pytest.approx(rate)


def test_what_was_measured_is_not_far() -> None:
    for name, each in scaling.validate(Constants()).items():
        assert each["simulated"] == pytest.approx(each["measured"], rel=0.15), name


def test_every_constant_has_a_source() -> None:
    assert set(scaling.SOURCES) == {each.name for each in fields(Constants)}
