"""What reading the data costs: images a second and core by part, loader processes, memory, opening a large index.

    python benchmarks/data_loading.py --out data.json
    python benchmarks/data_loading.py --dataset datasets/voc --images 400 --processes 0 1 2 4 8

rates: one core, the images of one dataset in random order, ours (a sample of the index, decoded, both views) in turns
with a loop over the same bytes as files, as one writes it with PIL and torchvision: open, scale, flip, crop, blur, one
random operation. loaders: whole batches from 0, 1, 2... loader processes, and how many a step of so many images a
second needs. memory: what each loader process holds for itself and what all of them share, by the kernel's count.
index: opening a dataset of 1,000 to 118,287 images and reading one sample, in a process that has imported all before.
Without --dataset 256 photographs of 500 x 375 are made.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from measuring import exponent, in_turns, machine, medians, now, ratio, save
from PIL import Image

from cosa_ray.config.schema import Views
from cosa_ray.data.dataset import Split, open_dataset
from cosa_ray.data.importing import write_dataset
from cosa_ray.data.loader import training_batches
from cosa_ray.data.order import draw
from cosa_ray.data.pictures import voc_palette
from cosa_ray.data.shard import Row
from cosa_ray.data.source import Source
from cosa_ray.data.views import two_views

COCO = 118_287


@dataclass(frozen=True)
class Repeated:
    """A reader that gives the same few encoded pictures again and again, under names of their own."""

    pictures: tuple[tuple[bytes, int, int], ...] = field(repr=False)
    classes: int

    def __call__(self, sample: tuple[str, int]) -> Row:
        name, index = sample
        picture, height, width = self.pictures[index % len(self.pictures)]
        return Row(name, picture, None, (index % self.classes,), height, width)


def make_dataset(out: Path, pictures: Sequence[tuple[bytes, int, int]], images: int, classes: int) -> None:
    """A dataset of so many images, which are a few pictures again and again."""
    names = tuple(f"c{number}" for number in range(classes))
    samples = [(f"{index:08d}", index) for index in range(images)]
    reader, palette = Repeated(tuple(pictures), classes), voc_palette(classes + 1)
    made = Source("benchmark", None, {}, names, palette, "made up", "none", {"train": samples}, reader)
    write_dataset(made, str(out), local=True)


def encoded(image: Image.Image) -> tuple[bytes, int, int]:
    """A picture as JPEG, with its height and width."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue(), image.height, image.width


