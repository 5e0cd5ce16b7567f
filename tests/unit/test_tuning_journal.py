"""The journal: what is written down is there after a kill, once, and in one piece."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.journal import FOLDER, Entry, Journal, Report, by_configuration


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "sweep"))


def test_everything_reads_back_equal(folder: RunFolder) -> None:
    journal = Journal(folder)
    full = Entry(
        0,
        {"a": 0.1, "b": None, "c": (1.0, 0.5), "d": "x", "e": True},
        0,
        seed=3,
        origin="earlier run x",
        state="failed",
        step=20,
        hours=0.5,
        started=1.0,
        ended=2.0,
        kind="diverged",
        cause="train/loss is not finite",
        ended_by="asha",
        reports=(Report(10, {"val/miou": 0.5}, 1.5), Report(20, {"val/miou": -math.inf}, 1.75)),
        lineage=({"step": 10, "donor": 2, "values": {"c": (1.0, 0.5)}},),
        memory={"tpe:key": [1, 2]},
    )
    journal.put(full)
    journal.add({"a": 0.2}, seed=1, first=0)
    read = Journal(folder)
    assert read.entries() == journal.entries() == [full, Entry(1, {"a": 0.2}, 0, seed=1)]
    assert (len(read), read[1].id) == (2, "001")


def test_trials_are_numbered_on_and_grouped_by_configuration(folder: RunFolder) -> None:
    journal = Journal(folder)
    for first in (None, 0, None, 0, 2):
        journal = Journal(folder)
        journal.add({}, first=first)
    groups = by_configuration(reversed(journal.entries()))
    assert {number: [entry.number for entry in group] for number, group in groups.items()} == {0: [0, 1, 3], 2: [2, 4]}


def test_a_step_is_reported_once(folder: RunFolder) -> None:
    journal = Journal(folder)
    journal.add({})
    journal.report(0, 20, {"m": 0.2}, at=1.0)
    journal.report(0, 20, {"m": 0.9}, at=2.0)
    journal.report(0, 10, {"m": 0.1}, at=3.0)
    entry = Journal(folder)[0]
    assert [(each.step, each.metrics["m"], each.at) for each in entry.reports] == [(20, 0.2, 1.0), (10, 0.1, 3.0)]
    assert entry.step == 20


def test_a_copy_has_the_donors_score_and_no_other(folder: RunFolder) -> None:
    journal = Journal(folder)
    for number, scores in enumerate(([0.1, 0.2, 0.3], [0.5, 0.6])):
        journal.add({"x": number})
        for place, score in enumerate(scores):
            journal.report(number, 10 * (place + 1), {"m": score}, at=float(place))
    journal.copied(0, 1, 20, {"x": 7})
    journal.report(0, 30, {"m": 0.4})
    entry = Journal(folder)[0]
    assert [(each.step, each.metrics["m"]) for each in entry.reports] == [(10, 0.1), (20, 0.6), (30, 0.4)]
    assert [report.metrics["m"] for report in entry.own_reports()] == [0.6, 0.4]
    assert entry.values == {"x": 7}
    assert entry.lineage == ({"step": 20, "donor": 1, "values": {"x": 7}},)
    assert [report.metrics["m"] for report in Journal(folder)[1].own_reports()] == [0.5, 0.6]


def test_a_kill_while_it_is_written_leaves_what_was_before(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the new file stands in its place, and with half of it on the disk."""
    journal = Journal(folder)
    journal.add({"x": 1})
    before = Journal(folder).entries()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            journal.update(0, state="running")
    Path(folder.join(f"{FOLDER}/.000.json.half")).write_text('{"number": 0, "val')
    assert Journal(folder).entries() == before
    assert journal[0] == before[0]


def test_what_does_not_change_is_not_written(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(folder)
    entry = journal.add({"x": 1})
    monkeypatch.setattr(RunFolder, "write_text", lambda *_: pytest.fail("written"))
    assert journal.update(0, state="pending") == entry
    with pytest.raises(pytest.fail.Exception):
        journal.put(replace(entry, state="running"))
