"""The monitor beside the driver: slots for runs, values kept for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from cosa_ray.training.session import Monitor


def test_slots_are_given_out_once_and_come_back() -> None:
    monitor = Monitor(slots=2)
    assert [monitor.acquire(run) for run in ("a", "b", "c")] == [True, True, False]
    assert monitor.acquire("a"), "a run that holds a slot keeps it"
    monitor.release("c")  # holds none: nothing comes back
    assert not monitor.acquire("c")
    monitor.release("a")
    monitor.release("a")  # one slot, not two
    assert [monitor.acquire(run) for run in ("c", "d")] == [True, False]


def test_without_slots_every_run_may_go() -> None:
    monitor = Monitor()
    assert all(monitor.acquire(str(run)) for run in range(50))


def test_many_threads_never_hold_more_than_the_slots() -> None:
    monitor = Monitor(slots=3)
    with ThreadPoolExecutor(16) as pool:
        given = list(pool.map(monitor.acquire, (str(run) for run in range(200))))
    assert sum(given) == 3


def test_values_are_kept_and_forgotten() -> None:
    monitor = Monitor()
    assert monitor.kept("nothing") is None
    monitor.keep("a", {"b": 1})
    monitor.keep("a", {"b": 2})
    assert monitor.kept("a") == {"b": 2}
    monitor.keep("a", None)
    assert monitor.kept("a") is None
