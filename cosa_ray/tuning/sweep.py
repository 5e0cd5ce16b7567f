"""Run a sweep: check everything, divide the cluster, let Tune drive the trials, say which was best."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cosa_ray.config.load import apply_overrides, dump_config
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.tuning.metrics import sweep_metric
from cosa_ray.tuning.parent import deliver_rest, parent_run, parent_tracking
from cosa_ray.tuning.resources import Fit, Node, fit_resources
from cosa_ray.tuning.results import (
    SweepResult,
    TrialResult,
    prune,
    read_result,
    trial_result,
    write_best,
    write_result,
)
from cosa_ray.tuning.sweepfile import Sweep, check_sweep, dump_sweep, load_sweep
from cosa_ray.tuning.tuner import run_trials, tune_settings
from cosa_ray.tuning.watch import SweepProgress, Watch, best_of

if TYPE_CHECKING:
    from cosa_ray.training.storage import RunFolder
    from cosa_ray.tuning.trial import Trials

__all__ = ["Sweep", "SweepProgress", "SweepResult", "TrialResult", "load_sweep", "run_sweep"]
log = logging.getLogger(__name__)
SHOW_SECONDS = 1.0
SWEEP_FILE, BASE_FILE = "sweep.yaml", "base.yaml"
# Of the 100 characters a run's name may have; a trial's is that of the sweep, a dash and Tune's id of 11 at most.
NAME_LENGTH = 100 - 12


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
    SIGTERM let running trials write a checkpoint and end the sweep as `stopped`; `resume` goes on with it, or returns
    the result it has when it is finished. Raises UserError before anything starts, and with nothing left behind, when
    something is wrong or does not fit; RunFailed when no trial succeeded.
    """
    from cosa_ray.training.driver import preflight, ray_cluster, resolve
    from cosa_ray.training.storage import RunFolder

    check_sweep(sweep, base, f"sweep {name}")
    config = resolve(base, track)
    folder = RunFolder(f"{config.storage.rstrip('/')}/{_check_name(name)}")
    # In this order: a sweep is there once its own file is.
    files = {BASE_FILE: dump_config(base), SWEEP_FILE: dump_sweep(sweep)}
    _check_folder(folder, name, files, resume)
    if resume and (before := read_result(folder)) is not None and before.state == "finished":
        log.warning("sweep %s is finished already; nothing to do", name)
        return _finished(before, sweep, config, folder, track)
    preflight(config)
    metric = sweep_metric(sweep, config, f"sweep {name}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(tune_settings())
        stack.enter_context(ray_cluster())
        import ray

        from cosa_ray.tracking.store import check_reachable
        from cosa_ray.training.session import start_monitor
        from cosa_ray.tuning.trial import STORE, Trials

        fit = _divide(sweep, config, resume)
        tracking = parent_tracking(config, name, folder.uri, track)
        if tracking is not None:
            check_reachable(tracking, sum(node["Alive"] for node in ray.nodes()))
        for file, content in files.items() if not resume else ():
            folder.write_text(file, content)
        monitor = start_monitor(fit.concurrency)
        if tracking is not None:
            ray.get(monitor.keep.remote(STORE, tracking.store.uri))
        parent = stack.enter_context(parent_run(tracking, sweep))
        trials = Trials(
            sweep=name,
            config=apply_overrides(config, {"resources.cpus_per_worker": fit.cpus_per_worker}, "resources"),
            space=sweep.space,
            metric=metric,
            monitor=monitor,
            track=track,
            parent_run_id=parent.run_id,
        )
        watch = _watch(sweep, trials)
        with _showing(watch, monitor, show):
            tune_trials = run_trials(sweep, base, trials, fit.concurrency, folder.uri, watch, resume)
        results = [trial_result(trial, trials, watch) for trial in tune_trials]
        succeeded = [result for result in results if result.state in ("finished", "stopped_early")]
        best = best_of(succeeded, sweep.mode, score=lambda result: result.score)
        done = not watch.interrupted and len(results) >= sweep.trials
        result = SweepResult(
            name=name,
            folder=folder.uri,
            state="stopped" if not done else "finished" if best else "failed",
            metric=metric,
            mode=sweep.mode,
            parent_run_id=None,
            tracking_uri=parent.uri,
            trials=results,
            best=best,
            best_file=write_best(folder, base, name, metric, best) if best else None,
        )
        result = deliver_rest(tracking, parent.finish(result))
    write_result(folder, result)
    if result.state == "finished" and sweep.keep == "best":
        prune(result)
    if result.state == "failed":
        causes = [trial.cause for trial in results if trial.cause]
        raise RunFailed(
            f"sweep {name}: none of its {len(results)} trials succeeded"
            + (f"; the first failed because of: {causes[0]}" if causes else f"; none reported {metric}")
            + f" (folder {folder.uri})."
        )
    return result


def _check_name(name: str) -> str:
    """The name of a sweep, when its trials' runs can be named after it; else UserError."""
    from cosa_ray.training.runs import check_name

    if len(name) > NAME_LENGTH:
        raise UserError(
            f"sweep name {name!r} has {len(name)} characters; use up to {NAME_LENGTH}, because its trials are named "
            "after it."
        )
    return check_name(name)


def _check_folder(folder: RunFolder, name: str, files: Mapping[str, str], resume: bool) -> None:
    """Make sure that the sweep's folder is free, or with `resume` that it holds the same sweep."""
    if not resume:
        if any(found != BASE_FILE and not found.startswith(".") for found in folder.names()):
            raise UserError(
                f"sweep {name} exists already in {folder.uri}: continue it with --resume, or choose another --name; "
                "nothing was changed."
            )
        return
    if folder.read_text(SWEEP_FILE) is None:
        raise UserError(f"no sweep {name} in {folder.uri} to resume; start it without --resume.")
    for file, content in files.items():
        if folder.read_text(file) != content:
            raise UserError(
                f"sweep {name} was started with other settings than these ({folder.uri}/{file} differs); "
                "resume it with the same file and overrides, or start a new one under another --name."
            )


def _finished(result: SweepResult, sweep: Sweep, config: Config, folder: RunFolder, track: bool) -> SweepResult:
    """A sweep that is finished, with what a kill or a server that was away left to be done after its end."""
    if sweep.keep == "best":
        prune(result)
    after = deliver_rest(parent_tracking(config, result.name, folder.uri, track), result)
    if after != result:
        write_result(folder, after)
    return after


def _divide(sweep: Sweep, config: Config, resume: bool) -> Fit:
    """Divide the cluster this process is attached to.

    Resumed, a sweep may start the drivers of all its trials at once: the interrupted ones beside new ones.
    """
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
        drivers=sweep.trials if resume else None,
    )
    log.info("%s trials at a time, %s CPUs a worker", fit.concurrency, fit.cpus_per_worker)
    return fit


def _watch(sweep: Sweep, trials: Trials) -> Watch:
    """What is known of the sweep while it runs, and its ways to reach the trials."""
    import ray

    from cosa_ray.tuning.trial import is_marked, mark_given_up

    monitor = trials.monitor

    def end_trial(trial_id: str) -> None:
        mark_given_up(trials.folder(trial_id))
        ray.get(monitor.stop.remote(trials.name(trial_id)))

    return Watch(
        trials.sweep,
        trials.metric,
        sweep.mode,
        sweep.trials,
        steps=lambda values: trials.trial_config(values).training.steps,
        end_trial=end_trial,
        end_all=lambda: ray.get(monitor.stop.remote()),
        # A driver that was killed has not given its place back itself.
        ended=lambda trial_id: monitor.release.remote(trials.name(trial_id)),
        marked=lambda trial_id: is_marked(trials.folder(trial_id)),
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
