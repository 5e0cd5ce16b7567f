"""`cosa-ray demo`: the whole platform in minutes, on made-up shapes."""

from __future__ import annotations

from typing import Annotated

import typer

from cosa_ray.cli.output import json_only, progress_line, say, table
from cosa_ray.cli.train import AsJson


def demo(
    folder: Annotated[str, typer.Option(help="Where the dataset and the runs go.")] = ".",
    as_json: AsJson = False,
) -> None:
    """Make the shapes dataset, sweep CoSA over it, and run the winner with one and with two workers.

    Example: cosa-ray demo
    """
    with json_only(as_json) as emit:
        from functools import partial

        from cosa_ray.cli.data import import_progress
        from cosa_ray.cli.tune import print_sweep, sweep_progress
        from cosa_ray.tracking.ui import command_to_show
        from cosa_ray.tuning.demo import Displays, run_demo

        displays = Displays(partial(import_progress, "shapes"), sweep_progress, progress_line)
        result = run_demo(folder, say=say, displays=displays)
        if not as_json:
            print_sweep(result.sweep)
            table(
                "the winner's loss with one and with two workers",
                ["step", "1 worker", "2 workers", "difference"],
                [[str(s), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}"] for s, a, b in result.shown_losses()],
            )
        say(result.verdict())
        say(f"compare the trials in MLflow: {command_to_show(result.sweep.tracking_uri or '')}")
        emit(result.as_json())
