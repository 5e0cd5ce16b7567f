"""`cosa-ray tune`: a sweep, from file to the best configuration."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosa_ray.cli.output import PLAIN_SECONDS, heading, json_only, say, say_tracked, table
from cosa_ray.cli.resume import command_to_resume
from cosa_ray.cli.train import AsJson, Set

if TYPE_CHECKING:
    from cosa_ray.tuning.sweep import SweepProgress, SweepResult

STATES = {"stopped_early": "stopped early"}


def tune(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="Sweep file, by path or by the name of a shipped one.")],
    set_: Set = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep; its folder is STORAGE/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep of this name.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: failed trials go on from their last checkpoint.")
    ] = False,
    no_track: Annotated[bool, typer.Option("--no-track", help="Without MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search over settings of an experiment, several trials at a time.

    --set takes keys of the sweep file (trials=4) and of its base experiment (training.steps=200).

    Examples: cosa-ray tune shapes --name first; cosa-ray tune shapes --name first --resume
    """
    from cosa_ray.config.names import default_name
    from cosa_ray.errors import UserError
    from cosa_ray.tuning.sweepfile import find_sweep, load_sweep

    if resume and name is None:
        raise UserError("--resume needs the --name of the sweep to continue.")
    if retry_failed and not resume:
        raise UserError("--retry-failed is for a sweep that is continued; add --resume.")
    sweep, base = load_sweep(file, set_ or [])
    name = name or default_name("tune", find_sweep(file))
    with json_only(as_json) as emit:
        from cosa_ray.tuning.sweep import run_sweep

        with sweep_progress() as show:
            result = run_sweep(
                sweep,
                base,
                name=name,
                resume=resume,
                retry_failed=retry_failed,
                track=not no_track,
                show=show,
                say=say,
            )
        if not as_json:
            print_sweep(result)
        if result.best is not None:
            say(f"best configuration: {result.best_file} (cosa-ray train {result.best_file})")
        if result.state == "stopped":
            say(f"stopped; continue with: {command_to_resume(context, name)}")
        say_tracked(result.parent_run_id, result.tracking_uri, children=True)
        emit(result.as_json())


def print_sweep(result: SweepResult) -> None:
    """Print a sweep's trials, best first, and why those that failed did."""
    keys = list(dict.fromkeys(key for trial in result.trials for key in trial.values))
    metrics = list(result.metrics) or [result.metric]
    seeds = len({trial.configuration for trial in result.trials}) < len(result.trials)
    rows = [
        [
            f"{trial.id} *" if trial is result.best or trial.id in result.front else trial.id,
            STATES.get(trial.state, trial.state),
            str(trial.step),
            *(_number(trial.scores.get(metric)) for metric in metrics),
            *([str(trial.seed)] if seeds else []),
            *(_number(trial.values.get(key)) for key in keys),
        ]
        for trial in result.ranked()
    ]
    columns = ["trial", "state", "step", *metrics, *(["seed"] if seeds else []), *map(heading, keys)]
    table(f"{result.name}: {result.state}, by {' and '.join(metrics)}", columns, rows)
    for trial in result.trials:
        if trial.state == "failed":
            say(f"trial {trial.id} failed ({trial.kind}): {trial.cause} (folder {trial.folder})")
    if result.cause:
        say(f"it ended because {result.cause}")


@contextlib.contextmanager
def sweep_progress() -> Iterator[Callable[[SweepProgress], None]]:
    """Yield a function that shows a sweep: a live table on a terminal, else a plain line every ten seconds."""
    if not sys.stderr.isatty():
        last: dict[str, Any] = {"at": 0.0, "ended": 0}

        def plain(progress: SweepProgress) -> None:
            if time.monotonic() - last["at"] >= PLAIN_SECONDS or progress.ended != last["ended"]:
                last.update(at=time.monotonic(), ended=progress.ended)
                say(progress.line())

        yield plain
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), auto_refresh=False) as live:
        yield lambda progress: live.update(live_table(progress), refresh=True)


def live_table(progress: SweepProgress) -> Any:
    """A sweep at one moment as a table for a terminal."""
    from rich.table import Table

    shown = Table(title=progress.line().replace("  running: none", ""), title_justify="left")
    columns, rows = trial_rows(progress)
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    best = progress.best
    for row, trial in zip(rows, progress.rows, strict=True):
        shown.add_row(*row, style="bold" if best is not None and trial.id == best.id else None)
    return shown


def trial_rows(progress: SweepProgress) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a sweep's trials."""
    keys = list(dict.fromkeys(key for row in progress.rows for key in row.values))
    rows = [
        [
            row.id,
            f"running ({row.phase})" if row.state == "running" and row.phase else STATES.get(row.state, row.state),
            f"{row.step}/{row.steps}",
            _number(row.score),
            *(_number(row.values.get(key)) for key in keys),
        ]
        for row in progress.rows
    ]
    return ["trial", "state", "step", f"best {progress.metric}", *map(heading, keys)], rows


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
