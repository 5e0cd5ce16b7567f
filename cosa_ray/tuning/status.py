"""How a sweep or a run is doing, read from its folder: also from another terminal, and after everything was killed."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from cosa_ray.training.runs import find_run
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.folder import SWEEP_FILE
from cosa_ray.tuning.results import SweepResult, read_result
from cosa_ray.tuning.watch import STATUS_FILE, SweepProgress, duration

SILENT_SECONDS = 60.0


@dataclass(frozen=True)
class Status:
    """A sweep (with `progress`, and `result` when it has ended) or a run, in one sentence and in full."""

    name: str
    folder: str
    kind: str
    state: str
    sentence: str
    progress: SweepProgress | None = None
    result: SweepResult | None = None

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


def read_status(name: str, storage: str = "runs") -> Status:
    """State of a sweep or run by name or folder. Raises UserError where there is none."""
    for uri in (name, f"{storage.rstrip('/')}/{name}"):
        folder = RunFolder(uri)
        if folder.exists(SWEEP_FILE):
            return _of_sweep(folder)
    run = find_run(name, storage)
    steps = run.config().last_step
    best = run.checkpoints.best()
    score = best.metrics.get(run.record.metric) if best is not None else None
    sentence = f"run {run.record.name} is {run.record.state}: checkpoint at step {run.step} of {steps}"
    sentence += f", best {run.record.metric} {score:.4f}" if score is not None else ""
    sentence += f"; {run.record.cause}" if run.record.cause else ""
    return Status(run.record.name, run.folder.uri, "run", run.record.state, f"{sentence}.")


def _of_sweep(folder: RunFolder) -> Status:
    name = folder.uri.rstrip("/").rpartition("/")[2]
    text = folder.read_text(STATUS_FILE)
    progress = SweepProgress.load(text) if text is not None else None
    result = read_result(folder)
    # A sweep that was resumed has the result of its earlier end until it ends again.
    silent = time.time() - progress.updated if progress is not None else None
    running = silent is not None and silent < SILENT_SECONDS and (progress is None or progress.ending is None)
    if result is not None and (progress is None or not running or progress.seconds <= result.seconds):
        best = f", best {result.metric} {result.best.score:.4f} ({result.best.id})" if result.best else ""
        why = f": {result.cause}" if result.cause else ""
        count = len(result.trials)
        sentence = f"sweep {name} is {result.state}{why}; {count} trial{'s' * (count != 1)}{best}."
        return Status(name, folder.uri, "sweep", result.state, sentence, progress, result)
    if progress is None:
        return Status(name, folder.uri, "sweep", "starting", f"sweep {name} has not started a trial yet.")
    if running:
        return Status(name, folder.uri, "sweep", "running", progress.line(), progress)
    sentence = (
        f"sweep {name} has said nothing for {duration(silent or 0.0)}: if its driver is gone, go on with the command "
        f"that started it (`cosa-ray tune`, `ablate` or `promote`) and --name {name} --resume. {progress.line()}"
    )
    return Status(name, folder.uri, "sweep", "silent", sentence, progress)
