"""What of a sweep is promoted: the best of its configurations, at which length, with which seeds."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from cosa_ray.config.load import (
    SHIPPED,
    apply_overrides,
    check,
    explain,
    find_experiment,
    flatten,
    load_config,
    merge,
    parse_overrides,
    parse_yaml,
)
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.folder import BASE_FILE, SWEEP_FILE
from cosa_ray.tuning.promotion import sign
from cosa_ray.tuning.results import SweepResult, TrialResult, pareto_front
from cosa_ray.tuning.sweepfile import Sweep

log = logging.getLogger(__name__)
PROMOTED_FROM = "cosa_ray.promoted_from"
# What a sweep shortens: these are the base experiment's again in a promoted run.
LENGTH = ("training.steps", "training.warmup_iters", "optimiser.warmup_steps", "evaluation.", "checkpoint.")
# What may differ between an experiment's file and the sweep made from it: places, and how a machine is divided.
_ELSEWHERE = ("storage", "data.dataset", "model.checkpoint", "tracking.", "resources.", "workers", "seed")


@dataclass(frozen=True)
class Choice:
    """A configuration of a sweep: number of its first trial, settings without the seed, mean scores by metric."""

    id: str
    values: dict[str, Any]
    scores: dict[str, float]


@dataclass(frozen=True)
class Source:
    """The sweep that is promoted: its folder's files, with every path absolute. `result`: None where it has none."""

    name: str
    folder: RunFolder
    state: str
    sweep: Sweep
    base: Config
    result: SweepResult | None

    @property
    def storage(self) -> str:
        """Where its trials lie, and the promoted runs will."""
        return self.folder.uri.rpartition("/")[0]


@dataclass(frozen=True)
class Plan:
    """The sweep that a promotion is, its base experiment, and what is said of them when it starts."""

    sweep: Sweep
    experiment: Config
    said: tuple[str, ...] = ()


def read_source(sweep: str, storage: str) -> Source:
    """A sweep by name or folder. Raises UserError where there is none."""
    from cosa_ray.tuning.status import read_status

    status = read_status(sweep, storage)
    if status.kind != "sweep":
        raise UserError(f"{sweep} is a run, and promote takes a sweep; `cosa-ray evaluate {sweep}` evaluates a run.")
    folder = RunFolder(status.folder)
    if folder.is_local:  # however it was named: a promotion that is resumed must be the same
        folder = RunFolder(str(Path(folder.path).resolve()))
    stored = stored_sweep(folder)
    if stored is None:
        raise UserError(f"sweep {sweep} ({folder.uri}) has no {BASE_FILE}; start it again.")
    file, base = stored
    places: dict[str, Any] = {"storage": folder.uri.rpartition("/")[0]}
    if status.result is not None and status.result.trials:
        # What the sweep was given may be relative to a folder that nobody knows any more; its trials' paths are not.
        known = flatten(check(status.result.trials[0].config, f"sweep {sweep}"))
        lasting = ("data.dataset", "model.checkpoint", "tracking.uri")
        places |= {key: known[key] for key in lasting if key not in file.space}
    base = apply_overrides(base, places, f"sweep {sweep}")
    return Source(status.name, folder, status.state, file, base, status.result)


def stored_sweep(folder: RunFolder) -> tuple[Sweep, Config] | None:
    """The sweep and its base experiment in a sweep's folder; None where there is none."""
    texts = [folder.read_text(file) for file in (SWEEP_FILE, BASE_FILE)]
    if None in texts:
        return None
    sweep, base = (
        parse_yaml(text or "", f"{folder.uri}/{file}")
        for text, file in zip(texts, (SWEEP_FILE, BASE_FILE), strict=True)
    )
    try:
        return Sweep.model_validate(sweep), check(base, f"{folder.uri}/{BASE_FILE}")
    except ValidationError as error:
        raise UserError(explain(error, f"{folder.uri}/{SWEEP_FILE}", Sweep)) from None


def choices(result: SweepResult) -> list[Choice]:
    """The configurations of a sweep that have a score in every metric, the mean over their seeds; best first."""
    groups: dict[str, list[TrialResult]] = {}
    for trial in result.trials:
        if trial.succeeded and all(metric in trial.scores for metric in result.metrics):
            groups.setdefault(key_of(trial.values), []).append(trial)
    found = [
        Choice(
            group[0].id,
            without_seed(group[0].values),
            {metric: float(np.mean([trial.scores[metric] for trial in group])) for metric in result.metrics},
        )
        for group in groups.values()
    ]
    return sorted(found, key=lambda choice: (-sign(result.mode) * choice.scores[result.metric], choice.id))


def choose(source: Source, top: int | None, front: bool) -> list[Choice]:
    """The configurations to promote, best first by the sweep's (first) metric. Raises UserError where it cannot say."""
    where, result = f"sweep {source.name}", source.result
    if result is None or source.state == "running":
        raise UserError(f"{where} is {source.state} and has come to no result yet; let it end, or resume it.")
    if source.state == "failed":
        raise UserError(
            f"{where} failed ({result.cause}), so its best is of no use; mend the cause and resume it with "
            "--resume --retry-failed, or run another."
        )
    ranked = choices(result)
    if not ranked:
        raise UserError(f"{where}: no trial has a score, so there is nothing to promote.")
    if front:
        if top is not None:
            raise UserError("--front takes the whole front and --top the best by one metric; give one of them.")
        if len(result.metrics) < 2:
            raise UserError(f"--front: {where} has one metric, {result.metric}, and so no Pareto front; use --top.")
        trials = {trial.id: trial for trial in result.trials}
        means = [replace(trials[choice.id], scores=choice.scores) for choice in ranked]
        kept = {trial.id for trial in pareto_front(means, result.metrics)}
        return [choice for choice in ranked if choice.id in kept]
    top = 1 if top is None else top
    if not 1 <= top <= len(ranked):
        raise UserError(f"--top {top}: {where} has {len(ranked)} configurations with a score; take up to that.")
    return ranked[:top]


