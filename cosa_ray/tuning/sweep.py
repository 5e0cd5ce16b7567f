"""Run a sweep: check everything, divide the cluster, let Tune drive the trials, say which was best."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cosa_ray.config.load import apply_overrides, dump_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.tuning.parent import parent_run
from cosa_ray.tuning.resources import DRIVER_CPUS, Fit, Node, fit_resources
from cosa_ray.tuning.results import SweepResult, TrialResult, prune, trial_result, write_best
from cosa_ray.tuning.sweepfile import Sweep, check_sweep, dump_sweep, grace_steps, load_sweep, rungs
from cosa_ray.tuning.watch import SweepProgress, Watch, best_of

if TYPE_CHECKING:
    from cosa_ray.training.storage import RunFolder
    from cosa_ray.tuning.trial import Trials

__all__ = ["Sweep", "SweepProgress", "SweepResult", "TrialResult", "load_sweep", "run_sweep"]
log = logging.getLogger(__name__)
SHOW_SECONDS = 1.0
SWEEP_FILE, BASE_FILE, RESULT_FILE = "sweep.yaml", "base.yaml", "sweep.json"
_TUNE = "tune"
# Set before Tune starts: no log files and no output of its own, no trial made before there is room for it.
_TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
}


def run_sweep(
    sweep: Sweep,
    base: Config,
    *,
    name: str,
    resume: bool = False,
    track: bool = True,
    show: Callable[[SweepProgress], None] | None = None,
) -> SweepResult:
    """Run all trials of a sweep and return how each ended; the function behind `cosa-ray tune`.

    Attaches to the cluster of RAY_ADDRESS, else starts one of this machine for the time of the sweep. Ctrl-C and
    SIGTERM let running trials write a checkpoint and end the sweep as `stopped`; `resume` goes on with it. Raises
    UserError before anything starts when something is wrong or does not fit, RunFailed when no trial succeeded.
    """
    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.evaluation.evaluate import best_metric, metric_prefix
    from cosa_ray.training.driver import preflight, ray_cluster, resolve
    from cosa_ray.training.runs import check_name
    from cosa_ray.training.storage import RunFolder

    check_sweep(sweep, base, f"sweep {name}")
    config = resolve(base, track)
    preflight(config)
    images = len(open_dataset(config.data.dataset).split(config.data.val_split))
    metric = sweep.metric or best_metric(config, metric_prefix(config, images))
    folder = RunFolder(f"{config.storage.rstrip('/')}/{check_name(name)}")
    _open_folder(folder, name, sweep, base, resume)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_settings())
        stack.enter_context(ray_cluster())
        import ray

        from cosa_ray.training.session import start_monitor
        from cosa_ray.tuning.trial import Trials, mark_given_up

        fit = _divide(sweep, config)
        monitor = start_monitor()
        parent = stack.enter_context(parent_run(config, sweep, name, folder.uri, track))
        trials = Trials(
            sweep=name,
            config=apply_overrides(config, {"resources.cpus_per_worker": fit.cpus_per_worker}, "resources"),
            space=sweep.space,
            metric=metric,
            monitor=monitor,
            track=track,
            parent_run_id=parent.run_id,
        )

        def end_trial(trial_id: str) -> None:
            mark_given_up(trials.folder(trial_id))
            ray.get(monitor.stop.remote(f"{name}-{trial_id}"))

        watch = Watch(
            name,
            metric,
            sweep.mode,
            sweep.trials,
            steps=lambda values: trials.trial_config(values).training.steps,
            end_trial=end_trial,
            end_all=lambda: ray.get(monitor.stop.remote()),
        )
        with _showing(watch, monitor, show), _signals_kept():
            tune_trials = _tune(sweep, base, trials, fit, folder, watch, resume)
        results = [trial_result(trial, trials, watch) for trial in tune_trials]
        succeeded = [result for result in results if result.state in ("finished", "stopped_early")]
        best = best_of(succeeded, sweep.mode, score=lambda result: result.score)
        done = not watch.interrupted and len(results) >= sweep.trials
        if done and sweep.keep == "best":
            prune(results, best)
        result = SweepResult(
            name=name,
            folder=folder.uri,
            state="finished" if done else "stopped",
            metric=metric,
            mode=sweep.mode,
            parent_run_id=None,
            tracking_uri=parent.uri,
            trials=results,
            best=best,
            best_file=write_best(folder, base, name, metric, best) if best else None,
        )
        result = parent.finish(result)
    folder.write_text(RESULT_FILE, json.dumps(result.as_json(), indent=1, default=str))
    if done and best is None:
        causes = [trial.cause for trial in results if trial.cause]
        raise RunFailed(
            f"sweep {name}: none of its {len(results)} trials succeeded"
            + (f"; the first failed because of: {causes[0]}" if causes else f"; none reported {metric}")
            + f" (folder {folder.uri})."
        )
    return result


def _open_folder(folder: RunFolder, name: str, sweep: Sweep, base: Config, resume: bool) -> None:
    """Make the sweep's folder, or with `resume` make sure that it holds the same sweep."""
    files = {SWEEP_FILE: dump_sweep(sweep), BASE_FILE: dump_config(base)}
    if not resume:
        if folder.exists():
            raise UserError(
                f"sweep {name} exists already in {folder.uri}: continue it with --resume, or choose another --name; "
                "nothing was changed."
            )
        for file, content in files.items():
            folder.write_text(file, content)
        return
    if folder.read_text(SWEEP_FILE) is None:
        raise UserError(f"no sweep {name} in {folder.uri} to resume; start it without --resume.")
    for file, content in files.items():
        if folder.read_text(file) != content:
            raise UserError(
                f"sweep {name} was started with other settings than these ({folder.uri}/{file} differs); "
                "resume it with the same file and overrides, or start a new one under another --name."
            )


