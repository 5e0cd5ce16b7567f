"""`cosa-ray ablate`: which part of the method does what, with seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cosa_ray.cli.output import count_bar, json_only, progress_line, say, say_tracked, table
from cosa_ray.cli.resume import command_to_resume
from cosa_ray.cli.train import AsJson, Set

if TYPE_CHECKING:
    from cosa_ray.ablation.study import Study


def ablate(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="Ablation file, by path or by the name of a shipped one.")],
    seeds: Annotated[int, typer.Option(help="Seeds of every row, from the base's seed on.")] = 3,
    base: Annotated[str | None, typer.Option(help="Experiment instead of the file's own base.")] = None,
    set_: Set = None,
    name: Annotated[str | None, typer.Option(help="Name of the study; its folder is STORAGE/NAME.")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="Protocol the last checkpoints are evaluated with; the runs' own without it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the study of this name.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: failed runs go on from their last checkpoint.")
    ] = False,
    no_track: Annotated[bool, typer.Option("--no-track", help="Without MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train rows that differ by one term, each with every seed, and say which differences noise explains.

    Rows of one seed share their classification warm-up. Compared are last checkpoints, never the best on val.

    Examples: cosa-ray ablate terms --seeds 3 --name first; cosa-ray ablate terms --base shapes_coexist --name second
    """
    from cosa_ray.config.names import default_name
    from cosa_ray.errors import UserError

    if resume and name is None:
        raise UserError("--resume needs the --name of the study to continue.")
    if retry_failed and not resume:
        raise UserError("--retry-failed is for a study that is continued; add --resume.")
    name = name or default_name("ablate", file)
    with json_only(as_json) as emit:
        from cosa_ray.ablation.plan import load_ablation
        from cosa_ray.ablation.study import Displays, run_ablation
        from cosa_ray.cli.tune import sweep_progress

        ablation, experiment = load_ablation(file, set_ or [], base)
        study = run_ablation(
            ablation,
            experiment,
            name=name,
            seeds=seeds,
            protocol=protocol,
            resume=resume,
            retry_failed=retry_failed,
            track=not no_track,
            displays=Displays(progress_line, sweep_progress, count_bar),
            say=say,
        )
        if study.state == "stopped":
            say(f"stopped; continue with: {command_to_resume(context, name)}")
        else:
            print_study(study, as_json)
        say_tracked(study.parent_run_id, study.tracking_uri, children=True)
        emit(study.as_json())


def print_study(study: Study, as_json: bool) -> None:
    """Print a study's rows with what each differs by from the row it follows."""
    from cosa_ray.ablation.numbers import seeds_words
    from cosa_ray.ablation.table import COLUMNS, table_rows

    if not as_json:
        table(
            f"{study.name}: {study.headline}, last checkpoint, {seeds_words(study.seeds)}", COLUMNS, table_rows(study)
        )
    for failure in study.failed:
        say(f"no result: {failure}")
    say(f"all metrics and figures: {study.folder}/{study.place}/")
