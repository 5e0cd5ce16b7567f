"""What a study's rows measured: means over seeds, differences from the row each follows, and what noise explains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cosa_ray.evaluation.confusion import middle, resampled_mious

RESAMPLES = 2000
FEWEST = 3  # seeds, below which two that happen to agree would pass for certainty


@dataclass(frozen=True)
class Value:
    """A metric of one row: by seed, their mean and standard deviation (n - 1; None with one seed)."""

    by_seed: dict[int, float]
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Difference:
    """A metric of a row less that of the row it follows, seed by seed.

    deviation: of the paired differences. bootstrap: 95 % over seeds and over the images both were evaluated on, drawn
    at once; None where counts per image are not kept. interval: Student's 95 % over seeds, widened to hold that
    bootstrap (of three seeds a bootstrap alone is hardly more than their range); None with one seed and no counts.
    over: what it covers. within_noise: the interval holds 0; None of fewer than FEWEST seeds.
    """

    by_seed: dict[int, float]
    mean: float
    deviation: float | None
    interval: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    over: str
    within_noise: bool | None

    @property
    def words(self) -> str:
        """The plain verdict."""
        if self.within_noise is None:
            return f"fewer than {FEWEST} seeds: not known"
        if self.within_noise:
            return "within noise"
        return "higher" if self.mean > 0 else "lower"


def seeds_words(seeds: Sequence[int]) -> str:
    """How many they are, in words."""
    return f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"


def value_of(by_seed: Mapping[int, float]) -> Value | None:
    """Mean and deviation of what seeds measured; None where none did."""
    known = {seed: value for seed, value in sorted(by_seed.items()) if math.isfinite(value)}
    if not known:
        return None
    values = list(known.values())
    return Value(known, float(np.mean(values)), _deviation(values))


def difference_of(
    above: Mapping[int, float],
    row: Mapping[int, float],
    images: tuple[Mapping[int, np.ndarray], Mapping[int, np.ndarray]] | None = None,
    *,
    resamples: int = RESAMPLES,
) -> Difference | None:
    """The paired difference of two rows over the seeds both have; None where they have none in common.

    Args:
        above, row: the metric by seed, of the row that is followed and of the one that follows.
        images: of each by seed the totals per image (N, 3, K) whose mIoU the metric is, rows the same images.
    """
    seeds = [seed for seed in sorted(row) if seed in above and math.isfinite(row[seed]) and math.isfinite(above[seed])]
    if not seeds:
        return None
    differences = [row[seed] - above[seed] for seed in seeds]
    mean, deviation = float(np.mean(differences)), _deviation(differences)
    intervals, over = [], [seeds_words(seeds)]
    if deviation is not None:
        from scipy.stats import t

        half = float(t.ppf(0.975, len(seeds) - 1)) * deviation / math.sqrt(len(seeds))
        intervals.append((mean - half, mean + half))
    bootstrap = None
    if images is not None and all(seed in each for each in images for seed in seeds):
        bootstrap = interval_over_both(
            [images[0][seed] for seed in seeds], [images[1][seed] for seed in seeds], resamples
        )
        intervals.append(bootstrap)
        over.append(f"{len(images[0][seeds[0]]):,} images")
    interval = (min(low for low, _ in intervals), max(high for _, high in intervals)) if intervals else None
    noise = None if interval is None or len(seeds) < FEWEST else interval[0] <= 0 <= interval[1]
    by_seed = dict(zip(seeds, differences, strict=True))
    return Difference(by_seed, mean, deviation, interval, bootstrap, " and ".join(over), noise)


def interval_over_both(
    above: Sequence[np.ndarray], row: Sequence[np.ndarray], resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % bootstrap of the mean over seeds of a paired mIoU difference, over seeds and over images at once.

    A resample draws images, the same for all seeds and both rows, and seeds, the same for both rows (ours; Efron's
    percentile bootstrap of two crossed factors).

    Args:
        above, row: totals (N, 3, K) per image, seed by seed.
    """
    mious = resampled_mious([*above, *row], resamples, 0)
    return middle(_drawn(mious[len(above) :] - mious[: len(above)]))


def _drawn(differences: np.ndarray) -> np.ndarray:
    """Means over seeds drawn again in every resample: (seeds, resamples) to (resamples,)."""
    seeds, resamples = differences.shape
    chosen = np.random.default_rng(1).integers(seeds, size=(seeds, resamples))
    return np.take_along_axis(differences, chosen, axis=0).mean(0)


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
