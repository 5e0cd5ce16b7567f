"""Names of runs, sweeps and studies that were given none."""

from __future__ import annotations

import time
from pathlib import PurePath

_KINDS = {"train": "", "tune": "-sweep", "ablate": "-ablation"}


def default_name(verb: str, file: str | PurePath) -> str:
    """What `verb` (train, tune, ablate) calls its result: the file's own name, the kind, the second it began in."""
    return f"{PurePath(file).stem}{_KINDS[verb]}-{time.strftime('%Y%m%d-%H%M%S')}"
