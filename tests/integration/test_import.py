"""Imports and loading for real: on Ray, killed without warning, and at two sizes for memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cosa_ray.data.dataset import open_dataset

SHAPES = """
import sys
from cosa_ray.data.importing import import_dataset
out, train, shard, local = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "local"
import_dataset("shapes", None, out, local=local, train=train, val=4, size=48, shard_images=shard)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(out: Path, train: int, shard: int, where: str = "local") -> subprocess.Popen:
    words = [sys.executable, "-c", SHAPES, str(out), str(train), str(shard), where]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    process.communicate(timeout=400)
    assert process.returncode == 0


ROWS = """
import sys
from cosa_ray.data import shard
from cosa_ray.data.importing import write_dataset
from cosa_ray.data.source import Source

out, train, hold = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "hold"
if hold:  # what this test is there to find: all rows of a shard in memory
    shard._ROWS = 10**9


class Samples:
    def __len__(self):
        return train

    def __getitem__(self, part):
        return [(str(index),) for index in range(train)[part]]


class Reader:
    def __call__(self, sample):
        return shard.Row(sample[0], sample[0].encode() * (60_000 // len(sample[0])), None, (0,), 1, 1)


source = Source("folder", None, {}, ("cat",), ((0, 0, 0), (1, 1, 1)), "", "", {"train": Samples()}, Reader())
write_dataset(source, out, local=True, shard_images=1000)
for line in open("/proc/self/status"):  # not getrusage: its peak takes in the parent's memory from before the exec
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) // 1024)
"""


def test_memory_does_not_grow_with_the_set_nor_with_the_shard(tmp_path):
    """3 MiB of rows against 85 MiB; and a writer that held a shard's rows would be found out."""
    peaks = {}
    for train, how in ((50, "stream"), (1500, "stream"), (1500, "hold")):
        words = [sys.executable, "-c", ROWS, str(tmp_path / f"{train}-{how}"), str(train), how]
        done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=True)
        peaks[train, how] = int(done.stdout)
    written = sum(path.stat().st_size for path in (tmp_path / "1500-stream").iterdir()) // 2**20
    assert written > 80
    allowed = 25  # MiB: two batches of 64 rows, in Python and in Arrow, and the allocator's slack
    assert peaks[1500, "stream"] - peaks[50, "stream"] < allowed
    assert peaks[1500, "hold"] - peaks[50, "stream"] > 2 * allowed


def killed_and_resumed(tmp_path: Path, where: str) -> None:
    finish(start(tmp_path / "whole", 600, 50))
    process = start(tmp_path / "cut", 600, 50, where)
    state = tmp_path / "cut/_import"
    deadline = time.monotonic() + 200
    while len(list(state.glob("train-*.json"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    if where != "local":  # the cluster ends with its driver; its tasks may still write what they had begun
        time.sleep(10)
    assert not (tmp_path / "cut/dataset.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("train-*.arrow")}
    reported = {path.stem for path in state.glob("train-*.json")}
    assert 3 <= len(reported) < 12
    finish(start(tmp_path / "cut", 600, 50))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    for path, stamp in kept.items():
        if path.stem in reported:
            assert path.stat().st_mtime_ns == stamp


def test_killed_and_resumed_ends_in_the_same_bytes(tmp_path):
    killed_and_resumed(tmp_path, "local")


@pytest.mark.real_data
def test_voc_small_is_what_its_description_says(real_data, tmp_path):
    from cosa_ray.data.check import check_dataset
    from cosa_ray.data.importing import import_dataset

    card = import_dataset("voc", str(real_data / "voc-small320"), str(tmp_path / "voc"), local=True)
    assert {name: (split.images, split.masks) for name, split in card.splits.items()} == {
        "train": (1500, 1500),
        "val": (296, 296),
    }
    assert not any(split.put_aside for split in card.splits.values())
    report = check_dataset(str(tmp_path / "voc"))
    assert report.ok
    named_only = [item for item in report.splits["train"].disagreements if item.only_in_labels]
    assert len(named_only) == 104
    (odd,) = report.splits["val"].disagreements
    assert (odd.id, odd.only_in_labels, odd.only_in_mask) == ("2008_005245", [], ["person"])
    original = (real_data / "voc-small320/JPEGImages/2008_005245.jpg").read_bytes()
    val = open_dataset(str(tmp_path / "voc")).split("val")
    assert val[val.ids().index("2008_005245")].image == original


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "cosa_ray.cli.main", *words], capture_output=True, text=True, timeout=300, check=False
    )


def test_commands_from_import_to_picture(tmp_path):
    out = str(tmp_path / "shapes")
    words = ("data", "import", "shapes", out, "--train", "20", "--val", "4", "--size", "48", "--local", "--json")
    done = command(*words)
    assert done.returncode == 0, done.stderr
    card = json.loads(done.stdout)["card"]
    assert card["splits"]["train"]["images"] == 20
    again = command(*words)
    assert again.returncode == 2
    assert again.stderr.startswith("cosa-ray: ")
    assert again.stdout == ""
    assert len(again.stderr.splitlines()) == 1

    checked = command("data", "check", out, "--json")
    assert checked.returncode == 0
    assert json.loads(checked.stdout)["damage"] == []
    table = command("data", "check", out)
    assert "all 2 shards have the checksums of the card" in table.stdout

    picture = tmp_path / "sheet.png"
    shown = command("data", "show", out, str(picture), "--split", "val", "--config", "shapes", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["picture"] == str(picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"

    shard = tmp_path / "shapes/val-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[-200] ^= 255
    shard.write_bytes(bytes(data))
    damaged = command("data", "check", out, "--json")
    assert damaged.returncode == 1
    assert "val-00000.arrow" in json.loads(damaged.stdout)["damage"][0]
