"""The metrics that order the trials of a sweep: those that every trial reports, or the sweep is refused."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from cosa_ray.config.load import apply_overrides
from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import open_dataset
from cosa_ray.errors import UserError
from cosa_ray.evaluation.naming import best_metric, metric_prefix, tracked_names
from cosa_ray.tuning.space import points
from cosa_ray.tuning.sweepfile import Mode, Sweep

_CAMS = (
    "cam_miou_best",
    "cam_best_threshold",
    "cam_miou_held_out",
    "cam_aux_miou_best",
    "cam_aux_best_threshold",
    "cam_aux_miou_held_out",
    "pseudo_miou",
    "pseudo_coverage",
    "map",
    "images",
)
_SEGMENTATION = ("miou", "miou_online", "miou_labels_given", "miou_online_labels_given", "pixel_accuracy")
_PREDICTED = ("miou_labels_predicted", "miou_online_labels_predicted")
# Settings that a metric's name, or whether there is one, depends on.
_NAMING = (
    "evaluation.subset",
    "evaluation.cam_threshold",
    "evaluation.presence",
    "data.val_split",
    "training.steps",
    "training.stop_at",
    "training.warmup_iters",
)


def reported(config: Config, classes: Sequence[str], images: int) -> list[str]:
    """Names of the metrics that a run of this config reports; `images` is the size of its validation split."""
    fixed = f"miou_at_{config.evaluation.cam_threshold:g}"
    names = [*_CAMS, f"cam_{fixed}", f"cam_aux_{fixed}"]
    if config.training.warmup_iters < config.last_step:
        predicted = [] if config.evaluation.presence is None else _PREDICTED
        names = [
            *_SEGMENTATION,
            *predicted,
            *names,
            *(f"iou/{name}" for name in tracked_names(("background", *classes))),
        ]
    prefix = metric_prefix(config, images)
    cost = f"cost/{'gpu' if config.resources.gpus_per_worker else 'cpu'}_hours"
    return [*(f"{prefix}/{name}" for name in names), "train/loss", cost]


def sweep_metrics(sweep: Sweep, base: Config, where: str) -> dict[str, Mode]:
    """The metrics of a sweep with their modes: its own, else the one its base calls best.

    Raises UserError, with the nearest name, when a trial of the space would not report one of them.
    """
    dataset = open_dataset(base.data.dataset)

    def names(config: Config) -> list[str]:
        return reported(config, dataset.classes, len(dataset.split(config.data.val_split)))

    wanted = sweep.metric if isinstance(sweep.metric, tuple) else (sweep.metric,)
    own = best_metric(base, metric_prefix(base, len(dataset.split(base.data.val_split))))
    metrics = dict(zip((metric or own for metric in wanted), sweep.modes, strict=True))
    varied = [key for key in _NAMING if key in sweep.space]
    seen: set[tuple[object, ...]] = set()
    for point in points(sweep.space) if varied else [{}]:
        given = {key: point[key] for key in varied if key in point}
        if tuple(given.items()) in seen:
            continue
        seen.add(tuple(given.items()))
        known = names(apply_overrides(base, point, where) if given else base)
        for metric in metrics:
            if metric not in known:
                shown = ", ".join(f"{key}={value}" for key, value in given.items())
                near = difflib.get_close_matches(metric, known, n=1, cutoff=0.5)
                raise UserError(
                    f"{where}: no evaluation{f' with {shown}' if shown else ''} reports the metric {metric}"
                    + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known[:12])} and others.")
                )
    return metrics
