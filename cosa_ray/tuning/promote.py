"""From sweep to result: the best configurations at full length with fresh seeds, evaluated and registered."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosa_ray.config.load import check
from cosa_ray.config.protocol import Protocol, load_protocol
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.training.evaluating import check_protocols
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.choosing import (
    PROMOTED_FROM,
    Plan,
    Source,
    choices,
    choose,
    key_of,
    plan_promotion,
    read_source,
    stored_sweep,
)
from cosa_ray.tuning.displays import Counting, Sweeping, silent
from cosa_ray.tuning.folder import SWEEP_FILE
from cosa_ray.tuning.promotion import Configuration, PromotedRun, Promotion, machine_words
from cosa_ray.tuning.results import SweepResult, TrialResult, grouped
from cosa_ray.tuning.sweep import run_sweep

if TYPE_CHECKING:
    from cosa_ray.evaluation.report import Report
    from cosa_ray.tracking.store import Store

log = logging.getLogger(__name__)
RESULT_FILE, TABLE_FILE = "promoted.json", "results.md"
PROMOTED_TO, WINNER = "cosa_ray.promoted_to", "cosa_ray.winner"
_SEEDS = 3


def promote_sweep(
    sweep: str,
    *,
    top: int | None = None,
    front: bool = False,
    seeds: int | None = None,
    overrides: Sequence[str] = (),
    base: str | None = None,
    protocols: Sequence[str] = (),
    register: str | None = None,
    aliases: Sequence[str] = (),
    name: str | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    storage: str = "runs",
    track: bool = True,
    sweeping: Sweeping = silent,
    counting: Counting = silent,
    say: Callable[[str], None] = log.info,
) -> Promotion:
    """Train the best configurations of a sweep again and say which is best; the function behind `cosa-ray promote`.

    The `top` best (1), or the Pareto front, become a sweep of their own, NAME (SWEEP-promoted): at full length, that
    is with the `LENGTH` settings of the sweep's base experiment (or of `base`) and `overrides`, with `seeds` (3) seeds
    that the sweep did not use. Every run is evaluated under every protocol (name or file). The best mean of the first
    protocol's plain mIoU wins, of the sweep's own metric without a protocol; `register` puts its best run into the
    registry. Results are in NAME's folder and in MLflow. `resume` goes on after a kill, and does nothing twice.

    Raises UserError before anything starts, RunFailed when no run succeeded or the model could not be registered.
    """
    read = [load_protocol(word) for word in protocols]
    _check_words(read, register, aliases, track)
    source = read_source(sweep, storage)
    name = name or f"{source.name}-promoted"
    asked = top is not None or front or seeds is not None or bool(overrides) or base is not None
    plan = None if asked or not resume else _begun(source, name)
    if plan is None:
        choice = choose(source, top, front)
        plan = plan_promotion(source, choice, _SEEDS if seeds is None else seeds, overrides, base)
    check_protocols(read, plan.experiment)
    if not resume and RunFolder(f"{plan.experiment.storage}/{name}").exists(SWEEP_FILE):
        raise UserError(f"{name} exists already: continue it with --resume, or choose another --name.")
    seed, count = plan.experiment.seed, plan.sweep.repeats
    words = f"seeds {seed} to {seed + count - 1}" if count > 1 else f"seed {seed}"
    say(f"{name}: {len(plan.sweep.points)} of the configurations of {source.name}, each with {words}")
    for line in plan.said:
        say(line)
    with sweeping() as show:
        result = run_sweep(
            plan.sweep, plan.experiment, name=name, resume=resume, retry_failed=retry_failed, track=track, show=show
        )
    if result.state == "stopped":
        return Promotion(name, result.folder, source.name, "stopped", result.metric, result.metrics[result.metric])
    evaluated = _evaluate(result, plan.experiment, list(zip(protocols, read, strict=True)), track, counting, say)
    promotion = _sum_up(source, plan, result, evaluated)
    folder = RunFolder(result.folder)
    before = json.loads(folder.read_text(RESULT_FILE) or "{}").get("registered")
    promotion = _write(folder, replace(promotion, registered=before))
    if register is not None and promotion.model is not None:
        registered = _register(promotion, plan.experiment, register, aliases)
        promotion = _write(folder, replace(promotion, registered=registered))
    if track:
        _note(promotion, plan.experiment, source)
    return promotion


def _begun(source: Source, name: str) -> Plan | None:
    """The plan of a promotion that has begun, as its folder has it; None where there is none."""
    stored = stored_sweep(RunFolder(f"{source.storage}/{name}"))
    if stored is None:
        return None
    if stored[1].tracking.tags.get(PROMOTED_FROM) != source.name:
        raise UserError(f"{name} is no promotion of sweep {source.name}; choose another --name.")
    return Plan(*stored)


def _check_words(protocols: Sequence[Protocol], register: str | None, aliases: Sequence[str], track: bool) -> None:
    """Refuse what cannot end well."""
    names = [protocol.name for protocol in protocols]
    if len(set(names)) < len(names):
        raise UserError(f"--protocol: {', '.join(names)} are not all different; give each once.")
    if protocols and not protocols[0].scores_plain:
        raise UserError(
            f"--protocol {names[0]}: the first protocol decides by the assignment network's plain mIoU, which it does "
            "not score; name one that does first."
        )
    if register is None and aliases:
        raise UserError(f"--alias {aliases[0]} is of a registered model; add --register NAME.")
    if register is None:
        return
    if not track:
        raise UserError("--register puts a model into MLflow, and --no-track leaves MLflow out; drop one of them.")
    from cosa_ray.tracking.registry import check_names

    check_names(register, aliases)


def _evaluate(
    result: SweepResult,
    experiment: Config,
    protocols: Sequence[tuple[str, Protocol]],
    track: bool,
    counting: Counting,
    say: Callable[[str], None],
) -> dict[str, list[Report]]:
    """Evaluate every finished run under every protocol, unless it has been; reports by trial, in order of protocols."""
    from cosa_ray.training.evaluating import evaluate_run
    from cosa_ray.training.ray_train import needs_ray, ray_cluster

    trials = [trial for trial in result.trials if trial.state == "finished"]
    reports = {(trial.id, word): _evaluated(trial, protocol) for trial in trials for word, protocol in protocols}
    missing = [(trial, word) for trial in trials for word, _ in protocols if reports[trial.id, word] is None]
    with contextlib.ExitStack() as stack:
        if missing and (needs_ray(experiment) or any(protocol.crf for _, protocol in protocols)):
            stack.enter_context(ray_cluster())  # one for all of them
        for trial, word in missing:
            title = f"evaluate {trial.name} under {word}"
            with counting(title) as count:
                report = evaluate_run(trial.folder, protocol=word, track=track, show=count)
            reports[trial.id, word] = report
            plain = report.metrics.get(f"{report.prefix}/miou")
            say(f"{title}" + ("" if plain is None else f": {report.prefix}/miou {plain:.4f}"))
    found: dict[str, list[Report]] = {}
    for (number, _), each in reports.items():
        found.setdefault(number, []).extend([each] if each is not None else [])
    return found


def _evaluated(trial: TrialResult, protocol: Protocol) -> Report | None:
    """The evaluation of a run's best checkpoint under a protocol that is there already."""
    from cosa_ray.training.evaluating import evaluation_of
    from cosa_ray.training.runs import find_run

    run = find_run(trial.folder)
    found = evaluation_of(run, run.best(), protocol)
    return None if found is None else found[1]


