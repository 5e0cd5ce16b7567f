"""What a trial costs besides its steps: trials a minute, the way to the first step, and what many trials leave behind.

    python benchmarks/trial_overhead.py rate --trials 6
    python benchmarks/trial_overhead.py first-step --repeats 5
    python benchmarks/trial_overhead.py many --trials 100 --json > many.json

rate: trials a minute, first to last, of bare Tune with a function that does nothing, of bare Tune with a TorchTrainer
whose one worker does nothing, and of a sweep whose trials take `--steps` steps of a tiny model. first-step: from the
call to the first optimiser step of a tiny run on a cluster that is there, and from its last step to the return, by
part; and what a fresh process spends on imports. many: a sweep of `--trials` tiny trials; memory of the driver and of
the cluster's own processes as trials end, how long the MLflow store takes to answer, and what is left afterwards.
Starts a Ray cluster of its own (without RAY_ADDRESS), in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cosa_ray.config.load import apply_overrides, load_config
from cosa_ray.config.schema import Config
from cosa_ray.training.driver import conclude, fit, preflight, prepare, ray_cluster, resolve
from cosa_ray.training.session import start_monitor
from cosa_ray.tuning.sweep import Sweep, SweepProgress, SweepResult, run_sweep

MODEL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
IMPORTS = {
    "ray": "import ray",
    "and ray.train": "import ray.train",
    "and torch": "import ray.train, torch",
    "and the worker's loop": "import ray.train, cosa_ray.training.loop",
    "and mlflow": "import ray.train, cosa_ray.training.loop, mlflow",
}
POLL_SECONDS = 0.02
CLUSTER = ("gcs_server", "raylet", "dashboard", "agent", "log_monitor", "monitor.py")


def tiny(folder: Path, steps: int) -> Config:
    """A run of a tiny model on made-up shapes, evaluated once, tracked in a store of its own."""
    from cosa_ray.data.importing import import_dataset

    data = folder / "shapes"
    if not data.exists():
        import_dataset("shapes", None, str(data), train=40, val=11, size=48, local=True)
    settings = {
        "storage": str(folder / "runs"),
        "data.dataset": str(data),
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "tracking.log_every": 1,
        "views.crop": 48,
        **{f"model.backbone_args.{name}": value for name, value in MODEL.items()},
        "model.aux": 0,
        "model.decoder_width": 16,
        "training.steps": steps,
        "training.warmup_iters": steps // 2,
        "training.batch_size": 4,
        "training.threads": 1,
        "training.precision": "fp32",
        "dynamic_threshold.batches": max(1, steps // 4),
        "optimiser.warmup_steps": 0,
        "evaluation.every": steps,
        "evaluation.batch_size": 4,
        "evaluation.panel_images": 2,
        "checkpoint.every": steps,
    }
    return apply_overrides(load_config("shapes"), settings)


class Ends:
    """When the trials of a sweep ended, by what its display is shown."""

    def __init__(self, also: Callable[[int], None] = lambda ended: None) -> None:
        self.times: list[float] = []
        self._also = also

    def __call__(self, progress: SweepProgress) -> None:
        while len(self.times) < progress.ended:
            self.times.append(time.perf_counter())
            self._also(len(self.times))


def by_tune(trial: Callable[[dict[str, Any]], None], trials: int, cpus: float, at_once: int, folder: Path) -> float:
    """Seconds a trial of bare Tune, from the start of the first to the end of the last."""
    from ray import tune

    began, ended = [], []

    class Follow(tune.Callback):
        def on_trial_start(self, *_: Any, **__: Any) -> None:
            began.append(time.perf_counter())

        def on_trial_complete(self, *_: Any, **__: Any) -> None:
            ended.append(time.perf_counter())

    results = tune.Tuner(
        tune.with_resources(trial, {"CPU": cpus}),
        param_space={"number": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
        run_config=tune.RunConfig(name="bare", storage_path=str(folder), verbose=0, callbacks=[Follow()]),
    ).fit()
    if results.num_errors or len(ended) != trials:
        raise RuntimeError(f"{results.num_errors} of {trials} trials failed")
    return (ended[-1] - began[0]) / trials


def rate_of_nothing(trials: int, at_once: int, folder: Path) -> float:
    """Seconds a trial of a function that does nothing."""

    def trial(_: dict[str, Any]) -> None:
        from ray import tune

        tune.report({"score": 0.0})

    return by_tune(trial, trials, 0.9, at_once, folder / "nothing")


def rate_of_workers(trials: int, at_once: int, folder: Path) -> float:
    """Seconds a trial that starts one worker, which does nothing, under a TorchTrainer."""
    storage = str(folder / "workers")

    def trial(given: dict[str, Any]) -> None:
        import ray.train
        from ray import tune
        from ray.train.torch import TorchTrainer

        TorchTrainer(
            lambda: None,
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.9}),
            run_config=ray.train.RunConfig(name=f"run-{given['number']}", storage_path=storage),
        ).fit()
        tune.report({"score": 0.0})

    return by_tune(trial, trials, 0.001, at_once, folder / "workers")


def sweep_of(trials: int, at_once: int, folder: Path, steps: int, name: str, ends: Ends) -> SweepResult:
    """A random search of so many tiny trials; nobody is given up."""
    sweep = Sweep.model_validate(
        {
            "base": "shapes",
            "space": {"losses.cam_to_seg": {"uniform": [0.1, 0.2]}},
            "search": "random",
            "trials": trials,
            "concurrency": at_once,
        }
    )
    return run_sweep(sweep, tiny(folder, steps), name=name, show=ends)


def rate_of_sweep(trials: int, at_once: int, folder: Path, steps: int) -> float:
    """Seconds a trial of a sweep, from the end of the first ones to the end of the last: its own start-up left out."""
    ends = Ends()
    sweep_of(trials + at_once, at_once, folder, steps, "rate", ends)
    return (ends.times[-1] - ends.times[at_once - 1]) / trials


def rate(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trials a minute of each kind, and how many times slower than the first it is."""
    seconds = {
        "Tune, a function that does nothing": rate_of_nothing(given.trials, given.at_once, folder),
        "Tune, a TorchTrainer of one worker": rate_of_workers(given.trials, given.at_once, folder),
        f"a sweep, {given.steps} steps a trial": rate_of_sweep(given.trials, given.at_once, folder, given.steps),
    }
    least = next(iter(seconds.values()))
    return {name: {"a_minute": 60 / each, "seconds": each, "times": each / least} for name, each in seconds.items()}


