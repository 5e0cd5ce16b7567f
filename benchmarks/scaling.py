"""What limits runs and sweeps on 8, 64 and 512 GPUs: measure this machine's constants, then simulate with them.

    python benchmarks/scaling.py measure --out constants.json
    python benchmarks/scaling.py measure --ray --only tune      # what needs a Ray cluster: about a minute
    python benchmarks/scaling.py simulate --gpus 8 64 512 --trials 10000 --constants constants.json
    python benchmarks/scaling.py validate

measure: medians of a few repeats in a temporary folder, no GPU, no Ray without --ray. simulate: a step model for one
run, a discrete-event simulation for a sweep (scaling_model.py); each constant that is not measured has a default, and
SOURCES says where it comes from. validate: the simulation against what was measured before. docs/scaling.md reads it.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from scaling_model import Constants, Scenario, cache_seconds, simulate_sweep, step_parts, validate

SOURCES = {
    "train_image_s": "the authors' published VOC log: 0.92 s a step of 2 images a GPU (RTX 3090), evaluation included",
    "eval_image_s": "reckoned: pixels of 22 forward passes (5 scales, flip, 2 networks) for a training step's 10",
    "state_bytes": "measured (ViT-B/16, 20 classes)",
    "gradient_bytes": "measured: a quarter of the state",
    "decode_image_s": "measured: decode a 500 x 375 photograph, two views of 448 px",
    "serialise_rate": "measured: save to the local disk",
    "startup_s": "README: 16.2 s to the first step of a run by itself, and its end",
    "collective_s": "assumed",
    "overlap": "README's step times: the backward pass is a fifth of a step",
    "driver_event_s": "assumed; --ray measures it: results that Tune handles one after the other",
    "journal_put_s": "measured",
    "suggest_s": "measured, TPE of five settings",
    "suggest_trial_s": "measured, TPE of five settings, a finished trial",
    "display_trial_s": "measured, a trial of the table and the status file",
    "monitor_call_s": "assumed; --ray measures it",
    "monitor_calls_a_second": "the code: a stop wish each 0.5 s, progress each second",
    "mlflow_batch_s": "assumed: a request without its points, as SQLite takes",
    "mlflow_point_s": "docs/tracking.md: one run, 0.30 s a batch of 500",
    "mlflow_open_s": "docs/tracking.md: one run, what its 3,000 points do not explain",
    "final_trial_s": "measured: result and files of a trial when the sweep ends",
}
SPACE = {
    "optimiser.lr": {"loguniform": [1e-5, 1e-3]},
    "losses.cam_to_seg": {"uniform": [0.0, 1.0]},
    "losses.seg_to_cam": {"uniform": [0.0, 1.0]},
    "losses.contrastive": {"loguniform": [1e-3, 1.0]},
    "pseudo_labels.policy": {"choice": ["single", "reliability"]},
}
METRICS: Any = {"val/miou": "max"}


def median(call: Callable[[], Any], times: int = 5) -> float:
    """Median seconds of a call, after one that does not count."""
    call()
    return statistics.median(seconds(call) for _ in range(times))


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measured_data(folder: Path) -> dict[str, float]:
    """Opening a dataset, reading a sample, two views of a photograph, checking and copying a shard's bytes."""
    import hashlib

    import numpy as np
    from PIL import Image
    from skimage import data

    from cosa_ray.config.schema import Views
    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.data.importing import import_dataset
    from cosa_ray.data.pictures import decode_rgb
    from cosa_ray.data.views import two_views

    import_dataset("shapes", None, str(folder / "shapes"), train=200, val=40, size=96, local=True)
    split = open_dataset(str(folder / "shapes")).split("train")
    stream = io.BytesIO()
    Image.fromarray(data.astronaut()).resize((500, 375)).save(stream, "JPEG", quality=90)
    photograph, draw = stream.getvalue(), np.random.default_rng(0)
    block, copy = folder / "block", folder / "copy"
    block.write_bytes(os.urandom(64_000_000))
    return {
        "open_s": median(lambda: open_dataset(str(folder / "shapes")).split("train")[0]),
        "sample_s": median(lambda: [split[i] for i in range(200)]) / 200,
        "decode_image_s": median(lambda: two_views(decode_rgb(photograph), Views(), draw), 15),
        "checksum_rate": 64e6 / median(lambda: hashlib.sha256(block.read_bytes()).hexdigest()),
        "copy_rate": 64e6 / median(lambda: shutil.copyfile(block, copy)),
    }