def _sum_up(source: Source, plan: Plan, result: SweepResult, evaluated: Mapping[str, Sequence[Report]]) -> Promotion:
    """The promotion, its configurations ranked; the metric and the columns are those of the evaluations, if any."""
    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.evaluation.naming import best_metric, metric_prefix
    from cosa_ray.tuning.journal import Journal

    own = check(result.trials[0].config, f"sweep {result.name}")
    prefixes = list(dict.fromkeys(report.prefix for reports in evaluated.values() for report in reports))
    images = len(open_dataset(own.data.dataset).split(own.data.val_split))
    cams = f"{prefixes[0] if prefixes else metric_prefix(own, images)}/cam_miou_best"
    decide = [best_metric(own, prefix) for prefix in prefixes] or list(result.metrics)
    sources = {key_of(choice.values): choice for choice in choices(source.result)} if source.result is not None else {}
    configurations = []
    for trials in grouped(result.trials).values():
        came_from = sources.get(key_of(trials[0].values))
        configurations.append(
            Configuration(
                values=trials[0].values,
                runs=tuple(_run(trial, evaluated.get(trial.id, ())) for trial in trials),
                source=came_from.id if came_from is not None else None,
                source_score=next(iter(came_from.scores.values())) if came_from is not None else None,
            )
        )
    known = {name for each in configurations for run in each.finished for name in run.metrics}
    ends = [entry.ended for entry in Journal(RunFolder(result.folder)).entries() if entry.ended is not None]
    promotion = Promotion(
        name=result.name,
        folder=result.folder,
        sweep=source.name,
        state=result.state,
        metric=decide[0],
        mode="max" if prefixes else result.metrics[decide[0]],
        configurations=configurations,
        columns=[name for name in dict.fromkeys([*decide, cams]) if name in known],
        experiment=plan.sweep.base.rpartition("/")[2],
        hours_of=result.hours_of,
        date=time.strftime("%Y-%m-%d", time.localtime(max(ends))) if ends else "",
        parent_run_id=result.parent_run_id,
        tracking_uri=result.tracking_uri,
    ).ranked()
    commit, machine = _made_by(promotion, plan.experiment)
    return replace(promotion, commit=commit, machine=machine)


