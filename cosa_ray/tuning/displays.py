"""Displays that a command hands to what takes long: opened for its time, they yield what is told how far it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosa_ray.data.importing import Progress as ImportProgress
    from cosa_ray.training.session import Progress
    from cosa_ray.tuning.watch import SweepProgress

# Of an import, a run, a sweep, or something of this title that counts images; None shows nothing.
Importing = Callable[[], contextlib.AbstractContextManager["Callable[[ImportProgress], None] | None"]]
Training = Callable[[], contextlib.AbstractContextManager["Callable[[Progress], None] | None"]]
Sweeping = Callable[[], contextlib.AbstractContextManager["Callable[[SweepProgress], None] | None"]]
Counting = Callable[[str], contextlib.AbstractContextManager["Callable[[int, int], None] | None"]]


def silent(title: str = "") -> contextlib.AbstractContextManager[None]:
    """Shows nothing."""
    return contextlib.nullcontext()
