"""Whose a folder is: a second driver of one name is refused, and what a killed one leaves is free again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cosa_ray.errors import RunFailed, UserError
from cosa_ray.training import lease
from cosa_ray.training.lease import LEASE, check_held, hold, token_in
from cosa_ray.training.storage import RunFolder

HOLDER = """
import sys, time
from cosa_ray.training.lease import hold
from cosa_ray.training.storage import RunFolder
with hold(RunFolder(sys.argv[1]), "run x"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "x") if request.param == "local" else f"memory://lease-{tmp_path.name}/x")


def test_one_holder_at_a_time(folder: RunFolder) -> None:
    with hold(folder, "run x") as held:
        assert token_in(folder) == held.token
        with (
            pytest.raises(UserError, match=rf"run x .* is being worked on by process {os.getpid()}"),
            hold(folder, "run x"),
        ):
            pass
        assert token_in(folder) == held.token
        check_held(folder, held.token, "run x")
    assert token_in(folder) is None
    with hold(folder, "run x"):
        pass


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(RunFolder(str(tmp_path / "runs" / "x")), "run x"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_of_many_at_once_one_gets_it(folder: RunFolder) -> None:
    got, refused = [], []
    done = threading.Event()

    def take() -> None:
        try:
            with hold(folder, "run x") as held:
                got.append(held.token)
                done.wait(30)
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for each in threads:
        each.start()
    end = time.monotonic() + 30
    while len(got) + len(refused) < 8 and time.monotonic() < end:
        time.sleep(0.01)
    done.set()
    for each in threads:
        each.join()
    assert (len(got), len(refused)) == (1, 7)


def test_the_lease_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid}"), hold(RunFolder(str(tmp_path)), "run x"):
            pass
        process.kill()
        process.wait()
        before = time.monotonic()
        with hold(RunFolder(str(tmp_path)), "run x"):
            assert time.monotonic() - before < lease.SILENT_SECONDS / 2


def elsewhere(folder: RunFolder, **changes: object) -> None:
    """The lease as another machine wrote it."""
    content = json.loads(folder.read_text(LEASE) or "{}")
    folder.write_text(LEASE, json.dumps({**content, "machine": "another", "host": "far", **changes}))


def test_a_holder_elsewhere_lives_while_it_renews(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SILENT_SECONDS", 3.0)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.1)
    with hold(folder, "run x"):
        content = json.loads(folder.read_text(LEASE) or "")
    folder.write_text(LEASE, json.dumps(content))
    elsewhere(folder)
    beating = threading.Event()

    def beat() -> None:
        number = 0
        while not beating.wait(0.2):
            number += 1
            elsewhere(folder, beat=number)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="on far"), hold(folder, "run x"):
        pass
    beating.set()
    thread.join()
    with hold(folder, "run x") as held:  # silent now
        assert token_in(folder) == held.token


def test_who_slept_through_finds_the_folder_taken(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    with hold(folder, "run x") as held:
        elsewhere(folder, token="another")
        time.sleep(0.5)
        assert token_in(folder) == "another", "a lost lease is not renewed"
        with pytest.raises(RunFailed, match=r"run x was taken over by process .* on far"):
            check_held(folder, held.token, "run x")
    assert token_in(folder) == "another", "nor given back"


def test_a_lease_is_renewed(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    with hold(folder, "run x"):
        end = time.monotonic() + 20
        while json.loads(folder.read_text(LEASE) or "{}").get("beat", 0) < 3:
            assert time.monotonic() < end
            time.sleep(0.05)