def _run(trial: TrialResult, reports: Sequence[Report]) -> PromotedRun:
    """A trial as a promoted run, with its evaluations' metrics; one that is not defined is left out."""
    metrics = {**trial.metrics, **trial.scores}
    for report in reports:
        metrics |= report.metrics
    return PromotedRun(
        name=trial.name,
        folder=trial.folder,
        seed=trial.seed,
        state=trial.state,
        step=trial.step,
        hours=trial.hours,
        metrics={name: value for name, value in metrics.items() if value is not None and np.isfinite(value)},
        mlflow_run_id=trial.mlflow_run_id,
        cause=trial.cause,
    )


def _made_by(promotion: Promotion, experiment: Config) -> tuple[str | None, str]:
    """Commit and machine of the winner, as its run has them in MLflow; without that, those of this process."""
    from cosa_ray.tracking.describe import environment, git_state

    tags, found = git_state()[0], environment()
    run_id = promotion.model.mlflow_run_id if promotion.model is not None else None
    if promotion.tracking_uri is not None and run_id is not None:
        with _asking_mlflow(experiment, "does not say what the winner was trained on") as store:
            client = store.client()
            tags = client.get_run(run_id).data.tags
            with tempfile.TemporaryDirectory(prefix="cosa-ray-promotion-") as folder:
                found = json.loads(Path(client.download_artifacts(run_id, "environment.json", folder)).read_text())
    commit = tags.get("mlflow.source.git.commit")
    if commit is not None:
        commit = commit[:9] + (" with changes" if tags.get("cosa_ray.git.dirty") == "true" else "")
    return commit, machine_words(found, experiment.most_workers * experiment.resources.gpus_per_worker)


def _write(folder: RunFolder, promotion: Promotion) -> Promotion:
    """Write the promotion and its table into its folder."""
    folder.write_text(TABLE_FILE, promotion.markdown() + "\n")
    folder.write_text(RESULT_FILE, json.dumps(promotion.as_json(), indent=1))
    return promotion


def _register(promotion: Promotion, experiment: Config, name: str, aliases: Sequence[str]) -> dict[str, Any]:
    """Put the winner's best run into the registry, unless that very run is there with these aliases."""
    from cosa_ray.tracking.store import Store, tracking_uri
    from cosa_ray.training.models import register_run

    model, before = promotion.model, promotion.registered
    assert model is not None
    same = before is not None and (before["name"], before["mlflow_run_id"]) == (name, model.mlflow_run_id)
    if before is not None and same and set(aliases) <= set(before["aliases"]):
        return before
    try:
        return register_run(model.folder, name=name, aliases=aliases).as_json()
    except Exception as error:
        said = Store(tracking_uri(experiment), experiment.tracking.experiment).said(error)
        raise RunFailed(
            f"promotion {promotion.name} is complete ({promotion.folder}), but run {model.name} could not be "
            f"registered as {name}: {said}; try again with --resume."
        ) from error


def _note(promotion: Promotion, experiment: Config, source: Source) -> None:
    """Note in MLflow, at the promotion's run and at the sweep's, what came of it; never fails."""
    from cosa_ray.tracking.evaluations import log_evaluation
    from cosa_ray.tracking.store import Store, tracking_uri

    if promotion.parent_run_id is None:
        return
    metrics: dict[str, float] = {}
    for name in promotion.columns:
        if promotion.winner is not None and (spread := promotion.winner.spread(name)) is not None:
            metrics |= {f"{name}_mean": spread.mean} | ({} if spread.std is None else {f"{name}_std": spread.std})
    model = promotion.model
    with tempfile.TemporaryDirectory(prefix="cosa-ray-promotion-") as folder:
        _write(RunFolder(folder), promotion)
        log_evaluation(
            Store(tracking_uri(experiment), experiment.tracking.experiment),
            promotion.name,
            promotion.folder,
            run_id=promotion.parent_run_id,
            metrics=metrics,
            step=model.step if model is not None else 0,
            artifacts=Path(folder),
            place="promotion",
        )
    with _asking_mlflow(experiment, "does not know yet what was promoted") as store:
        client = store.client()
        if model is not None:
            client.set_tag(promotion.parent_run_id, WINNER, model.name)
        if source.result is not None and source.result.parent_run_id is not None:
            client.set_tag(source.result.parent_run_id, PROMOTED_TO, promotion.name)


@contextlib.contextmanager
def _asking_mlflow(experiment: Config, otherwise: str) -> Iterator[Store]:
    """The store, for what is good to have and no reason to fail: an error becomes a warning."""
    from cosa_ray.tracking.store import Store, tracking_uri

    store = Store(tracking_uri(experiment), experiment.tracking.experiment)
    try:
        yield store
    except Exception as error:
        log.warning("MLflow at %s %s: %s", store.shown, otherwise, store.said(error))