def measured_checkpoint(folder: Path, experiment: str, classes: int, **changes: Any) -> dict[str, float]:
    """Seconds to save, upload and register a checkpoint, and its bytes."""
    import torch

    from cosa_ray.config.load import apply_overrides, load_config
    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.evaluation.description import Description
    from cosa_ray.training.state import TrainState
    from cosa_ray.training.storage import CheckpointStore, RunFolder

    config = apply_overrides(load_config(experiment), changes)
    card = open_dataset(str(folder / "shapes")).card
    state = TrainState(config, classes, torch.device("cpu"), initialise=False)
    for parameter in state.online.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimise(torch.ones(()), torch.zeros(()))
    said = Description("r", 1, [str(n) for n in range(classes)], {}, "assignment", 0.0, state.threshold_values())
    store, parts = CheckpointStore(RunFolder(str(folder / "run")), "val/miou"), []
    for step in range(1, 4):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            marks = [time.perf_counter()]
            state.save(Path(temporary), card, said)
            marks.append(time.perf_counter())
            size = sum(file.stat().st_size for file in Path(temporary).iterdir())
            name = store.upload(Path(temporary), step)
            marks.append(time.perf_counter())
            store.register(name, step, {})
            marks.append(time.perf_counter())
        parts.append([after - before for before, after in itertools.pairwise(marks)])
    save, upload, register = (statistics.median(part) for part in zip(*parts, strict=True))
    shutil.rmtree(folder / "run")
    return {"bytes": size, "save_s": save, "upload_s": upload, "register_s": register}


def measured_evaluation(folder: Path) -> dict[str, float]:
    """Images a second of the tiny network's evaluation, and the bytes that all workers add up at its end."""
    import torch

    from cosa_ray.config.load import load_config
    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.evaluation.evaluate import evaluate
    from cosa_ray.evaluation.tally import Tally
    from cosa_ray.training.state import TrainState

    config = load_config("shapes")
    dataset = open_dataset(str(folder / "shapes"))
    state = TrainState(config, dataset.num_classes, torch.device("cpu"))
    split, threshold = dataset.split("val"), state.threshold_values()
    networks = (state.online, state.assignment)
    took = median(lambda: evaluate(*networks, split, config, classes=dataset.classes, thresholds=threshold), 3)
    names = ("miou", "miou_online", "miou_labels_given", "cam_miou", "cam_aux_miou", "pseudo_miou")
    summed = {f"summed_bytes_{k}": sum(t.nbytes for t in Tally(k, names).counts()) for k in (20, 80)}
    return {"images_a_second": len(split) / took, **{key: float(value) for key, value in summed.items()}}


def made_up(folder: Path, count: int) -> Any:
    """A journal of so many finished trials, in memory."""
    import numpy as np

    from cosa_ray.training.storage import RunFolder
    from cosa_ray.tuning.journal import Entry, Journal, Report

    journal, draw = Journal(RunFolder(str(folder / f"sweep{count}"))), np.random.default_rng(0)
    for number in range(count):
        log, share = float(draw.uniform(-3, 0)), [float(each) for each in draw.uniform(size=3)]
        values = dict(zip(SPACE, [10 ** (2 * log / 3 - 3), *share[:2], 10**log, "single"], strict=True))
        reports = tuple(Report(150 * k, {"val/miou": share[2] + k / 100}, 1.0 * k) for k in range(1, 5))
        journal._entries[number] = Entry(number, values, number, state="finished", step=600, reports=reports)
    return journal


def judging(scheduler: Any, entries: list[Any]) -> Callable[[], Any]:
    """Have a scheduler that knows these trials judge an evaluation of one more."""
    scheduler.set_search_properties("val/miou", "max")
    scheduler.recall(entries, "val/miou")
    numbers = itertools.count(len(entries) + 100_000)

    def judge() -> None:
        another = replace(entries[0], number=next(numbers))
        scheduler.on_trial_add(None, another)
        scheduler._judge(another.id, {"val/miou": 0.5, "step": 300})

    return judge


