"""Evaluate a checkpoint of a run outside the run: in this process, or on the workers of a Ray cluster."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cosa_ray.config.load import apply_overrides
from cosa_ray.config.protocol import Protocol, load_protocol, own_protocol
from cosa_ray.config.schema import Config
from cosa_ray.data.card import CARD, DatasetCard
from cosa_ray.data.dataset import Split, open_dataset
from cosa_ray.errors import RunFailed, UserError
from cosa_ray.evaluation.crf import refine_here, refine_on_ray, require_crf
from cosa_ray.evaluation.description import DESCRIPTION, Description
from cosa_ray.evaluation.evaluate import check_masks, evaluation_order, main_thresholds
from cosa_ray.evaluation.inference import autocast_dtype
from cosa_ray.evaluation.naming import plain_name, protocol_prefix
from cosa_ray.evaluation.panels import Tile
from cosa_ray.evaluation.report import RESULT, SHOWN, Findings, Report, summarise, write_report
from cosa_ray.evaluation.scorer import RunCrf, Scorer
from cosa_ray.evaluation.tally import Tally
from cosa_ray.evaluation.trained import load_trained
from cosa_ray.training.autoscaler import to_come
from cosa_ray.training.distributed import join_workers, torch_settings
from cosa_ray.training.models import choose_checkpoint
from cosa_ray.training.ray_train import needs_ray, ray_cluster
from cosa_ray.training.room import alive_nodes, cpus_per_worker, without_cpus
from cosa_ray.training.runs import Run, find_run
from cosa_ray.training.storage import CheckpointEntry, RunFolder

if TYPE_CHECKING:
    from cosa_ray.tracking.store import Store

EVALUATIONS = "evaluations"
_CHUNK = 256  # images of one task at most: a progress bar that moves, and little to do again after a failure


@dataclass(frozen=True)
class _Task:
    """What is evaluated: everything a worker needs to do a part of it."""

    source: str
    dataset: str
    split: str
    protocol: Protocol
    prefix: str
    config: Config
    cpus: float | None = None


def evaluate_run(
    run: str,
    *,
    protocol: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    which: str = "best",
    storage: str = "runs",
    workers: int | None = None,
    local: bool = False,
    track: bool = True,
    show: Callable[[int, int], None] | None = None,
) -> Report:
    """Evaluate both networks of a run's `best` or `last` checkpoint under a protocol; the function of the verb.

    The run may still be training: its newest registered checkpoints are read. The report is written into the run's
    folder and logged to its MLflow run.

    run: name, folder or MLflow run id. protocol: name of a shipped one or a YAML file; None is the run's own, over the
    whole split. workers: processes on Ray; None is the run's own number. local: in this process, without Ray. show is
    told how many images are done, and of how many. Raises UserError when something does not fit.
    """
    found = find_run(run, storage)
    entry, task = _prepare(found, protocol, dataset, split, which, workers)
    if track and found.record.tracking_uri is not None:
        from cosa_ray.tracking.refusal import check_access

        check_access(_store(task.config))
    opened = open_dataset(task.dataset)
    target = opened.split(task.split)
    order, _ = evaluation_order(len(target), task.protocol.subset, 0, 1)
    thresholds = main_thresholds(_description(found, entry).thresholds)
    segment = entry.step > task.config.training.warmup_iters
    ids = target.ids()

    def findings(tally: Tally) -> Findings:
        named = {index: ids[index] for index in order}
        return Findings(tally, opened.classes, opened.card.palette, thresholds, segment, named)

    on_ray = not local and (task.protocol.crf is not None or needs_ray(task.config))
    with _workers_on_ray(task) if on_ray else _worker_here(task) as (count, draw):
        tally = None
        for part in count(_chunks(order, task)):
            if tally is None:
                tally = part
            else:
                tally.merge(part)
            if show is not None:
                show(int(tally.images.item()), len(order))
        if tally is None:
            raise UserError(f"split {task.split} of {task.dataset} is empty; evaluate on another.")
        result = findings(tally)
        ranking = [index for index, _ in result.ranking()]
        tiles = draw(sorted({*ranking[:SHOWN], *ranking[-SHOWN:]}))
    report = summarise(
        result,
        task.protocol,
        task.prefix,
        name=found.record.name,
        checkpoint=entry.name,
        step=entry.step,
        dataset=task.dataset,
        split=target.name,
    )
    return _keep(found, task.config, report, result, tiles, track)


def draw_images(found: Run, report: Report, ids: Sequence[str], metric: str) -> dict[str, Tile]:
    """What the networks of an evaluated checkpoint make of some of its images, once more and in this process; by id.

    metric: the mIoU whose prediction is a tile's segmentation, before any CRF; the assignment network's plain one where
    it is of CAMs. Raises UserError when the checkpoint, the dataset or an image is no longer there.
    """
    places = {name: place for place, name in enumerate(open_dataset(report.dataset).split(report.split).ids())}
    gone = [name for name in ids if name not in places]
    if gone:
        raise UserError(f"split {report.split} of {report.dataset} no longer has the image {gone[0]}; evaluate again.")
    protocol = Protocol.model_validate(
        report.protocol
        | {
            "networks": ["online" if metric.startswith("miou_online") else "assignment"],
            "labels": [next((use for use in ("given", "predicted") if f"labels_{use}" in metric), "none")],
            "crf": None,
        }
    )
    changes = {"data.dataset": report.dataset, "data.val_split": report.split, "data.loader_processes": 0}
    config = apply_overrides(found.config(), changes, found.record.name)
    source = f"{found.folder.uri}/{report.checkpoint}"
    part = _Part(_Task(source, report.dataset, report.split, protocol, report.prefix, config), join_workers().device)
    tiles = part.tiles([places[name] for name in ids])
    return {tile.name: tile for tile in tiles.values()}


def _prepare(
    found: Run, protocol: str | None, dataset: str | None, split: str | None, which: str, workers: int | None
) -> tuple[CheckpointEntry, _Task]:
    """Find every mistake before anything starts."""
    entry = choose_checkpoint(found, which)
    config = found.config()
    chosen = load_protocol(protocol) if protocol else own_protocol(config)
    if chosen.crf is not None:
        require_crf(f"protocol {chosen.name}")
    name = split or chosen.split or config.data.val_split
    changes: dict[str, Any] = {"data.val_split": name}
    if dataset:
        changes["data.dataset"] = dataset if "://" in dataset or "::" in dataset else str(Path(dataset).absolute())
    if workers:
        changes |= {"workers": workers, "training.batch_size": max(workers, config.training.batch_size)}
        changes["training.accumulate"] = 1
    config = apply_overrides(config, changes, found.record.name)
    opened = open_dataset(config.data.dataset)
    target = opened.split(name)
    check_masks(target)
    trained_on = _description(found, entry).classes
    if list(opened.classes) != trained_on:
        raise UserError(
            f"{config.data.dataset} has the classes {', '.join(opened.classes)}, but run {found.record.name} was "
            f"trained on {', '.join(trained_on)}; choose a dataset of the same classes."
        )
    prefix = protocol_prefix(chosen, name, len(target))
    if not _is_own(found, entry, config.data.dataset, target):
        prefix = f"{plain_name(config.data.dataset.rstrip('/').rpartition('/')[2])}.{prefix}"
    before = found.folder.read_text(f"{_place(prefix, entry.step)}/{RESULT}")
    if before is not None and Protocol.model_validate(json.loads(before)["protocol"]) != chosen:
        raise UserError(
            f"run {found.record.name} was evaluated as {prefix} under another protocol of that name; rename the "
            "protocol's file, because metrics carry it."
        )
    return entry, _Task(f"{found.folder.uri}/{entry.name}", config.data.dataset, name, chosen, prefix, config)


def check_protocols(protocols: Sequence[Protocol], experiment: Config) -> None:
    """Refuse, before anything is trained, a protocol that its runs could not be evaluated with.

    Raises UserError for a CRF that is not installed, and a split that is not there or has no masks.
    """
    for protocol in protocols:
        if protocol.crf is not None:
            require_crf(f"protocol {protocol.name}")
        check_masks(open_dataset(experiment.data.dataset).split(protocol.split or experiment.data.val_split))


def _is_own(found: Run, entry: CheckpointEntry, dataset: str, target: Split) -> bool:
    """True for the dataset the run was trained with, wherever it lies now: metrics of another one say which."""
    if dataset == found.config().data.dataset:
        return True
    text = found.folder.read_text(f"{entry.name}/{CARD}")
    own = DatasetCard.model_validate_json(text).splits.get(target.name) if text else None
    return own is not None and own.shards == target.card.shards


def read_evaluations(run: Run) -> Iterator[tuple[str, Report]]:
    """Every evaluation in a run's folder, by prefix and then newest first: (where it lies below the folder, report)."""
    for name in run.folder.folders(EVALUATIONS):
        for step in reversed(run.folder.folders(f"{EVALUATIONS}/{name}")):
            place = f"{EVALUATIONS}/{name}/{step}"
            text = run.folder.read_text(f"{place}/{RESULT}")
            if text is not None:  # a kill can leave a folder without it
                yield place, Report(**json.loads(text))


