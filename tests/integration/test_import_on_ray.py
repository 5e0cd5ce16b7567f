"""Imports on Ray: the bytes are those of an import without it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.integration.test_import import contents, killed_and_resumed

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_killed_on_ray_and_resumed_without_ends_in_the_same_bytes(tmp_path):
    killed_and_resumed(tmp_path, "ray")


def test_ray_writes_the_same_bytes_names_what_it_puts_aside_and_loads(tmp_path):
    """One cluster for several things: identity with a local import, strict errors, and a loader inside an actor."""
    script = tmp_path / "job.py"
    script.write_text(
        """
import json, os, sys, time
import ray
from cosa_ray.data.importing import import_dataset, write_dataset
from cosa_ray.data.pictures import Broken
from cosa_ray.data.shard import Row
from cosa_ray.data.source import Source
from cosa_ray.errors import UserError

out = sys.argv[1]
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
options = {"train": 90, "val": 10, "size": 48, "shard_images": 16}
seen = []
import_dataset("shapes", None, out + "/ray", progress=seen.append, **options)
import_dataset("shapes", None, out + "/local", local=True, **options)
assert ray.is_initialized()  # a cluster that was there stays
try:
    import_dataset("folder", sys.argv[2], out + "/strict", strict=True)
    refused = ""
except UserError as error:
    refused = str(error)


class Slow:
    def __call__(self, sample):  # sample 0 is broken; by the time that it says so, other shards are at work
        if sample[0] == "10":  # as where a task is interrupted just when it has opened its file
            open(out + "/slow/.train-00001.arrow.0.part", "w").close()
        time.sleep(0.5)
        if sample[0] == "0":
            raise Broken("it is broken")
        return Row(sample[0], b"x", None, (0,), 1, 1)


numbered = {"train": [(str(index),) for index in range(80)]}
slow = Source("folder", None, {}, ("cat",), ((0, 0, 0), (1, 1, 1)), "", "", numbered, Slow())
try:
    write_dataset(slow, out + "/slow", strict=True, shard_images=10)
except UserError as error:
    stopped = str(error)
left = [sorted(os.listdir(out + "/slow"))]
time.sleep(6)
left.append(sorted(os.listdir(out + "/slow")))


@ray.remote(num_cpus=1)
def load(folder, processes):
    from cosa_ray.config.schema import Views
    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.data.loader import training_batches

    split = open_dataset(folder).split("train")
    keys = dict(seed=1, views=Views(crop=32), batch_size=4, start_step=0, stop_step=6)
    return [int(batch.strong.long().sum()) for batch in training_batches(split, processes=processes, **keys)]


sums = ray.get([load.remote(out + "/ray", processes) for processes in (0, 2)], timeout=200)
ray.shutdown()
result = {"refused": refused, "sums": sums, "last": seen[-1], "steps": len(seen), "stopped": stopped, "left": left}
print(json.dumps(result))
"""
    )
    broken = tmp_path / "broken"
    (broken / "images").mkdir(parents=True)
    (broken / "images/bad.jpg").write_bytes(b"no picture")
    (broken / "labels.csv").write_text("image,labels\nbad.jpg,cat\n")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(broken)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert result["stopped"] == "train 0: it is broken; mend it, or import without --strict"
    at_once, later = (set(names) for names in result["left"])
    # Cancelled tasks may need a moment to drop what they had begun, and none begins or ends another shard.
    assert {name for name in at_once if not name.endswith(".part")} == later
    assert not [name for name in later if name.endswith(".part")]
    assert "train-00000.arrow" not in later
    assert len(later) < 5  # whole shards of tasks that had ended stay
    assert result["refused"].startswith("train bad: the image cannot be decoded (not a picture)")
    assert "\n" not in result["refused"]
    assert result["sums"][0] == result["sums"][1]
    assert len(result["sums"][0]) == 6
    assert result["last"] == [100, 100, 0]
    assert result["steps"] == 7
