"""What is known of a running sweep: its journal, how far the running trials are, and who has been asked to stop."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.journal import ENDED, Entry, Journal
from cosa_ray.tuning.search import trial_scores
from cosa_ray.tuning.sweepfile import Budget, Mode

STATUS_FILE = "status.json"


@dataclass(frozen=True)
class TrialRow:
    """One trial as the progress table shows it."""

    id: str
    name: str
    state: str
    values: Mapping[str, Any]
    step: int = 0
    steps: int = 0
    phase: str = ""
    score: float | None = None
    hours: float = 0.0
    cause: str | None = None


@dataclass(frozen=True)
class SweepProgress:
    """A sweep at one moment, as a live table, plain lines and `cosa-ray status` show it.

    `total` trials are planned. `seconds` it has run, earlier starts included; `steps_taken` of them since the last
    start, `seconds_taken` long. `updated`: when this was so, seconds since the epoch.
    """

    sweep: str
    metric: str
    mode: Mode
    total: int
    rows: list[TrialRow] = field(default_factory=list)
    seconds: float = 0.0
    seconds_taken: float = 0.0
    steps_taken: int = 0
    ending: str | None = None
    updated: float = 0.0

    @property
    def ended(self) -> int:
        """Trials that have ended, in whatever way; an interrupted one goes on, unless the sweep ends."""
        return sum(row.state in ENDED or (row.state == "interrupted" and bool(self.ending)) for row in self.rows)

    @property
    def best(self) -> TrialRow | None:
        """The trial with the best evaluation so far."""
        return best_of(self.rows, self.mode, score=lambda row: row.score)

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the time to the end: steps left at the pace so far; None before a tenth of them is taken.

        A trial that has not ended is taken to go as far as those that have did on average, where any has, and to its
        end where it is beyond that.
        """
        if not self.steps_taken or not self.seconds_taken:
            return None
        done = [row.step for row in self.rows if row.state in ("finished", "stopped_early")]
        longest = max((row.steps for row in self.rows), default=0)
        expected = sum(done) / len(done) if done else longest
        left = sum(
            (min(row.steps, expected) if row.step < expected else row.steps) - row.step
            for row in self.rows
            if row.state in ("running", "pending") or (row.state == "interrupted" and not self.ending)
        )
        left += max(0, self.total - len(self.rows)) * expected
        # Starting up takes long and no steps: the first would promise hours.
        return left * self.seconds_taken / self.steps_taken if 10 * self.steps_taken >= left else None

    def line(self) -> str:
        """One plain line for logs and terminals without a cursor."""
        best = self.best
        running = ", ".join(f"{row.id} {row.step}/{row.steps}" for row in self.rows if row.state == "running")
        shown = f"best {self.metric} {best.score:.4f} ({best.id})" if best else f"no {self.metric} yet"
        left = "" if self.seconds_left is None else f"  about {duration(self.seconds_left)} left"
        return f"{self.sweep}: {self.ended}/{self.total} trials ended  {shown}  running: {running or 'none'}{left}"

    def dump(self) -> str:
        """JSON that `load` reads back."""
        # Not asdict: it copies every value of every trial, for half a second of a driver's time at 10,000 trials.
        return json.dumps({**vars(self), "rows": [vars(row) for row in self.rows]}, default=list)

    @staticmethod
    def load(text: str) -> SweepProgress:
        """The progress in a JSON text."""
        said = json.loads(text)
        return SweepProgress(**{**said, "rows": [TrialRow(**row) for row in said["rows"]]})


