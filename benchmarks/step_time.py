"""A training step against the bare network time of the same step, and where the rest goes.

    python benchmarks/step_time.py shapes --rounds 40 --threads 2
    python benchmarks/step_time.py voc --batch 2 --rounds 3 --threads 2 --straightforward --out step.json

bare: the same networks in the same process on inputs of the same sizes and nothing else: the assignment network on
every scale and flip, the online network forward, backward from a constant, the optimiser. step: all that a run does for
a co-training step. They take turns; the ratio is the median over the rounds. --straightforward adds a step without what
makes ours fast: attention as timm chooses, every scale and flip by itself, optimiser and EMA parameter by parameter;
and a bare network in float32 with timm's attention, by which the release's own step, measured once on another
machine beside such a network, is scaled to this one. Without --dataset the pictures are noise (no data part).
The floating-point operations are those of the network's matrix products and convolutions (a multiplication and an
addition are two; backward included, nothing counted twice); the rate they ran at is set beside what one large matrix
product reaches here, and beside --peak, the chip's rate by its data sheet, for the model FLOP utilisation.
Needs torch, timm, numpy, pyarrow and pydantic; the weights are random and stay as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from measuring import in_turns, machine, medians, now, ratio, save
from straightforward import AverageByParameter, PlainAdamW, assign_one_by_one
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cosa_ray.config.load import apply_overrides, load_config
from cosa_ray.config.schema import Config
from cosa_ray.data.loader import TrainingBatch
from cosa_ray.method import backbone
from cosa_ray.method import step as method_step
from cosa_ray.method.assignment import resize
from cosa_ray.method.network import Network, Outputs, mixed_precision, scaled_size
from cosa_ray.training import distributed, stepping
from cosa_ray.training.distributed import join_workers, torch_settings
from cosa_ray.training.state import TrainState

NETWORK = ("assignment network", "online forward", "backward", "optimiser")
REST = ("data", "scales and fusion", "pseudo-labels and losses", "dense energy", "EMA, gradient norm, normalising")
# ViT-B/16, 448 px, batch 2, 3 scales with flips, 20 classes, float32: seconds of the release's step and of the bare
# network with fused attention, both on the same two cores (the middle of 20.6 to 23.0, and 9.29 + 1.27 + 2.31 + 0.09).
RELEASE, RELEASE_NETWORK = 21.8, 12.95
RELEASE_OF = ("vit_base_patch16_224", 448)


class Clock:
    """Adds up the time of named parts, each without what it calls that has a name of its own."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.looking = True  # on a GPU a look at the clock waits for it
        self._inner = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.looking:
                return function(*args, **kwargs)
            began = now()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = now() - began
                self.spent[part] += took - self._inner.pop()
                self._inner[-1] += took

        return call

    def put(self, part: str, owner: Any, name: str) -> None:
        """Time an attribute of something from now on."""
        setattr(owner, name, self.timed(part, getattr(owner, name)))


class Unwatched(Clock):
    """Leaves everything as it is: on a GPU a look at the clock waits for it."""

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return function


def noise(config: Config, classes: int) -> Iterator[TrainingBatch]:
    """Batches of noise pictures with one label each."""
    batch, crop = config.training.batch_size, config.views.crop
    draw, step = torch.Generator().manual_seed(0), 0
    while True:
        pictures = torch.randint(0, 256, (batch, 3, crop, crop), dtype=torch.uint8, generator=draw)
        labels = torch.zeros(batch, classes)
        labels[torch.arange(batch), torch.randint(0, classes, (batch,), generator=draw)] = 1
        box = torch.tensor([[0, crop, 0, crop]]).repeat(batch, 1)
        yield TrainingBatch(step, pictures, pictures, labels, box, torch.arange(batch))
        step += 1


def batches_of(config: Config, dataset: str | None, classes: int) -> tuple[Iterator[TrainingBatch], int]:
    """Endless batches, made as they are asked for, and the number of classes."""
    if dataset is None:
        return noise(config, classes), classes
    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.data.loader import training_batches

    opened = open_dataset(dataset)
    batches = training_batches(
        opened.split(config.data.train_split),
        seed=config.seed,
        views=config.views,
        batch_size=config.training.batch_size,
        start_step=0,
        stop_step=config.training.steps,
        processes=0,
    )
    return batches, opened.num_classes


