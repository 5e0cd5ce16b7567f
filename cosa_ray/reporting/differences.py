"""The differences between runs, as data: settings, metrics, classes, images and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from cosa_ray.evaluation.description import DESCRIPTION, Description
from cosa_ray.reporting.evaluated import (
    Chosen,
    Evaluated,
    Interval,
    OnImages,
    choose_evaluations,
    class_rows,
    command,
    common_metric,
    evaluations_of,
    mismatches,
    on_images,
    same_classes,
)
from cosa_ray.reporting.history import Histories, Tracked
from cosa_ray.reporting.subjects import Side, some
from cosa_ray.training.runs import Run

# Settings that say how a run measures itself, and that its metrics' names do not show.
_MEASURING = (
    "data.dataset",
    "evaluation.size",
    "evaluation.scales",
    "evaluation.flip",
    "evaluation.presence",
    "views.crop",
)
_IOU = "/iou/"  # before the class, in the names of single classes' metrics, which have a table of their own
EVALUATION, BEST, LAST = "evaluation", "best checkpoint", "last step"


@dataclass(frozen=True)
class MetricRow:
    """One metric over the sides; None where a side does not have it.

    source: an evaluation, or what training measured at the best checkpoint or last. values: the mean over a side's
    runs, deviations: their standard deviation (n - 1; None for one run), counts: how many runs have it. differences:
    from the first side. intervals: 95 % paired bootstrap over images, where it could be made.
    """

    source: str
    name: str
    values: list[float | None]
    deviations: list[float | None]
    counts: list[int]
    differences: list[float | None]
    intervals: list[Interval | None]

    @property
    def is_shared(self) -> bool:
        """True when more than one side has it."""
        return sum(value is not None for value in self.values) > 1


@dataclass(frozen=True)
class Verdict:
    """What the headline metric says of one side against the first, in numbers and in a sentence.

    within_noise: the interval over images holds 0, or the one over seeds does; None where neither is known.
    """

    letter: str
    metric: str
    values: tuple[float, float]
    difference: float
    interval: Interval | None
    images: int | None
    within_noise: bool | None
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """Two or more sides next to each other; differences are from the first.

    config: settings that differ, as (key, value by side). evaluated: prefix, protocol, metric and images of the
    evaluation that the intervals and `images` come from; None where the first has none in common with another.
    per_class: (class, IoU by side, difference by side, true pixels), of the metric `classes_of`: the evaluation's, else
    what training measured. images: those on which the sides of evaluated's `pair` differ most, as (id, their mIoUs,
    difference), over the classes in the image's mask.
    """

    sides: list[dict[str, Any]]
    config: list[dict[str, Any]]
    metrics: list[MetricRow]
    evaluated: dict[str, Any] | None
    verdicts: list[Verdict]
    classes_of: str
    per_class: list[dict[str, Any]]
    images: list[dict[str, Any]]
    notes: list[str]
    html: str | None = None

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


@dataclass(frozen=True)
class Compared:
    """A comparison with what its pictures are drawn from."""

    comparison: Comparison
    chosen: Chosen = field(repr=False)

    @property
    def pair(self) -> list[list[Evaluated]]:
        """The evaluations of the first side and of the next that has them."""
        return list(self.chosen.values())[:2]


def differences(
    sides: Sequence[Side], histories: Histories, *, protocol: str | None = None, metric: str | None = None
) -> Compared:
    """Compare sides; see `compare_runs`."""
    found = [[evaluations_of(run) for run in side.runs] for side in sides]
    chosen = choose_evaluations(sides, found, protocol)
    rows = _metric_rows(
        [
            [_measured(run, each, histories.of(run)) for run, each in zip(side.runs, evaluations, strict=True)]
            for side, evaluations in zip(sides, found, strict=True)
        ]
    )
    config = _config(sides)
    notes = _caveats(sides, config)
    rows, ious = [row for row in rows if _IOU not in row.name], [row for row in rows if _IOU in row.name]
    classes_of, per_class = _classes_in_training(ious)
    evaluated, images, headline = None, OnImages(), None
    if not chosen:
        notes.append("No other has an evaluation in common with the first, so there are no intervals and no pictures.")
        if all(run.checkpoints.latest() for side in sides for run in side.runs):
            notes.append(f"Evaluate each, as in `{command(sides[0].runs[0])}`.")
    else:
        report = chosen[0][0].report
        prefix, name = report.prefix, common_metric(chosen, metric)
        headline = (EVALUATION, f"{prefix}/{name}")
        notes += mismatches(sides, chosen)
        if same_classes(chosen, name):
            classes_of, per_class = f"{prefix}/{name}", class_rows(chosen, name, len(sides))
            images = on_images(chosen, name)
            notes += [images.note] if images.note else []
            rows = [_with_intervals(row, f"{prefix}/", images.intervals) for row in rows]
        else:
            classes_of, per_class = "", []
            notes.append("The runs have other classes, so classes, intervals and pictures are left out.")
        evaluated = {
            "prefix": prefix,
            "protocol": report.protocol["name"],
            "metric": name,
            "dataset": report.dataset,
            "split": report.split,
            "images": images.count or None,
            "pair": [sides[place].letter for place in list(chosen)[:2]],
            "steps": [[each.report.step for each in chosen.get(place, ())] for place in range(len(sides))],
        }
    verdicts = _verdicts(sides, rows, headline, metric, images.count)
    without = [side.letter for side in sides[1:] if side.letter not in {verdict.letter for verdict in verdicts}]
    if without:
        notes.append(f"There is no verdict on {', '.join(without)}, for want of a common mIoU: evaluate them alike.")
    comparison = Comparison(
        sides=[_described(side, histories) for side in sides],
        config=config,
        metrics=rows,
        evaluated=evaluated,
        verdicts=verdicts,
        classes_of=classes_of,
        per_class=per_class,
        images=images.ranking,
        notes=notes,
    )
    return Compared(comparison, chosen)


def _measured(run: Run, evaluations: Mapping[str, Evaluated], tracked: Tracked) -> dict[tuple[str, str], float]:
    """Every metric of a run by (source, name), the ends of intervals left out.

    A sweep deletes the checkpoints of all but the best: what was last logged stands for them.
    """
    latest, best = run.checkpoints.latest(), run.checkpoints.best()
    head = run.record.metric.partition("/")[0] + "/"
    logged = {
        name: value for name, (_, value) in tracked.points.items() if name.startswith(head) or name == "train/loss"
    }
    found = {(BEST, name): value for name, value in (best.metrics if best else {}).items()}
    found |= {(LAST, name): value for name, value in (latest.metrics if latest else logged).items()}
    for each in evaluations.values():
        found |= {(EVALUATION, name): value for name, value in each.report.metrics.items()}
    return {key: value for key, value in found.items() if not key[1].endswith(("_ci_low", "_ci_high"))}


def _metric_rows(measured: Sequence[Sequence[Mapping[tuple[str, str], float]]]) -> list[MetricRow]:
    """A row per metric, mIoUs first under every prefix; what the last step only repeats is left out."""
    order = [EVALUATION, BEST, LAST]
    keys = {key for side in measured for run in side for key in run}

    def place(key: tuple[str, str]) -> tuple[Any, ...]:
        prefix, _, name = key[1].rpartition("/")
        return order.index(key[0]), prefix, not name.startswith("miou"), name

    rows: dict[tuple[str, str], MetricRow] = {}
    for source, name in sorted(keys, key=place):
        known = [[run[source, name] for run in side if (source, name) in run] for side in measured]
        values = [float(np.mean(each)) if each else None for each in known]
        row = MetricRow(
            source,
            name,
            values,
            [float(np.std(each, ddof=1)) if len(each) > 1 else None for each in known],
            [len(each) for each in known],
            [None if value is None or values[0] is None else value - values[0] for value in values],
            [None] * len(values),
        )
        best = rows.get((BEST, name))
        if source == LAST and best is not None:
            if _repeats(row, best):
                continue
            if _repeats(best, row):
                del rows[BEST, name]
        rows[source, name] = row
    return list(rows.values())


def _repeats(row: MetricRow, other: MetricRow) -> bool:
    """True when a row says nothing that the other does not."""
    return all(mine in (None, theirs) for mine, theirs in zip(row.values, other.values, strict=True))


def _classes_in_training(ious: Sequence[MetricRow]) -> tuple[str, list[dict[str, Any]]]:
    """(what they are of, rows per class) of the IoUs that training measured of the first side and another."""
    known = [row for row in ious if row.source != EVALUATION and row.values[0] is not None and row.is_shared]
    if not known:
        return "", []
    source, prefix = known[0].source, known[0].name.partition(_IOU)[0]
    rows = [
        {"class": row.name.partition(_IOU)[2], "values": row.values, "differences": row.differences, "pixels": None}
        for row in known
        if (row.source, row.name.partition(_IOU)[0]) == (source, prefix)
    ]
    return f"{prefix}/miou, {source}", rows


def _caveats(sides: Sequence[Side], config: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is to be known of the sides before their metrics are read."""
    notes = []
    if measuring := [each["key"] for each in config if each["key"] in _MEASURING]:
        notes.append(
            f"The runs do not measure themselves alike, though the names are the same ({', '.join(measuring)} differ): "
            "trust a protocol that sets these."
        )
    bare = [run.record.name for side in sides for run in side.runs if run.checkpoints.latest() is None]
    if bare:
        notes.append(
            f"Without a checkpoint, because a sweep deletes those of all but its best or none is written yet: "
            f"{some(bare)}. Their metrics are those that MLflow has of their last step."
        )
    return notes


