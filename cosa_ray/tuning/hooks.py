"""What Ray Tune calls while a sweep runs.

Tune copies and pickles these objects; so they hold only the sweep's folder, under which the process that drives the
sweep keeps what they work on. Tune's own trial ids are not used: a trial is known by its number in the journal.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from cosa_ray.tuning.journal import Entry
from cosa_ray.tuning.population import Generations
from cosa_ray.tuning.search import Search
from cosa_ray.tuning.watch import Watch

log = logging.getLogger(__name__)
STEP = "step"


@dataclass
class Drive:
    """What the hooks of one sweep work on. `by`: name of the scheduler that gives trials up."""

    watch: Watch
    search: Search
    by: str = "asha"
    generations: Generations | None = None


OPEN: dict[str, Drive] = {}


@contextlib.contextmanager
def driving(folder: str, drive: Drive) -> Iterator[None]:
    """Let the hooks of the sweep in `folder` find what they work on while the block runs."""
    OPEN[folder] = drive
    try:
        yield
    finally:
        del OPEN[folder]


class Ask(Searcher):
    """Tune's searcher: hands on what the sweep's own search proposes."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        drive = OPEN[self._folder]
        entry = drive.search.next() if drive.watch.ending is None else None
        if entry is None:
            return Searcher.FINISHED
        return {"trial": entry.id, "values": entry.values, "seed": entry.seed}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the search learns from the journal."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the memory."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the memory."""


@dataclass(frozen=True)
class Numbered:
    """A trial as schedulers tell it apart: by its number, which stays the same when the sweep is resumed."""

    trial_id: str


class Asking:
    """A scheduler of Tune's that asks a trial to end instead of killing it, and that knows what was before a resume.

    Tune's own stop kills the trial's driver, and with it the worker that holds the tracker: the MLflow run would stay
    RUNNING and the placement group would be freed late or never.
    """

    _folder: str
    _asked: set[str]
    _metric: str | None

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Taken once; Tune says the same again."""
        return self._metric is not None or super().set_search_properties(metric, mode, **spec)  # type: ignore[misc]

    def recall(self, entries: Iterable[Entry], metric: str) -> None:
        """Take in the evaluations of before, in the order in which they were made."""
        known = list(entries)
        for entry in known:
            self.on_trial_add(None, entry)
        made = [(report.at, entry.id, report) for entry in known for report in entry.reports]
        for _, number, report in sorted(made, key=lambda each: each[:2]):
            if metric in report.metrics:
                self._judge(number, {**report.metrics, STEP: report.step})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        number = _number(trial)
        # ASHA draws the trial's bracket: by its number, so that it has the same after a resume.
        before = np.random.get_state()
        np.random.seed(int(number))
        try:
            super().on_trial_add(tune_controller, Numbered(number))  # type: ignore[misc]
        finally:
            np.random.set_state(before)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        drive, number = OPEN[self._folder], _number(trial)
        if self._judge(number, result):
            drive.watch.give_up(int(number), drive.by)
        return str(TrialScheduler.CONTINUE)

    def _judge(self, number: str, result: Mapping[str, Any]) -> bool:
        """True when the trial is to end; what it reports after that, until it has, is not looked at."""
        if number in self._asked:
            return False
        decision = super().on_trial_result(None, Numbered(number), result)  # type: ignore[misc]
        if decision == TrialScheduler.STOP:
            self._asked.add(number)
        return bool(decision == TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Nothing: what it reported last has been judged when it was reported."""

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing: what it reported stays."""

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing: what it reported stays."""

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        return FIFOScheduler.choose_trial_to_run(self, tune_controller)


class StepAsha(Asking, ASHAScheduler):
    """Asynchronous successive halving on optimiser steps; with several brackets, asynchronous HyperBand."""

    def __init__(self, folder: str, grace: int, steps: int, reduction_factor: float, brackets: int = 1) -> None:
        super().__init__(
            time_attr=STEP,
            grace_period=grace,
            max_t=steps,
            reduction_factor=reduction_factor,
            brackets=brackets,
            stop_last_trials=False,
        )
        self._folder, self._asked = folder, set()


class StepMedian(Asking, MedianStoppingRule):
    """Median stopping on optimiser steps."""

    def __init__(self, folder: str, grace: int, trials: int) -> None:
        # Without a pause: a trial that waits holds its place.
        super().__init__(
            time_attr=STEP, grace_period=grace, min_samples_required=trials, min_time_slice=math.inf, hard_stop=True
        )
        self._folder, self._asked = folder, set()


class Follow(tune.Callback):
    """Tells the watch what happens, and turns Ctrl-C and SIGTERM into a wish to stop."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    @property
    def _drive(self) -> Drive:
        return OPEN[self._folder]

    def setup(self, **info: Any) -> None:
        """Called once Tune's own handlers stand: stand before them. The second signal is Tune's, which kills."""
        if threading.current_thread() is not threading.main_thread():
            return
        tunes = signal.getsignal(signal.SIGINT)
        signalled = threading.Event()

        def handle(number: int, frame: Any) -> None:
            if signalled.is_set() and callable(tunes):
                tunes(number, frame)
                return
            log.warning(
                "%s: trials write a checkpoint, then the sweep ends (again to end at once)",
                signal.Signals(number).name,
            )
            signalled.set()
            # Not here: the handler may have interrupted the very lock that asking takes.
            threading.Thread(target=self._drive.watch.interrupt, daemon=True).start()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._drive.watch.started(int(_number(trial)))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self._drive.watch.reported(int(_number(trial)), result, STEP)
        self._arrived()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._drive.watch.recovered(int(_number(trial)))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._drive.watch.gone(int(_number(trial)), killed=False)
        self._arrived()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._drive.watch.gone(int(_number(trial)), killed=True)
        self._arrived()

    def _arrived(self) -> None:
        if self._drive.generations is not None and self._drive.watch.ending is None:
            self._drive.generations.decide()

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder}


def _number(trial: Any) -> str:
    """The number of a trial of Tune's, or of an entry."""
    config: Mapping[str, Any] | None = getattr(trial, "config", None)
    return str(config["trial"]) if config is not None else str(trial.id)
