"""Run a study: warm-ups, rows, an evaluation of every run's last checkpoint, and what the differences are worth."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa_ray.ablation.courses import Courses, During
from cosa_ray.ablation.numbers import Difference, Value, difference_of, value_of
from cosa_ray.ablation.plan import Ablation, Plan, WarmUp, plan_ablation
from cosa_ray.ablation.table import description, markdown
from cosa_ray.config.protocol import Protocol, load_protocol, own_protocol
from cosa_ray.config.schema import Config
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.evaluation.naming import best_metric
from cosa_ray.training.storage import RunFolder
from cosa_ray.tuning.check import check_sweep
from cosa_ray.tuning.displays import Counting, Sweeping, Training, silent
from cosa_ray.tuning.folder import SWEEP_FILE, check_folder, check_sweep_name, sweep_files
from cosa_ray.tuning.metrics import sweep_metrics
from cosa_ray.tuning.sweep import divide, run_sweep

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from cosa_ray.reporting.evaluated import Evaluated
    from cosa_ray.tuning.results import SweepResult

log = logging.getLogger(__name__)
RESULT_FILE, TABLE_FILE = "ablation.json", "ablation.md"
PLACE = "ablation"  # folder of these and of the figures, in the study's and in MLflow


@dataclass(frozen=True)
class Displays:
    """What shows how far everything is; None shows nothing."""

    training: Training = silent
    sweeping: Sweeping = silent
    counting: Counting = silent


@dataclass(frozen=True)
class RowResult:
    """A row: what it sets, the row it follows, its runs by seed, its metrics, and what they differ by from that row's.

    metrics are those of the evaluation of the last checkpoint, by name; differences of the same.
    """

    name: str
    sets: dict[str, Any]
    after: str | None
    runs: dict[int, str]
    metrics: dict[str, Value]
    differences: dict[str, Difference]


@dataclass(frozen=True)
class Study:
    """What a study came to: finished, or stopped before all runs had ended.

    headline: the metric of the table. during: by metric, values and differences at the evaluations on the way. place:
    the folder of tables and figures, in the study's and in MLflow.
    """

    name: str
    folder: str
    state: str
    headline: str
    seeds: list[int]
    rows: list[RowResult] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    during: dict[str, list[During]] = field(default_factory=dict)
    place: str = PLACE
    parent_run_id: str | None = None
    tracking_uri: str | None = None

    @property
    def shared(self) -> list[str]:
        """Metrics of every row that has any, the headline first."""
        known = [row.metrics for row in self.rows if row.metrics]
        names = [name for name in known[0] if all(name in metrics for metrics in known)] if known else []
        return sorted(names, key=lambda name: (name != self.headline, name))

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


def run_ablation(
    ablation: Ablation,
    base: Config,
    *,
    name: str,
    seeds: int,
    protocol: str | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    track: bool = True,
    displays: Displays | None = None,
    say: Callable[[str], None] = log.info,
) -> Study:
    """Train every row with every seed, evaluate the last checkpoints, and compare; the function of the verb.

    Rows of one seed that agree on the warm-up go on from one checkpoint of it. The rows are a sweep called `name`, so
    `resume` goes on after a stop or a kill, with `retry_failed` also with runs that failed. protocol: what is evaluated
    with, None is the runs' own over the whole split. Results go into the sweep's folder, those under a protocol into a
    folder of its name there. Raises UserError before anything starts, RunFailed when no run succeeded.
    """
    from cosa_ray.training.driver import resolve
    from cosa_ray.training.evaluating import check_protocols
    from cosa_ray.training.ray_train import ray_cluster
    from cosa_ray.training.runs import read_run

    displays = displays or Displays()
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: a study has at least one seed.")
    read = load_protocol(protocol) if protocol is not None else None
    if read is not None and not read.scores_plain:
        raise UserError(
            f"--protocol {read.name}: rows are compared by the assignment network's plain mIoU, which it does not "
            "score; name one that does."
        )
    plan = plan_ablation(ablation, resolve(base, track), name, seeds)
    check_sweep(plan.sweep, plan.base, f"study {name}")
    check_protocols([read or own_protocol(plan.base)], plan.base)
    sweep_metrics(plan.sweep, plan.base, f"study {name}")
    storage = plan.base.storage.rstrip("/")
    folder = RunFolder(f"{storage}/{check_sweep_name(name)}")
    swept = folder.exists(SWEEP_FILE)
    if swept and not resume:
        raise UserError(
            f"study {name} exists already in {storage}: continue it with --resume, or choose another --name."
        )
    if resume and not swept and not any(read_run(f"{storage}/{each.name}") for each in plan.warm_ups):
        raise UserError(f"there is no study {name} in {storage} to resume; start it without --resume.")
    # What the sweep would refuse, before the warm-ups are trained.
    check_folder(folder, name, sweep_files(plan.sweep, plan.base), swept)
    say(f"{name}: {len(ablation.rows)} rows with seeds {base.seed} to {base.seed + seeds - 1}")
    for line in plan.said:
        say(line)
    with ray_cluster():
        divide(plan.sweep, plan.base, len(plan.points))
        for warm_up in plan.warm_ups:
            if not _warm_up(warm_up, track, displays):
                return Study(name, f"{storage}/{name}", "stopped", "", [])
        with displays.sweeping() as show:
            result = run_sweep(
                plan.sweep,
                plan.base,
                name=name,
                resume=swept,
                retry_failed=retry_failed and swept,
                track=track,
                show=show,
                say=say,
            )
        if result.state == "stopped":
            return Study(name, result.folder, "stopped", result.metric, [])
        evaluated = _evaluate(result, protocol, read, track, displays, say)
    study = sum_up(ablation, plan, result, evaluated, f"{PLACE}/{read.name}" if read else PLACE)
    courses = Courses(study, result.folder.rpartition("/")[0])
    study = replace(study, during=courses.during())
    with tempfile.TemporaryDirectory(prefix="cosa-ray-ablation-") as local:
        _write(Path(local), study, courses)
        RunFolder(result.folder).put(Path(local), study.place)
        _log(plan.base, study, Path(local))
    return study


def _write(folder: Path, study: Study, courses: Courses) -> None:
    """Tables and figures of a study into a local folder; a figure that cannot be drawn costs a warning."""
    from cosa_ray.ablation.figures import courses_figure, differences_figure, during_figure

    (folder / RESULT_FILE).write_text(json.dumps(study.as_json(), indent=1), encoding="utf-8")
    (folder / TABLE_FILE).write_text(markdown(study), encoding="utf-8")

    def draw(file: str, make: Callable[[], Figure | None]) -> None:
        try:
            if (figure := make()) is not None:
                figure.savefig(folder / file)
        except Exception as error:
            log.warning("study %s lacks %s: %s", study.name, file, error)

    def over_steps() -> Figure | None:
        charts = courses.charts()
        return courses_figure(study, charts, courses.names) if charts else None

    draw("differences.png", lambda: differences_figure(study))
    draw("courses.png", over_steps)
    draw("during.png", lambda: during_figure(study) if study.during else None)


def _log(base: Config, study: Study, folder: Path) -> None:
    """Put the study's files into its MLflow run; never fails."""
    if study.parent_run_id is None:
        return
    from cosa_ray.tracking.evaluations import log_evaluation
    from cosa_ray.tracking.store import Store, tracking_uri

    store = Store(tracking_uri(base), base.tracking.experiment)
    log_evaluation(
        store,
        study.name,
        study.folder,
        run_id=study.parent_run_id,
        metrics={},
        step=0,
        artifacts=folder,
        place=study.place,
        # In place of the sweep's, whose best trial and importance are not what a study asks.
        tags={"mlflow.note.content": description(study)},
    )