def _with_intervals(row: MetricRow, prefix: str, intervals: Mapping[str, Mapping[int, Interval]]) -> MetricRow:
    found = intervals.get(row.name.removeprefix(prefix))
    if row.source != EVALUATION or found is None or not row.name.startswith(prefix):
        return row
    return replace(row, intervals=[found.get(place) for place in range(len(row.values))])


def _verdicts(
    sides: Sequence[Side],
    rows: Sequence[MetricRow],
    headline: tuple[str, str] | None,
    metric: str | None,
    images: int,
) -> list[Verdict]:
    """By the common evaluation where a side has it, else by what training measured of it and the first."""
    own = sides[0].runs[0].record.metric
    name = own if metric is None else f"{own.rpartition('/')[0]}/{metric.rpartition('/')[2]}"
    by_key = {(row.source, row.name): row for row in rows}
    judged = [by_key[key] for key in (headline, (BEST, name), (LAST, name)) if key in by_key]
    found = []
    for place, side in enumerate(sides[1:], 1):
        row = next((row for row in judged if row.differences[place] is not None), None)
        if row is not None:
            found.append(_verdict(sides[0], side, row, place, images))
    return found


def _verdict(first: Side, side: Side, row: MetricRow, place: int, images: int) -> Verdict:
    before, value, difference = row.values[0], row.values[place], row.differences[place]
    assert before is not None
    assert value is not None
    assert difference is not None
    interval, half = row.intervals[place], _over_seeds(row, place)
    amount = f"{abs(difference):.4f} {'above' if difference > 0 else 'below'}" if difference else "level with"
    words = f"{side.shown} is {amount} {first.shown} in {row.name} ({value:.4f} against {before:.4f})"
    noise = None if half is None else abs(difference) <= half
    if interval is None:
        words += f", by the {row.source}, of which there is no interval over images."
    else:
        over_images = interval[0] <= 0 <= interval[1]
        noise = over_images or bool(noise)
        between = f"95 % interval over the {images:,} images, {interval[0]:+.4f} to {interval[1]:+.4f}"
        words += (
            f": within noise, because the {between}, holds 0."
            if over_images
            else f": more than the choice of images explains ({between})."
        )
    words += " " + _about_seeds(first, side, row, place)
    if half is not None:
        words += f" Over seeds its 95 % interval is {difference - half:+.4f} to {difference + half:+.4f}, which "
        words += "holds 0." if abs(difference) <= half else "does not hold 0."
    return Verdict(
        side.letter, row.name, (before, value), difference, interval, images if interval else None, noise, words
    )


