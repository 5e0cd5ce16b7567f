"""Run a sweep: check everything, divide the cluster, let Tune drive the trials, say which was best."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cosa_ray.config.load import apply_overrides
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed
from cosa_ray.training.room import alive_nodes
from cosa_ray.tuning.check import check_sweep, generations, rungs, wanted
from cosa_ray.tuning.folder import check_folder, check_sweep_name, sweep_files
from cosa_ray.tuning.metrics import sweep_metrics
from cosa_ray.tuning.parent import deliver_rest, parent_run, parent_tracking
from cosa_ray.tuning.resources import Fit, fit_resources
from cosa_ray.tuning.results import (
    SweepResult,
    TrialResult,
    best_trial,
    pareto_front,
    prune,
    read_result,
    trial_result,
    write_best,
    write_result,
)
from cosa_ray.tuning.search import Search
from cosa_ray.tuning.sweepfile import Mode, Sweep, load_sweep
from cosa_ray.tuning.tuner import run_trials, tune_settings
from cosa_ray.tuning.watch import SweepProgress, Watch

if TYPE_CHECKING:
    from cosa_ray.training.storage import RunFolder
    from cosa_ray.tuning.journal import Entry, Journal
    from cosa_ray.tuning.population import Generations
    from cosa_ray.tuning.trial import Trials

__all__ = ["Sweep", "SweepProgress", "SweepResult", "TrialResult", "load_sweep", "run_sweep"]
log = logging.getLogger(__name__)
SHOW_SECONDS = 1.0
STATUS_SECONDS, REMOTE_STATUS_SECONDS = 2.0, 15.0


def run_sweep(
    sweep: Sweep,
    base: Config,
    *,
    name: str,
    resume: bool = False,
    retry_failed: bool = False,
    track: bool = True,
    show: Callable[[SweepProgress], None] | None = None,
    say: Callable[[str], None] = log.info,
) -> SweepResult:
    """Run all trials of a sweep and return how each ended; the function behind `cosa-ray tune`.

    Attaches to the cluster of RAY_ADDRESS, else starts one of this machine for the time of the sweep. Ctrl-C and
    SIGTERM let running trials write a checkpoint and end the sweep as `stopped`. `resume` goes on with a sweep whose
    driver was stopped or killed, or whose trials or budget have been raised: ended trials stay as they are (with
    `retry_failed`, those that failed go on from their last checkpoint), the others go on. Raises UserError before
    anything starts, and with nothing left behind, when something is wrong or does not fit; RunFailed when no trial
    succeeded, or too many failed in a row. `show` is told how far everything is, `say` once what is about to happen.
    """
    from cosa_ray.training.driver import preflight, ray_cluster, resolve
    from cosa_ray.training.lease import hold
    from cosa_ray.training.storage import RunFolder
    from cosa_ray.tuning.earlier import earlier_runs, keep_earlier, kept_earlier
    from cosa_ray.tuning.journal import Journal
    from cosa_ray.tuning.size import check_size

    where = f"sweep {name}"
    check_sweep(sweep, base, where)
    config = resolve(base, track)
    folder = RunFolder(f"{config.storage.rstrip('/')}/{check_sweep_name(name)}")
    files = sweep_files(sweep, base)
    check_folder(folder, name, files, resume)
    journal = Journal(folder)
    again = _again(journal, retry_failed)
    before = read_result(folder) if resume else None
    found = kept_earlier(folder) if sweep.earlier else None
    complete = not again and len(journal) >= wanted(sweep, None if found is None else len(found)) * sweep.repeats
    if complete and before is not None and before.state == "finished":
        log.warning("sweep %s is finished already; nothing to do", name)
        return _finished(before, sweep, config, folder, track)
    sizes = preflight(config)
    metrics = sweep_metrics(sweep, config, where)
    known = earlier_runs(sweep, config, metrics, folder, where)
    search = Search(sweep, config, metrics, journal, known, again)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold(folder, where))
        check_folder(folder, name, files, resume)  # whoever held it until now may have changed it
        stack.enter_context(tune_settings())
        stack.enter_context(ray_cluster())
        import ray

        from cosa_ray.tracking.store import check_reachable
        from cosa_ray.tracking.views import sweep_view
        from cosa_ray.training.session import end_monitor, start_monitor
        from cosa_ray.tuning import hooks
        from cosa_ray.tuning.trial import STORE, Trials, settle

        pauses = tuple(generations(sweep, config, where)) if sweep.scheduler == "pbt" else ()
        fit = divide(sweep, config, search.total, drivers=search.total if pauses else None)
        at_once = search.total if pauses else fit.concurrency
        done = len(journal) - len(again)
        most = check_size(folder, sizes, trials=search.total - done, at_once=at_once)
        say(_plan(sweep, config, search.total, done, fit, most))
        tracking = parent_tracking(config, name, folder.uri, track)
        if tracking is not None:
            check_reachable(tracking, sum(node["Alive"] for node in ray.nodes()))
        for file, content in files.items():
            folder.write_text(file, content)
        _reopen(journal, again)
        if known:
            keep_earlier(folder, known)
        monitor = start_monitor(fit.concurrency)
        stack.callback(end_monitor, monitor)
        if tracking is not None:
            ray.get(monitor.keep.remote(STORE, tracking.store.uri))
        parent = stack.enter_context(parent_run(tracking, sweep))
        parent.tracker.offer_view(sweep_view(name, metrics, list(sweep.space), config.training.steps))
        trials = Trials(
            sweep=name,
            config=apply_overrides(config, {"resources.cpus_per_worker": fit.cpus_per_worker}, "resources"),
            metric=next(iter(metrics)),
            monitor=monitor,
            track=track,
            parent_run_id=parent.run_id,
            pauses=pauses,
        )
        watch = _watch(sweep, trials, metrics, search.total, journal, folder)
        drive = hooks.Drive(watch, search, sweep.scheduler)
        if pauses:
            drive.generations = _generations(sweep, trials, metrics, watch, folder)
        with _showing(watch, monitor, folder, show):
            try:
                run_trials(sweep, config, trials, at_once, folder, drive)
            finally:
                # Also when Tune itself breaks down: no run may stay open.
                for entry in journal.entries():
                    if entry.state in ("running", "pending"):
                        ended = settle(trials, entry, killed=True, interrupted=True, said=lambda key: None)
                        journal.put(ended)
        result = _result(base, trials, metrics, watch, folder, parent.uri)
        result = deliver_rest(tracking, parent.finish(result, journal.entries()))
    write_result(folder, result)
    if result.state == "finished" and sweep.keep == "best":
        prune(result)
    if result.state == "failed":
        raise RunFailed(f"{where}: {result.cause} (folder {folder.uri}).")
    return result


def _plan(sweep: Sweep, config: Config, total: int, known: int, fit: Fit, most: str) -> str:
    """What is about to happen, in one sentence."""
    words = f"{total} trials" + (f", {known} of them known already," if known else "")
    words += f" of up to {config.last_step} steps, {fit.concurrency} at a time, {fit.cpus_per_worker:g} CPUs"
    words += f" and {fit.gpus_per_worker:g} GPUs" if fit.gpus_per_worker else ""
    words += f" a worker; checkpoints take up to {most}"
    if sweep.scheduler in ("asha", "hyperband"):
        words += f"; trials that fall behind end at steps {', '.join(map(str, rungs(sweep, config)))}"
    elif sweep.scheduler == "pbt":
        words += f"; generations at steps {', '.join(map(str, generations(sweep, config)))}"
    return words


def _again(journal: Journal, retry_failed: bool) -> list[int]:
    """Trials that go on when the sweep is resumed."""
    from cosa_ray.tuning.journal import ENDED

    states = [state for state in ENDED if not (retry_failed and state == "failed")]
    return [entry.number for entry in journal.entries() if entry.state not in states]


def _reopen(journal: Journal, again: Sequence[int]) -> None:
    """Trials that failed and go on have not failed any more; only once nothing can be refused: it forgets the cause."""
    for number in again:
        if journal[number].state == "failed":
            journal.update(number, state="interrupted", kind=None, cause=None)


def _result(
    base: Config,
    trials: Trials,
    metrics: Mapping[str, Mode],
    watch: Watch,
    folder: RunFolder,
    uri: str | None,
) -> SweepResult:
    """What the sweep came to, by its journal."""
    results = [trial_result(entry, trials, metrics) for entry in watch.journal.entries()]
    best = best_trial(results, metrics)
    metric, mode = next(iter(metrics.items()))
    cause, state = watch.ending, "finished"
    if watch.failed:
        state = "failed"
    elif watch.interrupted:
        state = "stopped"
    elif best is None:
        state = "failed"
        causes = [trial.cause for trial in results if trial.cause]
        said = f"the first failed because of: {causes[0]}" if causes else f"none reported {metric}"
        cause = cause or f"none of its {len(results)} trials succeeded; {said}"
    return SweepResult(
        name=watch.sweep,
        folder=folder.uri,
        state=state,
        metric=metric,
        mode=mode,
        parent_run_id=None,
        tracking_uri=uri,
        trials=results,
        best=best,
        best_file=write_best(folder, base, watch.sweep, metric, best) if best else None,
        metrics=dict(metrics),
        front=[trial.id for trial in pareto_front(results, metrics)] if len(metrics) > 1 else [],
        cause=cause,
        hours=sum(trial.hours for trial in results),
        hours_of="gpu" if base.resources.gpus_per_worker else "cpu",
        seconds=watch.progress().seconds,
    )


def _finished(result: SweepResult, sweep: Sweep, config: Config, folder: RunFolder, track: bool) -> SweepResult:
    """A sweep that is finished, with what a kill or a server that was away left to be done after its end."""
    if sweep.keep == "best":
        prune(result)
    after = deliver_rest(parent_tracking(config, result.name, folder.uri, track), result)
    if after != result:
        write_result(folder, after)
    return after


def divide(sweep: Sweep, config: Config, trials: int, drivers: int | None = None) -> Fit:
    """Divide the cluster this process is attached to; a population has a driver for each of its trials at once."""
    return fit_resources(
        alive_nodes(),
        workers=config.least_workers,
        trials=trials,
        cpus_per_worker=config.resources.cpus_per_worker,
        gpus_per_worker=config.resources.gpus_per_worker,
        concurrency=sweep.concurrency,
        drivers=drivers,
    )


def _watch(
    sweep: Sweep, trials: Trials, metrics: Mapping[str, Mode], total: int, journal: Journal, folder: RunFolder
) -> Watch:
    """What is known of the sweep while it runs, and its ways to reach the trials."""
    import ray

    from cosa_ray.tuning.trial import mark_given_up, settle

    monitor = trials.monitor

    def end_trial(entry: Entry, by: str) -> None:
        mark_given_up(trials.folder(entry.id), by)
        ray.get(monitor.stop.remote(trials.name(entry.id)))

    def settled(entry: Entry, killed: bool) -> Entry:
        # A driver that was killed has not given its place back itself.
        monitor.release.remote(trials.name(entry.id))
        return settle(
            trials,
            entry,
            killed=killed,
            interrupted=watch.interrupted,
            said=lambda key: ray.get(monitor.kept.remote(key)),
        )

    watch = Watch(
        trials.sweep,
        metrics,
        total,
        journal,
        folder,
        steps=lambda values: trials.trial_config(values).last_step,
        end_trial=end_trial,
        end_all=lambda: ray.get(monitor.stop.remote()),
        settle=settled,
        failures=sweep.failures,
        budget=sweep.budget,
    )
    return watch


def _generations(
    sweep: Sweep, trials: Trials, metrics: Mapping[str, Mode], watch: Watch, folder: RunFolder
) -> Generations:
    """The population's decisions, and their ways to reach the trials."""
    import ray

    from cosa_ray.tuning.population import Generations
    from cosa_ray.tuning.trial import copy_trial, generation

    metric, mode = next(iter(metrics.items()))
    return Generations(
        sweep,
        list(trials.pauses),
        metric,
        mode,
        watch.journal,
        folder,
        total=watch.total,
        copy=lambda taker, donor, step, values: copy_trial(trials, taker, donor, step, values),
        publish=lambda step, plan: ray.get(trials.monitor.keep.remote(generation(step), dict(plan))),
    )


@contextlib.contextmanager
def _showing(
    watch: Watch, monitor: Any, folder: RunFolder, show: Callable[[SweepProgress], None] | None
) -> Iterator[None]:
    """Show the sweep from a thread of its own while the block runs: Tune keeps the main one."""
    import ray

    show = show or (lambda progress: log.info("%s", progress.line()))
    every = STATUS_SECONDS if folder.is_local else REMOTE_STATUS_SECONDS
    end = threading.Event()

    def work() -> None:
        before: list[Any] = []
        while True:
            last = end.wait(SHOW_SECONDS)
            with contextlib.suppress(Exception):  # the display never ends a sweep
                watch.advance(ray.get(monitor.latest.remote(), timeout=10))
                watch.write_status(0.0 if last else every)
            now = watch.progress()
            if now.rows != before:
                show(now)
                before = now.rows
            if last:
                return

    thread = threading.Thread(target=work, name="show", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(timeout=10)
