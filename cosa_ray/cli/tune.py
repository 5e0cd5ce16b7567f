"""`cosa-ray tune`: a sweep, from file to the best configuration."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosa_ray.cli.output import PLAIN_SECONDS, json_only, say, table
from cosa_ray.cli.train import AsJson, Set

if TYPE_CHECKING:
    from cosa_ray.tuning.sweep import SweepProgress, SweepResult

STATES = {"stopped_early": "stopped early"}


def tune(
    file: Annotated[str, typer.Argument(help="Sweep file, by path or by the name of a shipped one.")],
    set_: Set = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep; its folder is STORAGE/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep of this name.")] = False,
    no_track: Annotated[bool, typer.Option("--no-track", help="Without MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search over settings of an experiment, several trials at a time.

    --set takes keys of the sweep file (trials=4) and of its base experiment (training.steps=200).

    Examples: cosa-ray tune shapes --name first; cosa-ray tune shapes --name first --resume
    """
    from cosa_ray.errors import UserError
    from cosa_ray.tuning.sweepfile import find_sweep, load_sweep

    if resume and name is None:
        raise UserError("--resume needs the --name of the sweep to continue.")
    sweep, base = load_sweep(file, set_ or [])
    name = name or f"{find_sweep(file).stem}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    with json_only(as_json) as emit:
        from cosa_ray.tracking.ui import command_to_show
        from cosa_ray.tuning.sweep import run_sweep

        with sweep_progress() as show:
            result = run_sweep(sweep, base, name=name, resume=resume, track=not no_track, show=show)
        if not as_json:
            print_sweep(result)
        if result.best is not None:
            say(f"best configuration: {result.best_file} (cosa-ray train {result.best_file})")
        if result.state == "stopped":
            words = "".join(f" --set {word}" for word in set_ or [])
            say(f"stopped; continue with: cosa-ray tune {file}{words} --name {name} --resume")
        if result.parent_run_id and result.tracking_uri:
            say(f"MLflow run {result.parent_run_id} and its children: {command_to_show(result.tracking_uri)}")
        emit(result.as_json())


def print_sweep(result: SweepResult) -> None:
    """Print a sweep's trials, best first, and why those that failed did."""
    keys = list(result.trials[0].values) if result.trials else []
    best_first = sorted(
        result.trials,
        key=lambda trial: (trial.score is None, (trial.score or 0.0) * (-1 if result.mode == "max" else 1)),
    )
    rows = [
        [
            f"{trial.id} *" if trial is result.best else trial.id,
            STATES.get(trial.state, trial.state),
            str(trial.step),
            _number(trial.score),
            *(_number(trial.values[key]) for key in keys),
        ]
        for trial in best_first
    ]
    table(f"{result.name}: {result.state}, by {result.metric}", ["trial", "state", "step", result.metric, *keys], rows)
    for trial in result.trials:
        if trial.state == "failed":
            say(f"trial {trial.id} failed: {trial.cause} (folder {trial.folder})")


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
        yield lambda progress: live.update(_live_table(progress), refresh=True)


def _live_table(progress: SweepProgress) -> Any:
    from rich.table import Table

    shown = Table(title=progress.line().split("  running:")[0], title_justify="left")
    keys = list(progress.rows[0].values) if progress.rows else []
    for index, column in enumerate(("trial", "state", "step", f"best {progress.metric}", *keys)):
        shown.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    best = progress.best
    for row in progress.rows:
        shown.add_row(
            row.id,
            f"running ({row.phase})" if row.state == "running" and row.phase else STATES.get(row.state, row.state),
            f"{row.step}/{row.steps}",
            _number(row.score),
            *(_number(row.values[key]) for key in keys),
            style="bold" if best is not None and row.id == best.id else None,
        )
    return shown


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
