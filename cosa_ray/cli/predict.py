"""`cosa-ray predict` and `cosa-ray pseudo-labels`: masks from a trained model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cosa_ray.cli.output import count_bar, json_only, say
from cosa_ray.cli.train import AsJson

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A run, a checkpoint's folder, or models:/name@alias.")]
Out = Annotated[str, typer.Option("--out", help="Folder or URI for the masks; must hold none yet.")]
Network = Annotated[str | None, typer.Option(help="assignment or online; the better one without it.")]
Protocol = Annotated[
    str | None, typer.Option(help="Scales and sizes: a protocol's name or file; the run's own without it.")
]
Overlays = Annotated[bool, typer.Option("--overlays/--no-overlays", help="Also the pictures with the masks laid over.")]
Scores = Annotated[bool, typer.Option("--scores", help="Also class probabilities, as .npz of float16.")]
Checkpoint = Annotated[str, typer.Option(help="best or last, of a run.")]
Storage = Annotated[str, typer.Option(help="Folder or URI that holds the runs.")]
Workers = Annotated[int, typer.Option(min=1, help="Model actors on Ray.")]
Local = Annotated[bool, typer.Option("--local", help="In this process, without Ray.")]
NAMED = 10  # skipped pictures that are named one by one; predictions.json has them all


def predict(
    model: Model,
    images: Annotated[list[str] | None, typer.Argument(help="Files, folders or URIs.")] = None,
    out: Out = "predictions",
    dataset: Annotated[str | None, typer.Option(help="A dataset instead of pictures.")] = None,
    split: Annotated[str | None, typer.Option(help="The dataset's split.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="CSV or JSON of the pictures' classes, to restrict the masks.")
    ] = None,
    labels_given: Annotated[
        bool, typer.Option("--labels-given", help="Restrict the masks to the dataset's image-level labels.")
    ] = False,
    presence: Annotated[
        float, typer.Option(help="Leave out classes that the model's classifier gives less than this probability.")
    ] = 0.0,
    network: Network = None,
    protocol: Protocol = None,
    overlays: Overlays = True,
    scores: Scores = False,
    voc_test: Annotated[bool, typer.Option("--voc-test", help="Also results.tgz for the VOC test server.")] = False,
    checkpoint: Checkpoint = "best",
    storage: Storage = "runs",
    workers: Workers = 1,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Write a palette PNG at its own size for every picture; a broken one is named and skipped.

    Examples: cosa-ray predict voc-1 photos/ --out masks; cosa-ray predict models:/cosa@best a.jpg --local
    """
    _predict(
        as_json,
        "predict",
        model,
        images or [],
        out=out,
        dataset=dataset,
        split=split,
        labels=labels,
        labels_given=labels_given,
        presence=presence,
        network=network,
        protocol=protocol,
        overlays=overlays,
        scores=scores,
        voc_test=voc_test,
        which=checkpoint,
        storage=storage,
        workers=workers,
        local=local,
    )


def pseudo_labels(
    model: Model,
    out: Out = "pseudo-labels",
    dataset: Annotated[str, typer.Option(help="The dataset.")] = "datasets/voc",
    split: Annotated[str, typer.Option(help="Its split.")] = "train",
    source: Annotated[
        str, typer.Option(help="segmentation, or cam: cut by the run's policy, undecided pixels 255.")
    ] = ("segmentation"),
    network: Network = None,
    protocol: Protocol = None,
    overlays: Overlays = False,
    scores: Scores = False,
    checkpoint: Checkpoint = "best",
    storage: Storage = "runs",
    workers: Workers = 1,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Export a training set's pseudo-labels, restricted to its image-level labels, to train any supervised model.

    Example: cosa-ray pseudo-labels voc-1 --dataset datasets/voc --split train --out pseudo
    """
    _predict(
        as_json,
        "pseudo-labels",
        model,
        [],
        out=out,
        dataset=dataset,
        split=split,
        labels_given=True,
        source=source,
        network=network,
        protocol=protocol,
        overlays=overlays,
        scores=scores,
        which=checkpoint,
        storage=storage,
        workers=workers,
        local=local,
    )


def _predict(as_json: bool, title: str, model: str, images: list[str], **wanted: Any) -> None:
    from cosa_ray.errors import UserError

    for key, known in (("network", (None, "assignment", "online")), ("source", ("segmentation", "cam"))):
        if key in wanted and wanted[key] not in known:
            raise UserError(f"--{key} {wanted[key]}: choose {' or '.join(word for word in known if word)}.")
    with json_only(as_json) as emit:
        from cosa_ray.training.predicting import predict as run

        with count_bar(title) as show:
            result = run(model, images, show=show, **wanted)
        for name, reason in result.skipped[:NAMED]:
            say(f"skipped {name}: {reason}")
        if len(result.skipped) > NAMED:
            say(f"... and {len(result.skipped) - NAMED} more, see {result.out}/predictions.json")
        say(f"{result.images} masks of the {result.network} network: {result.out}")
        if result.archive:
            say(f"for the test server: {result.archive}")
        emit(result.as_json())