def plan_promotion(
    source: Source, chosen: Sequence[Choice], seeds: int, overrides: Sequence[str], base: str | None = None
) -> Plan:
    """A promotion of chosen configurations. Raises UserError where length, overrides or seeds cannot be."""
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: a configuration takes one seed or more.")
    result = source.result
    assert result is not None
    if source.sweep.scheduler == "pbt":
        log.warning("settings of a population changed on the way: those that a trial had last are promoted")
    space = {key: dimension for key, dimension in source.sweep.space.items() if key != "seed"}
    given = [word.partition("=")[0].strip() for word in overrides]
    for key in given:
        if varied := next((name for name in space if name == key or name.startswith(f"{key}.")), None):
            raise UserError(
                f"--set {key}: the sweep searched {varied}, so every configuration has its own; leave it out."
            )
    experiment, said = full_length(source, given, base)
    merged = merge(experiment.model_dump(mode="json"), parse_overrides(overrides))
    experiment = check(merged, "promoted experiment with --set")
    used = {trial.seed for trial in result.trials} | {source.base.seed}
    first = experiment.seed if "seed" in given else max(used) + 1
    if again := used & set(range(first, first + seeds)):
        raise UserError(f"--set seed={first}: the sweep used seed {min(again)}; take {max(used) + 1} or more.")
    tags = {**experiment.tracking.tags, PROMOTED_FROM: source.name}
    experiment = apply_overrides(experiment, {"seed": first, "tracking.tags": tags}, "promoted experiment")
    told = [f"sweep {source.name} was stopped: these are the best so far"] if result.state == "stopped" else []
    for choice in chosen:
        scores = ", ".join(f"{metric} {score:.4f}" for metric, score in choice.scores.items())
        words = ", ".join(f"{key}={value}" for key, value in choice.values.items())
        told.append(f"promoted: trial {choice.id} ({scores}): {words}")
    before, now = flatten(source.base), flatten(experiment)
    changed = [f"{k} {v} (in the sweep {before[k]})" for k, v in now.items() if v != before[k] and k.startswith(LENGTH)]
    told.append(f"{said}: {', '.join(changed) or f'{experiment.training.steps} steps, nothing changed'}")
    points = {
        "base": source.sweep.base,
        "space": space,
        "search": "points",
        "points": [choice.values for choice in chosen],
        "repeats": seeds,
        "concurrency": source.sweep.concurrency,
        "metric": _metric_then(source.sweep.metric, source.base, experiment),
        "mode": source.sweep.mode,
        "failures": source.sweep.failures,
        "restarts": source.sweep.restarts,
        "keep": "all",
    }
    return Plan(Sweep.model_validate(points), experiment, tuple(told))


def full_length(source: Source, given: Sequence[str], base: str | None = None) -> tuple[Config, str]:
    """The sweep's base with the `LENGTH` settings of the experiment it was made from, and words for their origin.

    Where that experiment's file is not found, or says something else than the sweep had, the sweep's base is taken as
    it is if the sweep's file did not change any such setting, or if `given` (keys of --set) say the length; else
    UserError.
    """
    if base is not None:
        file, why = find_experiment(base), None
    else:
        file, why = _base_file(source)
    if why is None:
        longer = {key: value for key, value in flatten(load_config(file)).items() if key.startswith(LENGTH)}
        return apply_overrides(source.base, longer, str(file)), f"full length, by {file}"
    shortened = next((key for key in source.sweep.set if key.startswith(LENGTH)), None)
    if shortened is not None and "training.steps" not in given:
        raise UserError(
            f"sweep {source.name} set {shortened}, and what its base experiment said is not known: {why}; name it with "
            "--base FILE, or say how long a run is with --set training.steps=N."
        )
    return source.base, f"the sweep's own length ({why})"


def _base_file(source: Source) -> tuple[Path, str | None]:
    """The file of the sweep's base experiment, and why it is not it."""
    try:
        # The file of a shipped sweep names its base from its own folder.
        file = find_experiment(source.sweep.base, SHIPPED / "sweeps")
        says, had = flatten(load_config(file)), flatten(source.base)
    except UserError:
        return Path(source.sweep.base), f"{source.sweep.base} is not found from here"
    set_by_sweep = (*LENGTH, *_ELSEWHERE, *source.sweep.set)
    for key, value in says.items():
        if value != had[key] and not key.startswith(set_by_sweep):
            return file, f"{file} says {key}={value}, and the sweep had {had[key]}"
    return file, None


def _metric_then(metric: str | tuple[str, ...] | None, before: Config, now: Config) -> str | tuple[str, ...] | None:
    """The sweep's metrics as runs of another length call them: val_subset_500/miou is val/miou on all images."""
    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.evaluation.naming import metric_prefix

    if metric is None:
        return None
    old, new = (
        metric_prefix(config, len(open_dataset(config.data.dataset).split(config.data.val_split)))
        for config in (before, now)
    )
    names = metric if isinstance(metric, tuple) else (metric,)
    renamed = tuple(f"{new}/{name[len(old) + 1 :]}" if name.startswith(f"{old}/") else name for name in names)
    return renamed if isinstance(metric, tuple) else renamed[0]


def key_of(values: Mapping[str, Any]) -> str:
    """Settings as one word, by which configurations are told apart: their seed does not count."""
    return json.dumps(without_seed(values), sort_keys=True, default=list)


def without_seed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a configuration, of which a trial's seed is none."""
    return {key: value for key, value in values.items() if key != "seed"}
