"""What an evaluation leaves behind: one JSON document, tables for other programs, and pictures for people."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cosa_ray.config.protocol import Protocol
from cosa_ray.evaluation.confusion import ious
from cosa_ray.evaluation.figures import confidence_histogram, confusion_picture, reliability_curve, threshold_curves
from cosa_ray.evaluation.panels import Tile, panel
from cosa_ray.evaluation.tally import Tally, per_class

SHOWN = 6  # images in each of the panels of worst and best
RESULT = "result.json"


@dataclass(frozen=True)
class Report:
    """An evaluation of one checkpoint under one protocol; JSON-ready but for the arrays of the tally.

    metrics: by their tracked names. per_class: by the name of the mIoU, see `tally.per_class`. curves: CAM mIoU at
    every threshold of `thresholds`. worst, best: (id, mIoU of that image over its own classes).
    """

    name: str
    checkpoint: str
    step: int
    dataset: str
    split: str
    prefix: str
    protocol: dict[str, Any]
    metrics: dict[str, float]
    per_class: dict[str, list[dict[str, float | str]]]
    curve_thresholds: list[float]
    curves: dict[str, list[float]]
    worst: list[tuple[str, float]]
    best: list[tuple[str, float]]
    folder: str | None = None

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; values that are not defined are null."""
        return _without_nan(asdict(self))


@dataclass(frozen=True)
class Findings:
    """A finished evaluation's counts with what is needed to draw and write them."""

    tally: Tally = field(repr=False)
    classes: Sequence[str]
    palette: Sequence[tuple[int, int, int]] | None
    thresholds: Mapping[str, float]
    segment: bool
    ids: Mapping[int, str] = field(repr=False)

    @property
    def ranked_by(self) -> str:
        """The name whose per-image mIoU ranks the images: the first segmentation, else the CAMs at the fixed value."""
        names = list(self.tally.matrices)
        return names[0] if self.segment else next(name for name in names if name.startswith("cam_"))

    def ranking(self) -> list[tuple[int, float]]:
        """(index, mIoU over the classes in the image's mask) of every image, worst first."""
        assert self.tally.per_image is not None
        indices = sorted(self.tally.per_image)
        table = ious(self.tally.totals(self.ranked_by))
        known = ~np.isnan(table)
        each = np.where(known, table, 0).sum(1) / np.maximum(1, known.sum(1))
        order = np.argsort(each, kind="stable")
        return [(indices[place], float(each[place])) for place in order if known[place].any()]


def summarise(
    findings: Findings,
    protocol: Protocol,
    prefix: str,
    *,
    name: str,
    checkpoint: str,
    step: int,
    dataset: str,
    split: str,
) -> Report:
    """The report of finished counts."""
    tally = findings.tally
    ranking = [(findings.ids[index], miou) for index, miou in findings.ranking()]
    shown = {n: m for n, m in tally.matrices.items() if findings.segment or not n.startswith("miou")}
    return Report(
        name=name,
        checkpoint=checkpoint,
        step=step,
        dataset=dataset,
        split=split,
        prefix=prefix,
        protocol=protocol.model_dump(mode="json"),
        metrics={
            f"{prefix}/{key}": value for key, value in tally.metrics(findings.classes, segment=findings.segment).items()
        },
        per_class={n: per_class(matrix.numpy(), findings.classes) for n, matrix in shown.items()},
        curve_thresholds=[round(float(value), 6) for value in tally.main.thresholds],
        curves={"cam": tally.main.curve().tolist(), "cam_aux": tally.aux.curve().tolist()},
        worst=ranking[:SHOWN],
        best=ranking[::-1][:SHOWN],
    )


def write_report(folder: Path, report: Report, findings: Findings, tiles: Mapping[int, Tile]) -> None:
    """Write a report into an empty local folder: result.json, CSV tables, per-image counts, pictures."""
    tally, classes = findings.tally, ("background", *findings.classes)
    (folder / RESULT).write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
    with (folder / "per_class.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["metric", "class", "iou", "precision", "recall", "pixels"])
        for name, rows in report.per_class.items():
            writer.writerows([name, *row.values()] for row in rows)
    with (folder / "threshold_curve.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["threshold", *report.curves])
        writer.writerows(zip(report.curve_thresholds, *report.curves.values(), strict=True))
    for name in report.per_class:
        matrix = tally.matrices[name].numpy()
        with (folder / f"confusion_{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["true \\ predicted", *classes])
            writer.writerows([label, *row] for label, row in zip(classes, matrix.tolist(), strict=True))
        if name in (findings.ranked_by, "miou_online"):
            confusion_picture(matrix, classes, name).save(folder / f"confusion_{name}.png")
    thresholds = findings.thresholds
    grid = np.array(report.curve_thresholds)
    curves = {"CAM": tally.main.curve(), "auxiliary CAM": tally.aux.curve()}
    threshold_curves(grid, curves, thresholds).save(folder / "threshold_curve.png")
    confidence_histogram(tally.outcomes.sum(1).numpy(), thresholds).save(folder / "cam_confidence.png")
    reliability_curve(tally.outcomes.numpy(), thresholds).save(folder / "reliability.png")
    ranking = [index for index, _ in findings.ranking()]
    for name, indices in (("worst", ranking[:SHOWN]), ("best", ranking[::-1][:SHOWN])):
        found = [tiles[index] for index in indices if index in tiles]
        if found:
            panel(found, classes, findings.palette).save(folder / f"{name}.png")
    _write_per_image(folder / "per_image.arrow", findings)


def _write_per_image(file: Path, findings: Findings) -> None:
    """Pixels right, true and predicted of every image and class: what paired comparisons of two runs need."""
    import pyarrow as pa

    tally = findings.tally
    assert tally.per_image is not None
    indices = sorted(tally.per_image)
    columns: dict[str, Any] = {"id": [findings.ids[index] for index in indices]}
    for name in tally.matrices:
        if findings.segment or not name.startswith("miou"):
            flat = pa.array(tally.totals(name).reshape(-1).astype(np.int32))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, 3 * tally.size)
    table = pa.table(columns)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_per_image(file: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """(ids, totals (N, 3, K) by the name of the mIoU) of a report's per_image.arrow."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    found = {}
    for name in table.column_names[1:]:
        column = table.column(name).combine_chunks()
        found[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), 3, -1)
    return table.column("id").to_pylist(), found


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
