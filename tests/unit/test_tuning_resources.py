"""Dividing a cluster: whatever the arithmetic grants must be placeable, and nothing more could have been granted."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cosa_ray.errors import UserError
from cosa_ray.tuning.resources import DRIVER_CPUS, Fit, Node, fit_resources

TEN_THOUSAND = 10_000  # Ray counts resources in ten-thousandths


def place(cluster: list[Node], fit: Fit, workers: int, drivers_on: int, drivers: int) -> bool:
    """Put every trial's driver on one machine, then the workers wherever there is room, as Ray does: in whole units."""
    cpus = [round(node.cpus * TEN_THOUSAND) for node in cluster]
    devices = [[TEN_THOUSAND] * int(node.gpus) for node in cluster]
    cpus[drivers_on] -= drivers * round(DRIVER_CPUS * TEN_THOUSAND)
    if cpus[drivers_on] < 0:
        return False
    need, share = round(fit.cpus_per_worker * TEN_THOUSAND), round(fit.gpus_per_worker * TEN_THOUSAND)
    for _ in range(fit.concurrency * workers):
        for index in range(len(cluster)):
            if cpus[index] < need:
                continue
            if share >= TEN_THOUSAND:  # whole GPUs
                free = [i for i, left in enumerate(devices[index]) if left == TEN_THOUSAND]
                if len(free) < share // TEN_THOUSAND:
                    continue
                for i in free[: share // TEN_THOUSAND]:
                    devices[index][i] = 0
            elif share:
                fitting = [i for i, left in enumerate(devices[index]) if left >= share]
                if not fitting:
                    continue
                devices[index][fitting[0]] -= share
            cpus[index] -= need
            break
        else:
            return False
    return True


nodes = st.lists(
    st.builds(Node, cpus=st.sampled_from([0.0, 1.0, 2.0, 3.0, 8.0, 64.0]), gpus=st.sampled_from([0.0, 0.0, 1.0, 4.0])),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=300)
@given(
    cluster=nodes,
    workers=st.integers(1, 5),
    trials=st.integers(1, 12),
    cpus=st.one_of(st.none(), st.sampled_from([0.25, 0.5, 0.9, 1.0, 2.0])),
    gpus=st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0, 2.0]),
    concurrency=st.one_of(st.none(), st.integers(1, 6)),
    resumed=st.booleans(),
)
def test_what_is_granted_always_starts(
    cluster: list[Node],
    workers: int,
    trials: int,
    cpus: float | None,
    gpus: float,
    concurrency: int | None,
    resumed: bool,
) -> None:
    """Also beside the drivers of all trials, which a resumed sweep can have alive while they wait for their turn."""
    try:
        fit = fit_resources(
            cluster,
            workers=workers,
            trials=trials,
            cpus_per_worker=cpus,
            gpus_per_worker=gpus,
            concurrency=concurrency,
            drivers=trials if resumed else None,
        )
    except UserError:
        assume(False)
    assert 1 <= fit.concurrency <= min(trials, concurrency or trials)
    assert fit.cpus_per_worker > 0
    drivers = trials if resumed else fit.concurrency
    homes = [index for index, node in enumerate(cluster) if node.cpus >= drivers * DRIVER_CPUS]
    for drivers_on in homes:
        assert place(cluster, fit, workers, drivers_on, drivers)


@settings(deadline=None, max_examples=300)
@given(
    cpus=st.sampled_from([1.0, 2.0, 4.0, 7.0, 16.0]),
    workers=st.integers(1, 5),
    trials=st.integers(1, 12),
    each=st.sampled_from([0.25, 0.5, 0.9, 1.0, 2.0]),
)
def test_on_one_machine_as_many_run_as_there_is_room_for(cpus: float, workers: int, trials: int, each: float) -> None:
    room = 0
    while (room + 1) * (DRIVER_CPUS + workers * each) <= cpus + 1e-9:
        room += 1
    if room == 0:
        with pytest.raises(UserError, match="does not fit"):
            fit_resources([Node(cpus)], workers=workers, trials=trials, cpus_per_worker=each)
    else:
        fit = fit_resources([Node(cpus)], workers=workers, trials=trials, cpus_per_worker=each)
        assert fit.concurrency == min(room, trials)


def test_two_cores_run_two_trials() -> None:
    """The best fit in hundredths: 2 x (0.001 + 0.99) < 2; with one CPU a worker it would be 2.002, and a deadlock."""
    assert fit_resources([Node(2)], workers=1, trials=4) == Fit(2, 0.99, 0.0)
    assert fit_resources([Node(2)], workers=1, trials=4, cpus_per_worker=0.9).concurrency == 2
    assert fit_resources([Node(2)], workers=1, trials=4, cpus_per_worker=1.0).concurrency == 1


@pytest.mark.parametrize(
    ("arguments", "arithmetic"),
    [
        ({"workers": 4, "cpus_per_worker": 1.0}, "4 workers x 1 + 1 driver x 0.001 = 4.001 CPUs, and there are 2 CPUs"),
        (
            {"workers": 1, "cpus_per_worker": 1.0, "concurrency": 2},
            "2 x 1 workers x 1 + 2 drivers x 0.001 = 2.002 CPUs",
        ),
        ({"workers": 1, "gpus_per_worker": 1.0}, "1 workers x 1 GPUs = 1, and there are 0 GPUs"),
    ],
)
def test_refusals_show_the_arithmetic(arguments: dict, arithmetic: str) -> None:
    with pytest.raises(UserError) as caught:
        fit_resources([Node(2)], trials=4, **arguments)
    assert arithmetic in str(caught.value)


def test_a_worker_never_spans_machines() -> None:
    with pytest.raises(UserError, match=r"2 \+ 2 CPUs"):
        fit_resources([Node(2), Node(2)], workers=1, trials=1, cpus_per_worker=3.0)
    assert fit_resources([Node(2), Node(2)], workers=2, trials=4).concurrency == 2


def test_gpus_decide_how_many_run() -> None:
    fit = fit_resources([Node(32, 4), Node(32, 4)], workers=2, trials=20, gpus_per_worker=1.0)
    assert fit.concurrency == 4
    assert 7.9 <= fit.cpus_per_worker <= 8.0


def test_a_resumed_sweep_makes_room_for_the_drivers_of_all_its_trials() -> None:
    fresh = {"workers": 1, "trials": 40, "cpus_per_worker": 0.99, "concurrency": 2}
    assert fit_resources([Node(2)], **fresh).concurrency == 2
    # 40 x 0.001 + 2 x 0.99 = 2.02: one at a time, instead of a refusal the sweep could never get past.
    assert fit_resources([Node(2)], **fresh, drivers=40).concurrency == 1
    assert fit_resources([Node(2)], workers=1, trials=40, drivers=40) == Fit(2, 0.98, 0.0)
