"""What Ray, checkpoints and tracking add to a step: the same loop with and without them, in turns.

    python benchmarks/ray_overhead.py ray --workers 2 --steps 150 --rounds 3 --out ray.json
    python benchmarks/ray_overhead.py keeping --steps 350 --rounds 3

ray: a run's own loop under TorchTrainer and with plain torch.distributed, one after the other, with no Ray on the
machine while the plain one runs; the time of a step is the median from one step's start to the next, the first
`--skip` left out, as rank 0 sees it. keeping: one process takes blocks of steps with the tracker (SQLite) and a
checkpoint a block, and blocks without; the mean time of a step counts, so what a checkpoint costs is spread over
its block. Where blocks differ by more than that, the CPU time says more: of the threads that track and write, and of
the training thread inside their calls, against that of the steps. The way from the command to the first step is
trial_overhead.py's. On made-up shapes, the demo's network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from measuring import machine, ratio, save

from cosa_ray.config.load import apply_overrides, load_config
from cosa_ray.config.schema import Config

WAYS = ("plain", "ray")
KEEPERS = ("tracker", "checkpoint")  # names of the threads that track and write


def config_in(folder: Path, experiment: str, steps: int, workers: int, settings: list[str]) -> Config:
    """The experiment on a small dataset of its own, co-training from the first step, evaluated at the end alone."""
    from cosa_ray.data.importing import import_dataset

    data = folder / "shapes"
    if not data.exists():
        import_dataset("shapes", None, str(data), train=200, val=8, size=96, local=True)
    changes: dict[str, Any] = {
        "storage": str(folder / "runs"),
        "data.dataset": str(data),
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "workers": workers,
        "training.steps": steps,
        "training.warmup_iters": 0,
        "evaluation.every": steps,
        "checkpoint.every": 10 * steps,
    }
    return apply_overrides(load_config(experiment, settings), changes)


class Stamped:
    """A session that notes when every step began."""

    def __init__(self, session: Any, file: Path) -> None:
        self._session, self._file, self._times = session, file, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def alive(self) -> None:
        self._times.append(time.perf_counter())
        self._session.alive()

    def close(self) -> None:
        self._file.write_text(json.dumps(self._times))
        self._session.close()


def under_ray(job: Any, monitor: Any, folder: str) -> None:
    """What every worker of the TorchTrainer runs."""
    import ray.train

    from cosa_ray.training.loop import run_worker
    from cosa_ray.training.ray_train import worker_device
    from cosa_ray.training.session import RaySession

    rank = ray.train.get_context().get_world_rank()
    session = RaySession(monitor, job.name, rank, job.config.resources.hang_seconds)
    run_worker(job, Stamped(session, Path(folder) / f"{rank}.json"), worker_device(job.config))


def one_way(way: str, given: argparse.Namespace, folder: Path) -> None:
    """Train once, under Ray or as one process of a plain group; leaves the times of the steps in the folder."""
    from cosa_ray.training.driver import prepare, resolve
    from cosa_ray.training.loop import Job, run_worker
    from cosa_ray.training.ray_train import _trainer, ray_cluster
    from cosa_ray.training.session import LocalSession, start_monitor

    config = resolve(config_in(folder.parent, given.experiment, given.steps, given.workers, given.set))
    if way == "plain":
        session = LocalSession(lambda _: None, threading.Event())
        job = Job(folder.name, str(folder / "run"), config, None, given.cpus / given.workers)
        run_worker(job, Stamped(session, folder / f"{os.environ.get('RANK', '0')}.json"))
        return
    with ray_cluster():
        import ray.train

        _, job = prepare(config, folder.name, track=False)
        job = replace(job, cpus_per_worker=given.cpus / given.workers)
        _trainer(config)(
            partial(under_ray, job, start_monitor(), str(folder)),
            scaling_config=ray.train.ScalingConfig(
                num_workers=given.workers, resources_per_worker={"CPU": given.cpus / given.workers - 0.1}
            ),
            run_config=ray.train.RunConfig(name=folder.name, storage_path=str(folder / "ray")),
        ).fit()


def started(way: str, given: argparse.Namespace, folder: Path) -> list[float]:
    """Seconds of every step of a run of its own processes."""
    folder.mkdir()
    words = [sys.executable, __file__, "one", "--way", way, "--folder", str(folder), "--experiment", given.experiment]
    words += ["--steps", str(given.steps), "--workers", str(given.workers), "--cpus", str(given.cpus)]
    words += [word for one in given.set for word in ("--set", one)]
    ranks = range(given.workers) if way == "plain" and given.workers > 1 else [0]
    group = {"WORLD_SIZE": str(given.workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(given.port)}
    processes = []
    for rank in ranks:
        place = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if len(ranks) > 1 else {}
        processes.append(subprocess.Popen(words, env={**os.environ, **place}, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"the {way} run failed; its output is above")
    times = json.loads((folder / "0.json").read_text())[given.skip : given.steps]
    return [after - before for before, after in itertools.pairwise(times)]


def cpu_seconds(names: tuple[str, ...]) -> float:
    """CPU seconds so far of this process's living threads whose names start so."""
    clocks = [
        time.pthread_getcpuclockid(thread.ident)
        for thread in threading.enumerate()
        if thread.ident is not None and thread.name.startswith(names)
    ]
    return sum(time.clock_gettime(clock) for clock in clocks)


