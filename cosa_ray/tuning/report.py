"""What a sweep's own MLflow run shows of it: tables, figures, the best experiment, cost, and a description."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import json
import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cosa_ray.tracking.store import metric_course
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.journal import Entry
from cosa_ray.tuning.results import BEST_FILE, SweepResult, TrialResult, grouped, read_result
from cosa_ray.tuning.sweepfile import Sweep
from cosa_ray.tuning.watch import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cosa_ray.tracking.store import Store
    from cosa_ray.tracking.tracker import NoTracker, Tracker
    from cosa_ray.tuning.importance import Importance
    from cosa_ray.tuning.interactions import Interactions

log = logging.getLogger(__name__)
FOLDER = "sweep"
THRESHOLDS = "threshold/"
READ_SECONDS = 20.0  # for the thresholds' histories of all trials; what is not read by then is not drawn
READERS = 4
_STYLE = """<style>
:root { color-scheme: light dark; --line: #d8d8d8; --best: #e3eefa; --head: #f4f4f4; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --best: #1d3550; --head: #262626; } }
body { font: 13px/1.4 system-ui, sans-serif; margin: 12px; }
h1 { font-size: 16px; } h2 { font-size: 14px; margin: 18px 0 6px; }
table { border-collapse: collapse; }
th, td { padding: 3px 9px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 22em; }
th { position: sticky; top: 0; background: var(--head); font-weight: 600; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.best td { background: var(--best); font-weight: 600; }
</style>"""
Histories = dict[str, dict[str, list[tuple[int, float]]]]


@dataclass(frozen=True)
class Table:
    """A table as text: `best` are the rows to stand out."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    best: frozenset[int] = frozenset()


def totals(result: SweepResult) -> dict[str, float]:
    """Metrics of the sweep's run: scores of the best trial, what all of them cost, and how they ended."""
    states = [trial.state for trial in result.trials]
    best = dict(result.best.scores) if result.best is not None else {}
    return {
        **best,
        f"cost/{result.hours_of}_hours": result.hours,
        "sweep/seconds": result.seconds,
        "sweep/trials": len(states),
        "sweep/failed": states.count("failed"),
        "sweep/stopped_early": states.count("stopped_early"),
    }


def tags(result: SweepResult) -> dict[str, str]:
    """Tags of the sweep's run. What an earlier end left, and is not so any more, is emptied."""
    said = {"cosa_ray.state": result.state}
    if result.best is not None:
        said["cosa_ray.best_trial"] = result.best.name
    before = None
    with contextlib.suppress(Exception):  # of an earlier version
        before = read_result(RunFolder(result.folder))
    if result.cause or (before is not None and before.cause):
        said["cosa_ray.cause"] = result.cause or ""
    return said


def log_report(
    tracker: Tracker | NoTracker, store: Store, sweep: Sweep, result: SweepResult, entries: Sequence[Entry]
) -> None:
    """Log the report under `sweep/`, in place of an earlier one. Nothing that goes wrong in it is raised."""
    begun = time.monotonic()
    found: dict[str, Importance] = {}
    pairs: dict[str, Interactions] = {}

    def write(what: str, make: Callable[[], None]) -> None:
        try:
            make()
        except Exception as error:
            log.warning("sweep %s: its MLflow run lacks %s (%s)", result.name, what, store.said(error))
            log.debug("the report said", exc_info=True)

    def tables() -> None:
        shown = [leaderboard(result)]
        tracker.log_text(f"{FOLDER}/leaderboard.csv", as_csv(shown[0]))
        if _repeated(result):
            shown.insert(0, by_configuration(result))
            tracker.log_text(f"{FOLDER}/configurations.csv", as_csv(shown[0]))
        tracker.log_text(f"{FOLDER}/leaderboard.html", as_html(result, shown))

    def best() -> None:
        content = RunFolder(result.folder).read_text(BEST_FILE)
        if result.best_file is not None and content is not None:
            tracker.log_text(f"{FOLDER}/{BEST_FILE}", content)

    def settings() -> None:
        from cosa_ray.tuning.importance import METHOD, importance, study_of
        from cosa_ray.tuning.interactions import METHOD as PAIRS
        from cosa_ray.tuning.interactions import interactions
        from cosa_ray.tuning.slices import importances, parallel, slices, together

        study = study_of(sweep.space, entries, result.metrics)
        found.update(importance(study, entries, result.metrics))
        pairs.update({metric: interactions(study, entries, index) for index, metric in enumerate(result.metrics)})
        said: dict[str, Any] = {"method": METHOD, "method of pairs": PAIRS}
        said |= {metric: {**asdict(each), "together": pairs[metric].said()} for metric, each in found.items()}
        tracker.log_dict(f"{FOLDER}/importance.json", said)
        order = sorted((first := next(iter(found.values()))).shares, key=lambda name: first.shares[name])
        figure("importance", lambda: importances(found))
        figure("interactions", lambda: together(study, pairs, result.metrics))
        figure("parallel", lambda: parallel(study, result.metrics, order))
        figure("slice", lambda: slices(study, result.metrics))

    def figure(name: str, draw: Callable[[], Figure]) -> None:
        write(f"{name}.png", lambda: tracker.log_figure(f"{FOLDER}/{name}.png", draw()))

    def figures() -> None:
        from cosa_ray.tuning.figures import cost, curves, history, pareto

        figure("history", lambda: history(result))
        figure("curves", lambda: curves(entries, result))
        figure("cost", lambda: cost(result))
        if len(result.metrics) > 1:
            figure("pareto", lambda: pareto(result))

    def thresholds() -> None:
        from cosa_ray.tuning.figures import sentence, trajectories

        try:
            histories, read = read_thresholds(store, result.ranked())
        except Exception as error:
            log.debug("MLflow said: %s", store.said(error))
            gone = f"MLflow at {store.shown} did not answer when the sweep ended."
            figure("thresholds", lambda: sentence("Thresholds of all trials", gone))
            return
        figure("thresholds", lambda: trajectories(histories, result, read))

    write("its tables", tables)
    write(BEST_FILE, best)
    write("its figures", figures)
    write("its figures of settings", settings)
    write("its thresholds", thresholds)
    write(
        "its description", lambda: tracker.set_tags({"mlflow.note.content": description(result, sweep, found, pairs)})
    )
    log.debug("sweep %s: report made in %.1f s", result.name, time.monotonic() - begun)


def leaderboard(result: SweepResult) -> Table:
    """All trials, best first; those that do not count have no rank, and a front has a column of its own."""
    settings = list(dict.fromkeys(name for trial in result.trials for name in trial.values))
    repeated = _repeated(result)
    rows: list[dict[str, Any]] = []
    ranked = sorted(result.ranked(), key=lambda trial: not (trial.succeeded and trial.score is not None))
    for place, trial in enumerate(ranked, 1):
        row: dict[str, Any] = {"rank": place if trial.succeeded and trial.score is not None else None}
        if result.front:
            row["front"] = "yes" if trial.id in result.front else None
        # Named in full: MLflow's viewer takes 007 for a number.
        row |= {"trial": trial.name, "state": trial.state.replace("_", " ")}
        row |= {metric: trial.scores.get(metric) for metric in result.metrics}
        row |= {"step": trial.step, f"{result.hours_of}_hours": trial.hours}
        if repeated:
            row |= {"configuration": f"{trial.configuration:03d}", "seed": trial.seed}
        row |= _settings(trial, settings)
        row |= {"failure": trial.kind, "cause": trial.cause, "stopped_by": trial.stopped_by, "origin": trial.origin}
        rows.append({**row, "mlflow_run_id": trial.mlflow_run_id})
    best = {trial.id for trial in result.trials if trial is result.best or trial.id in result.front}
    return _table("Trials", rows, [place for place, trial in enumerate(ranked) if trial.id in best])


def by_configuration(result: SweepResult) -> Table:
    """Configurations, best mean first: mean and standard deviation (n - 1) over their repeats, and how many count."""
    settings = list(dict.fromkeys(name for trial in result.trials for name in trial.values))
    rows: list[dict[str, Any]] = []
    for number, group in grouped(result.trials).items():
        row: dict[str, Any] = {"rank": None, "configuration": f"{number:03d}"}
        counted = [trial.scores for trial in group if trial.succeeded and len(trial.scores) == len(result.metrics)]
        for metric in result.metrics:
            scores = [each[metric] for each in counted]
            row[f"{metric} mean"] = float(np.mean(scores)) if scores else None
            row[f"{metric} std"] = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
        row |= {"n": len(counted), "trials": " ".join(trial.id for trial in group)}
        row |= {f"{result.hours_of}_hours": sum(trial.hours for trial in group)}
        rows.append(row | _settings(group[0], settings))
    sign, mean = -1.0 if result.mode == "max" else 1.0, f"{result.metric} mean"
    rows.sort(key=lambda row: (row[mean] is None, sign * (row[mean] or 0.0), row["configuration"]))
    rows = [{**row, "rank": place if row["n"] else None} for place, row in enumerate(rows, 1)]
    best = f"{result.best.configuration:03d}" if result.best is not None else None
    return _table("Configurations", rows, [place for place, row in enumerate(rows) if row["configuration"] == best])


def as_csv(table: Table) -> str:
    """The table as comma-separated values, which MLflow shows as a table."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return stream.getvalue()


def as_html(result: SweepResult, tables: Sequence[Table]) -> str:
    """A page of tables, for MLflow's viewer and for a browser."""
    parts = []
    for table in tables:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
        rows = []
        for place, row in enumerate(table.rows):
            cells = "".join(map(_cell, row))
            rows.append(f"<tr{' class=best' if place in table.best else ''}>{cells}</tr>")
        parts.append(
            f"<h2>{table.title}</h2><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )
    title = html.escape(f"{result.name}: {_outcome(result)}")
    return f"<!doctype html><meta charset=utf-8><title>{title}</title>{_STYLE}<h1>{title}</h1>{''.join(parts)}\n"


def description(
    result: SweepResult, sweep: Sweep, found: Mapping[str, Importance], pairs: Mapping[str, Interactions]
) -> str:
    """A few lines of Markdown: what was searched, what came of it, how to run it, and what it cost."""
    orders = " and ".join(f"`{metric}` ({mode})" for metric, mode in result.metrics.items())
    names = ", ".join(f"`{name}`" for name in sweep.space)
    how = f"search {sweep.search}, scheduler {sweep.scheduler}" + (
        f", {sweep.repeats} seeds each" if sweep.repeats > 1 else ""
    )
    lines = [f"**Sweep {result.name}**: {_outcome(result)}"]
    if result.cause:
        lines.append(f"It ended because {result.cause}")
    best = result.best
    if best is not None and best.score is not None:
        values = ", ".join(f"`{name}={_shown(value)}`" for name, value in best.values.items())
        scores = ", ".join(f"{metric} {value:.4g}" for metric, value in best.scores.items())
        seeds = [t.score for t in result.trials if t.configuration == best.configuration and t.succeeded]
        known = [score for score in seeds if score is not None]
        mean = f" (mean of its {len(known)} seeds {np.mean(known):.4g})" if len(known) > 1 else ""
        lines.append(f"**Best**: trial {best.id} with {scores}{mean} at step {best.step}: {values}")
        if result.front:
            lines.append(f"**Pareto front**: trials {', '.join(result.front)}")
        file, name = shlex.quote(result.best_file or BEST_FILE), shlex.quote(result.name)
        lines.append(f"Train it: `cosa-ray train {file}`; with fresh seeds: `cosa-ray promote {name}`")
    for metric, each in found.items():
        share = each.shares or each.early
        if share:
            top = ", ".join(f"`{name}` {100 * value:.0f} %" for name, value in list(share.items())[:3])
            predicted = pairs[metric].predicted if metric in pairs else None
            worth = "" if predicted is None else f"; a forest predicts those left out with an R² of {predicted:.2f}"
            lines.append(f"**What matters** for {metric}: {top} of what single settings explain{worth}")
        if metric in pairs and pairs[metric].pairs:
            (first, second), together = next(iter(pairs[metric].pairs.items()))
            lines.append(f"**Together**: `{first}` and `{second}` {100 * together:.0f} % more of the forest's variance")
    lines.append(f"**Searched** on `{sweep.base}` by {orders} ({how}): {names}")
    if sweep.scheduler == "pbt":
        lines.append("Settings changed while the trials ran; those shown are the last")
    lines.append(f"**Cost**: {result.hours:.3g} {result.hours_of.upper()} hours in {duration(result.seconds)}")
    lines.append(f"Leaderboard, figures and best experiment: under Artifacts, in `{FOLDER}/`")
    return "\n\n".join(lines)


def read_thresholds(store: Store, trials: Sequence[TrialResult]) -> tuple[Histories, int]:
    """Points (step, value) of the trials' threshold metrics by metric and trial, and how many trials were read.

    The trials come in the order in which they are read, until READ_SECONDS are over. Raises what MLflow raises where it
    does not answer at all.
    """
    client = store.client()
    client.get_experiment_by_name(store.experiment)
    known = [trial for trial in trials if trial.mlflow_run_id is not None]

    def read(trial: TrialResult) -> dict[str, list[tuple[int, float]]]:
        names = [name for name in client.get_run(trial.mlflow_run_id).data.metrics if name.startswith(THRESHOLDS)]
        return {name: metric_course(client, str(trial.mlflow_run_id), name) for name in names}

    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="thresholds")
    waiting = {pool.submit(read, trial): trial for trial in known}
    try:
        for done in as_completed(waiting, READ_SECONDS):
            if done.exception() is None:  # else the run was deleted
                found[waiting[done].id] = done.result()
    except OutOfTime:
        log.warning("the thresholds of %s trials could not be read in %.0f s", len(known) - len(found), READ_SECONDS)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    names = sorted({name for courses in found.values() for name in courses})
    read_ids = [trial.id for trial in known if trial.id in found]
    return {name: {number: found[number].get(name, []) for number in read_ids} for name in names}, len(found)


def _outcome(result: SweepResult) -> str:
    words = {"finished": "ran to their end", "stopped_early": "ended early", "interrupted": "interrupted"}
    states = [trial.state for trial in result.trials]
    parts = [f"{states.count(state)} {word}" for state, word in words.items() if state in states]
    kinds = [trial.kind or "error" for trial in result.trials if trial.state == "failed"]
    if kinds:
        each = ", ".join(f"{kinds.count(kind)} {kind.replace('_', ' ')}" for kind in dict.fromkeys(kinds))
        parts.append(f"{len(kinds)} failed ({each})")
    return f"{result.state}, {len(states)} trials: {', '.join(parts) or 'none was started'}"


def _repeated(result: SweepResult) -> bool:
    return any(trial.configuration != int(trial.id) for trial in result.trials)


def _settings(trial: TrialResult, names: Sequence[str]) -> dict[str, Any]:
    """Settings as cells: one may be null, and one that a trial does not have is empty."""
    return {
        name: "null" if name in trial.values and trial.values[name] is None else trial.values.get(name)
        for name in names
    }


def _table(title: str, rows: Sequence[Mapping[str, Any]], best: Sequence[int]) -> Table:
    """Rows by column as text; six digits tell values apart."""
    columns = list(rows[0]) if rows else []
    cells = [["" if row[name] is None else _shown(row[name], 6) for name in columns] for row in rows]
    return Table(title, columns, cells, frozenset(best))


def _shown(value: Any, digits: int = 4) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_shown(each, digits) for each in value)}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    try:
        number = float(text)
    except ValueError:
        return f"<td{' class=long' if len(text) > 60 else ''}>{html.escape(text)}</td>"
    return f"<td class=n>{f'{number:#.4g}' if '.' in text else html.escape(text)}</td>"
