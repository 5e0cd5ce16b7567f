"""How cost grows with workers, images, classes and trials: measured, and the exponent of a power law through it.

    python benchmarks/growth.py classes --values 5 20 80 --experiment voc --batch 2 --rounds 2
    python benchmarks/growth.py workers --values 1 2 4
    python benchmarks/growth.py images --values 1000 10000 100000
    python benchmarks/growth.py trials --values 10 50 200

classes: seconds of a step by part, beside the bare network. workers: seconds of a step of the same global batch by
plain torch.distributed on this machine, each worker with its share of the cores. images: what opening a dataset and
reading a sample take and hold, each in a process of its own, and the order of an epoch. trials: what a sweep spends
where so many have finished: the search's next proposal, a turn of the table, the journal read again, and the result.
An exponent of 0 is flat, of 1 in proportion.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from measuring import exponent, machine, save

Growth = dict[str, dict[str, float]]
_OPEN = """
import sys, time
from pathlib import Path
import cosa_ray.data.loader
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.order import Order
def held():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
before, began = held(), time.perf_counter()
split = open_dataset(sys.argv[1]).split("train")
sample = split[len(split) // 2]
opened = time.perf_counter() - began
began = time.perf_counter()
Order(0, len(split)).indices(len(split), 4)
print(opened, (held() - before) / 1024, time.perf_counter() - began)
"""


def classes(given: Namespace, folder: Path) -> Growth:
    """Seconds of the parts of a step, by number of classes."""
    found: Growth = {}
    for value in given.values:
        out = folder / f"{value}.json"
        words = [sys.executable, str(Path(__file__).parent / "step_time.py"), given.experiment, "--out", str(out)]
        words += ["--classes", str(value), "--rounds", str(given.rounds), "--threads", str(given.threads)]
        words += ["--batch", str(given.batch)] if given.batch else []
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        result = json.loads(out.read_text())
        for name, seconds in result["seconds"].items():
            found.setdefault(f"{name}, s", {})[str(value)] = seconds
        for part in ("scales and fusion", "pseudo-labels and losses"):
            found.setdefault(f"{part}, s", {})[str(value)] = result["split"]["step"][part]
    return found


def workers(given: Namespace, folder: Path) -> Growth:
    """Seconds of a step, by number of workers."""
    from ray_overhead import started

    found: dict[str, float] = {}
    for value in given.values:
        asked = Namespace(
            experiment=given.experiment,
            set=[],
            steps=given.steps,
            skip=10,
            workers=value,
            cpus=given.threads,
            port=29_514,
        )
        found[str(value)] = statistics.median(started("plain", asked, folder / f"workers-{value}"))
    return {"step, s": found}


def images(given: Namespace, folder: Path) -> Growth:
    """Seconds and MiB of opening a dataset, and seconds of an epoch's order, by number of images."""
    from data_loading import encoded, make_dataset
    from PIL import Image

    tiny = encoded(Image.new("RGB", (16, 16), (90, 120, 60)))
    found: Growth = {"opened and one sample read, s": {}, "held by that, MiB": {}, "order of an epoch, s": {}}
    for value in given.values:
        make_dataset(folder / str(value), [tiny], value, 80)
        runs = []
        for _ in range(given.rounds):
            words = [sys.executable, "-c", _OPEN, str(folder / str(value))]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            runs.append([float(word) for word in done.stdout.split()])
        for row, numbers in zip(found.values(), zip(*runs, strict=True), strict=True):
            row[str(value)] = statistics.median(numbers)
    return found


def trials(given: Namespace, folder: Path) -> Growth:
    """Seconds of what a sweep's driver does, by number of finished trials."""
    from scaling import measured_sweep

    found: Growth = {}
    for value in given.values:
        for name, seconds in measured_sweep(folder, value).items():
            if name.endswith("_s") and name != "median_judge_s":
                found.setdefault(name.removesuffix("_s") + ", s", {})[str(value)] = seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["classes", "workers", "images", "trials"])
    parser.add_argument("--values", type=int, nargs="+", required=True)
    parser.add_argument("--experiment", default="shapes")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run with so many workers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of all workers together")
    parser.add_argument("--out", metavar="FILE", help="write the result as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure = {"classes": classes, "workers": workers, "images": images, "trials": trials}[given.what]
        growth = measure(given, Path(temporary))
    result: dict[str, Any] = {
        "what": given.what,
        "experiment": given.experiment,
        "machine": machine(),
        "growth": growth,
    }
    if len(given.values) > 1:
        result["exponents"] = {name: exponent(row) for name, row in growth.items() if min(row.values()) > 0}
    print(json.dumps(result, indent=1))
    save(result, given.out)


if __name__ == "__main__":
    main()
