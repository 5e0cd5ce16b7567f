"""The spool and the lanes: nothing lost, nothing out of order, whatever is spilled, fails or is killed between."""

from __future__ import annotations

import contextlib
import json
import os
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosa_ray.tracking.lane import Lane
from cosa_ray.tracking.spool import Spool, session_of


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_segments_come_back_in_order_and_lanes_apart(tmp_path, kind) -> None:
    uri = str(tmp_path / "spool") if kind == "local" else f"memory://{uuid.uuid4().hex}/spool"
    spool = Spool(uri)
    assert spool.segments("metrics") == []
    names = [spool.write(f"session{n % 2}", "metrics", [{"n": n}, {"n": n + 0.5}]) for n in range(12)]
    artifact = spool.write("session0", "artifacts", [{"x": float("nan")}])
    again = Spool(uri)
    assert again.segments("metrics") == names
    assert again.segments("artifacts") == [artifact]
    assert [record["n"] for name in names for record in again.read(name)] == [n / 2 for n in range(24)]
    assert [session_of(name) for name in names] == ["session0", "session1"] * 6
    again.remove(names[0])
    assert spool.segments("metrics") == names[1:]


def test_a_half_written_segment_does_not_count_and_a_damaged_line_is_left_out(tmp_path) -> None:
    spool = Spool(str(tmp_path))
    name = spool.write("s", "metrics", [{"n": 1}, {"n": 2}])
    (tmp_path / ".leftover").write_text('{"n": 3')
    (tmp_path / name).write_text('{"n": 1}\n{"n": 2\n')
    assert spool.segments("metrics") == [name]
    assert spool.read(name) == [{"n": 1}]


def test_a_failed_write_leaves_no_segment(tmp_path, monkeypatch) -> None:
    spool = Spool(str(tmp_path))

    def full(_handle: int) -> None:
        raise OSError("No space left on device")

    lane = Lane("metrics", "s", spool)
    lane.add({"n": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        lane.spill()
    assert lane.in_memory == 1
    monkeypatch.undo()
    assert spool.segments("metrics") == []
    lane.spill()
    assert lane.in_memory == 0
    assert len(spool.segments("metrics")) == 1


class Store:
    """Takes records, or fails like a server that is away, in the middle of a batch too."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.fail_after: int | None = None

    def send(self, records, lane, session) -> None:
        for record in records:
            if self.fail_after == 0:
                raise ConnectionError("away")
            if self.fail_after is not None:
                self.fail_after -= 1
            self.taken.append(record["n"])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.just("add"), st.just("spill"), st.just("kill"), st.integers(0, 6)), max_size=40))
def test_every_record_arrives_in_order_whatever_happens_between(tmp_path_factory, actions) -> None:
    # add a record, flush to disk, deliver with a failure after n records, or die and start again.
    folder = str(tmp_path_factory.mktemp("spool"))
    store, number, safe = Store(), 0, 0
    lane = Lane("metrics", "s0", Spool(folder))
    for count, action in enumerate(actions):
        if action == "add":
            lane.add({"n": number})
            number += 1
        elif action == "spill":
            lane.spill()
            safe = number
        elif action == "kill":
            number = max(safe, max(store.taken, default=-1) + 1)  # the run goes on after what is safe or delivered
            safe = number
            lane = Lane("metrics", f"s{count}", Spool(folder))
            lane.take_over()
        else:
            store.fail_after = action
            with contextlib.suppress(ConnectionError):
                lane.deliver(store)
    store.fail_after = None
    lane.deliver(store)
    assert lane.empty
    assert list(dict.fromkeys(store.taken)) == list(range(number)), "each once (repeats aside), oldest first"
    assert Spool(folder).segments("metrics") == []


def test_a_flush_during_delivery_repeats_but_never_loses_or_overtakes(tmp_path) -> None:
    lane = Lane("metrics", "s", Spool(str(tmp_path)))
    taken: list[int] = []

    class Busy:
        def send(self, records, name, session) -> None:
            taken.extend(record["n"] for record in records)
            if len(taken) == 2:  # while the first batch is on its way, the run flushes and logs on
                lane.add({"n": 2})
                lane.spill()
                lane.add({"n": 3})

    lane.add({"n": 0})
    lane.add({"n": 1})
    lane.deliver(Busy())
    assert taken == [0, 1, 0, 1, 2, 3]


def test_records_are_plain_json(tmp_path) -> None:
    spool = Spool(str(tmp_path))
    record = {"kind": "metrics", "time": 1, "step": 2, "values": {"a": float("inf"), "b": 0.1}}
    name = spool.write("s", "metrics", [record])
    assert [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == [record]


def test_two_deliverers_of_one_spool_do_not_trip_each_other(tmp_path) -> None:
    writer = Lane("metrics", "s", Spool(str(tmp_path)))
    writer.add({"n": 0})
    writer.spill()
    lanes = [Lane("metrics", "", Spool(str(tmp_path))) for _ in range(2)]
    for lane in lanes:
        lane.take_over()
    store = Store()
    for lane in lanes:
        lane.deliver(store)
        assert lane.empty
    assert store.taken == [0]