def born(name: str, since: float) -> float:
    """When the newest process with this in its title started, of those later than `since` (seconds since the epoch).

    `since` itself where Ray had started it ahead, before there was something for it to do.
    """
    times = [
        process.info["create_time"]
        for process in psutil.process_iter(["cmdline", "create_time"])
        if process.info["create_time"] > since and any(name in word for word in process.info["cmdline"] or [])
    ]
    return max(times, default=since)


def one_run(folder: Path, steps: int, number: int, monitor: Any) -> dict[str, float]:
    """The parts of one run's time, in seconds."""
    import ray

    marks = {"start": time.time()}
    config = resolve(tiny(folder, steps))
    preflight(config)
    run, job = prepare(config, f"run-{number}")
    marks["prepared"] = time.time()
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(fit(job, monitor)))
    thread.start()
    last = 0
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        progress = ray.get(monitor.latest.remote()).get(job.name)
        if progress is not None and progress["step"] > last:
            if not last:  # not before: looking through all processes would slow down what is measured
                marks["first step"] = time.time()
                marks["controller"] = born("TrainController", marks["prepared"])
                marks["worker"] = born("RayTrainWorker", marks["controller"])
            last, marks["last step"] = progress["step"], time.time()
    marks["fitted"] = time.time()
    conclude(run, job, outcomes[0])
    marks["end"] = time.time()
    return {
        "checks, the run's folder and store": marks["prepared"] - marks["start"],
        "until Ray's controller starts": marks["controller"] - marks["prepared"],
        "until the worker's process starts": marks["worker"] - marks["controller"],
        "until its first step is done": marks["first step"] - marks["worker"],
        "start to first step": marks["first step"] - marks["start"],
        "last evaluation to return": marks["fitted"] - marks["last step"],
        "writing down how it ended": marks["end"] - marks["fitted"],
        "whole run": marks["end"] - marks["start"],
    }


