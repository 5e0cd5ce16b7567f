"""Evaluate a checkpoint of a run outside the run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cosa_ray.config.load import apply_overrides
from cosa_ray.data.dataset import open_dataset
from cosa_ray.errors import UserError
from cosa_ray.evaluation.evaluate import evaluate
from cosa_ray.training.distributed import autocast_dtype, join_workers
from cosa_ray.training.runs import find_run
from cosa_ray.training.state import Description, TrainState


@dataclass(frozen=True)
class RunEvaluation:
    """Metrics by their tracked names, and what they were measured on."""

    name: str
    checkpoint: str
    step: int
    dataset: str
    split: str
    metrics: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


def evaluate_run(
    run: str,
    *,
    dataset: str | None = None,
    split: str | None = None,
    which: str = "best",
    storage: str = "runs",
) -> RunEvaluation:
    """Evaluate both networks of a run's `best` or `last` checkpoint on the whole split, by the run's scales and flip.

    `run` is a name, folder or MLflow run id. Raises UserError when something does not fit.
    """
    if which not in ("best", "last"):
        raise UserError(f"--checkpoint {which}: choose best or last.")
    found = find_run(run, storage)
    best = found.best()
    entry = best if which == "best" else found.checkpoints.latest() or best
    config = apply_overrides(
        found.config(),
        {
            "evaluation.subset": None,
            **({"data.dataset": dataset} if dataset else {}),
            **({"data.val_split": split} if split else {}),
        },
        run,
    )
    opened = open_dataset(config.data.dataset)
    target = opened.split(config.data.val_split)
    if not target.has_masks:
        raise UserError(f"split {config.data.val_split} of {config.data.dataset} has no masks to evaluate on.")
    workers = join_workers()
    with found.folder.local_copy(entry.name) as folder:
        description = Description.read(folder)
        if list(opened.classes) != description.classes:
            raise UserError(
                f"{config.data.dataset} has the classes {', '.join(opened.classes)}, but run {found.record.name} was "
                f"trained on {', '.join(description.classes)}; choose a dataset of the same classes."
            )
        state = TrainState(config, opened.num_classes, workers.device, initialise=False)
        state.load_networks(folder)
    result = evaluate(
        state.online,
        state.assignment,
        target,
        config,
        classes=opened.classes,
        palette=opened.card.palette,
        thresholds=description.thresholds,
        segment=entry.step > config.training.warmup_iters,
        rank=workers.rank,
        world=workers.world,
        sum_over_workers=workers.sum,
        device=workers.device,
        autocast=autocast_dtype(config, workers.device),
    )
    return RunEvaluation(
        found.record.name, entry.name, entry.step, config.data.dataset, config.data.val_split, result.metrics
    )
