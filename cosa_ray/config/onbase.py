"""Files that name a base experiment and what is done with it: sweeps and ablations."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from cosa_ray.config.load import (
    apply_overrides,
    explain,
    find_base,
    find_experiment,
    load_config,
    merge,
    parse_overrides,
    read_yaml,
)
from cosa_ray.config.schema import Config
from cosa_ray.config.section import Section
from cosa_ray.errors import UserError


class OnBase(Section):
    """What every such file says first."""

    base: str = Field(description="Experiment file, by path (from this file) or shipped name.")
    set: dict[str, Any] = Field(default_factory=dict, description="Overrides of the base, dotted keys.")


File = TypeVar("File", bound=OnBase)
Lay = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


def find_on_base(name: str | Path, folder: str) -> Path:
    """Path of such a file given by path, or by the name of a shipped one in `folder`."""
    path = Path(name)
    if path.is_file():
        return path.resolve()
    try:
        return find_experiment(Path(folder) / path)
    except UserError:
        return find_experiment(path)


def load_on_base(
    model: type[File],
    path: Path,
    overrides: Sequence[str],
    *,
    kind: str,
    says: str,
    other_base: str | None = None,
    lay: Lay = merge,
) -> tuple[File, Config]:
    """Such a file and its base experiment, with `key=value` overrides: the file's own keys first, else the base's.

    `kind` and `says`: what it is called and has in it, for who gives another file. `other_base`: an experiment, by path
    or shipped name, in place of the file's own. `lay` lays the file's own overrides on what it says. Raises UserError
    naming the key, the file and the nearest valid key.
    """
    content = read_yaml(path)
    needed = [key for key, field in model.model_fields.items() if field.is_required()]
    if missing := [key for key in needed if key not in content]:
        raise UserError(f"{path}: no {kind} file, it lacks {missing[0]}; {says}.")
    given = parse_overrides(overrides)
    own = {key: given.pop(key) for key in list(given) if key in model.model_fields}
    try:
        file = model.model_validate(lay(content, own))
    except ValidationError as error:
        raise UserError(explain(error, f"{path}{' with --set' if own else ''}", model)) from None
    for key in given:
        if key not in Config.model_fields:
            close = difflib.get_close_matches(key, [*model.model_fields, *Config.model_fields], n=1)
            raise UserError(
                f"--set {key}: a key of neither the {kind} file nor its base experiment"
                f"{f'; did you mean {close[0]}?' if close else '.'}"
            )
    if other_base is not None:
        file = file.model_copy(update={"base": other_base})
    found = find_experiment(other_base) if other_base is not None else find_base(file.base, path)
    base = apply_overrides(load_config(found), file.set, f"{path}: set")
    return file, apply_overrides(base, given, "--set") if given else base
