"""What commands print: one live progress line, tables, or exactly one JSON object."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosa_ray.training.session import Progress

PLAIN_SECONDS = 10.0


@contextlib.contextmanager
def json_only(wanted: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that prints the result as JSON; meanwhile whatever else writes to stdout goes to stderr.

    The redirection is of the file descriptor, so that libraries and child processes are caught too. Without `wanted`
    nothing is redirected and the function prints nothing.
    """
    if not wanted:
        yield lambda result: None
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    results: list[dict[str, Any]] = []
    try:
        yield results.append
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        for result in results:
            print(json.dumps(result, default=str), flush=True)


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[Progress], None]]:
    """Yield a function that shows a run's progress: a live bar on a terminal, else a plain line every ten seconds."""
    if not sys.stderr.isatty():
        last: dict[str, Any] = {"at": 0.0, "phase": None}

        def plain(progress: Progress) -> None:
            due = time.monotonic() - last["at"] >= PLAIN_SECONDS
            if due or progress.phase != last["phase"] or progress.step == progress.steps:
                last.update(at=time.monotonic(), phase=progress.phase)
                print(progress.line(), file=sys.stderr, flush=True)

        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(TextColumn("{task.description}"), BarColumn(bar_width=30), console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def live(progress: Progress) -> None:
        if progress.run not in tasks:
            tasks[progress.run] = bar.add_task(progress.run, total=progress.steps)
        bar.update(tasks[progress.run], completed=progress.step, description=progress.line())

    with bar:
        yield live


@contextlib.contextmanager
def count_bar(title: str) -> Iterator[Callable[..., None]]:
    """Yield a function told images done, in all and put aside: a live bar on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        last = time.monotonic()

        def plain(done: int, total: int, aside: int = 0) -> None:
            nonlocal last
            if done == total or time.monotonic() - last >= PLAIN_SECONDS:
                last = time.monotonic()
                say(f"{title}: {done} of {total} images{_and_aside(aside)}")

        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images{task.fields[aside]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, aside="")

        def live(done: int, total: int, aside: int = 0) -> None:
            bar.update(task, completed=done, total=total, aside=_and_aside(aside))

        yield live


def _and_aside(count: int) -> str:
    return f", {count} put aside" if count else ""


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on stdout; text is shown as it is, brackets and all."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(title), title_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(escape(column), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(escape, row))
    # Piped output keeps its full width: a folded table cannot be read by a script.
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


def heading(key: str, width: int = 12) -> str:
    """A dotted setting as the heading of a narrow column: a line a section, long ones broken at their underscores."""
    lines = [""]
    for piece in re.findall(r"[^._]+[._]?", key):
        if lines[-1] and (lines[-1].endswith(".") or len(lines[-1]) + len(piece) > width):
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def metrics_table(title: str, metrics: dict[str, float]) -> None:
    """Print metrics by name."""
    table(title, ["metric", "value"], [[name, f"{value:.4f}"] for name, value in sorted(metrics.items())])


def say(sentence: str) -> None:
    """A line for the person at the terminal, on stderr, so that pipes stay clean."""
    print(sentence, file=sys.stderr, flush=True)


def say_tracked(run_id: str | None, tracking_uri: str | None, children: bool = False) -> None:
    """Say where MLflow has a run, with its children, and how to look at it; nothing for what is not tracked."""
    if run_id and tracking_uri:
        from cosa_ray.tracking.ui import command_to_show

        say(f"MLflow run {run_id}{' and its children' if children else ''}: {command_to_show(tracking_uri)}")
