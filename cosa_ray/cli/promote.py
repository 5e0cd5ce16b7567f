"""`cosa-ray promote`: from a sweep to a result that can be quoted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cosa_ray.cli.output import count_bar, json_only, say, say_tracked, table
from cosa_ray.cli.resume import command_to_resume
from cosa_ray.cli.train import AsJson, Set

if TYPE_CHECKING:
    from cosa_ray.tuning.promotion import Promotion


def promote(
    context: typer.Context,
    sweep: Annotated[str, typer.Argument(help="Name or folder of a sweep that has ended.")],
    top: Annotated[int | None, typer.Option(min=1, help="So many of the best configurations; 1 without it.")] = None,
    front: Annotated[bool, typer.Option("--front", help="The Pareto front of a sweep with several metrics.")] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each, with seeds that the sweep did not use; 3 without it.")
    ] = None,
    set_: Set = None,
    base: Annotated[
        str | None, typer.Option(help="Experiment whose length is meant; the one the sweep names without it.")
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="Evaluate under it (as evaluate does); may be given several times, and the first decides."),
    ] = None,
    register: Annotated[str | None, typer.Option(metavar="NAME", help="Register the winner under this name.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="With --register: alias of the version.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the promotion; SWEEP-promoted without it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue it; what is done is not done again.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: failed runs go on from their last checkpoint.")
    ] = False,
    storage: Annotated[str, typer.Option(help="Folder or URI that holds the sweep.")] = "runs",
    no_track: Annotated[bool, typer.Option("--no-track", help="Without MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a sweep's best configurations at full length with fresh seeds, evaluate them, register the winner.

    Full length: training.steps, warm-ups, evaluation and checkpoints as in the sweep's base experiment; --set changes
    them, and anything else that the sweep did not search.

    Examples: cosa-ray promote first --seeds 3 --protocol multi_scale; cosa-ray promote first --resume --register voc
    """
    from cosa_ray.errors import UserError

    if retry_failed and not resume:
        raise UserError("--retry-failed is for a promotion that is continued; add --resume.")
    with json_only(as_json) as emit:
        from cosa_ray.cli.tune import sweep_progress
        from cosa_ray.tuning.promote import promote_sweep

        result = promote_sweep(
            sweep,
            top=top,
            front=front,
            seeds=seeds,
            overrides=set_ or [],
            base=base,
            protocols=protocol or [],
            register=register,
            aliases=alias or [],
            name=name,
            resume=resume,
            retry_failed=retry_failed,
            storage=storage,
            track=not no_track,
            sweeping=sweep_progress,
            counting=count_bar,
            say=say,
        )
        if result.state == "stopped":
            say(f"stopped; continue with: {command_to_resume(context, result.name)}")
        else:
            print_promotion(result, as_json)
        say_tracked(result.parent_run_id, result.tracking_uri, children=True)
        emit(result.as_json())


def print_promotion(result: Promotion, as_json: bool) -> None:
    """Print a promotion's configurations best first, what the winner is, and its row."""
    names = result.head()[1 : 4 + len(result.columns)]
    rows = [result.row(each) for each in result.configurations]
    if not as_json:
        table(
            f"{result.name}: by the mean of {result.metric} over seeds",
            ["configuration", *(name.strip("`") for name in names)],
            [[each.changes(), *row[1 : 1 + len(names)]] for each, row in zip(result.configurations, rows, strict=True)],
        )
    for configuration in result.configurations:
        for run in configuration.runs:
            if run.state != "finished":
                say(f"run {run.name} {run.state}: {run.cause or 'no cause known'} (folder {run.folder})")
    if result.winner is None or result.model is None:
        say(f"no configuration has {result.metric}, so there is no winner")
        return
    spread = result.winner.spread(result.metric)
    assert spread is not None
    ahead = ""
    if result.margin is not None:
        difference, error = result.margin
        known = "unknown with one seed" if error is None else f"standard error over seeds {error:.4f}"
        ahead = f", {abs(difference):.4f} better than the next with all its seeds ({known})"
    say(f"winner: {result.metric} {spread.shown()} over {spread.count} seeds{ahead}")
    say(f"its best run: {result.model.name} ({result.model.metrics[result.metric]:.4f}; quote the mean, not this)")
    if (version := result.registered) is not None:
        of = "it" if version["mlflow_run_id"] == result.model.mlflow_run_id else "another of its runs"
        say(f"{of} is registered as {version['uri']}, version {version['version']}")
    say(f"table and details: {result.folder}/results.md, promoted.json; the row:")
    if not as_json:
        print(result.markdown_row())