def measured_sweep(folder: Path, count: int) -> dict[str, float]:
    """What the driver of a sweep does where there are so many trials: events, display, search, and the end."""
    from cosa_ray.config.load import apply_overrides, load_config
    from cosa_ray.training.storage import RunFolder
    from cosa_ray.tuning.hooks import StepAsha, StepMedian
    from cosa_ray.tuning.journal import Journal
    from cosa_ray.tuning.report import as_csv, as_html, leaderboard
    from cosa_ray.tuning.results import SweepResult, best_trial, read_result, trial_result, write_result
    from cosa_ray.tuning.search import Search
    from cosa_ray.tuning.sweepfile import Budget, Sweep
    from cosa_ray.tuning.trial import Trials
    from cosa_ray.tuning.watch import Watch

    base = load_config("shapes")
    sweep = Sweep.model_validate({"base": "shapes", "space": SPACE, "search": "tpe", "trials": 20_000})
    place = RunFolder(str(folder / f"sweep{count}"))
    journal = made_up(folder, count)
    entries = journal.entries()
    row: dict[str, float] = {"put_s": median(lambda: journal.put(entries[0]), 15)}
    trials = Trials("s", apply_overrides(base, {"storage": str(folder)}), "val/miou", None, False, None)
    watch = Watch(
        *("s", METRICS, 20_000, journal, place),
        steps=lambda values: trials.trial_config(values).training.steps,
        end_trial=lambda entry, by: None,
        end_all=lambda: None,
        settle=lambda entry, killed: entry,
        failures=3,
        budget=Budget(),
    )
    row["first_table_s"] = seconds(watch.progress)
    row["display_s"] = median(lambda: (watch.advance({}), watch.progress(), watch.progress().dump()), 3)
    row["suggest_s"] = median(Search(sweep, base, METRICS, journal).next, 3)
    row["asha_judge_s"] = median(judging(StepAsha("x", 150, 601, 3), entries), 7)
    if count <= 1000:  # it takes in what was before with the square of it
        row["median_judge_s"] = median(judging(StepMedian("x", 150, 3), entries[:300]), 7)
    results: list[Any] = []
    row["result_s"] = seconds(lambda: results.extend(trial_result(entry, trials, METRICS) for entry in entries))
    best = best_trial(results, METRICS)
    result = SweepResult("s", place.uri, "finished", "val/miou", "max", None, None, results, best, None, METRICS)
    row["write_result_s"] = seconds(lambda: write_result(place, result))
    row["result_bytes"] = Path(place.join("sweep.json")).stat().st_size
    row["read_result_s"] = seconds(lambda: read_result(place))
    row["leaderboard_s"] = seconds(lambda: (as_csv(shown := leaderboard(result)), as_html(result, [shown])))
    for entry in entries:  # without waiting for the disk: what is measured is reading
        Path(place.join(f"trials/{entry.id}.json")).write_text(json.dumps(asdict(entry), default=list))
    row["read_journal_s"] = seconds(lambda: Journal(place))
    return row


def measured_files(folder: Path) -> dict[str, float]:
    """Holding a folder, and writing and reading a small file of it."""
    from cosa_ray.training.lease import hold
    from cosa_ray.training.storage import RunFolder

    place = RunFolder(str(folder / "files"))

    def held() -> None:
        with hold(place, "benchmark"):
            pass

    return {
        "write_s": median(lambda: place.write_text("a.json", "x" * 1000), 15),
        "read_s": median(lambda: place.read_text("a.json"), 15),
        "lease_s": median(held, 5),
    }


