"""`cosa-ray config`: look at experiment files."""

from __future__ import annotations

import typer

from cosa_ray.cli.output import json_only
from cosa_ray.cli.train import AsJson, File, Set

app = typer.Typer(no_args_is_help=True, help="Look at experiment files.")


@app.command()
def show(file: File, set_: Set = None, as_json: AsJson = False) -> None:
    """Print every setting of an experiment, defaults and overrides resolved.

    Example: cosa-ray config show shapes --set training.steps=100
    """
    from cosa_ray.config.load import dump_config, load_config

    config = load_config(file, set_ or [])
    with json_only(as_json) as emit:
        if not as_json:
            print(dump_config(config), end="")
        emit(config.model_dump(mode="json"))


@app.command("list")
def list_() -> None:
    """Name the experiment files that come with the package."""
    from cosa_ray.config.load import shipped_experiments

    print("\n".join(shipped_experiments()))