class Bench:
    """One pair of networks with an optimiser, and the steps that are compared on it."""

    def __init__(self, config: Config, dataset: str | None, classes: int, workers: Any, clock: Clock) -> None:
        self.config, self.clock, self.device = config, clock, workers.device
        self.batches, classes = batches_of(config, dataset, classes)
        self.state = TrainState(config, classes, workers.device, initialise=False)
        for group in self.state.optimiser.param_groups:  # every step is to meet the same weights
            group["lr"] = group["base_lr"] = 0.0
        self._plain: PlainAdamW | None = None
        self.get = clock.timed("data", lambda: next(self.batches))
        self.stepper = stepping.Stepper(self.state, workers)
        batch = next(self.batches)
        images = self.state.online.normalise(batch.weak.to(self.device))
        side, self.images = config.views.crop, images
        sizes = [scaled_size(self.state.assignment, side, side, scale) for scale in config.assignment.scales]
        self.inputs = [
            torch.cat([view, view.flip(-1)]) if config.assignment.flip else view
            for view in (resize(images, size) for size in sizes)
        ]
        self.operations = self._operations()
        clock.put("EMA, gradient norm, normalising", stepping.Stepper, "take")
        clock.put("pseudo-labels and losses", stepping, "cotraining_step")
        clock.put("dense energy", method_step, "dense_energy")
        clock.put("scales and fusion", method_step, "assign")
        clock.put("assignment network", self.state.assignment, "forward")
        clock.put("online forward", self.state.online, "forward")
        clock.put("backward", Tensor, "backward")
        clock.put("optimiser", self.state.optimiser, "step")

    def bare(self, autocast: torch.dtype | None) -> None:
        """The network time of a step and nothing else."""
        passes(self.state.assignment, self.state.online, self.inputs, self.images, autocast)
        self.state.optimiser.step()
        self.state.optimiser.zero_grad(set_to_none=True)

    def not_compiled(self) -> None:
        """The network time of a step whose networks are as they were written."""
        with torch.compiler.set_stance("force_eager"):
            self.bare(self.stepper.autocast)

    def _operations(self) -> int:
        """Floating-point operations of the matrix products and convolutions of those passes, counted without data."""
        assignment, online = (deepcopy(network).to("meta") for network in (self.state.assignment, self.state.online))
        inputs = [view.to("meta") for view in self.inputs]
        ours = {torch.ops.aten.convolution_backward: convolution_backward_operations}
        with FlopCounterMode(display=False, custom_mapping=ours) as counter, sdpa_kernel(SDPBackend.MATH):
            passes(assignment, online, inputs, self.images.to("meta"), None)
        return counter.get_total_flops()

    def step(self) -> None:
        """A whole step, as a run takes it."""
        self.state.step = self.config.training.warmup_iters
        self.stepper.take(self.get())

    def straightforward(self) -> None:
        """A whole step with scales and flips one by one, and parameters one by one."""
        state = self.state
        usual = method_step.assign, state.average, state.optimiser, backbone.plain_is_faster
        if self._plain is None:
            self._plain = PlainAdamW([{**group} for group in self.state.optimiser.param_groups])
            self.clock.put("optimiser", self._plain, "step")
        method_step.assign = self.clock.timed("scales and fusion", assign_one_by_one)  # type: ignore[assignment]
        state.average = AverageByParameter(state.assignment, state.online)  # type: ignore[assignment]
        state.optimiser = self._plain
        backbone.plain_is_faster = lambda *_: False
        try:
            self.step()
        finally:
            method_step.assign, state.average, state.optimiser, backbone.plain_is_faster = usual


def convolution_backward_operations(*shapes: Any, **_: Any) -> int:
    """Operations of a convolution's gradients, each as many as forward: torch counts grouped ones as if they were full.

    shapes: of aten.convolution_backward's arguments: gradient, input, weight, ..., output_mask.
    """
    gradient, _input, weight, *_others, wanted = shapes[:11]
    forward = 2 * gradient[0] * math.prod(gradient[2:]) * math.prod(weight)
    return int(forward * sum(wanted[:2]))


def passes(
    assignment: Network, online: Network, inputs: Sequence[Tensor], images: Tensor, autocast: torch.dtype | None
) -> None:
    """The assignment network on every input, the online network forward and backward on the images."""
    with torch.no_grad():
        for view in inputs:
            with mixed_precision(view.device, autocast):
                assignment(view)
    with mixed_precision(images.device, autocast):
        outputs = online(images)
    total(outputs).backward()


