"""Two trials on one device: side by side, and one after the other.

    python benchmarks/side_by_side.py shapes --steps 30 --rounds 5 --threads 2
    python benchmarks/side_by_side.py voc --batch 4 --steps 30

A trial is a process that takes a run's co-training steps (no Ray here, so that it runs on a bare GPU machine): on one
GPU all of them share it, on a CPU each has its part of the threads while they run together and all of them alone.
Needs what step_time.py needs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from measuring import in_turns, machine, medians, ratio, save
from step_time import Bench, Unwatched

from cosa_ray.config.load import apply_overrides, load_config
from cosa_ray.training.distributed import join_workers, torch_settings


class Trial:
    """A process that takes steps when it is told to."""

    def __init__(self, words: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words, "--wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, steps: int, threads: int) -> None:
        """Begin so many steps."""
        assert self.process.stdin
        self.process.stdin.write(f"{steps} {threads}\n")
        self.process.stdin.flush()

    def wait(self) -> None:
        """Until the steps are taken. Raises RuntimeError where the process has ended."""
        assert self.process.stdout
        if self.process.stdout.readline() != "taken\n":
            raise RuntimeError(f"a trial ended with exit code {self.process.wait()}")

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(given: argparse.Namespace) -> None:
    """Take as many steps as each line asks for, with as many threads."""
    changes: dict[str, Any] = {"workers": 1, "model.checkpoint": None, "training.threads": 1}
    if given.batch:
        changes["training.batch_size"] = given.batch
    config, workers = apply_overrides(load_config(given.experiment, given.set), changes), join_workers()
    with torch_settings(config, None, workers.device):
        bench = Bench(config, None, given.classes, workers, Unwatched())
        for line in sys.stdin:
            steps, threads = map(int, line.split())
            torch.set_num_threads(threads)
            for _ in range(steps):
                bench.step()
            if workers.device.type == "cuda":
                torch.cuda.synchronize()
            print("taken", flush=True)


def measure(words: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of all trials together and one after the other."""
    trials = [Trial(words) for _ in range(given.trials)]

    def together() -> None:
        for trial in trials:
            trial.start(given.steps, max(1, given.threads // given.trials))
        for trial in trials:
            trial.wait()

    def in_a_row() -> None:
        for trial in trials:
            trial.start(given.steps, given.threads)
            trial.wait()

    try:
        seconds = in_turns({"side by side": together, "one after the other": in_a_row}, given.rounds)
    finally:
        for trial in trials:
            trial.end()
    return {
        "seconds": medians(seconds),
        "one after the other / side by side": ratio(seconds["one after the other"], seconds["side by side"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("--classes", type=int, default=20, help="classes of the noise")
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30, help="of each trial in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a trial that runs alone")
    parser.add_argument("--out", metavar="FILE", help="write the result as JSON")
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.wait:
        serve(given)
        return
    result = {"experiment": given.experiment, "machine": machine("torch", "timm"), **measure(sys.argv[1:], given)}
    result |= {"trials": given.trials, "steps": given.steps, "rounds": given.rounds}
    print(json.dumps(result, indent=1))
    save(result, given.out)


if __name__ == "__main__":
    main()