def measured_ray(folder: Path) -> dict[str, float]:
    """Results a second that Tune handles, and calls a second that the monitor answers; on a cluster of its own."""
    import ray
    from ray import tune

    from cosa_ray.training.ray_train import ray_cluster
    from cosa_ray.training.session import start_monitor

    def reports(_: dict[str, Any]) -> None:
        began = time.perf_counter()
        for step in range(300):
            tune.report({"step": step, "spent": time.perf_counter() - began})

    with ray_cluster():
        monitor = start_monitor(2)
        ray.get(monitor.latest.remote())
        calls = median(lambda: ray.get([monitor.stop_wished.remote("run") for _ in range(500)]), 5) / 500
        one = median(lambda: ray.get(monitor.stop_wished.remote("run")), 50)
        grid = tune.Tuner(
            tune.with_resources(reports, {"CPU": 0.9}),
            param_space={"n": tune.grid_search([0, 1])},
            run_config=tune.RunConfig(name="t", storage_path=str(folder), verbose=0),
        ).fit()
        spent = max(result.metrics["spent"] for result in grid)
    return {"monitor_call_s": calls, "monitor_answer_s": one, "driver_event_s": spent / 600}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for, with the load of the machine before and after."""
    found: dict[str, Any] = {"cpus": os.cpu_count(), "load_before": os.getloadavg()}
    vit = {"model.pretrained": False, "data.dataset": "x"}
    with tempfile.TemporaryDirectory(prefix="cosa-ray-scaling-") as temporary:
        folder = Path(temporary)
        parts: dict[str, Callable[[], Any]] = {
            "data": lambda: measured_data(folder),
            "files": lambda: measured_files(folder),
            "evaluation": lambda: measured_evaluation(folder),
            "checkpoint_tiny": lambda: measured_checkpoint(folder, "shapes", 5),
            "checkpoint_vit": lambda: measured_checkpoint(folder, "voc", 20, **vit),
            "sweep": lambda: {str(count): measured_sweep(folder, count) for count in given.counts},
            **({"tune": lambda: measured_ray(folder)} if given.ray else {}),
        }
        for name, part in parts.items():
            if given.only is None or name in given.only:
                found[name] = part()
                print(name, json.dumps(found[name]), flush=True)
    found["load_after"] = os.getloadavg()
    return found


def constants(measured: dict[str, Any]) -> Constants:
    """The defaults, with what was measured in their place."""
    known: dict[str, float] = {}
    if vit := measured.get("checkpoint_vit"):
        known |= {"state_bytes": vit["bytes"], "gradient_bytes": vit["bytes"] / 4}
        known |= {"serialise_rate": vit["bytes"] / vit["save_s"]}
    known |= {"decode_image_s": measured["data"]["decode_image_s"]} if "data" in measured else {}
    if rows := {int(count): row for count, row in measured.get("sweep", {}).items()}:
        least, most = min(rows), max(rows)
        slope = (rows[most]["suggest_s"] - rows[least]["suggest_s"]) / max(1, most - least)
        known |= {"suggest_trial_s": slope, "suggest_s": max(0.0, rows[least]["suggest_s"] - slope * least)}
        known |= {"display_trial_s": rows[most]["display_s"] / most, "journal_put_s": rows[most]["put_s"]}
        ends = sum(rows[most][key] for key in ("result_s", "write_result_s", "leaderboard_s"))
        known |= {"final_trial_s": ends / most}
    known |= {key: measured["tune"][key] for key in ("monitor_call_s", "driver_event_s") if "tune" in measured}
    return replace(Constants(), **known)


def simulate(known: Constants, given: argparse.Namespace) -> dict[str, Any]:
    """A run on 1 to `batch` GPUs, and a sweep on each number of GPUs; printed as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=170)
    at = Scenario(**{each.name: value for each in fields(Scenario) if (value := getattr(given, each.name, None))})
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n <= min(at.batch, max(given.park))]
    steps = {n: step_parts(known, at, n) for n in counts}
    table = Table(
        "GPUs", *next(iter(steps.values())), "step", "times faster", title="one run: seconds of a step, by part"
    )
    whole = {n: sum(parts.values()) for n, parts in steps.items()}
    for n, parts in steps.items():
        cells = [f"{1000 * value:,.1f} ms" for value in parts.values()]
        table.add_row(str(n), *cells, f"{whole[n]:.3f} s", f"{whole[1] / whole[n]:.2f}")
    console.print(table)
    table = Table(
        *("GPUs", "a trial", "at once", "cache", "days", "idle", "driver", "its wait", "display", "monitor", "MLflow"),
        *("p95", "storage", "upload", "the end", "files", "nearest its limit"),
        title=f"{at.trials} trials of {at.steps} steps",
    )
    sweeps = {}
    for gpus in given.park if at.trials else []:
        for each in given.each:
            here = replace(at, gpus=gpus, gpus_a_trial=each)
            out, cache = simulate_sweep(known, here), cache_seconds(here)
            sweeps[f"{gpus} GPUs, {each} a trial"] = {**asdict(out), "cache_s": cache, "first": out.first}
            table.add_row(
                *(str(gpus), str(each), str(out.at_once), f"{cache:,.0f} s", f"{out.hours / 24:,.2f}"),
                *(f"{100 * out.gpu_idle:.1f} %", f"{100 * out.driver_used:.1f} %", f"{out.driver_p95:.2f} s"),
                *(
                    f"{100 * out.display_used:.0f} %",
                    f"{100 * out.monitor_used:.0f} %",
                    f"{100 * out.mlflow_used:.0f} %",
                ),
                *(f"{out.mlflow_p95:.2f} s", f"{100 * out.storage_used:.0f} %", f"{out.upload_s:.1f} s"),
                *(f"{out.final_s:,.0f} s", f"{out.checkpoint_bytes / 1e12:.1f} TB", out.first),
            )
    console.print(table)
    return {"constants": asdict(known), "sources": SOURCES, "run": steps, "sweeps": sweeps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "simulate", "validate"])
    parser.add_argument("--out", type=Path, help="write what came of it as JSON")
    parser.add_argument("--constants", type=Path, nargs="+", default=[], help="what `measure` wrote; else defaults")
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1_000, 10_000], help="trials to measure with")
    parser.add_argument("--only", nargs="+", help="parts to measure")
    parser.add_argument("--ray", action="store_true", help="measure also what needs a Ray cluster")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], dest="park")
    parser.add_argument("--each", type=int, nargs="+", default=[1, 4], help="GPUs a trial")
    for each in fields(Scenario):
        if each.name not in ("gpus", "gpus_a_trial", "suggests"):
            kind = float if isinstance(each.default, float) else int
            parser.add_argument(f"--{each.name.replace('_', '-')}", type=kind, default=each.default)
    given = parser.parse_args()
    measured: dict[str, Any] = {}
    for file in given.constants:
        measured |= json.loads(file.read_text())
    if given.what == "measure":
        found = measure(given)
    else:
        found = simulate(constants(measured), given) if given.what == "simulate" else validate(constants(measured))
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
