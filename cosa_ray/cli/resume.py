"""What to type to go on with what a command began."""

from __future__ import annotations

import shlex
from typing import Any

import typer


def said(context: typer.Context) -> dict[str, Any]:
    """The parameters of a command line by name, those left at their defaults left out."""
    return {
        key: value
        for key, value in context.params.items()
        if context.get_parameter_source(key).name != "DEFAULT"  # type: ignore[union-attr]
    }


def command_to_resume(context: typer.Context, name: str) -> str:
    """The command line of `context` with `--name NAME --resume`: without the same options a resume is refused."""
    from cosa_ray.jobs.command import words

    given = said(context)
    as_json = ["--json"] if given.pop("as_json", False) else []
    return shlex.join(["cosa-ray", str(context.info_name), *as_json, *words({**given, "name": name, "resume": True})])