def evaluation_of(run: Run, entry: CheckpointEntry, protocol: Protocol) -> tuple[str, Report] | None:
    """(where it lies, report) of a checkpoint's evaluation on the run's own data under a protocol; None without one."""
    data = run.config().data
    wanted = (entry.name, data.dataset, protocol.split or data.val_split)
    for place, report in read_evaluations(run):
        same = (report.checkpoint, report.dataset, report.split) == wanted
        if same and Protocol.model_validate(report.protocol) == protocol:
            return place, report
    return None


def _place(prefix: str, step: int) -> str:
    """Where an evaluation lies, below the run's folder and among its artifacts."""
    return f"{EVALUATIONS}/{prefix.replace('/', '.')}/step_{step:08d}"


def _description(found: Run, entry: CheckpointEntry) -> Description:
    """What the checkpoint says of itself, without fetching its weights."""
    text = found.folder.read_text(f"{entry.name}/{DESCRIPTION}")
    if text is None:
        raise UserError(f"the checkpoint {entry.name} of run {found.record.name} is not there; evaluate again.")
    return Description.parse(text)


class _Part:
    """Evaluates parts of a task in one process; on Ray, an actor."""

    def __init__(self, task: _Task, device: torch.device) -> None:
        config = task.config
        if (
            device.type == "cpu"
        ):  # the network takes all there is: processes that decode would only start, chunk by chunk
            config = apply_overrides(config, {"data.loader_processes": 0})
        self.task, self.device = task, device
        self.split: Split = open_dataset(task.dataset).split(task.split)
        source = RunFolder(task.source)
        if not source.exists():
            raise UserError(f"the checkpoint {task.source} was replaced by a newer one meanwhile; evaluate again.")
        with source.local_copy("") as folder:
            trained = load_trained(folder, device, task.protocol)
        self.scorer = Scorer(
            trained.online,
            trained.assignment,
            task.protocol,
            config,
            thresholds=trained.description.thresholds,
            segment=trained.segments,
            device=device,
            autocast=autocast_dtype(config, device),
        )

    def count(self, indices: Sequence[int], places: Sequence[int], run_crf: RunCrf | None = None) -> Tally:
        """The counts of some images, on the CPU; the CRF runs as Ray tasks unless told otherwise."""
        crf = self.task.protocol.crf
        if crf is not None and run_crf is None:
            run_crf = refine_on_ray(crf)
        with torch_settings(self.task.config, self.task.cpus, self.device):
            tally = self.scorer.tally(per_image=True)
            jobs = self.scorer.count(tally, self.split, indices, places)
            for refined in run_crf(jobs) if run_crf else ():
                tally.add_matrix(refined.name, refined.image, torch.from_numpy(refined.matrix).to(self.device))
            for _ in jobs:
                raise AssertionError("a protocol without CRF has nothing to refine")
            return tally.on_cpu()

    def tiles(self, indices: Sequence[int]) -> dict[int, Tile]:
        """What a panel shows of some images."""
        tiles: dict[int, Tile] = {}
        scratch = self.scorer.tally(per_image=False)
        with torch_settings(self.task.config, self.task.cpus, self.device):
            for _ in self.scorer.count(scratch, self.split, indices, indices, tiles=tiles, wanted=indices):
                pass  # nothing is refined for a picture
        return tiles