def ray(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Median time of a step with and without Ray, round by round."""
    config_in(folder, given.experiment, given.steps, given.workers, given.set)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(given.rounds):
        for way in WAYS if turn % 2 else reversed(WAYS):
            found[way].append(statistics.median(started(way, given, folder / f"{way}-{turn}")))
    return {
        "median ms of a step": {way: 1000 * statistics.median(values) for way, values in found.items()},
        "ms of a step by round": {way: [1000 * value for value in values] for way, values in found.items()},
        "ray / plain": ratio(found["ray"], found["plain"]),
        "workers": given.workers,
    }


def keeping(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Mean time of a step with tracker and checkpoints, and without, block by block."""
    import torch

    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.data.loader import training_batches
    from cosa_ray.evaluation.description import Description
    from cosa_ray.tracking.store import open_store
    from cosa_ray.tracking.tracker import open_tracker
    from cosa_ray.training.distributed import join_workers, torch_settings
    from cosa_ray.training.keeping import CheckpointWriter
    from cosa_ray.training.state import TrainState
    from cosa_ray.training.stepping import Stepper
    from cosa_ray.training.storage import CheckpointStore, RunFolder

    blocks = 2 * (given.rounds + 1)
    config = config_in(folder, given.experiment, blocks * given.steps, 1, given.set)
    workers, dataset = join_workers(), open_dataset(config.data.dataset)
    tracker = open_tracker(open_store(config, run_name="keeping", folder=str(folder / "run")))
    store = CheckpointStore(RunFolder(str(folder / "run")), "val/miou")
    writer = CheckpointWriter(store, config, dataset.card, guard=lambda: None, flush=tracker.flush, alive=lambda: None)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    beside = calling = steps_cpu = 0.0
    with torch_settings(config, given.cpus, workers.device):
        state = TrainState(config, dataset.num_classes, workers.device)
        stepper = Stepper(state, workers)
        batches = training_batches(
            dataset.split("train"),
            seed=0,
            views=config.views,
            batch_size=config.training.batch_size,
            start_step=0,
            stop_step=config.training.steps,
            processes=config.data.loader_processes,
        )
        for block in range(blocks):
            kept = (block % 2 == 0) == (block // 2 % 2 == 0)  # with, without, without, with
            began, cpu, others = time.perf_counter(), time.process_time(), cpu_seconds(KEEPERS)
            for number in range(given.steps):
                taken = stepper.take(next(batches))
                inside = time.thread_time()
                if kept and state.step % config.tracking.log_every == 0:
                    tracker.log(
                        {f"train/{name}": loss.item() for name, loss in taken.output.losses.items()}, state.step
                    )
                if kept and number == given.steps // 2:
                    writer.begin(state.snapshot())
                    writer.complete(Description("r", state.step, [], {}, "assignment", 0.0, {}), {})
                if kept and block > 1:
                    calling += time.thread_time() - inside
            took = (time.perf_counter() - began) / given.steps
            if kept:  # what is left to write belongs to this block, and does not wait in the next one's
                writer.wait()
                tracker.flush()
            if block > 1:
                seconds["with" if kept else "without"].append(took)
                if kept:
                    beside += cpu_seconds(KEEPERS) - others
                    steps_cpu += time.process_time() - cpu
    writer.close()
    tracker.finish("FINISHED")
    return {
        "mean ms of a step": {name: 1000 * statistics.mean(values) for name, values in seconds.items()},
        "ms of a step by block": {name: [1000 * value for value in values] for name, values in seconds.items()},
        "with / without": ratio(seconds["with"], seconds["without"]),
        "CPU seconds of the blocks with": steps_cpu,
        "of that, threads that track and write": beside / steps_cpu,
        "of that, the training thread in their calls": calling / steps_cpu,
        "steps between checkpoints": given.steps,
        "steps between logged ones": config.tracking.log_every,
        "threads": given.cpus,
        "checkpoint MB": state.checkpoint_bytes()[0] / 1e6,
        "cuda": torch.cuda.is_available(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ray", "keeping", "one"])
    parser.add_argument("--experiment", default="shapes")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=len(os.sched_getaffinity(0)), help="of all workers together")
    parser.add_argument("--steps", type=int, default=150, help="steps of a run, or of a block")
    parser.add_argument("--skip", type=int, default=20, help="first steps of a run that do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=29_513, help="of the plain process group")
    parser.add_argument("--out", metavar="FILE", help="write the result as JSON")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "one":
        one_way(given.way, given, Path(given.folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = (ray if given.what == "ray" else keeping)(given, Path(folder))
    result |= {"experiment": given.experiment, "rounds": given.rounds, "machine": machine()}
    print(json.dumps(result, indent=1))
    save(result, given.out)


if __name__ == "__main__":
    main()
