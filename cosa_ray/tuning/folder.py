"""A sweep's folder: its name, what it says it was asked for, and whether that is what is asked for now."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cosa_ray.config.load import dump_config, parse_yaml
from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.tuning.sweepfile import RESUMABLE, Sweep, dump_sweep

if TYPE_CHECKING:
    from cosa_ray.training.storage import RunFolder

SWEEP_FILE, BASE_FILE = "sweep.yaml", "base.yaml"
# Of the 100 characters a run's name may have; a trial's is that of the sweep, a dash and its number.
NAME_LENGTH = 100 - 8


def check_sweep_name(name: str) -> str:
    """The name of a sweep, when its trials' runs can be named after it; else UserError."""
    from cosa_ray.training.runs import check_name

    if len(name) > NAME_LENGTH:
        raise UserError(
            f"sweep name {name!r} has {len(name)} characters; use up to {NAME_LENGTH}, because its trials are named "
            "after it."
        )
    return check_name(name)


def _said(file: str, text: str, where: str) -> dict[str, Any]:
    """What a sweep's file says; a setting that an experiment of an earlier version lacks is at its default."""
    content = parse_yaml(text, where)
    if file != BASE_FILE:
        return content
    with contextlib.suppress(ValidationError):  # of a version that knew other settings: compared as it is
        return Config.model_validate(content).model_dump(mode="json")
    return content


def sweep_files(sweep: Sweep, base: Config) -> dict[str, str]:
    """What a sweep's folder says it was asked for, by file, in the order to write: it is there once its own file is."""
    return {BASE_FILE: dump_config(base), SWEEP_FILE: dump_sweep(sweep)}


def check_folder(folder: RunFolder, name: str, files: Mapping[str, str], resume: bool) -> None:
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
        before, now = (_said(file, text or "", f"{folder.uri}/{file}") for text in (folder.read_text(file), content))
        for key in RESUMABLE if file == SWEEP_FILE else ():
            before.pop(key, None)
            now.pop(key, None)
        if before != now:
            changed = next(key for key in {**before, **now} if before.get(key) != now.get(key))
            raise UserError(
                f"sweep {name} was started with other settings than these ({changed} of {folder.uri}/{file} differs); "
                f"resume it with the same file and overrides (only {', '.join(RESUMABLE)} may change), or start a new "
                "one under another --name."
            )
