"""Faults of what a run stands on, injected for real: storage, disk, data, the clock, a second run of its name.

What has to hold each time: the loss curve is bitwise that of an undisturbed run, MLflow has every point once, the last
good checkpoint is never touched, and nobody cleans up by hand. Runs are one process without Ray; test_faults_on_ray
has what is Ray's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cosa_ray.config.load import dump_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.training import driver, storage
from cosa_ray.training.driver import RunResult, train
from cosa_ray.training.lease import hold, token_in
from cosa_ray.training.runs import read_run
from cosa_ray.training.session import LocalSession
from cosa_ray.training.storage import RunFolder
from tests.conftest import history, tiny_config
from tests.integration.team_server import PlainServer

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
Make = Callable[..., Config]
Curve = list[tuple[int, float]]


def curve(config: Config, result: RunResult, key: str = "train/loss") -> Curve:
    assert config.tracking.uri is not None
    assert result.mlflow_run_id is not None
    return history(config.tracking.uri, result.mlflow_run_id, key)


@pytest.fixture(scope="module")
def undisturbed(tiny_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """The loss of twenty steps that nothing disturbs."""
    config = tiny_config(tiny_dataset, tmp_path_factory.mktemp("undisturbed"))
    return curve(config, train(config, name="undisturbed", local=True))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 16 MiB, to fill and to write-protect."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], check=False).returncode
    ):
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def contents(folder: Path) -> dict[str, str]:
    """Checksum of every file of the run's latest registered checkpoint."""
    run = read_run(str(folder))
    assert run is not None
    latest = run.checkpoints.latest()
    assert latest is not None
    files = (folder / latest.name).iterdir()
    return {f"{latest.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def after(folder: Path, step: int, action: Callable[[], None]) -> threading.Thread:
    """Does something in a thread once the run has registered a checkpoint of that step."""

    def wait() -> None:
        while (run := read_run(str(folder))) is None or run.step < step:
            time.sleep(0.005)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def fill(disk: Path) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(1 << 12))


def whole(folder: Path) -> None:
    """Nothing but the registered checkpoints is there, and no half-written file."""
    index = json.loads((folder / "checkpoints.json").read_text())["checkpoints"]
    assert sorted(each["name"].partition("/")[2] for each in index) == sorted(os.listdir(folder / "checkpoints"))
    assert not [path for path in folder.rglob(".*") if path.is_file()]


@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", ["write-protected", "full"])
def test_storage_refuses_writes_for_a_while(
    disk: Path, tiny: Make, undisturbed: Curve, monkeypatch: pytest.MonkeyPatch, fault: str, seconds: int
) -> None:
    config = tiny(storage=str(disk / "runs"))
    folder = disk / "runs" / "refused"
    kept: list[dict[str, str]] = []

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    def refuse() -> None:
        kept.append(contents(folder))
        if fault == "full":
            fill(disk)
        else:
            # Refused while a file is open for writing there.
            while subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=False, capture_output=True).returncode:
                time.sleep(0.005)
        time.sleep(seconds)
        kept.append({name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in kept[0]})
        (disk / "ballast").unlink() if fault == "full" else remount("rw")

    fault_over = after(folder, 5, refuse)
    # Slowly enough for the fault to come within the run.
    monkeypatch.setattr(LocalSession, "stop_wished", lambda self: bool(time.sleep(0.2)))
    result = train(config, name="refused", local=True)
    fault_over.join(30)
    assert kept[0] == kept[1], "the last good checkpoint was not touched"
    assert result.state == "finished"
    assert curve(config, result) == undisturbed
    whole(folder)


def test_storage_that_stays_away_ends_the_run_and_loses_nothing(
    disk: Path, tiny: Make, undisturbed: Curve, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(storage=str(disk / "runs"))
    folder = disk / "runs" / "away"
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 3.0)
    monkeypatch.setattr(LocalSession, "stop_wished", lambda self: bool(time.sleep(0.2)))

    filled = after(folder, 5, lambda: fill(disk))
    with pytest.raises(Exception, match=r"No space left|no space|failed writing|I/O error"):
        train(config, name="away", local=True)
    filled.join()
    (disk / "ballast").unlink()
    monkeypatch.undo()
    result = train(config, name="away", local=True, resume=True)
    assert curve(config, result) == undisturbed
    whole(folder)