def duration(seconds: float) -> str:
    """A time in the two largest of its units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


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
        metrics: Mapping[str, Mode],
        total: int,
        journal: Journal,
        folder: RunFolder,
        *,
        steps: Callable[[Mapping[str, Any]], int],
        end_trial: Callable[[Entry, str], None],
        end_all: Callable[[], None],
        settle: Callable[[Entry, bool], Entry],
        failures: int,
        budget: Budget,
    ) -> None:
        """What the watch does to trials: `steps` of their settings, ask one to end (and say on whose behalf) or all,
        and `settle` one that is gone: how it ended, by its run's own record (True: its process was killed)."""
        self.sweep, self.metrics, self.total, self.journal = sweep, dict(metrics), total, journal
        self._folder, self._steps, self._end_trial, self._end_all = folder, steps, end_trial, end_all
        self._settle, self._failures, self._budget = settle, failures, budget
        self._lock = threading.RLock()
        self._live: dict[int, Mapping[str, Any]] = {}
        # Rows are read every second, and what an entry's settings come to takes a whole experiment to be checked.
        self._rows: dict[int, tuple[Entry, TrialRow]] = {}
        self._in_a_row = 0
        before = folder.read_text(STATUS_FILE)
        self._seconds_before = SweepProgress.load(before).seconds if before else 0.0
        self._began = time.monotonic()
        self._steps_before = self._all_steps()
        self._written = -math.inf
        self.interrupted = self.failed = False
        self.ending: str | None = None  # why no new trial starts

    def started(self, number: int) -> None:
        """Note that a trial's driver runs."""
        with self._lock:
            entry = self.journal[number]
            self.journal.update(number, state="running", started=entry.started or time.time())

    def reported(self, number: int, result: Mapping[str, Any], step: str) -> None:
        """Note an evaluation."""
        found = {metric: float(result[metric]) for metric in self.metrics if metric in result}
        with self._lock:
            if found:
                self.journal.report(number, int(result[step]), found)

    def recovered(self, number: int) -> None:
        """Note that a trial's process was killed, and that it is started again."""
        with self._lock:
            self.journal.update(number, state="pending")

    def gone(self, number: int, killed: bool) -> Entry:
        """Note that a trial's driver is gone for good, and how the trial ended; too many failures end the sweep."""
        with self._lock:
            entry = self._settle(self.journal[number], killed)
            live = self._live.pop(number, None)
            hours = max(entry.hours, (live or {}).get("hours") or 0.0)
            entry = self.journal.put(replace(entry, hours=hours, ended=time.time()))
            self._in_a_row = self._in_a_row + 1 if entry.state == "failed" else 0
            if self._in_a_row >= self._failures and self.ending is None:
                self.failed = True
                self.end(f"{self._in_a_row} trials in a row failed, the last ({entry.id}) because of: {entry.cause}")
            return entry

    def advance(self, latest: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what the runs themselves reported, by run name, and end the sweep when its budget is spent."""
        with self._lock:
            for entry in self.journal.entries():
                progress = latest.get(self.name(entry))
                if progress is not None and entry.state == "running":
                    self._live[entry.number] = progress
            if self.ending is None and (spent := self._spent()) is not None:
                self.end(f"budget.{spent} is spent", by="budget")

    def name(self, entry: Entry) -> str:
        """Name of a trial's run."""
        return f"{self.sweep}-{entry.id}"

    def progress(self) -> SweepProgress:
        """The sweep as it stands."""
        metric, mode = next(iter(self.metrics.items()))
        with self._lock:
            taken = time.monotonic() - self._began
            rows = [self._row(entry) for entry in self.journal.entries()]
            return SweepProgress(
                self.sweep,
                metric,
                mode,
                self.total,
                rows,
                seconds=self._seconds_before + taken,
                seconds_taken=taken,
                steps_taken=sum(row.step for row in rows) - self._steps_before,
                ending=self.ending,
                updated=time.time(),
            )

    def write_status(self, every: float) -> None:
        """Write the progress into the sweep's folder for other terminals, at most once in `every` seconds."""
        if time.monotonic() - self._written >= every:
            self._folder.write_text(STATUS_FILE, self.progress().dump())
            self._written = time.monotonic()

    def give_up(self, number: int, by: str) -> None:
        """Ask a trial that fell behind to end: it writes what it has, so nothing is killed and nothing leaks."""
        self._end_trial(self.journal[number], by)

    def end(self, why: str, by: str | None = None) -> None:
        """Start no new trial, and ask those that run to write a checkpoint and end."""
        with self._lock:
            self.ending = why
            running = [entry for entry in self.journal.entries() if entry.state in ("running", "pending")]
        if by is not None:
            for entry in running:
                self._end_trial(entry, by)
        self._end_all()

    def interrupt(self) -> None:
        """Ask every trial to write a checkpoint and end."""
        self.interrupted = True
        self.end("it was stopped")

    def _row(self, entry: Entry) -> TrialRow:
        known = self._rows.get(entry.number)
        if known is None or known[0] is not entry:
            known = self._rows[entry.number] = (entry, self._row_of(entry))
        live = self._live.get(entry.number) if entry.state == "running" else None
        if live is None:
            return known[1]
        return replace(
            known[1],
            step=max(entry.step, live.get("step") or 0),
            phase=live.get("phase") or "",
            hours=max(entry.hours, live.get("hours") or 0.0),
        )

    def _row_of(self, entry: Entry) -> TrialRow:
        """An entry's row, without what its run has reported since."""
        scores = trial_scores(entry, self.metrics)
        return TrialRow(
            entry.id,
            self.name(entry),
            entry.state,
            entry.values,
            step=entry.step,
            steps=self._steps(entry.values),
            score=scores[0] if scores else None,
            hours=entry.hours,
            cause=entry.cause,
        )

    def _all_steps(self) -> int:
        return sum(entry.step for entry in self.journal.entries())

    def _spent(self) -> str | None:
        """The first limit of the budget that is reached, with its value."""
        budget, rows = self._budget, [self._row(entry) for entry in self.journal.entries()]
        hours = sum(row.hours for row in rows)
        used = {
            "steps": sum(row.step for row in rows),
            "gpu_hours": hours,
            "cpu_hours": hours,
            "wall_hours": (self._seconds_before + time.monotonic() - self._began) / 3600,
        }
        for limit, value in used.items():
            allowed = getattr(budget, limit)
            if allowed is not None and value >= allowed:
                return f"{limit} {allowed:g}"
        return None
