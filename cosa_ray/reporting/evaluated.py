"""Evaluations that runs have in their folders, read back and put side by side: by class, and image by image."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cosa_ray.config.protocol import load_protocol
from cosa_ray.errors import UserError
from cosa_ray.evaluation.confusion import ious, paired_intervals
from cosa_ray.evaluation.naming import plain_name
from cosa_ray.evaluation.report import Report, read_per_image
from cosa_ray.reporting.subjects import Side
from cosa_ray.training.evaluating import read_evaluations
from cosa_ray.training.runs import Run

RANKED = 24  # images listed by how much the first two sides differ on them
_PER_IMAGE = "per_image.arrow"

Interval = tuple[float, float]


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of a run: what `result.json` says, and where it lies in the run's folder."""

    run: Run
    place: str
    report: Report

    def per_image(self) -> tuple[list[str], dict[str, np.ndarray]]:
        """Ids and totals (N, 3, K) by the name of the mIoU, see `read_per_image`; none where the file is gone."""
        if not self.run.folder.exists(f"{self.place}/{_PER_IMAGE}"):
            return [], {}
        with self.run.folder.local_copy(self.place) as folder:
            return read_per_image(Path(folder) / _PER_IMAGE)

    def confusion(self, metric: str) -> np.ndarray | None:
        """Confusion matrix (K, K) of a scored prediction, rows truth; None where the file is gone."""
        text = self.run.folder.read_text(f"{self.place}/confusion_{metric}.csv")
        if text is None:
            return None
        rows = list(csv.reader(io.StringIO(text, newline="")))[1:]
        return np.array([[int(value) for value in row[1:]] for row in rows], dtype=np.int64)


# The runs' evaluations of one prefix of metrics by their side's place; the first side is always in it.
Chosen = dict[int, list[Evaluated]]


def evaluations_of(run: Run) -> dict[str, Evaluated]:
    """The evaluation of a run under every prefix of metrics: of its best checkpoint, else the newest."""
    best = run.checkpoints.best()
    found: dict[str, Evaluated] = {}
    for place, report in read_evaluations(run):
        if report.prefix not in found or (best is not None and report.step == best.step):
            found[report.prefix] = Evaluated(run, place, report)
    return found


def choose_evaluations(
    sides: Sequence[Side], evaluations: Sequence[Sequence[dict[str, Evaluated]]], protocol: str | None
) -> Chosen:
    """Evaluations of one prefix of metrics that the first side and most others have; none where no other has any.

    Of several, those of the runs' own protocol on their own data, else the first by name. `protocol` demands one of all
    sides: a protocol's name or file, or a prefix such as `others.val/release`. UserError says what is missing.
    """
    having = {
        prefix: [place for place, side in enumerate(evaluations) if all(prefix in found for found in side)]
        for prefix in evaluations[0][0]
    }
    if protocol is not None:
        having = _demanded(sides, evaluations, having, protocol)
    having = {prefix: places for prefix, places in having.items() if 0 in places and len(places) > 1}
    if not having:
        return {}
    prefix = min(having, key=lambda each: (-len(having[each]), _preference(evaluations[0][0][each].report)))
    return {place: [found[prefix] for found in evaluations[place]] for place in having[prefix]}


def _demanded(
    sides: Sequence[Side],
    evaluations: Sequence[Sequence[dict[str, Evaluated]]],
    having: dict[str, list[int]],
    protocol: str,
) -> dict[str, list[int]]:
    """The prefixes that all sides have and that the demanded word names; UserError where there is none."""
    common = {prefix: places for prefix, places in having.items() if len(places) == len(sides)}
    if protocol in common:
        return {protocol: common[protocol]}
    wanted = load_protocol(protocol).name
    under = {prefix: places for prefix, places in common.items() if _protocol(evaluations[0][0][prefix]) == wanted}
    if under:
        return under
    measured = [
        (run, [prefix for prefix, each in found.items() if _protocol(each) == wanted])
        for side, evaluated in zip(sides, evaluations, strict=True)
        for run, found in zip(side.runs, evaluated, strict=True)
    ]
    for run, prefixes in measured:
        if not prefixes:
            raise UserError(
                f"run {run.record.name} has no evaluation under {wanted}; make it with: {command(run, protocol)}"
            )
    on = ", ".join(f"{run.record.name} as {' and '.join(prefixes)}" for run, prefixes in measured)
    raise UserError(f"the runs were not evaluated alike under {wanted} ({on}); use the same --dataset and --split.")


def _protocol(evaluated: Evaluated) -> str:
    return str(evaluated.report.protocol["name"])


def _preference(report: Report) -> tuple[bool, bool, str]:
    """Order of evaluations: a run's own protocol first, its own data before others, whose metrics say which."""
    return bool(report.protocol["name"]), not report.prefix.startswith(plain_name(report.split)), report.prefix


def command(run: Run, protocol: str | None = None) -> str:
    """The command that evaluates a run, by its folder, which works from anywhere."""
    return f"cosa-ray evaluate {run.folder.uri}" + (f" --protocol {protocol}" if protocol else "")


def common_metric(chosen: Chosen, metric: str | None) -> str:
    """The mIoU that sides are judged by: the one asked for, else the first that all evaluations have."""
    reports = [each.report for side in chosen.values() for each in side]
    common = [name for name in reports[0].per_class if all(name in report.per_class for report in reports)]
    prefix = reports[0].prefix
    if not common:
        raise UserError(f"the evaluations {prefix} of these runs have no mIoU in common; evaluate them again.")
    name = common[0] if metric is None else metric.removeprefix(f"{prefix}/")
    if name not in common:
        raise UserError(f"--metric {metric}: these evaluations have {', '.join(common)} in common; choose one.")
    return name


