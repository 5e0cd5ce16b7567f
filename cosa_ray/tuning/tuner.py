"""Ray Tune's part of a sweep: scheduler, and the loop that runs the trials the search proposes."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cosa_ray.config.schema import Config
from cosa_ray.tuning.check import grace_steps, rungs
from cosa_ray.tuning.resources import DRIVER_CPUS
from cosa_ray.tuning.sweepfile import Sweep

if TYPE_CHECKING:
    from cosa_ray.training.storage import RunFolder
    from cosa_ray.tuning.hooks import Drive
    from cosa_ray.tuning.trial import Trials

_TUNE = "tune"
# Set before Tune starts: no log files and no output of its own, no trial made before there is room for it, and no
# snapshots, because nothing is read back from them. Whether there is a metric has been checked; that it is undefined in
# one evaluation must not end the sweep.
_TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
}


def run_trials(sweep: Sweep, base: Config, trials: Trials, drivers: int, folder: RunFolder, drive: Drive) -> None:
    """Let Tune run what the search proposes, `drivers` trials at a time; what comes of them is in the journal."""
    from ray import tune

    from cosa_ray.tuning import hooks
    from cosa_ray.tuning.trial import run_trial

    def trial(given: dict[str, Any]) -> None:
        run_trial(trials, given)

    folder.remove(_TUNE)
    with hooks.driving(folder.uri, drive), _signals_kept():
        tuner = tune.Tuner(
            tune.with_resources(trial, {"CPU": DRIVER_CPUS}),
            tune_config=tune.TuneConfig(
                metric=trials.metric,
                mode=drive.watch.metrics[trials.metric],
                search_alg=hooks.Ask(folder.uri),
                scheduler=make_scheduler(sweep, base, folder.uri, drive),
                num_samples=-1,
                max_concurrent_trials=drivers,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.config["trial"]),
            ),
            run_config=tune.RunConfig(
                name=_TUNE,
                storage_path=folder.uri,
                verbose=0,
                callbacks=[hooks.Follow(folder.uri)],
                failure_config=tune.FailureConfig(max_failures=sweep.restarts),
            ),
        )
        tuner.fit()
    folder.remove(_TUNE)


def make_scheduler(sweep: Sweep, base: Config, folder: str, drive: Drive) -> Any:
    """The scheduler that gives trials up, with what it judged before a resume; None where nobody is given up."""
    from cosa_ray.tuning import hooks

    metric, mode = next(iter(drive.watch.metrics.items()))
    scheduler: hooks.StepAsha | hooks.StepMedian
    if sweep.scheduler in ("asha", "hyperband"):
        at = rungs(sweep, base)
        brackets = sweep.asha.brackets if sweep.scheduler == "hyperband" else 1
        scheduler = hooks.StepAsha(folder, at[0], at[-1] + 1, sweep.asha.reduction_factor, brackets)
    elif sweep.scheduler == "median":
        scheduler = hooks.StepMedian(folder, grace_steps(sweep, base, "sweep"), sweep.median.trials)
    else:
        return None
    scheduler.set_search_properties(metric, mode)
    scheduler.recall((entry for entry in drive.watch.journal.entries() if entry.reports), metric)
    return scheduler


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Put the signal handlers back that stood before Tune."""
    import signal

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def tune_settings() -> Iterator[None]:
    """Tune's settings in the environment for the time of the sweep."""
    before = {key: os.environ.get(key) for key in _TUNE_SETTINGS}
    os.environ.update(_TUNE_SETTINGS)
    for noisy in ("ray.tune.analysis.experiment_analysis", "ray.tune.tune", "optuna"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