_Chunk = tuple[list[int], list[int]]
_Workers = tuple[Callable[[list[_Chunk]], Iterator[Tally]], Callable[[list[int]], dict[int, Tile]]]


def _chunks(order: Sequence[int], task: _Task) -> list[_Chunk]:
    """(indices, places) of the parts that are handed out: sixteen a worker, or more of at most `_CHUNK` images."""
    even = -(-len(order) // (16 * task.config.least_workers))
    size = max(task.protocol.batch_size, min(_CHUNK, even))
    places = list(range(len(order)))
    return [(list(order[start : start + size]), places[start : start + size]) for start in places[::size]]


@contextlib.contextmanager
def _worker_here(task: _Task) -> Iterator[_Workers]:
    """The evaluation in this process."""
    part = _Part(task, join_workers().device)
    run_crf = refine_here(task.protocol.crf) if task.protocol.crf else None
    yield (lambda chunks: (part.count(*chunk, run_crf) for chunk in chunks)), part.tiles


@contextlib.contextmanager
def _workers_on_ray(task: _Task) -> Iterator[_Workers]:
    """The evaluation on Ray actors, which Ray restarts, their part with them, when one dies."""
    import ray
    from ray.util import ActorPool

    config = task.config
    with ray_cluster():
        cluster = alive_nodes()
        coming = to_come(cluster)
        if task.protocol.crf is not None:
            cluster = without_cpus(cluster, 1)  # the CRF's tasks would wait for ever behind the workers
            if not coming and sum(node.cpus for node in cluster) < 0.2:
                raise UserError("the CRF's tasks need a CPU beside the workers', and the cluster has one; add --local.")
        task = replace(task, cpus=cpus_per_worker(config, cluster, coming))
        gpus = config.resources.gpus_per_worker
        actor: Any = ray.remote(
            num_cpus=task.cpus,
            num_gpus=gpus,
            max_restarts=config.resources.max_failures,
            max_task_retries=config.resources.max_failures,
        )(_Part)
        # Ray shows a worker the GPUs it was given and no others.
        device = torch.device("cuda" if gpus else "cpu")
        handles = [actor.remote(task, device) for _ in range(config.least_workers)]
        pool = ActorPool(handles)

        def count(chunks: list[_Chunk]) -> Iterator[Tally]:
            yield from pool.map_unordered(lambda each, chunk: each.count.remote(*chunk), chunks)

        try:
            yield count, lambda indices: ray.get(handles[0].tiles.remote(indices))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise RunFailed(f"a worker failed: {type(error.cause).__name__}: {error.cause}") from error
        except ray.exceptions.RayError as error:
            raise RunFailed(f"the workers of the evaluation are gone: {str(error).splitlines()[0]}") from error
        finally:
            for handle in handles:
                ray.kill(handle)


def _keep(
    found: Run, config: Config, report: Report, findings: Findings, tiles: dict[int, Tile], track: bool
) -> Report:
    """Write the report into the run's folder, and to its MLflow run."""
    place = _place(report.prefix, report.step)
    report = replace(report, folder=f"{found.folder.uri}/{place}")
    with tempfile.TemporaryDirectory(prefix="cosa-ray-evaluation-") as temporary:
        write_report(Path(temporary), report, findings, tiles)
        found.folder.put(Path(temporary), place)
        if track and found.record.tracking_uri is not None:
            from cosa_ray.tracking.evaluations import log_evaluation

            log_evaluation(
                _store(config),
                found.record.name,
                found.folder.uri,
                run_id=found.record.mlflow_run_id,
                metrics=report.metrics,
                step=report.step,
                artifacts=Path(temporary),
                place=place,
            )
    return report


def _store(config: Config) -> Store:
    from cosa_ray.tracking.store import Store, tracking_uri

    return Store(tracking_uri(config), config.tracking.experiment)