def matmul_rate(device: torch.device, dtype: torch.dtype | None) -> float:
    """Floating-point operations a second of one large square matrix product; the best of several."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype or torch.float32) for _ in range(2))
    return 2 * side**3 / min(in_turns({"product": lambda: left @ right}, 10)["product"])


def most_memory(device: torch.device) -> float:
    """Most GiB that were in use: of the GPU by torch, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def page_faults() -> int:
    """Pages that the kernel has had to give this process so far: freed memory that goes back to it costs them anew."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def total(outputs: Outputs) -> Tensor:
    """Something small whose backward pass goes through every head."""
    maps = (outputs.cls, outputs.cls_aux, outputs.cam, outputs.cam_aux, outputs.seg)
    return torch.stack([each.float().sum() for each in maps if each is not None]).sum()


def measure(
    config: Config,
    rounds: int,
    dataset: str | None,
    classes: int,
    threads: int,
    straightforward: bool,
    peak: float | None,
) -> dict[str, Any]:
    """Seconds of every contender, whole and by part, their ratios, and the rate at which the step computes."""
    workers, clock = join_workers(), Clock()
    with torch_settings(apply_overrides(config, {"training.threads": threads}), None, workers.device):
        bench = Bench(config, dataset, classes, workers, clock)
        contenders: dict[str, Callable[[], None]] = {
            "bare": lambda: bench.bare(bench.stepper.autocast),
            "step": bench.step,
        }
        if config.training.compile != "none":
            contenders["bare, not compiled"] = bench.not_compiled
        if straightforward:
            contenders |= {"straightforward": bench.straightforward, "bare fp32": lambda: bench.bare(None)}
        parts: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        faults: dict[str, list[int]] = {name: [] for name in contenders}

        def noted(name: str) -> Callable[[], None]:
            def call() -> None:
                clock.spent.clear()
                before = page_faults()
                contenders[name]()
                faults[name].append(page_faults() - before)
                parts[name].append(dict(clock.spent))

            return call

        clock.looking = workers.device.type == "cpu"
        seconds = in_turns({name: noted(name) for name in contenders}, rounds)
        if not clock.looking:  # whole steps are timed without the looks at the clock that the split takes
            clock.looking = True
            parts.update({name: [] for name in contenders})
            in_turns({name: noted(name) for name in contenders}, rounds)
        found = machine("torch", "timm", "numpy", "pyarrow", "pydantic")
        held, product = most_memory(workers.device), matmul_rate(workers.device, bench.stepper.autocast)
    split = {
        name: {part: statistics.median(one.get(part, 0.0) for one in parts[name][1:]) for part in (*NETWORK, *REST)}
        for name in contenders
    }
    whole, operations = medians(seconds), bench.operations
    result: dict[str, Any] = {
        "seconds": whole,
        "split": split,
        "precision": "fp32" if bench.stepper.autocast is None else "bf16",
        "images a second": config.training.batch_size / whole["step"],
        "most GiB held": held,
        "page faults a step": statistics.median(faults["step"][1:]),
        "TFLOP of the network": operations / 1e12,
        "TFLOP/s of one matrix product": product / 1e12,
        "step's TFLOP/s / matrix product's": operations / whole["step"] / product,
        "step / bare": ratio(seconds["step"], seconds["bare"]),
        "machine": found,
    }
    if "bare, not compiled" in seconds:
        result["step / bare, not compiled"] = ratio(seconds["step"], seconds["bare, not compiled"])
    if peak:
        result["model FLOP utilisation"] = operations / whole["step"] / (peak * 1e12)
    if straightforward:
        result["straightforward / step"] = ratio(seconds["straightforward"], seconds["step"])
        if (config.model.backbone.partition(".")[0], config.views.crop) == RELEASE_OF:
            release = [RELEASE / RELEASE_NETWORK * each for each in seconds["bare fp32"]]
            result["release, scaled / step"] = ratio(release, seconds["step"])
    return result


def table(result: dict[str, Any]) -> str:
    """The contenders side by side, part by part."""
    names = list(result["seconds"])
    lines = [f"{'ms':34s}" + "".join(f"{name:>17s}" for name in names)]
    for part in (*NETWORK, *REST):
        lines.append(f"{part:34s}" + "".join(f"{1000 * result['split'][name][part]:17.1f}" for name in names))
    lines.append(f"{'in all':34s}" + "".join(f"{1000 * result['seconds'][name]:17.1f}" for name in names))
    lines += [f"{name:34s}{value:11.3f}" for name, value in result.items() if isinstance(value, float)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dataset", help="data set folder; noise without one")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("--classes", type=int, default=20, help="classes of the noise")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--memory-back", action="store_true", help="let freed memory go back to the kernel, as glibc does"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--straightforward", action="store_true", help="compare with a step without care for its time")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="the chip's dense rate in the step's precision")
    parser.add_argument("--out", metavar="FILE", help="write the result as JSON")
    given = parser.parse_args()
    # One worker, random weights: the time of a step does not depend on what the weights are.
    changes: dict[str, Any] = {"workers": 1, "model.checkpoint": None}
    if given.batch:
        changes["training.batch_size"] = given.batch
    config = apply_overrides(load_config(given.experiment, given.set), changes)
    if given.memory_back:
        distributed.keep_freed_memory = lambda: False
    result = measure(
        config, given.rounds, given.dataset, given.classes, given.threads, given.straightforward, given.peak
    )
    result |= {"experiment": given.experiment, "batch": config.training.batch_size, "rounds": given.rounds}
    print(f"{given.experiment}, batch {result['batch']}, {result['precision']}, median of {given.rounds} rounds")
    print(f"{json.dumps(result['machine'])}\n{table(result)}")
    save(result, given.out)


if __name__ == "__main__":
    main()
