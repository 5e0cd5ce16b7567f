"""`cosa-ray status`: how a sweep or run is doing, from another terminal."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from cosa_ray.cli.output import json_only, table
from cosa_ray.cli.train import AsJson


def status(
    name: Annotated[str, typer.Argument(help="Name or folder of a sweep or run.")],
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds until it has ended.")] = False,
    storage: Annotated[str, typer.Option(help="Folder or URI that holds the runs.")] = "runs",
    as_json: AsJson = False,
) -> None:
    """Show how a sweep (its trials, the best so far, the time left) or a run is doing.

    Reads the folder alone: it needs neither Ray nor MLflow, and tells what was last known when everything was killed.

    Examples: cosa-ray status first; cosa-ray status first --watch
    """
    with json_only(as_json) as emit:
        from cosa_ray.cli.tune import live_table, trial_rows
        from cosa_ray.tuning.status import read_status

        found = read_status(name, storage)
        if watch and not as_json and sys.stdout.isatty() and found.progress is not None:
            from rich.live import Live

            with Live(live_table(found.progress), auto_refresh=False) as live:
                while found.state == "running" and found.progress is not None:
                    live.update(live_table(found.progress), refresh=True)
                    time.sleep(2.0)
                    found = read_status(name, storage)
        if found.progress is not None and not as_json:
            columns, rows = trial_rows(found.progress)
            table(f"{found.name}: {found.state}", columns, rows)
        if not as_json:
            print(found.sentence)
        emit(found.as_json())