@pytest.mark.parametrize("seconds", [8, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])])
def test_mlflow_is_away_and_comes_back(
    tiny: Make, tmp_path: Path, undisturbed: Curve, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """The server is killed after five steps; the run goes on meanwhile and ends after it is back."""
    with PlainServer(tmp_path) as server:
        config = tiny(tracking__uri=server.url)
        back = after(Path(config.storage) / "away", 5, lambda: server.away(seconds))
        steps_left = 15
        monkeypatch.setattr(LocalSession, "stop_wished", lambda self: bool(time.sleep(1.3 * seconds / steps_left)))
        result = train(config, name="away", local=True)
        back.join()
        result = train(config, name="away", local=True, resume=True)  # delivers what is left, if anything
        assert result.state == "finished"
        assert curve(config, result) == undisturbed
        assert [step for step, _ in curve(config, result, "val/miou")] == [10, 20]
        spool = Path(config.storage) / "away" / "spool"
        assert not spool.exists() or not list(spool.iterdir())


def test_a_corrupt_shard_is_named_and_the_run_goes_on_once_it_is_mended(
    tiny: Make, tiny_dataset: str, tmp_path: Path, undisturbed: Curve, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "copy"
    shutil.copytree(tiny_dataset, data)
    config = tiny(data__dataset=str(data))
    folder = Path(config.storage) / "corrupt"
    shard = next(data.glob("train*"))
    good = shard.read_bytes()

    def corrupt() -> None:
        with shard.open("r+b") as stream:  # in place: the run has it mapped
            at = 0
            while (at := good.find(b"\x89PNG", at + 1)) > 0:
                stream.seek(at)
                stream.write(bytes(64))
            at = 0
            while (at := good.find(b"\xff\xd8\xff", at + 1)) > 0:
                stream.seek(at)
                stream.write(bytes(64))

    monkeypatch.setattr(LocalSession, "stop_wished", lambda self: bool(time.sleep(0.1)))
    done = after(folder, 5, corrupt)
    with pytest.raises((UserError, RunFailed), match=r"cannot be decoded .*data check"):
        train(config, name="corrupt", local=True)
    done.join()
    run = read_run(str(folder))
    assert run is not None
    assert run.step >= 5
    with shard.open("r+b") as stream:
        stream.write(good)
    result = train(config, name="corrupt", local=True, resume=True)
    assert curve(config, result) == undisturbed
    whole(folder)


def cosa_ray(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cosa_ray.cli.main", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# The wall clock as all processes of a run see it, moved by as many seconds as a file says; no other clock is touched.
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <sys/time.h>
static int64_t offset(void) {
    int64_t seconds = 0;
    FILE *file = fopen(getenv("CLOCK_OFFSET"), "rb");
    if (file) { if (fread(&seconds, 8, 1, file) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, at);
    if (!code && clock == CLOCK_REALTIME) at->tv_sec += offset();
    return code;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec; at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.mark.slow
def test_the_clock_jumps(tiny: Make, tmp_path: Path) -> None:
    """Two hours back while the run goes on; killed, and continued a day ahead."""
    (tmp_path / "clock.c").write_text(CLOCK)
    compiler = shutil.which("cc") or pytest.skip("no C compiler to make another clock with")
    library, offset = tmp_path / "clock.so", tmp_path / "offset"
    words = ["-shared", "-fPIC", "-O2", "-o", library, tmp_path / "clock.c", "-ldl"]
    subprocess.run([compiler, *map(str, words)], check=True)
    faked = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}
    # So many steps that the jump back, which follows a checkpoint's registration, falls between two of them.
    config = tiny(training__steps=80, evaluation__every=40)
    usual = curve(config, train(config, name="usual", local=True))
    (tmp_path / "x.yaml").write_text(dump_config(config))

    def jump(seconds: int) -> None:
        (tmp_path / "next").write_bytes(struct.pack("q", seconds))
        os.replace(tmp_path / "next", offset)

    jump(0)
    folder = Path(config.storage) / "jumps"
    words = ["train", "x.yaml", "--local", "--name", "jumps"]
    first = cosa_ray(tmp_path, *words, **faked)
    after(folder, 5, lambda: jump(-7200)).join(120)
    after(folder, 40, first.kill).join(120)
    first.communicate()
    jump(86400)
    second = cosa_ray(tmp_path, *words, "--resume", "--json", **faked)
    out, said = second.communicate(timeout=300)
    assert second.returncode == 0, said
    run_id = json.loads(out)["mlflow_run_id"]
    from mlflow import MlflowClient

    points = MlflowClient(tracking_uri=config.tracking.uri).get_metric_history(run_id, "train/loss")
    # By step: times of logging jump with the clock.
    assert sorted((point.step, point.value) for point in points) == usual
    times = [point.timestamp for point in sorted(points, key=lambda point: point.step)]
    assert min(times) < times[0] - 3600_000, "the clock did jump back"
    assert max(times) > times[0] + 80_000_000, "and ahead"
    whole(folder)


def test_two_runs_of_one_name_at_once(tiny: Make, tmp_path: Path, undisturbed: Curve) -> None:
    config = tiny()
    (tmp_path / "x.yaml").write_text(dump_config(config))
    words = ["train", "x.yaml", "--local", "--name", "same", "--json"]
    both = [cosa_ray(tmp_path, *words) for _ in range(2)]
    ended = [(process.communicate(timeout=300), process.returncode) for process in both]
    assert sorted(code for _, code in ended) == [0, 2]
    (refused,) = [said for (_, said), code in ended if code == 2]
    assert "run same" in refused
    assert "is being worked on by process" in refused or "exists already" in refused
    assert refused.strip().count("\n") == 0
    (result,) = [json.loads(out) for (out, _), code in ended if code == 0]
    assert history(str(config.tracking.uri), result["mlflow_run_id"], "train/loss") == undisturbed


def test_a_second_run_of_the_name_leaves_the_first_alone(
    tiny: Make, tmp_path: Path, undisturbed: Curve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--resume of a run that is still going."""
    config = tiny()
    (tmp_path / "x.yaml").write_text(dump_config(config))
    said: list[Any] = []

    def second() -> None:
        process = cosa_ray(tmp_path, "train", "x.yaml", "--local", "--name", "going", "--resume")
        said.append((process.communicate(timeout=120)[1], process.returncode))

    waiting = after(Path(config.storage) / "going", 5, second)

    class Waiting(LocalSession):
        def stop_wished(self) -> bool:
            run = read_run(str(Path(config.storage) / "going"))
            if run is not None and run.step >= 10:
                waiting.join(120)
            return False

    monkeypatch.setattr(driver, "LocalSession", Waiting)
    result = train(config, name="going", local=True)
    assert said[0][1] == 2
    assert f"is being worked on by process {os.getpid()}" in said[0][0]
    assert curve(config, result) == undisturbed


def test_a_sweep_whose_driver_lives_is_refused(tiny: Make, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(dump_config(tiny()))
    (tmp_path / "s.yaml").write_text("base: x.yaml\nspace: {losses.cam_to_seg: {uniform: [0.1, 0.2]}}\ntrials: 2\n")
    with hold(RunFolder(str(Path(tiny().storage) / "swept")), "sweep swept") as lease:
        process = cosa_ray(tmp_path, "tune", "s.yaml", "--name", "swept", "--no-track")
        _, said = process.communicate(timeout=120)
        assert token_in(RunFolder(str(Path(tiny().storage) / "swept"))) == lease.token
    assert process.returncode == 2
    assert f"is being worked on by process {os.getpid()}" in said
