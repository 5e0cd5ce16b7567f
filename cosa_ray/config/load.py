"""From an experiment file and overrides to a checked Config, and back to YAML."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from cosa_ray.config.schema import Config
from cosa_ray.config.section import Section
from cosa_ray.errors import UserError

_PACKAGE = Path(__file__).resolve().parent.parent
# An installed wheel carries the experiments inside the package; a checkout has them beside it.
SHIPPED = next((d for d in (_PACKAGE / "_experiments", _PACKAGE.parent / "experiments") if d.is_dir()), _PACKAGE)
PROTOCOLS = "protocols"  # their folder among the experiments


def find_experiment(name: str | Path, relative_to: Path | None = None) -> Path:
    """Path of an experiment file given by path or by name (`shapes`, `sweeps/shapes.yaml`).

    Looks beside the file that names it, in the working folder, then among the shipped experiments.
    Raises UserError naming the nearest shipped file.
    """
    wanted = Path(name)
    folders = [relative_to] if relative_to else []
    for folder in (*folders, Path(), Path("experiments"), SHIPPED):
        for candidate in (folder / wanted, folder / f"{wanted}.yaml"):
            if candidate.is_file():
                return candidate.resolve()
    # A job runs in a copy of the project, where "experiments/x.yaml" may only exist as a shipped file.
    if wanted.parts[:1] == ("experiments",) and len(wanted.parts) > 1:
        return find_experiment(Path(*wanted.parts[1:]), relative_to)
    raise UserError(f"no experiment file {name}{_nearest(str(wanted.with_suffix('.yaml')), shipped_experiments())}.")


def find_base(base: str, file: Path) -> Path:
    """Path of the experiment that a sweep or ablation file names as its base (sweeps/shapes.yaml is on shapes.yaml)."""
    found = find_experiment(base, file.parent)
    return found if found != file else find_experiment(base, file.parent.parent)


def shipped_experiments() -> list[str]:
    """Names of the experiment files that come with the package, relative to their folder."""
    files = (path for path in SHIPPED.rglob("*.yaml") if path.parent != SHIPPED / PROTOCOLS)
    return sorted(str(path.relative_to(SHIPPED)) for path in files)


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML mapping; UserError names file and line when it is not one."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid YAML ({error}); mend the file.") from error
    return parse_yaml(text, str(file))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in a YAML text, of plain values only; UserError names `where` and line when it is not one."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{where}, line {mark.line + 1}" if mark else where
        raise UserError(
            f"{where}: not valid YAML ({getattr(error, 'problem', None) or error}); mend the file."
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected `key: value` lines, found a {type(content).__name__}; mend the file.")
    return content


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mapping with `over` laid on `base`: nested mappings merge, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        inherited = merged.get(key)
        merged[key] = merge(inherited, value) if isinstance(value, dict) and isinstance(inherited, dict) else value
    return merged


def read_experiment(file: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Differences from the defaults that an experiment file and all it extends state; later files win."""
    if file in seen:
        raise UserError(f"{file}: extends itself by way of {seen[-1]}; remove one `extends`.")
    content = read_yaml(file)
    parents = content.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{file}: extends must be a file name or a list of them, got {parents!r}.")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = merge(merged, read_experiment(find_experiment(parent, file.parent), (*seen, file)))
    return merge(merged, content)


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Config of an experiment file (path or shipped name) with `key=value` overrides.

    Raises UserError naming the key, the file and the nearest valid key.
    """
    path = find_experiment(file)
    content = merge(read_experiment(path), parse_overrides(overrides))
    return check(content, str(path) + (" with --set" if overrides else ""))


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Nested mapping of `a.b=value` words; values are YAML."""
    nested: dict[str, Any] = {}
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {word}: expected key=value, as in --set losses.cam_to_seg=0.2.")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {word}: the value is not valid YAML; quote it.") from error
        nested = merge(nested, nest({key.strip(): parsed}))
    return nested


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'a.b': 1} -> {'a': {'b': 1}}; what is nested already stays."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def apply_overrides(config: Config, overrides: Mapping[str, Any], where: str = "overrides") -> Config:
    """A config with dotted keys replaced, checked again."""
    return check(merge(config.model_dump(mode="json"), nest(overrides)), where)


_TAGS = ("number", "range")  # of a union's members (schema.WorkerCount), which are no keys


def check(content: Mapping[str, Any], where: str) -> Config:
    """Config of a mapping; UserError in one sentence that names the key, `where` and the nearest valid key."""
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise UserError(explain(error, where, Config)) from None


def explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """One sentence for the first of pydantic's errors, with a count of the others."""
    problems = error.errors()
    # An unknown key first: the other complaints are often its consequences.
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = ".".join(str(part) for part in first["loc"] if part not in _TAGS)
    if first["type"] == "extra_forbidden":
        sentence = f"unknown key {key}{_nearest(key, list(keys(model)))}"
    elif first["type"] == "value_error":
        sentence = str(first["ctx"]["error"])
    else:
        message = first["msg"][0].lower() + first["msg"][1:]
        sentence = f"{key}: {message}, got {first['input']!r}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {sentence}{more}."


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of every field of a schema, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        members = [get_args(each)[0] if get_origin(each) is Annotated else each for each in get_args(field.annotation)]
        for inner in (field.annotation, *members):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from keys(inner, f"{prefix}{name}.")


def _nearest(wrong: str, valid: Sequence[str]) -> str:
    """', did you mean ...?' for the closest valid word, comparing whole and last parts."""
    close = difflib.get_close_matches(wrong, valid, n=1, cutoff=0.6)
    if not close:
        leaves = {name.rsplit(".", 1)[-1]: name for name in valid}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(wrong.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(valid[:30])}"


def dump_config(config: Config) -> str:
    """YAML of every setting, which load_config reads back to an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)


def dump_section(section: Section) -> str:
    """YAML of the settings that are not at their defaults, from which an equal section is read."""
    return yaml.safe_dump(
        section.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
        sort_keys=False,
        default_flow_style=None,
        width=120,
    )


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value of every leaf; free-form mappings stay whole."""

    def leaves(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name, list(value) if isinstance(value, tuple) else value

    return dict(leaves(config, ""))
