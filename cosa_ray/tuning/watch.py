"""What is known of a running sweep: its trials' states and scores, and who has been asked to stop."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cosa_ray.tuning.space import Scalar

Mode = Literal["max", "min"]
ENDED = ("finished", "stopped_early", "failed", "interrupted")


@dataclass(frozen=True)
class TrialRow:
    """One trial as the progress table shows it."""

    id: str
    name: str
    state: str
    values: Mapping[str, Scalar]
    step: int = 0
    steps: int = 0
    phase: str = ""
    score: float | None = None


@dataclass(frozen=True)
class SweepProgress:
    """A sweep at one moment: shown as a live table or as plain lines."""

    sweep: str
    metric: str
    mode: Mode
    total: int
    rows: list[TrialRow] = field(default_factory=list)

    @property
    def ended(self) -> int:
        """Trials that have ended, in whatever way."""
        return sum(row.state in ENDED for row in self.rows)

    @property
    def best(self) -> TrialRow | None:
        """The trial with the best evaluation so far."""
        return best_of(self.rows, self.mode, score=lambda row: row.score)

    def line(self) -> str:
        """One plain line for logs and terminals without a cursor."""
        best = self.best
        running = ", ".join(f"{row.id} {row.step}/{row.steps}" for row in self.rows if row.state == "running")
        shown = f"best {self.metric} {best.score:.4f} ({best.id})" if best else f"no {self.metric} yet"
        return f"{self.sweep}: {self.ended}/{self.total} trials ended  {shown}  running: {running or 'none'}"


def better(score: float, than: float | None, mode: Mode) -> bool:
    """True when a score is finite and better than another, or than none."""
    if not math.isfinite(score):
        return False
    return than is None or (score > than if mode == "max" else score < than)


def best_of(rows: Iterable[Any], mode: Mode, score: Callable[[Any], float | None]) -> Any | None:
    """The first row with the best finite score, None when no row has one."""
    best = None
    for row in rows:
        value = score(row)
        if value is not None and better(value, score(best) if best is not None else None, mode):
            best = row
    return best


class Watch:
    """Thread-safe state of a sweep in the process that drives it; Tune's hooks write it, the display reads it."""

    def __init__(
        self,
        sweep: str,
        metric: str,
        mode: Mode,
        total: int,
        *,
        steps: Callable[[Mapping[str, Scalar]], int],
        end_trial: Callable[[str], None],
        end_all: Callable[[], None],
        ended: Callable[[str], None],
        marked: Callable[[str], bool],
    ) -> None:
        """What the watch does to trials, by id: `steps` of their settings, ask one or all to end, say that one has
        `ended`, and ask whether one is `marked` as given up by an earlier start of the sweep."""
        self.sweep, self.metric, self.mode, self.total = sweep, metric, mode, total
        self._steps, self._end_trial, self._end_all = steps, end_trial, end_all
        self._ended, self._marked = ended, marked
        self._lock = threading.Lock()
        self._rows: dict[str, TrialRow] = {}
        self._given_up: set[str] = set()
        self.interrupted = False

    def name(self, trial_id: str) -> str:
        """Name of a trial's run."""
        return f"{self.sweep}-{trial_id}"

    def put(self, trial_id: str, values: Mapping[str, Scalar], state: str | None = None, **changes: Any) -> None:
        """Note what is new about a trial; a score counts when it is better than the one noted."""
        with self._lock:
            row = self._rows.get(trial_id)
            if row is None:
                row = TrialRow(trial_id, self.name(trial_id), "pending", dict(values), steps=self._steps(values))
            score = changes.pop("score", None)
            if score is not None and better(score, row.score, self.mode):
                changes["score"] = score
            self._rows[trial_id] = replace(row, state=state or row.state, **changes)

    def take_over(self, trials: Iterable[Any], step: str) -> None:
        """Note Tune's trials that ended before the sweep was resumed: Tune says nothing of them any more."""
        for trial in trials:
            if trial.status == "TERMINATED" and trial.trial_id not in self._rows:
                self.put(
                    trial.trial_id,
                    trial.config,
                    "stopped_early" if self._marked(trial.trial_id) else "finished",
                    score=trial.metric_analysis.get(self.metric, {}).get(self.mode),
                    step=int(trial.last_result.get(step, 0)),
                )

    def end(self, trial_id: str, values: Mapping[str, Scalar], state: str) -> None:
        """Note that a trial's driver is gone, however it went."""
        self.put(trial_id, values, state)
        self._ended(trial_id)

    def advance(self, latest: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over the steps that the runs themselves reported, by run name."""
        with self._lock:
            for trial_id, row in self._rows.items():
                if (progress := latest.get(row.name)) is not None and row.state == "running":
                    self._rows[trial_id] = replace(row, step=progress["step"], phase=progress["phase"])

    def progress(self) -> SweepProgress:
        """The sweep as it stands."""
        with self._lock:
            return SweepProgress(self.sweep, self.metric, self.mode, self.total, list(self._rows.values()))

    def give_up(self, trial_id: str) -> None:
        """Ask a trial that fell behind to end: it writes what it has, so nothing is killed and nothing leaks."""
        self._given_up.add(trial_id)
        self._end_trial(trial_id)

    def given_up(self, trial_id: str) -> bool:
        """True when the scheduler asked this trial to end."""
        return trial_id in self._given_up

    def interrupt(self) -> None:
        """Ask every trial to write a checkpoint and end."""
        self.interrupted = True
        self._end_all()
