"""What Ray Tune calls while a sweep runs.

Tune pickles these objects with the sweep and loads them again on resume; so they hold only the sweep's folder, under
which the process that drives the sweep keeps its watch.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from cosa_ray.tuning.watch import Watch

log = logging.getLogger(__name__)
STEP = "step"
OPEN: dict[str, Watch] = {}


@contextlib.contextmanager
def watching(folder: str, watch: Watch) -> Iterator[None]:
    """Let the hooks of the sweep in `folder` find its watch while the block runs."""
    OPEN[folder] = watch
    try:
        yield
    finally:
        del OPEN[folder]


class StepAsha(ASHAScheduler):
    """ASHA on optimiser steps that asks a trial to end instead of killing it.

    Tune's own stop kills the trial's driver, and with it the worker that holds the tracker: the MLflow run would stay
    RUNNING and the placement group would be freed late or never.
    """

    def __init__(self, folder: str, grace: int, steps: int, reduction_factor: float) -> None:
        super().__init__(
            time_attr=STEP, grace_period=grace, max_t=steps, reduction_factor=reduction_factor, stop_last_trials=False
        )
        self._folder = folder

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        watch = OPEN[self._folder]
        if not watch.given_up(trial.trial_id):
            decision = super().on_trial_result(tune_controller, trial, result)
            if decision == TrialScheduler.STOP:
                watch.give_up(trial.trial_id)
        return str(TrialScheduler.CONTINUE)


class Follow(tune.Callback):
    """Tells the watch what happens, and turns Ctrl-C and SIGTERM into a wish to stop."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    @property
    def _watch(self) -> Watch:
        return OPEN[self._folder]

    def setup(self, **info: Any) -> None:
        """Called once Tune's own handlers stand: stand before them. The second signal is Tune's, which kills."""
        self._waiting_for: set[str] | None = None
        self._end_tune: Any = None
        if threading.current_thread() is not threading.main_thread():
            return
        tunes = signal.getsignal(signal.SIGINT)

        def handle(number: int, frame: Any) -> None:
            if self._end_tune is None and callable(tunes):
                log.warning(
                    "%s: trials write a checkpoint, then the sweep ends (again to end at once)",
                    signal.Signals(number).name,
                )
                self._end_tune = lambda: tunes(number, frame)
                # Not here: the handler may have interrupted the very lock that asking takes.
                threading.Thread(target=self._watch.interrupt, daemon=True).start()
            elif callable(tunes):
                tunes(number, frame)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._watch.take_over(trials, STEP)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """After a wish to stop: end Tune's loop as soon as the trials that ran then have ended."""
        if self._end_tune is None:
            return
        running = {trial.trial_id for trial in trials if trial.status == Trial.RUNNING}
        if self._waiting_for is None:
            self._waiting_for = running
        if not self._waiting_for & running:
            self._end_tune()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._watch.put(trial.trial_id, trial.config, "running")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        score = result.get(self._watch.metric)
        if score is not None:
            self._watch.put(trial.trial_id, trial.config, score=float(score), step=int(result[STEP]))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        watch = self._watch
        watch.end(trial.trial_id, trial.config, "stopped_early" if watch.given_up(trial.trial_id) else "finished")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._watch.end(trial.trial_id, trial.config, "interrupted" if self._watch.interrupted else "failed")

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder}
