"""The demo: the whole platform once, in minutes, on made-up shapes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosa_ray.config.load import apply_overrides, load_config
from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.importing import import_dataset
from cosa_ray.errors import RunFailed
from cosa_ray.tracking.store import metric_course, tracking_uri
from cosa_ray.training.driver import ray_cluster, train
from cosa_ray.training.session import Progress
from cosa_ray.tuning.displays import Importing, Sweeping, Training, silent
from cosa_ray.tuning.sweep import SweepResult, load_sweep, run_sweep

TOLERANCE = 1e-4
# Few, because rounding grows from step to step, at the highest learning rates of the sweep past the tolerance.
STEPS, WARMUP = 60, 40


@dataclass(frozen=True)
class Displays:
    """What shows how far each of the three steps is: opened for the time of its step, None shows nothing."""

    importing: Importing = silent
    sweeping: Sweeping = silent
    training: Training = silent


@dataclass(frozen=True)
class DemoResult:
    """The sweep, and the winner's loss by step with one and with two workers."""

    sweep: SweepResult
    losses: list[tuple[int, float, float]]

    @property
    def largest_difference(self) -> float:
        """Largest difference between the two loss curves, relative to the loss."""
        return max(abs(one - two) / max(abs(one), 1e-12) for _, one, two in self.losses)

    def shown_losses(self) -> list[tuple[int, float, float]]:
        """A few steps of the two curves, those around the start of co-training among them."""
        wanted = {1, 20, WARMUP, WARMUP + 1, 50, STEPS}
        return [point for point in self.losses if point[0] in wanted]

    def verdict(self) -> str:
        """Whether one and two workers gave the same losses, in words."""
        difference = self.largest_difference
        same = "equal" if difference <= TOLERANCE else "NOT equal"
        return (
            f"{len(self.losses)} steps with one and with two workers at the same global batch: {same} "
            f"(largest relative difference {difference:.1e}, allowed {TOLERANCE:.0e})"
        )

    def as_json(self) -> dict[str, Any]:
        """The sweep's JSON, with the comparison of worker counts."""
        comparison = {"losses": self.losses, "largest_relative_difference": self.largest_difference}
        return {**self.sweep.as_json(), "workers_1_and_2": comparison}


def run_demo(
    folder: str = ".",
    *,
    sweep_file: str = "shapes",
    say: Callable[[str], None] = print,
    displays: Displays | None = None,
) -> DemoResult:
    """Import shapes, sweep CoSA over them, and run the winner across the start of co-training on 1 and 2 workers.

    Everything goes into `folder`: datasets/shapes (kept when it is there), runs, mlflow.db (unless MLFLOW_TRACKING_URI
    says otherwise). Raises UserError or RunFailed as the verbs do, RunFailed also when it is stopped.
    """
    displays = displays or Displays()
    place = Path(folder).resolve()
    name = time.strftime("demo-%Y%m%d-%H%M%S")
    settings: dict[str, Any] = {"storage": str(place / "runs"), "data.dataset": str(place / "datasets" / "shapes")}
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        settings["tracking.uri"] = f"sqlite:///{place}/mlflow.db"
    sweep, base = load_sweep(sweep_file)
    base = apply_overrides(base, settings)
    with ray_cluster():
        if (Path(base.data.dataset) / "dataset.json").exists():
            say(f"1/3 data: {base.data.dataset} is there already")
        else:
            say("1/3 data: making 2,200 pictures of shapes")
            with displays.importing() as show_import:
                import_dataset("shapes", None, base.data.dataset, progress=show_import)
        images = open_dataset(base.data.dataset).card.splits
        say("    " + ", ".join(f"{split}: {card.images} images" for split, card in images.items()))
        say(f"2/3 sweep {name}: {sweep.trials} trials of {base.training.steps} steps")
        with displays.sweeping() as show_sweep:
            result = run_sweep(sweep, base, name=name, show=show_sweep)
        if result.state == "stopped":
            raise RunFailed(f"demo stopped while sweeping; what was done is in {result.folder} and in MLflow.")
        if result.best is None or result.best_file is None:
            raise RunFailed(f"demo {name}: no trial succeeded (folder {result.folder}).")
        say(f"3/3 the winner for {STEPS} steps with one and with two workers")
        winner = load_config(result.best_file)
        curves = []
        for workers in (1, 2):
            with displays.training() as show_run:
                curves.append(_loss_curve(_short(winner, workers), f"{name}-{workers}-workers", show_run))
    return DemoResult(result, [(step, curves[0][step], curves[1][step]) for step in range(1, STEPS + 1)])


def _short(winner: Config, workers: int) -> Config:
    """The winner, shortened to pass the start of co-training half-way, every step logged."""
    return apply_overrides(
        winner,
        {
            "workers": workers,
            "training.steps": STEPS,
            "training.warmup_iters": WARMUP,
            "training.precision": "fp32",
            "optimiser.warmup_steps": min(winner.optimiser.warmup_steps, WARMUP),
            "evaluation.every": STEPS,
            "evaluation.subset": 16,
            "checkpoint.every": STEPS,
            "tracking.log_every": 1,
            "resources.cpus_per_worker": None,
            "training.threads": 1,
        },
    )


def _loss_curve(config: Config, name: str, show: Callable[[Progress], None] | None) -> dict[int, float]:
    """Train and read the loss of every step back from MLflow. Raises RunFailed unless every step is there."""
    from mlflow import MlflowClient

    result = train(config, name=name, show=show)
    if result.state != "finished":
        raise RunFailed(f"demo: run {name} {result.state} at step {result.step}, so there is nothing to compare.")
    if result.mlflow_run_id is None:
        raise RunFailed(f"demo: run {name} did not reach MLflow, so its losses cannot be compared.")
    client = MlflowClient(tracking_uri=tracking_uri(config))
    curve = dict(metric_course(client, result.mlflow_run_id, "train/loss"))
    if missing := set(range(1, config.training.steps + 1)) - curve.keys():
        raise RunFailed(
            f"demo: MLflow has no loss of {len(missing)} steps of run {name}, the first {min(missing)}, so the losses "
            "cannot be compared."
        )
    return curve