def mismatches(sides: Sequence[Side], chosen: Chosen) -> list[str]:
    """What makes metrics of one name less comparable than they look, and who has none."""
    first = chosen[0][0].report
    notes = []
    for place, side in enumerate(sides):
        if place not in chosen:
            notes.append(f"{side.shown} has no evaluation {first.prefix}: no classes, no interval, no pictures of it.")
        for each in chosen.get(place, ()):
            report = each.report
            other = [key for key, value in first.protocol.items() if report.protocol.get(key) != value]
            other = [key for key in other if key != "batch_size"]
            if other:
                said = ", ".join(f"{key} {report.protocol.get(key)}, not {first.protocol[key]}" for key in other)
                notes.append(
                    f"{side.shown} was evaluated with other settings than {sides[0].shown}, though the name is the "
                    f"same: {said}."
                )
            if report.dataset.rstrip("/") != first.dataset.rstrip("/"):
                notes.append(f"{side.shown} was evaluated on {report.dataset}, {sides[0].shown} on {first.dataset}.")
            best = each.run.checkpoints.best()
            if best is not None and best.step != report.step:
                notes.append(
                    f"{side.shown} was evaluated at step {report.step:,}, and its best checkpoint is at {best.step:,}."
                )
    return list(dict.fromkeys(notes))


def same_classes(chosen: Chosen, metric: str) -> bool:
    """True when all evaluations are over the same classes in the same order."""
    reports = [each.report for side in chosen.values() for each in side]
    return len({tuple(row["class"] for row in report.per_class[metric]) for report in reports}) == 1


def class_rows(chosen: Chosen, metric: str, sides: int) -> list[dict[str, Any]]:
    """IoU of every class by side (the mean over its runs), with the difference from the first side."""

    def ious_of(each: Evaluated) -> list[float]:
        return [math.nan if row["iou"] is None else float(row["iou"]) for row in each.report.per_class[metric]]

    rows = chosen[0][0].report.per_class[metric]
    table = np.full((sides, len(rows)), np.nan)
    for place, side in chosen.items():
        table[place] = np.mean([ious_of(each) for each in side], axis=0)
    return [
        {
            "class": row["class"],
            "values": [_known(value) for value in table[:, number]],
            "differences": [_known(value) for value in table[:, number] - table[0, number]],
            "pixels": row["pixels"],
        }
        for number, row in enumerate(rows)
    ]


@dataclass(frozen=True)
class OnImages:
    """What evaluations say image by image, over the images that all have in common.

    intervals: 95 % paired bootstrap of the difference from the first side, by the mIoU's name and the side's place.
    ranking: images on which the first side and the next that was evaluated differ most. note: why there is less than
    there could be.
    """

    count: int = 0
    intervals: dict[str, dict[int, Interval]] = field(default_factory=dict)
    ranking: list[dict[str, Any]] = field(default_factory=list)
    note: str | None = None


def on_images(chosen: Chosen, metric: str) -> OnImages:
    """Compare evaluations image by image; `metric` is the mIoU whose images are ranked."""
    tables = [[each.per_image() for each in side] for side in chosen.values()]
    everybody = [table for side in tables for table in side]
    common = set(everybody[0][0]).intersection(*(ids for ids, _ in everybody))
    ids = [name for name in everybody[0][0] if name in common]
    if len(ids) < 2:
        return OnImages(note="The evaluations have no images in common, so there are no intervals and no pictures.")

    def in_order(table: tuple[list[str], dict[str, np.ndarray]], name: str) -> np.ndarray:
        rows = {image: row for row, image in enumerate(table[0])}
        return table[1][name][[rows[image] for image in ids]]

    def totals(name: str) -> list[np.ndarray]:
        return [np.stack([in_order(table, name) for table in side]) for side in tables]

    names = [name for name in everybody[0][1] if all(name in found for _, found in everybody)]
    # Pixels whose pseudo-label is undecided are not counted, so its true pixels differ on the same mask.
    truths = np.concatenate(totals(next((name for name in names if name != "pseudo_miou"), metric)))[:, :, 1]
    if (truths != truths[0]).any():
        return OnImages(
            note="Images of the same ids have other masks, so they are not the same: no intervals and no pictures."
        )
    others = list(chosen)[1:]
    intervals = {name: dict(zip(others, paired_intervals(totals(name)), strict=True)) for name in names}
    first, second = (np.mean([image_scores(run) for run in side], axis=0) for side in totals(metric)[:2])
    difference = np.nan_to_num(second - first)
    order = np.argsort(-np.abs(difference), kind="stable")[:RANKED]
    ranking = [
        {
            "id": ids[place],
            "values": [float(first[place]), float(second[place])],
            "difference": float(difference[place]),
        }
        for place in order
        if difference[place]
    ]
    note = None
    if any(len(table[0]) != len(ids) for table in everybody):
        note = (
            f"Not all were evaluated on the same images: intervals and pictures are of the {len(ids)} that they have "
            "in common, values of each one's own."
        )
    return OnImages(len(ids), intervals, ranking, note)


def image_scores(totals: np.ndarray) -> np.ndarray:
    """mIoU of every image over the classes in its mask (N,), NaN where it has none: totals (N, 3, K)."""
    table = ious(totals)
    known = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        return np.where(known, table, 0).sum(1) / known.sum(1)


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
