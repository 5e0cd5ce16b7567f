"""Evaluation and prediction against the bare network, their memory, and the CRF on all cores.

    python benchmarks/evaluation.py --threads 2 --out evaluation.json
    python benchmarks/evaluation.py --experiment voc --images 8 --size 448 --rounds 2

speed: images a second of an evaluation inside a run (both networks, every scale and flip, scores, pictures) in turns
with the bare networks on inputs that are ready, and of `predict` (one network; pictures read, masks and overlays
written) in turns with that network. memory: the most that a process holds while it evaluates more and more images, each
in a process of its own. crf: images a second on one core of this process, and as Ray tasks on all of them. Random
weights, made-up shapes; the CRF on a photograph of 500 x 375 with 21 classes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import in_turns, machine, medians, now, ratio, save

from cosa_ray.config.load import apply_overrides, load_config
from cosa_ray.config.protocol import Crf, Protocol, in_run_protocol
from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import Split, open_dataset
from cosa_ray.data.importing import import_dataset
from cosa_ray.evaluation.description import Description
from cosa_ray.evaluation.evaluate import evaluate
from cosa_ray.evaluation.inference import autocast_dtype
from cosa_ray.method.assignment import resize
from cosa_ray.method.network import Network, mixed_precision, scaled_size
from cosa_ray.training.state import TrainState


def configured(given: argparse.Namespace, data: Path) -> Config:
    """The experiment on this data, read in this process."""
    changes: dict[str, Any] = {"data.dataset": str(data), "data.loader_processes": 0, "model.checkpoint": None}
    if given.size:
        changes["views.crop"] = given.size
    return apply_overrides(load_config(given.experiment, given.set), {"workers": 1, **changes})


def run_evaluation(state: TrainState, split: Split, classes: tuple[str, ...], config: Config) -> dict[str, float]:
    """An evaluation as it happens inside a run; pictures drawn."""
    found = evaluate(
        state.online,
        state.assignment,
        split,
        config,
        classes=classes,
        thresholds=state.threshold_values(),
        autocast=autocast_dtype(config, torch.device("cpu")),
    )
    found.pictures()
    return found.metrics


def bare(networks: list[Network], images: torch.Tensor, protocol: Protocol, autocast: torch.dtype | None) -> Any:
    """A function that puts batches of ready inputs through the networks at every scale and flip, and nothing else."""
    batches = []
    for batch in images.split(protocol.batch_size):
        for scale in protocol.scales:
            view = resize(batch, scaled_size(networks[0], *batch.shape[-2:], scale))
            batches.append(torch.cat([view, view.flip(-1)]) if protocol.flip else view)

    @torch.no_grad()
    def run() -> None:
        for network in networks:
            for batch in batches:
                with mixed_precision(batch.device, autocast):
                    network(batch)

    return run


@contextmanager
def opened(folder: Path) -> Iterator[Path]:
    """A folder, as something that is opened for a while."""
    yield folder


def speed(given: argparse.Namespace, folder: Path, data: Path) -> dict[str, Any]:
    """Images a second of evaluation and prediction, and of the bare networks beneath them."""
    from cosa_ray.evaluation.batch import BatchPrediction, items_of_split

    config, dataset = configured(given, data), open_dataset(str(data))
    split, state = dataset.split("val"), TrainState(config, dataset.num_classes, torch.device("cpu"), initialise=False)
    for network in (state.online, state.assignment):
        network.eval().requires_grad_(False)
    model = folder / "model"
    model.mkdir()
    state.save(
        model, dataset.card, Description("r", config.training.steps, list(dataset.classes), {}, "assignment", 0, {})
    )
    protocol, autocast = in_run_protocol(config), autocast_dtype(config, torch.device("cpu"))
    side = protocol.size or config.views.crop
    images = state.online.normalise(torch.randint(0, 256, (len(split), 3, side, side), dtype=torch.uint8))
    out, turn = folder / "predicted", iter(range(10_000))

    def predict() -> None:
        items = items_of_split(split, labels_given=False)
        target = out / str(next(turn))
        wanted = BatchPrediction(
            items, partial(opened, model), protocol, str(target), "assignment", dataset=str(data), split="val"
        )
        for name in ("masks", "overlays"):
            (target / name).mkdir(parents=True)
        for outcome in wanted.here():
            assert not outcome.reason, outcome

    both, one = [state.online, state.assignment], [state.assignment]
    calls: dict[str, Callable[[], Any]] = {
        "both networks": bare(both, images, protocol, autocast),
        "evaluation": lambda: run_evaluation(state, split, dataset.classes, config),
        "one network": bare(one, images, protocol, autocast),
        "prediction": predict,
    }
    seconds = in_turns(calls, given.rounds)
    return {
        "images a second": {name: len(split) / each for name, each in medians(seconds).items()},
        "evaluation / both networks": ratio(seconds["evaluation"], seconds["both networks"]),
        "prediction / one network": ratio(seconds["prediction"], seconds["one network"]),
    }


def memory(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Most MiB that a process held while it evaluated so many images."""
    found = {}
    for images in given.sizes:
        data = folder / f"of {images}"
        import_dataset("shapes", None, str(data), train=1, val=images, size=96, local=True)
        words = [sys.executable, __file__, "--held", str(data), "--experiment", given.experiment]
        words += [word for one in given.set for word in ("--set", one)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[str(images)] = float(done.stdout.splitlines()[-1])
    return found


def held(given: argparse.Namespace) -> float:
    """Evaluates a dataset; most MiB that this process has held."""
    config, dataset = configured(given, Path(given.held)), open_dataset(given.held)
    state = TrainState(config, dataset.num_classes, torch.device("cpu"), initialise=False)
    run_evaluation(state, dataset.split("val"), dataset.classes, config)
    status = Path("/proc/self/status").read_text().splitlines()  # getrusage has what the parent held before
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def crf(given: argparse.Namespace) -> dict[str, Any]:
    """Images a second of the CRF in this process and as Ray tasks, and how many times as many that is."""
    import io

    import ray
    from PIL import Image
    from skimage import data

    from cosa_ray.evaluation.crf import refine_here, refine_on_ray
    from cosa_ray.evaluation.scorer import CrfJob

    stream, draw = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(data.astronaut()).resize((500, 375)).save(stream, "JPEG")
    shares = draw.dirichlet(np.ones(21), (375, 500)).transpose(2, 0, 1).astype(np.float32)
    truth = draw.integers(0, 21, (375, 500), dtype=np.uint8)
    jobs = [CrfJob("miou_crf", index, shares, stream.getvalue(), truth) for index in range(given.images)]
    ray.init(address="local", include_dashboard=True, log_to_driver=False)
    cores = int(ray.cluster_resources()["CPU"])
    ways = {"this process": refine_here(Crf()), "Ray tasks": refine_on_ray(Crf())}
    seconds = in_turns({name: lambda way=way: list(way(iter(jobs))) for name, way in ways.items()}, given.rounds)
    ray.shutdown()
    return {
        "images a second": {name: len(jobs) / each for name, each in medians(seconds).items()},
        "Ray tasks / this process": 1 / ratio(seconds["Ray tasks"], seconds["this process"]),
        "cores": cores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="shapes")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--size", type=int, help="side of the images, pixels; the experiment's crop without it")
    parser.add_argument("--images", type=int, default=64, help="images of a round")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[50, 200, 800], help="images of which memory is measured"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=["speed", "memory", "crf"], default=["speed", "memory", "crf"])
    parser.add_argument("--out", metavar="FILE", help="write the result as JSON")
    parser.add_argument("--held", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.held:
        print(held(given))
        return
    result: dict[str, Any] = {"experiment": given.experiment, "machine": machine(), "rounds": given.rounds}
    began = now()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "shapes"
        import_dataset("shapes", None, str(data), train=1, val=given.images, size=given.size or 96, local=True)
        if "speed" in given.only:
            result["speed"] = speed(given, folder, data)
        if "memory" in given.only:
            result["memory, MiB by images"] = memory(given, folder)
        if "crf" in given.only:
            result["crf"] = crf(given)
    result["took"] = now() - began
    print(json.dumps(result, indent=1))
    save(result, given.out)


if __name__ == "__main__":
    main()