def _warm_up(warm_up: WarmUp, track: bool, displays: Displays) -> bool:
    """Train what rows share, unless it is there; False when it was stopped on the way."""
    from cosa_ray.training.driver import train
    from cosa_ray.training.runs import read_run

    there = read_run(f"{warm_up.config.storage.rstrip('/')}/{warm_up.name}")
    with displays.training() as show:
        done = train(warm_up.config, name=warm_up.name, resume=there is not None, track=track, show=show)
    return done.state == "finished"


def _evaluate(
    result: SweepResult,
    word: str | None,
    protocol: Protocol | None,
    track: bool,
    displays: Displays,
    say: Callable[[str], None],
) -> dict[str, Evaluated]:
    """The evaluation of every finished run's last checkpoint, by trial; made unless it is there."""
    from cosa_ray.training.evaluating import evaluate_run

    found: dict[str, Evaluated] = {}
    for trial in result.trials:
        if trial.state != "finished":
            continue
        evaluated = _evaluated(trial.folder, protocol)
        if evaluated is None:
            title = f"evaluate {trial.name}"
            with displays.counting(title) as count:
                report = evaluate_run(trial.folder, protocol=word, which="last", track=track, show=count)
            plain = report.metrics.get(f"{report.prefix}/miou")
            say(title + ("" if plain is None else f": {report.prefix}/miou {plain:.4f}"))
            evaluated = _evaluated(trial.folder, protocol)
            assert evaluated is not None
        found[trial.id] = evaluated
    return found


