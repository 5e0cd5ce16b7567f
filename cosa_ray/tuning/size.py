"""How much storage a sweep's checkpoints will take, said before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from cosa_ray.errors import UserError
from cosa_ray.training.storage import RunFolder

_COPIES = 3  # of a running trial: the last, the best, and the one that is being written


def sweep_bytes(sizes: tuple[int, int], *, trials: int, at_once: int) -> int:
    """The most bytes of checkpoints there are at one time: sizes of one whole and of its weights alone.

    Running trials have up to three whole ones; those that have ended keep the weights of the last and the best until
    the sweep has ended, which keeps the best trial's only.
    """
    whole, weights = sizes
    running = min(trials, at_once)
    return running * _COPIES * whole + (trials - running) * 2 * weights


def check_size(folder: RunFolder, sizes: tuple[int, int], *, trials: int, at_once: int) -> str:
    """How much the sweep's checkpoints will take, in words. Raises UserError where a local disk has less left."""
    needed = sweep_bytes(sizes, trials=trials, at_once=at_once)
    if not folder.is_local:
        return shown(needed)
    place = Path(folder.path)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"the checkpoints of {trials} trials, {at_once} at a time, take up to {shown(needed)}, and {place} has "
            f"{shown(free)} free; set storage to a larger place, lower concurrency or trials, or make room."
        )
    return shown(needed)


def shown(size: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