def first_step(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians of the parts of a run's time, and of what a fresh process spends on imports."""
    monitor = start_monitor()
    one_run(folder, given.steps, 0, monitor)  # makes the store
    runs = [one_run(folder, given.steps, number, monitor) for number in range(1, given.repeats + 1)]
    imports: dict[str, float] = {}
    for name, line in IMPORTS.items():
        spent = []
        for _ in range(given.repeats):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", line], check=True)
            spent.append(time.perf_counter() - began)
        imports[name] = statistics.median(spent)
    parts = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
    return {"median_seconds": parts, "all": runs, "imports_of_a_process": imports}


def memory() -> dict[str, float]:
    """Resident MiB of this process and of the cluster's own (not its workers), open files and threads of this one."""
    me, cluster = psutil.Process(), 0
    for process in me.children(recursive=True):
        with suppress(psutil.Error):
            if any(name in " ".join(process.cmdline()[:3]) for name in CLUSTER):
                cluster += process.memory_info().rss
    return {
        "driver_mib": me.memory_info().rss / 2**20,
        "cluster_mib": cluster / 2**20,
        "files": me.num_fds(),
        "threads": me.num_threads(),
    }


def answer_times(uri: str, repeats: int = 7) -> dict[str, float]:
    """Median milliseconds that the store takes to list all runs, and to give one run's history of a metric."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, max_results=1000)
    run = max(runs, key=lambda run: len(run.data.metrics))

    def milliseconds(ask: Callable[[], Any]) -> float:
        spent = []
        for _ in range(repeats):
            began = time.perf_counter()
            ask()
            spent.append(1000 * (time.perf_counter() - began))
        return statistics.median(spent)

    return {
        "runs": len(runs),
        "list_ms": milliseconds(lambda: client.search_runs(experiments, max_results=1000)),
        "table_ms": milliseconds(
            lambda: client.search_runs(experiments, order_by=["metrics.`val/miou` DESC"], max_results=100)
        ),
        "history_ms": milliseconds(lambda: client.get_metric_history(run.info.run_id, "train/loss")),
    }


def left_behind(seconds: float = 15.0) -> dict[str, Any]:
    """Actors, placement groups, worker processes and resources once the sweep is over, after at most `seconds`."""
    import ray
    from ray.util import placement_group_table
    from ray.util.state import list_actors

    end = time.monotonic() + seconds
    while True:
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        actors = list_actors(filters=[("state", "!=", "DEAD")], limit=1000)
        # Ray's own, one a cluster, stay: they belong to no run.
        actors = [actor for actor in actors if "Coordinator" not in actor.class_name]
        lent = ray.cluster_resources().get("CPU", 0.0) - ray.available_resources().get("CPU", 0.0)
        if time.monotonic() > end or not (groups or actors or lent):
            break
        time.sleep(0.5)
    titles = [child.cmdline()[:1] for child in psutil.Process().children(recursive=True) if child.is_running()]
    return {
        "actors": len(actors),
        "their_names": sorted({actor.class_name for actor in actors}),
        "placement_groups": len(groups),
        "cpus_lent": round(lent, 3),
        "working_processes": sum(
            bool(title) and title[0].startswith("ray::") and "IDLE" not in title[0] for title in titles
        ),
        "idle_processes": sum(bool(title) and "ray::IDLE" in title[0] for title in titles),
        "checkpoint_folders_in_tmp": len(list(Path(tempfile.gettempdir()).glob("cosa-ray-checkpoint-*"))),
    }


def slope(values: Sequence[float]) -> float:
    """Least-squares slope a trial over the second half, where what is loaded once has been loaded."""
    half = list(values)[len(values) // 2 :]
    return float(np.polyfit(range(len(half)), half, 1)[0]) if len(half) > 1 else 0.0


def many(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A sweep of many trials: memory as they end, answers of the store at the start and the end, and what is left."""
    uri = f"sqlite:///{folder}/mlflow.db"
    samples: list[dict[str, float]] = []
    answers: list[dict[str, float]] = []

    def note(ended: int) -> None:
        samples.append({"ended": ended, **memory()})
        if ended == min(2, given.trials):
            answers.append(answer_times(uri))

    began = time.perf_counter()
    result = sweep_of(given.trials, given.at_once, folder, given.steps, "many", Ends(note))
    took = time.perf_counter() - began
    answers.append(answer_times(uri))
    states: dict[str, int] = {}
    for trial in result.trials:
        states[trial.state] = states.get(trial.state, 0) + 1
    return {
        "trials": given.trials,
        "states": states,
        "seconds_a_trial": took / given.trials,
        "memory": samples,
        "slope_a_trial": {key: slope([sample[key] for sample in samples]) for key in samples[0] if key != "ended"},
        "store": answers,
        "store_mib": (folder / "mlflow.db").stat().st_size / 2**20,
        "left": left_behind(),
    }


@contextmanager
def quiet_cluster() -> Iterator[None]:
    """A Ray cluster for the block, Tune without output of its own, and logs of what goes wrong only."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    with ray_cluster():
        yield


def table(part: str, said: dict[str, Any]) -> Iterator[str]:
    """The lines that a person reads."""
    if part == "rate":
        for name, row in said.items():
            yield f"  {name:38s} {row['a_minute']:7.1f} a minute {row['seconds']:7.2f} s {row['times']:6.1f} times"
    elif part == "first-step":
        for name, seconds in said["median_seconds"].items():
            yield f"  {name:38s} {seconds:7.2f} s"
        yield "imports of a fresh process"
        for name, seconds in said["imports_of_a_process"].items():
            yield f"  {name:38s} {seconds:7.2f} s"
    else:
        first, last = said["memory"][0], said["memory"][-1]
        yield f"  {said['trials']} trials ({said['states']}), {said['seconds_a_trial']:.1f} s each"
        for key, change in said["slope_a_trial"].items():
            yield f"  {key:12s} {first[key]:8.1f} to {last[key]:8.1f}, {change:+.3f} a trial over the second half"
        for answer in said["store"]:
            yield "  store: " + ", ".join(f"{key} {value:.1f}" for key, value in answer.items())
        yield "  left: " + ", ".join(f"{key} {value}" for key, value in said["left"].items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["rate", "first-step", "many"])
    parser.add_argument("--trials", type=int, help="rate: 6, many: 100")
    parser.add_argument("--at-once", type=int, default=2, help="trials at a time")
    parser.add_argument("--repeats", type=int, default=5, help="of first-step, after one that does not count")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps a tiny run")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.trials = given.trials or (100 if given.part == "many" else 6)
    parts = {"rate": rate, "first-step": first_step, "many": many}
    with tempfile.TemporaryDirectory(prefix="cosa-ray-overhead-") as folder, quiet_cluster():
        import ray

        said = parts[given.part](given, Path(folder))
        machine = {"cpus": ray.cluster_resources().get("CPU"), "ray": ray.__version__, "machine": platform.processor()}
    machine["load_at_end"] = os.getloadavg()[0]
    if given.json:
        print(json.dumps({"part": given.part, given.part: said, "at_once": given.at_once, **machine}))
        return
    print(f"{given.part}, {machine['cpus']:g} CPUs, {given.at_once} trials at a time")
    for line in table(given.part, said):
        print(line)


if __name__ == "__main__":
    main()