def _about_seeds(first: Side, side: Side, row: MetricRow, place: int) -> str:
    """What is known of the spread over seeds, which no bootstrap over images covers."""
    if row.counts[0] == row.counts[place] == 1:
        return "There is one run of each: what another seed would change is not known."
    said = []
    for each, at in ((first, 0), (side, place)):
        spread = row.deviations[at]
        words = "not known (one run)" if spread is None else f"{spread:.4f} (n = {row.counts[at]})"
        said.append(f"{each.letter} {words}")
    return f"Standard deviation over seeds, which the interval does not cover: {', '.join(said)}."


def _over_seeds(row: MetricRow, place: int) -> float | None:
    """Half of the 95 % interval over seeds of the difference of two groups' means; None where either has one run.

    Welch's: groups need not spread alike, nor have as many runs (Welch 1947, degrees of freedom by Satterthwaite).
    """
    from scipy.stats import t

    first, second = row.deviations[0], row.deviations[place]
    if first is None or second is None:
        return None
    shares = first**2 / row.counts[0], second**2 / row.counts[place]
    error = math.sqrt(sum(shares))
    if error == 0.0:
        return 0.0
    freedom = sum(shares) ** 2 / sum(
        share**2 / (count - 1) for share, count in zip(shares, (row.counts[0], row.counts[place]), strict=True)
    )
    return float(t.ppf(0.975, freedom)) * error


def _config(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Settings that differ, in the config's own order."""
    settings = [side.settings() for side in sides]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [
        {"key": key, "values": [each.get(key) for each in settings]}
        for key in keys
        if any(each.get(key) != settings[0].get(key) for each in settings)
    ]


def _described(side: Side, histories: Histories) -> dict[str, Any]:
    """A side with its runs, what they cost and how long they took."""
    runs = [_described_run(run, histories.of(run)) for run in side.runs]
    return {"letter": side.letter, "name": side.name, "kind": side.kind, "note": side.note, "runs": runs}


def _described_run(run: Run, tracked: Tracked) -> dict[str, Any]:
    latest, best = run.checkpoints.latest(), run.checkpoints.best()
    on_gpu = "cost/gpu_hours" in tracked.points or run.config().resources.gpus_per_worker > 0
    _, hours = tracked.points.get(f"cost/{'gpu' if on_gpu else 'cpu'}_hours", (0, 0.0))
    text = run.folder.read_text(f"{latest.name}/{DESCRIPTION}") if latest is not None else None
    if text is not None:
        hours = Description.parse(text).worker_seconds / 3600
    return {
        "name": run.record.name,
        "folder": run.folder.uri,
        "state": run.record.state,
        "step": latest.step if latest is not None else max((step for step, _ in tracked.points.values()), default=0),
        "best_step": best.step if best is not None else None,
        "mlflow_run_id": tracked.run_id or run.record.mlflow_run_id,
        "hours": hours or None,
        "hours_of": "GPU" if on_gpu else "CPU",
        "wall_seconds": tracked.wall_seconds,
    }
