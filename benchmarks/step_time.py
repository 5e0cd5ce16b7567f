"""Where the time of a co-training step goes: data, assignment network, online forward, backward, labels, optimiser.

    python benchmarks/step_time.py shapes --dataset datasets/shapes --threads 1
    python benchmarks/step_time.py voc --batch 2 --steps 3 --threads 2

Without --dataset the pictures are noise (no data part). --track logs every step to an MLflow store of its own (a run
logs every `tracking.log_every` steps). Prints medians over the measured steps, and JSON with --json. Needs neither Ray
nor, without --track, MLflow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cosa_ray.config.load import apply_overrides, load_config
from cosa_ray.config.schema import Config
from cosa_ray.data.loader import TrainingBatch
from cosa_ray.evaluation.inference import autocast_dtype
from cosa_ray.method import step as method_step
from cosa_ray.tracking.tracker import NoTracker, Tracker, open_tracker
from cosa_ray.training.distributed import join_workers
from cosa_ray.training.state import TrainState

PARTS = (
    "data",
    "assignment network",
    "online forward",
    "backward",
    "pseudo-labels and losses",
    "optimiser and EMA",
    "tracking",
)


class Clock:
    """Adds up the time of named parts; waits for the device so that a GPU's time is counted where it belongs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            result = function(*args, **kwargs)
            self.spent[part] += self.now() - began
            return result

        return call


def noise(config: Config, step: int, classes: int) -> TrainingBatch:
    """A batch of noise pictures with one or two labels each."""
    draw = torch.Generator().manual_seed(step)
    batch, crop = config.training.batch_size, config.views.crop
    pictures = torch.randint(0, 256, (batch, 3, crop, crop), dtype=torch.uint8, generator=draw)
    labels = torch.zeros(batch, classes)
    labels[torch.arange(batch), torch.randint(0, classes, (batch,), generator=draw)] = 1
    box = torch.tensor([[0, crop, 0, crop]]).repeat(batch, 1)
    return TrainingBatch(step, pictures, pictures, labels, box, torch.arange(batch))


def tracker_in(folder: str, config: Config) -> Tracker | NoTracker:
    """A tracker with a SQLite store and a spool in a folder."""
    from cosa_ray.tracking.store import open_store

    config = apply_overrides(config, {"tracking.uri": f"sqlite:///{folder}/mlflow.db"})
    return open_tracker(open_store(config, run_name="step-time", folder=folder))


def measure(
    config: Config, steps: int, dataset: str | None, classes: int, tracker: Tracker | NoTracker | None
) -> list[dict[str, float]]:
    """Seconds of every part for each of `steps` co-training steps, after two that do not count."""
    workers = join_workers()
    clock = Clock(workers.device)
    if dataset is not None:
        from cosa_ray.data.dataset import open_dataset
        from cosa_ray.data.loader import training_batches

        opened = open_dataset(dataset)
        classes = opened.num_classes
        batches = training_batches(
            opened.split(config.data.train_split),
            seed=config.seed,
            views=config.views,
            batch_size=config.training.batch_size,
            start_step=0,
            stop_step=steps + 2,
            rank=0,
            world=1,
            processes=0,
        )
        get = clock.timed("data", lambda step: next(batches))
    else:
        get = lambda step: noise(config, step, classes)  # noqa: E731
    state = TrainState(config, classes, workers.device, initialise=False)
    autocast = autocast_dtype(config, workers.device)
    method_step.assign = clock.timed("assignment network", method_step.assign)  # type: ignore[assignment]
    torch.Tensor.backward = clock.timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    state.online.forward = clock.timed("online forward", state.online.forward)  # type: ignore[method-assign]
    measured = []
    for step in range(steps + 2):
        clock.spent.clear()
        began = clock.now()
        batch = get(step)
        weak, strong = (state.online.normalise(view.to(workers.device)) for view in (batch.weak, batch.strong))
        rest = (part.to(workers.device) for part in (batch.labels, batch.box, batch.position))
        output = method_step.cotraining_step(
            state.online,
            state.assignment,
            [method_step.MicroBatch(weak, strong, *rest)],
            state.thresholds,
            config,
            step,
            global_batch=config.training.batch_size,
            sum_over_workers=workers.sum,
            autocast=autocast,
        )
        before = clock.now()
        finite = torch.ones((), device=workers.device)
        state.optimise(finite, state.gradient_norm())
        if output.proposal is not None:
            state.thresholds.commit(output.proposal, finite)
        optimised = clock.now()
        clock.spent["optimiser and EMA"] = optimised - before
        if tracker is not None:
            tracker.log({f"train/{name}": loss.item() for name, loss in output.losses.items()}, step)
        ended = clock.now()
        clock.spent["tracking"] = ended - optimised
        whole = ended - began
        clock.spent["pseudo-labels and losses"] = whole - sum(clock.spent.values())
        if step >= 2:
            measured.append({**clock.spent, "step": whole})
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dataset", help="data set folder; noise without one")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("--classes", type=int, default=20, help="classes of the noise")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--track", action="store_true", help="log every step to MLflow")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = load_config(given.experiment, given.set)
    # One worker, random weights: the time of a step does not depend on what the weights are.
    changes: dict[str, Any] = {"workers": 1, "training.warmup_iters": 0, "model.checkpoint": None}
    if given.batch:
        changes["training.batch_size"] = given.batch
    config = apply_overrides(config, changes)
    with ExitStack() as stack:
        tracker = tracker_in(stack.enter_context(TemporaryDirectory()), config) if given.track else None
        measured = measure(config, given.steps, given.dataset, given.classes, tracker)
        if tracker is not None:
            tracker.finish("FINISHED")
    medians = {part: statistics.median(one.get(part, 0.0) for one in measured) for part in (*PARTS, "step")}
    if given.json:
        machine = {"threads": given.threads, "torch": torch.__version__, "cuda": torch.cuda.is_available()}
        print(json.dumps({"experiment": given.experiment, "median_seconds": medians, "steps": given.steps, **machine}))
        return
    print(f"{given.experiment}, batch {config.training.batch_size}, {given.threads} threads: median of {given.steps}")
    for part, seconds in medians.items():
        print(f"  {part:26s} {1000 * seconds:9.1f} ms {100 * seconds / medians['step']:6.1f} %")


if __name__ == "__main__":
    main()
