"""Ray Tune's part of a sweep: search, scheduler, and the loop that runs the trials or goes on with them."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cosa_ray.config.schema import Config
from cosa_ray.tuning.resources import DRIVER_CPUS
from cosa_ray.tuning.sweepfile import Sweep, grace_steps, rungs
from cosa_ray.tuning.watch import Watch

if TYPE_CHECKING:
    from cosa_ray.tuning.trial import Trials

log = logging.getLogger(__name__)
_TUNE = "tune"
# Set before Tune starts: no log files and no output of its own, no trial made before there is room for it. Whether
# there is a metric has been checked; that it is undefined in one evaluation must not end the sweep.
_TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
}


def run_trials(
    sweep: Sweep, base: Config, trials: Trials, concurrency: int, folder: str, watch: Watch, resume: bool
) -> list[Any]:
    """Let Tune run the trials, or go on where its snapshot left off; returns all its trials, also those of before.

    When Tune itself breaks down, what it left open is closed first.
    """
    from ray import tune

    from cosa_ray.tuning import hooks
    from cosa_ray.tuning.trial import end_open, run_trial

    def trial(sampled: dict[str, Any]) -> None:
        run_trial(trials, sampled, tune.get_context().get_trial_id())

    trainable = tune.with_resources(trial, {"CPU": DRIVER_CPUS})
    place = f"{folder}/{_TUNE}"
    with hooks.watching(folder, watch), _signals_kept():
        if resume and tune.Tuner.can_restore(place):
            tuner = tune.Tuner.restore(place, trainable, resume_unfinished=True, resume_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space={key: dimension.domain() for key, dimension in sweep.space.items()},
                tune_config=tune_config(sweep, base, watch.metric, concurrency, folder),
                run_config=tune.RunConfig(
                    name=_TUNE,
                    storage_path=folder,
                    verbose=0,
                    callbacks=[hooks.Follow(folder)],
                    failure_config=tune.FailureConfig(max_failures=0),
                ),
            )
        try:
            # Not what the hooks have seen: Tune takes no step when all trials had ended before.
            ended = list(tuner.fit()._experiment_analysis.trials)
        except BaseException:
            end_open(trials, {row.id: row.values for row in watch.progress().rows})
            raise
    watch.take_over(ended, hooks.STEP)
    return ended


def tune_config(sweep: Sweep, base: Config, metric: str, concurrency: int, folder: str) -> Any:
    """Search and scheduler of a sweep; both kinds of search are seeded."""
    from ray import tune

    from cosa_ray.tuning import hooks

    search: Any
    if sweep.search == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        search = OptunaSearch(seed=sweep.search_seed)
    else:
        from ray.tune.search.basic_variant import BasicVariantGenerator

        search = BasicVariantGenerator(max_concurrent=concurrency, random_state=sweep.search_seed)
    scheduler = None
    if sweep.scheduler == "asha":
        at = rungs(sweep, base)
        log.info("trials that fall behind end at steps %s", at)
        scheduler = hooks.StepAsha(folder, grace_steps(sweep, base, "sweep"), at[-1] + 1, sweep.asha.reduction_factor)
    return tune.TuneConfig(
        metric=metric,
        mode=sweep.mode,
        search_alg=search,
        scheduler=scheduler,
        num_samples=sweep.trials,
        max_concurrent_trials=concurrency if sweep.search == "optuna" else None,
        trial_dirname_creator=lambda trial: str(trial.trial_id),
    )


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
