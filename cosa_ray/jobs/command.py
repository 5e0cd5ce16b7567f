"""What a verb's command line becomes on the cluster: the words, and the files that go along."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from cosa_ray.config.credentials import holds_secret, without_credentials
from cosa_ray.config.load import SHIPPED, dump_config, find_base, find_experiment, flatten, load_config
from cosa_ray.config.names import default_name
from cosa_ray.config.protocol import find_protocol, load_protocol
from cosa_ray.errors import UserError
from cosa_ray.jobs.head import refuse_password
from cosa_ray.jobs.parcel import for_cluster

Verb = Literal["train", "tune", "ablate", "promote", "evaluate", "predict", "pseudo-labels"]
VERBS: tuple[Verb, ...] = get_args(Verb)
# Parameters that are words without a name, the subject of the verb first; all others are options.
_POSITIONAL = ("file", "sweep", "run", "model", "images")
# Parameters that are folders or files on the cluster, with the default of those that have a relative one.
_PLACES: dict[Verb, dict[str, str | None]] = {
    "train": {},
    "tune": {},
    "ablate": {},
    "promote": {"storage": "runs"},
    "evaluate": {"storage": "runs", "dataset": None},
    "predict": {"storage": "runs", "dataset": None, "out": "predictions", "images": None},
    "pseudo-labels": {"storage": "runs", "dataset": "datasets/voc", "out": "pseudo-labels"},
}
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Command:
    """A job's command line after `cosa-ray`, its files by name, and what it is about.

    `subject` names the file, run or model; `name` the run or sweep it makes, if it does. `looks_up` is true when the
    job finds its run or model in the MLflow store.
    """

    verb: Verb
    words: list[str]
    subject: str
    files: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    looks_up: bool = False


def command_for(verb: Verb, given: Mapping[str, Any], folder: str, *, tracked: bool) -> Command:
    """The command of a job from the verb's parameters by name, those left at their defaults left out.

    Experiment, sweep and protocol files of this machine are resolved and go along; every other relative path starts at
    `folder` on the cluster. `tracked`: the job's environment names the tracking store. Raises UserError for what is
    wrong in them, before anything is sent.
    """
    root = PurePosixPath(folder)
    if not root.is_absolute():
        raise UserError(f"--folder {folder}: expected an absolute folder on the cluster.")
    if given.get("resume") and given.get("name") is None and verb != "promote":
        raise UserError("--resume needs the --name of the run or sweep to continue.")
    values = dict(given)
    if verb in ("train", "tune", "ablate"):
        return _with_file(verb, values, folder, tracked)
    for key, default in _PLACES[verb].items():
        if (value := values.get(key, default)) is not None:
            values[key] = [_there(each, root) for each in value] if isinstance(value, list) else _there(value, root)
    files: dict[str, str] = {}
    if (protocol := values.get("protocol")) is not None:
        several = isinstance(protocol, list)
        sent = [_sent_protocol(each, files) for each in (protocol if several else [protocol])]
        values["protocol"] = sent if several else sent[0]
    if (labels := values.get("labels")) is not None:
        values["labels"] = _sent_labels(labels, root, files)
    if (base := values.get("base")) is not None:
        path = find_experiment(base)
        values["base"] = _add(
            files, path, dump_config(for_cluster(load_config(path), folder, tracking_from_environment=tracked))
        )
    key = next(key for key in _POSITIONAL if key in values)
    subject = str(values[key])
    looks_up = subject.startswith("models:/") or bool(_RUN_ID.fullmatch(subject))
    if "/" in subject and not looks_up:  # a bare name is looked up in `storage`
        values[key] = _there(subject, root)
    return Command(verb, [verb, *words(values)], subject, files, values.get("name"), looks_up)


def words(values: Mapping[str, Any]) -> list[str]:
    """The words of a command line from parameters by name: what stands without a name first, where it can."""
    options: list[str] = []
    plain: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        several = value if isinstance(value, list | tuple) else [value]
        if key in _POSITIONAL:
            plain += [str(each) for each in several]
            continue
        option = key.rstrip("_").replace("_", "-")
        for each in several:
            if isinstance(each, bool):
                options.append(f"--{option}" if each else f"--no-{option}")
            else:
                options.append(f"--{option}={each}")
    # A word that begins like an option is none only behind `--`.
    return [*options, "--", *plain] if any(each.startswith("-") for each in plain) else [*plain, *options]


def _with_file(verb: Verb, values: dict[str, Any], folder: str, tracked: bool) -> Command:
    """train, tune and ablate: overrides, `extends` and `base` are worked into the files that are sent."""
    overrides = values.pop("set_", None) or []
    given = values.pop("file")
    if verb == "train":
        path = find_experiment(given)
        file, files = _experiment_files(path, overrides, folder, tracked)
    elif verb == "tune":
        from cosa_ray.tuning.sweepfile import find_sweep

        path = find_sweep(given)
        file, files = _sweep_files(path, overrides, folder, tracked)
    else:
        from cosa_ray.ablation.plan import find_ablation

        path = find_ablation(given)
        file, files = _ablation_files(path, overrides, values.pop("base", None), folder, tracked)
        if (protocol := values.get("protocol")) is not None:
            values["protocol"] = _sent_protocol(protocol, files)
    # Chosen here, so that whoever sends the job knows where to look.
    values["name"] = values.get("name") or default_name(verb, path)
    return Command(verb, [verb, *words({**values, "file": file})], path.name, files, values["name"])


def _experiment_files(path: Path, overrides: list[str], folder: str, tracked: bool) -> tuple[str, dict[str, str]]:
    config = load_config(path, overrides)
    refuse_password(config.tracking.uri, "tracking.uri")
    return path.name, {path.name: dump_config(for_cluster(config, folder, tracking_from_environment=tracked))}


def _sweep_files(path: Path, overrides: list[str], folder: str, tracked: bool) -> tuple[str, dict[str, str]]:
    """A sweep's file in a folder of its own, because its base, beside it, may have the same name.

    What the sweep and `overrides` change of the base stays apart from it: a promotion asks what the base itself says.
    """
    from cosa_ray.tuning.check import check_sweep
    from cosa_ray.tuning.sweepfile import dump_sweep, load_sweep

    sweep, config = load_sweep(path, overrides)
    check_sweep(sweep, config, str(path))
    refuse_password(config.tracking.uri, "tracking.uri")
    base_path = find_base(sweep.base, path)
    changed, base = (
        for_cluster(each, folder, tracking_from_environment=tracked) for each in (config, load_config(base_path))
    )
    before = flatten(base)
    changes = {key: value for key, value in flatten(changed).items() if value != before[key]}
    sent = sweep.model_copy(update={"base": base_path.name, "set": changes})
    file = f"sweeps/{path.name}"
    return file, {file: dump_sweep(sent), base_path.name: dump_config(base)}


def _ablation_files(
    path: Path, overrides: list[str], other_base: str | None, folder: str, tracked: bool
) -> tuple[str, dict[str, str]]:
    """An ablation's file in a folder of its own, as a sweep's; what is set for all rows is worked into the base."""
    from cosa_ray.ablation.plan import dump_ablation, load_ablation, plan_ablation

    ablation, base = load_ablation(path, overrides, other_base)
    plan_ablation(ablation, base, path.stem, 1)  # says what is wrong with a row
    refuse_password(base.tracking.uri, "tracking.uri")
    base_path = find_experiment(other_base) if other_base else find_base(ablation.base, path)
    sent = ablation.model_copy(update={"base": base_path.name, "set": {}})
    file = f"ablations/{path.name}"
    dumped = dump_config(for_cluster(base, folder, tracking_from_environment=tracked))
    return file, {file: dump_ablation(sent), base_path.name: dumped}


def _there(path: str, root: PurePosixPath) -> str:
    """A path as the cluster has it; `~` is the home folder of whoever runs the job there.

    Raises UserError for a URI with a password: everybody who sees the dashboard would read it.
    """
    if holds_secret(path):
        raise UserError(
            f"{without_credentials(path)}: the URI holds a password, which the cluster's job list would show; leave it "
            "out and set the store's credentials in the environment of the nodes."
        )
    return path if "://" in path or path.startswith("~") else str(root / path)


def _sent_protocol(given: str, files: dict[str, str]) -> str:
    """A protocol's name or file as the job gives it; a file of this machine goes along."""
    load_protocol(given)
    file = find_protocol(given)
    return given if file.is_relative_to(SHIPPED) else _add(files, file, file.read_text(encoding="utf-8"))


def _sent_labels(given: str, root: PurePosixPath, files: dict[str, str]) -> str:
    """The pictures' classes: a file of this machine goes along, any other is on the cluster."""
    file = Path(given)
    return _add(files, file, file.read_text(encoding="utf-8")) if file.is_file() else _there(given, root)


def _add(files: dict[str, str], file: Path, content: str) -> str:
    """Put a file into the parcel under its own name; UserError when two differ there."""
    if files.setdefault(file.name, content) != content:
        raise UserError(f"{file}: two files named {file.name} cannot go along; rename one.")
    return file.name