def photographs() -> list[tuple[bytes, int, int]]:
    """Photographs of VOC's usual size, 500 x 375: parts of those that scikit-image brings."""
    from skimage import data

    place, found = random.Random(0), []
    whole = [Image.fromarray(each()) for each in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    for index in range(64):
        image = whole[index % len(whole)]
        share = place.uniform(0.6, 1.0)
        width, height = int(image.width * share), int(image.height * share)
        left, top = place.randint(0, image.width - width), place.randint(0, image.height - height)
        found.append(encoded(image.crop((left, top, left + width, top + height)).resize((500, 375))))
    return found


def plain_views(file: Path, views: Views, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of a file with PIL and torchvision, as one writes them by hand."""
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F

    image = Image.open(file).convert("RGB")
    scale = rng.uniform(*views.scale)
    image = F.resize(image, [max(1, int(image.height * scale)), max(1, int(image.width * scale))])
    if rng.random() < views.flip:
        image = F.hflip(image)
    down, right = max(0, views.crop - image.height), max(0, views.crop - image.width)
    image = F.pad(image, [0, 0, right, down]) if down or right else image
    top, left = rng.randint(0, image.height - views.crop), rng.randint(0, image.width - views.crop)
    weak = F.crop(image, top, left, views.crop, views.crop)
    if rng.random() < views.blur:
        weak = F.gaussian_blur(weak, [9, 9], [rng.uniform(0.1, 2.0)])
    strong = v2.RandAugment(num_ops=1)(weak)
    return F.pil_to_tensor(weak), F.pil_to_tensor(strong)


def rates(split: Split, views: Views, images: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Images a second on one core: ours by part, and the plain loop over the same bytes as files."""
    order = random.Random(1).sample(range(len(split)), min(images, len(split)))
    files = []
    for index in order:
        files.append(folder / f"{index}.jpg")
        files[-1].write_bytes(split[index].image)
    chance = random.Random(2)
    calls = {
        "sample": lambda: [split[index] for index in order],
        "sample, decoded": lambda: [split[index].decode_image() for index in order],
        "sample, decoded, both views": lambda: [
            two_views(split[index].decode_image(), views, draw(0, 0, place)) for place, index in enumerate(order)
        ],
        "file, decoded": lambda: [Image.open(file).convert("RGB") for file in files],
        "file, decoded, both views": lambda: [plain_views(file, views, chance) for file in files],
    }
    seconds = in_turns(calls, rounds)
    ours, plain = seconds["sample, decoded, both views"], seconds["file, decoded, both views"]
    return {
        "images a second": {name: len(order) / each for name, each in medians(seconds).items()},
        "plain / ours": ratio(plain, ours),
        "plain / ours, decoding alone": ratio(seconds["file, decoded"], seconds["sample, decoded"]),
    }


def held(process: psutil.Process) -> dict[str, int]:
    """Bytes of a process by the kernel's count, shared pages in equal parts: its own memory, and of files."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return {"own": kib["Pss_Anon"] * 1024, "of files": kib["Pss_File"] * 1024}


def loaders(split: Split, views: Views, batch: int, steps: int, processes: Sequence[int]) -> dict[str, Any]:
    """Images a second of whole batches and memory of the loader processes, for each number of them."""
    found: dict[str, Any] = {}
    for count in processes:
        before = {each.pid for each in psutil.Process().children(recursive=True)}
        batches = training_batches(
            split, seed=0, views=views, batch_size=batch, start_step=0, stop_step=steps + 2 * count + 4, processes=count
        )
        for _ in range(2 * count + 4):  # what was made ahead
            next(batches)
        began = now()
        for _ in range(steps):
            next(batches)
        rate = steps * batch / (now() - began)
        workers = [each for each in psutil.Process().children(recursive=True) if each.pid not in before]
        workers = [each for each in workers if "from multiprocessing.forkserver" in " ".join(each.cmdline())]
        memory = [held(each) for each in workers if each.ppid() != psutil.Process().pid]
        found[str(count)] = {
            "images a second": rate,
            "own MiB a process": [round(each["own"] / 2**20, 1) for each in memory],
            "MiB of files, all processes": round(sum(each["of files"] for each in memory) / 2**20, 1),
        }
        del batches
    return found


def opening(folder: Path, images: Sequence[int], rounds: int) -> dict[str, float]:
    """Median seconds to open a dataset of so many images with 80 classes and to read one sample from its middle."""
    tiny = encoded(Image.new("RGB", (16, 16), (90, 120, 60)))
    for count in images:
        make_dataset(folder / str(count), [tiny], count, 80)

    def open_one(count: int) -> Any:
        split = open_dataset(str(folder / str(count))).split("train")
        return split[len(split) // 2]

    return medians(in_turns({str(count): lambda count=count: open_one(count) for count in images}, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="dataset folder; photographs are made without one")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=128, help="images of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="batches that are timed for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--index", type=int, nargs="+", default=[1_000, 10_000, COCO])
    parser.add_argument("--out", metavar="FILE", help="write the result as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    views = Views()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if given.dataset is None:
            make_dataset(folder / "photographs", photographs(), 256, 20)
        split = open_dataset(given.dataset or str(folder / "photographs")).split(given.split)
        (folder / "files").mkdir()
        result: dict[str, Any] = {"machine": machine(), "rates": {}, "loaders": {}}
        began = time.perf_counter()
        result["rates"] = rates(split, views, given.images, given.rounds, folder / "files")
        result["loaders"] = loaders(split, views, given.batch, given.steps, given.processes)
        result["index seconds"] = opening(folder / "index", given.index, given.rounds)
        if len(given.index) > 1:
            result["index exponent"] = exponent(result["index seconds"])
        result["took"] = time.perf_counter() - began
    one = result["rates"]["images a second"]["sample, decoded, both views"]
    result["processes a step needs"] = {f"{rate} images a second": math.ceil(rate / one) for rate in (1, 10, 100, 300)}
    print(json.dumps(result, indent=1))
    save(result, given.out)


if __name__ == "__main__":
    main()