def _divide(sweep: Sweep, config: Config) -> Fit:
    """Divide the cluster this process is attached to."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    cluster = [Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in nodes]
    fit = fit_resources(
        cluster,
        workers=config.workers,
        trials=sweep.trials,
        cpus_per_worker=config.resources.cpus_per_worker,
        gpus_per_worker=config.resources.gpus_per_worker,
        concurrency=sweep.concurrency,
    )
    log.info("%s trials at a time, %s CPUs a worker", fit.concurrency, fit.cpus_per_worker)
    return fit


def _tune(
    sweep: Sweep, base: Config, trials: Trials, fit: Fit, folder: RunFolder, watch: Watch, resume: bool
) -> list[Any]:
    """Let Tune run the trials, or go on where its snapshot left off; returns its trial objects."""
    from ray import tune

    from cosa_ray.tuning import hooks
    from cosa_ray.tuning.trial import run_trial

    def trial(sampled: dict[str, Any]) -> None:
        run_trial(trials, sampled, tune.get_context().get_trial_id())

    trainable = tune.with_resources(trial, {"CPU": DRIVER_CPUS})
    place = f"{folder.uri}/{_TUNE}"
    with hooks.watching(folder.uri, watch):
        if resume and tune.Tuner.can_restore(place):
            tuner = tune.Tuner.restore(place, trainable, resume_unfinished=True, resume_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space={key: dimension.domain() for key, dimension in sweep.space.items()},
                tune_config=tune_config(sweep, base, watch.metric, fit.concurrency, folder.uri),
                run_config=tune.RunConfig(
                    name=_TUNE,
                    storage_path=folder.uri,
                    verbose=0,
                    callbacks=[hooks.Follow(folder.uri)],
                    failure_config=tune.FailureConfig(max_failures=0),
                ),
            )
        tuner.fit()
    return watch.tune_trials


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
def _showing(watch: Watch, monitor: Any, show: Callable[[SweepProgress], None] | None) -> Iterator[None]:
    """Show the sweep from a thread of its own while the block runs: Tune keeps the main one."""
    import ray

    show = show or (lambda progress: log.info("%s", progress.line()))
    end = threading.Event()

    def work() -> None:
        before: SweepProgress | None = None
        while True:
            last = end.wait(SHOW_SECONDS)
            with contextlib.suppress(Exception):  # the display never ends a sweep
                watch.advance(ray.get(monitor.latest.remote(), timeout=10))
            now = watch.progress()
            if now != before:
                show(now)
                before = now
            if last:
                return

    thread = threading.Thread(target=work, name="show", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(timeout=10)


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
def _settings() -> Iterator[None]:
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