def _evaluated(folder: str, protocol: Protocol | None) -> Evaluated | None:
    """The evaluation of a run's last checkpoint under a protocol (None: its own) that is there already."""
    from cosa_ray.reporting.evaluated import Evaluated
    from cosa_ray.training.evaluating import evaluation_of
    from cosa_ray.training.runs import find_run

    run = find_run(folder)
    found = evaluation_of(run, run.last(), protocol or own_protocol(run.config()))
    return None if found is None else Evaluated(run, *found)


def sum_up(
    ablation: Ablation, plan: Plan, result: SweepResult, evaluated: Mapping[str, Evaluated], where: str = PLACE
) -> Study:
    """Rows with values and differences, from the evaluations of the runs of a sweep whose points the plan lists.

    where: the study's `place`.
    """
    if not evaluated:
        raise RunFailed(f"study {result.name}: no run has come to an evaluation (folder {result.folder}).")
    at = {trial.id: plan.points[trial.configuration] for trial in result.trials}
    prefix = next(iter(evaluated.values())).report.prefix
    runs: list[dict[int, str]] = [{} for _ in ablation.rows]
    measured: list[dict[str, dict[int, float]]] = [{} for _ in ablation.rows]
    images: list[dict[str, dict[int, np.ndarray]]] = [{} for _ in ablation.rows]
    for trial in result.trials:
        row, seed = at[trial.id]
        runs[row][seed] = trial.name
        if (found := evaluated.get(trial.id)) is None:
            continue
        for key, value in found.report.metrics.items():
            if not key.endswith(("_ci_low", "_ci_high")):
                measured[row].setdefault(key, {})[seed] = value
        for key, totals in _per_image(found).items():
            images[row].setdefault(f"{prefix}/{key}", {})[seed] = totals
    rows = []
    for place, arm in enumerate(ablation.rows):
        above = ablation.before(place)
        metrics = {key: mean for key, by_seed in measured[place].items() if (mean := value_of(by_seed)) is not None}
        differences: dict[str, Difference] = {}
        if above is not None:
            for key in metrics:
                counts = images[above].get(key), images[place].get(key)
                both = (counts[0], counts[1]) if counts[0] and counts[1] else None
                difference = difference_of(measured[above].get(key, {}), measured[place][key], both)
                differences |= {key: difference} if difference is not None else {}
        after = None if above is None else ablation.rows[above].name
        rows.append(RowResult(arm.name, dict(arm.set), after, runs[place], metrics, differences))
    failed = [f"{trial.name}: {trial.cause or trial.state}" for trial in result.trials if trial.id not in evaluated]
    seeds = sorted({seed for _, seed in plan.points})
    headline = best_metric(plan.base, prefix)
    return Study(
        result.name,
        result.folder,
        "finished",
        headline,
        seeds,
        rows,
        failed,
        place=where,
        parent_run_id=result.parent_run_id,
        tracking_uri=result.tracking_uri,
    )


def _per_image(evaluated: Evaluated) -> dict[str, np.ndarray]:
    """Totals per image (N, 3, K), images by name, of an evaluation's mIoUs."""
    import numpy as np

    ids, totals = evaluated.per_image()
    order = np.argsort(ids)
    return {key: table[order] for key, table in totals.items()}
