"""Predict pictures with a trained model: find everything first, then a Ray Data pipeline or this process."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cosa_ray.config.protocol import NetworkName, in_run_protocol, load_protocol
from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.folder import labels_by_image
from cosa_ray.data.remote import Place, place
from cosa_ray.data.voc import CLASSES as VOC_CLASSES
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.evaluation.batch import MASKS, BatchPrediction, Item, Outcome, items_of, items_of_split
from cosa_ray.evaluation.description import Description, is_model, read_config
from cosa_ray.evaluation.prediction import MaskSource
from cosa_ray.training.models import find_model
from cosa_ray.training.ray_train import ray_cluster

REPORT, ARCHIVE = "predictions.json", "results.tgz"
_VOC_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
Show = Callable[[int, int, int], None]


@dataclass(frozen=True)
class PredictResult:
    """What was written where; skipped: (picture, reason)."""

    out: str
    model: str
    network: str
    protocol: dict[str, Any]
    presence: float
    images: int
    skipped: list[tuple[str, str]]
    archive: str | None = None

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


def predict(
    model: str,
    images: Sequence[str] = (),
    *,
    out: str,
    dataset: str | None = None,
    split: str | None = None,
    labels: str | None = None,
    labels_given: bool = False,
    network: NetworkName | None = None,
    protocol: str | None = None,
    source: MaskSource = "segmentation",
    overlays: bool = True,
    scores: bool = False,
    presence: float = 0.0,
    voc_test: bool = False,
    which: str = "best",
    storage: str = "runs",
    workers: int = 1,
    local: bool = False,
    show: Show | None = None,
) -> PredictResult:
    """Write a palette PNG at its own size for every picture, and what else is asked for, under the folder or URI `out`.

    model: a run, a checkpoint's folder, or `models:/name@alias`. images: files, folders and URIs; or `split` of
    `dataset`. labels: a CSV or JSON file of the pictures' classes; labels_given: the dataset's own; both restrict the
    masks. network: None is the better one. protocol: scales, sizes; None is the run's own. source: the segmentation,
    or the CAMs by the run's pseudo-label policy. presence: where a picture's classes are not known, those that the
    network's classifier gives less than this probability are left out. voc_test: also the archive that the VOC test
    server takes. show is told how many pictures are done, of how many, how many were skipped. Raises UserError before
    anything is written; RunFailed when no picture could be predicted.
    """
    reference = find_model(model, which=which, storage=storage)
    with reference.open() as folder:
        if not is_model(folder):
            raise UserError(
                f"{model} holds no trained model; give a run, a checkpoint's folder, or models:/name@alias."
            )
        config = read_config(folder)
        described = Description.read(folder)
    if source == "segmentation" and described.step <= config.training.warmup_iters:
        raise UserError(
            f"{model} is at step {described.step}, before its decoder is trained ({config.training.warmup_iters} steps "
            "of warm-up): it has CAMs only; ask for pseudo-labels --source cam."
        )
    if not 0 <= presence < 1:
        raise UserError(f"--presence {presence:g}: give a probability from 0, which leaves out no class, to below 1.")
    if voc_test and tuple(described.classes) != VOC_CLASSES:
        raise UserError(
            f"--voc-test needs the 20 classes of PASCAL VOC, and {model} has {len(described.classes)} others."
        )
    chosen = load_protocol(protocol) if protocol else in_run_protocol(config)
    items = _items(images, dataset, split, labels, labels_given, described.classes)
    if voc_test and len({item.name.rpartition("/")[2] for item in items}) < len(items):
        raise UserError(
            "--voc-test needs pictures of different names, because the archive has no folders; rename them."
        )
    if source == "cam" and any(item.labels is None for item in items):
        raise UserError("pseudo-labels from CAMs need the pictures' classes: give --labels FILE, or a dataset's split.")
    target = _free(out)
    wanted = BatchPrediction(
        items=items,
        open_model=reference.open,
        protocol=chosen,
        out=target.uri if target.local is None else str(target.local),
        network=network,
        source=source,
        overlays=overlays,
        scores=scores,
        presence=presence,
        dataset=_absolute(dataset),
        split=split,
    )
    outcomes = list(_shown(_run(wanted, config, workers, local), len(items), show))
    skipped = [(outcome.name, outcome.reason) for outcome in outcomes if outcome.reason]
    if len(skipped) == len(items):
        raise RunFailed(
            f"none of the {len(items)} pictures could be predicted; the first, {skipped[0][0]}: {skipped[0][1]}."
        )
    used = network or described.better_network
    result = PredictResult(
        out=wanted.out,
        model=reference.uri,
        network=used,
        protocol=chosen.model_dump(mode="json"),
        presence=presence,
        images=len(outcomes) - len(skipped),
        skipped=skipped,
    )
    classes = {
        o.name: {"classes": list(o.classes), "height": o.height, "width": o.width} for o in outcomes if not o.reason
    }
    target.child(REPORT).write((json.dumps({**result.as_json(), "pictures": classes}, indent=1) + "\n").encode())
    return replace(result, archive=_voc_archive(target, outcomes)) if voc_test else result


def _items(
    images: Sequence[str],
    dataset: str | None,
    split: str | None,
    labels: str | None,
    labels_given: bool,
    classes: Sequence[str],
) -> list[Item]:
    """What is to be predicted, with the classes that restrict it."""
    if (dataset is None) == (not images):
        raise UserError(
            "give pictures (files, folders, URIs), or a dataset's split with --dataset and --split; one of the two."
        )
    if dataset is None:
        if labels_given or split:
            raise UserError(
                "--labels-given and --split are a dataset's; add --dataset, or give the classes with --labels FILE."
            )
        items = items_of([image if "://" in image else str(Path(image).expanduser().absolute()) for image in images])
        return items if labels is None else _labelled(items, labels, classes)
    if labels is not None:
        raise UserError("--labels is for pictures; a dataset has labels of its own, see --labels-given.")
    opened = open_dataset(dataset)
    if labels_given and list(opened.classes) != list(classes):
        raise UserError(f"{dataset} has other classes than the model; predict it without --labels-given.")
    return items_of_split(opened.split(split or ""), labels_given=labels_given)


def _labelled(items: Sequence[Item], labels: str, classes: Sequence[str]) -> list[Item]:
    known = labels_by_image(labels)
    found = []
    for item in items:
        names = known.get(item.name, known.get(item.name.rpartition("/")[2]))
        if names is None:
            raise UserError(f"{labels} says nothing of {item.name}; add a line, or predict without --labels.")
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise UserError(
                f"{labels}: {item.name} is {unknown[0]!r}, which the model does not know; it knows "
                f"{', '.join(classes)}."
            )
        found.append(item._replace(labels=tuple(sorted(classes.index(name) for name in names))))
    return found


def _absolute(uri: str | None) -> str | None:
    return uri if uri is None or "://" in uri or "::" in uri else str(Path(uri).expanduser().absolute())


def _free(out: str) -> Place:
    """The folder to write into. Raises UserError when predictions are in it already."""
    target = place(out)
    if target.child(REPORT).exists() or target.child(MASKS).names():
        raise UserError(f"{out} holds predictions already; choose another --out, nothing was changed.")
    target.make_folder()
    return target


def _run(wanted: BatchPrediction, config: Config, workers: int, local: bool) -> Iterator[Outcome]:
    if local:
        yield from replace(wanted, device="cuda" if torch.cuda.is_available() else "cpu").here()
        return
    import ray

    with ray_cluster():
        cluster = ray.cluster_resources()
        gpus = config.resources.gpus_per_worker if cluster.get("GPU", 0) else 0.0
        # The tasks that read and write need a little beside the model actors, or they would wait for ever.
        cpus = int((cluster.get("CPU", 1.0) - 0.3) / workers * 100) / 100
        if cpus < 0.1 or workers * gpus > cluster.get("GPU", 0):
            raise UserError(
                f"{workers} workers do not fit the cluster's {cluster.get('CPU', 0):g} CPUs and "
                f"{cluster.get('GPU', 0):g} GPUs; lower --workers."
            )
        wanted = replace(wanted, device="cuda" if gpus else "cpu", threads=max(1, round(cpus)))
        try:
            yield from wanted.on_ray(workers=workers, cpus=cpus, gpus=gpus)
        except ray.exceptions.RayTaskError as error:
            raise RunFailed(f"the pipeline failed: {type(error.cause).__name__}: {error.cause}") from error


def _shown(outcomes: Iterator[Outcome], total: int, show: Show | None) -> Iterator[Outcome]:
    done = skipped = 0
    for outcome in outcomes:
        done, skipped = done + 1, skipped + bool(outcome.reason)
        if show is not None:
            show(done, total, skipped)
        yield outcome


def _voc_archive(target: Place, outcomes: Sequence[Outcome]) -> str:
    """The archive of the test server: one palette PNG a picture under the folder of a comp6 entry (external data)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for outcome in outcomes:
            if outcome.reason:
                raise RunFailed(
                    f"the test server wants every picture, and {outcome.name} was skipped: {outcome.reason}; the masks "
                    f"of the others are in {target.uri}."
                )
            data = target.child(MASKS).child(f"{outcome.name}.png").read()
            entry = tarfile.TarInfo(f"{_VOC_FOLDER}/{outcome.name.rpartition('/')[2]}.png")
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    target.child(ARCHIVE).write(stream.getvalue())
    return target.child(ARCHIVE).uri
