"""Prediction of many pictures: read, predict, write, as a Ray Data pipeline or in this process.

A picture that cannot be read is named with its reason and skipped; everything else goes on.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cosa_ray.config.protocol import NetworkName, Protocol
from cosa_ray.data.dataset import Split, open_dataset
from cosa_ray.data.folder import ENDINGS
from cosa_ray.data.pictures import decode_rgb
from cosa_ray.data.remote import leaves, place
from cosa_ray.errors import UserError
from cosa_ray.evaluation.inference import autocast_dtype
from cosa_ray.evaluation.prediction import MaskSource, Segmenter, mask_png, overlay_jpeg, scores_npz
from cosa_ray.evaluation.trained import Trained, load_trained

MASKS, OVERLAYS, SCORES = "masks", "overlays", "scores"
OpenModel = Callable[[], AbstractContextManager[Path]]
Row = dict[str, Any]


class Item(NamedTuple):
    """One picture: the name of its outputs, where it is (a path or URI, or a row of the dataset's split), its classes.

    labels: indices of its classes where they are known, else None.
    """

    name: str
    uri: str | None = None
    row: int | None = None
    labels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one picture; reason: why it was skipped, empty where it was not."""

    name: str
    reason: str
    classes: tuple[str, ...]
    height: int
    width: int


@dataclass(frozen=True)
class BatchPrediction:
    """What is predicted, how, and where it goes; picklable, because tasks are sent it.

    open_model: gives the folder of a trained model. dataset, split: of items that are given by index.
    """

    items: Sequence[Item] = field(repr=False)
    open_model: OpenModel
    protocol: Protocol
    out: str
    network: NetworkName | None = None
    source: MaskSource = "segmentation"
    overlays: bool = True
    scores: bool = False
    presence: float = 0.0
    dataset: str | None = None
    split: str | None = None
    device: str = "cpu"
    threads: int | None = None

    def here(self) -> Iterator[Outcome]:
        """Do it all in this process."""
        predict = Predictor(self)
        size = self.protocol.batch_size
        for start in range(0, len(self.items), size):
            rows = [self.read({"item": number}) for number in range(start, min(start + size, len(self.items)))]
            yield from map(self.outcome, map(self.write, predict.rows(rows)))

    def on_ray(self, *, workers: int, cpus: float, gpus: float) -> Iterator[Outcome]:
        """Do it as a Ray Data pipeline: tasks that read and write, `workers` model actors of so many CPUs and GPUs."""
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the caller shows progress
        light: dict[str, Any] = {"num_cpus": 0.1}  # reading and writing wait for disks, not for a processor
        pipeline = (
            ray.data.from_items(
                [{"item": number} for number in range(len(self.items))],
                override_num_blocks=max(1, min(len(self.items), 4 * workers)),
            )
            .map(self.read, **light)
            .map_batches(
                Predictor,
                fn_constructor_args=(self,),
                batch_size=self.protocol.batch_size,
                batch_format="numpy",
                concurrency=workers,
                num_cpus=cpus,
                num_gpus=gpus,
            )
            .map(self.write, **light)
        )
        for row in pipeline.iter_rows():
            yield self.outcome(row)

    def read(self, row: Row) -> Row:
        """The encoded picture of the item whose number is in `row`, or the reason why there is none."""
        item = self.items[int(row["item"])]
        try:
            if item.row is None:
                data = place(item.uri or "").read()
            else:
                data = _opened(self.dataset or "", self.split or "")[item.row].image
            reason = "" if data else "the file is empty"
        except Exception as error:
            data, reason = b"", f"it cannot be read ({_short(error)})"
        return {"item": int(row["item"]), "data": data, "reason": reason}

    def write(self, row: Row) -> Row:
        """Write what was predicted for one picture under `out`; returns the row without it."""
        if not row["reason"]:
            name, root = self.items[int(row["item"])].name, place(self.out)
            for folder, ending, key in (
                (MASKS, "png", "mask"),
                (OVERLAYS, "jpg", "overlay"),
                (SCORES, "npz", "scores"),
            ):
                if row[key]:
                    target = root.child(folder).child(f"{name}.{ending}")
                    _parent(target.path, root.filesystem)
                    target.write(row[key])
        return {key: row[key] for key in ("item", "reason", "classes", "height", "width")}

    def outcome(self, row: Row) -> Outcome:
        """The outcome of a row that went through everything."""
        return Outcome(
            self.items[int(row["item"])].name,
            str(row["reason"]),
            tuple(json.loads(row["classes"])),
            int(row["height"]),
            int(row["width"]),
        )


@functools.lru_cache(maxsize=1)
def _opened(dataset: str, split: str) -> Split:
    """A split, opened once a process and not once a picture."""
    return open_dataset(dataset).split(split)


class Predictor:
    """The model in one process: rows of encoded pictures in, rows of encoded masks out."""

    def __init__(self, wanted: BatchPrediction) -> None:
        self.wanted = wanted
        if wanted.threads:
            torch.set_num_threads(wanted.threads)
        with wanted.open_model() as folder:
            self.trained: Trained = load_trained(folder, wanted.device, wanted.protocol)
        self.segmenter = Segmenter(
            self.trained,
            wanted.protocol,
            wanted.network,
            wanted.source,
            wanted.device,
            autocast_dtype(self.trained.config, torch.device(wanted.device)),
            wanted.presence,
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """A batch as Ray Data hands it over: columns of arrays."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        done = self.rows(rows)
        return {key: np.array([row[key] for row in done], dtype=_COLUMNS[key]) for key in _COLUMNS}

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Rows of `BatchPrediction.read` with mask, overlay and scores in place of the picture."""
        wanted, palette = self.wanted, self.trained.card.palette
        done: list[Row] = []
        pictures, labels = [], []
        for row in rows:
            empty = {"mask": b"", "overlay": b"", "scores": b"", "classes": "[]", "height": 0, "width": 0}
            done.append({"item": int(row["item"]), "reason": str(row["reason"]), **empty})
            if row["reason"]:
                continue
            try:
                picture = decode_rgb(row["data"])
            except Exception as error:
                done[-1]["reason"] = f"it cannot be decoded ({_short(error)})"
                continue
            pictures.append((done[-1], picture))
            known = wanted.items[int(row["item"])].labels
            labels.append(None if known is None else self._labels(known))
        found = self.segmenter([picture for _, picture in pictures], labels, scores=wanted.scores)
        for (row, picture), prediction in zip(pictures, found, strict=True):
            names = ("background", *self.trained.classes)
            present = [names[value] for value in np.unique(prediction.mask) if 0 < value < len(names)]
            row |= {
                "mask": mask_png(prediction.mask, palette),
                "overlay": overlay_jpeg(picture, prediction.mask, palette) if wanted.overlays else b"",
                "scores": b"" if prediction.scores is None else scores_npz(prediction.scores, self.trained.classes),
                "classes": json.dumps(present),
                "height": picture.height,
                "width": picture.width,
            }
        return done

    def _labels(self, known: Sequence[int]) -> np.ndarray:
        labels = np.zeros(len(self.trained.classes), np.float32)
        labels[list(known)] = 1
        return labels


_COLUMNS: dict[str, Any] = {
    "item": np.int64,
    "reason": object,
    "mask": object,
    "overlay": object,
    "scores": object,
    "classes": object,
    "height": np.int64,
    "width": np.int64,
}


def items_of(images: Sequence[str]) -> list[Item]:
    """The pictures that files, folders (searched to their depth) and URIs name, each under a name of its own.

    Outputs are named as the pictures are, without their endings, and keep the folders below a given one. Raises
    UserError for what is not there, a folder without pictures, and two pictures of one name.
    """
    found: dict[str, str] = {}
    for given in images:
        where = place(given)
        if where.is_folder():
            names = [name for name in where.names(recursive=True) if name.lower().endswith(ENDINGS)]
            if not names:
                raise UserError(f"{given} holds no picture ({', '.join(ENDINGS)}); give another folder.")
            named = {name.rpartition(".")[0]: where.child(name).uri for name in names}
            if len(named) < len(names):
                raise UserError(f"{given} holds two pictures of one name with different endings; move one of them.")
        elif where.exists():
            named = {where.path.rpartition("/")[2].rpartition(".")[0] or where.path.rpartition("/")[2]: given}
        else:
            raise UserError(f"there is no picture or folder {given}; check the path.")
        for name, uri in named.items():
            if name in found:
                raise UserError(f"{found[name]} and {uri} would both be written as {name}.png; give them apart.")
            found[name] = uri
    return [Item(name, uri) for name, uri in found.items()]


def items_of_split(split: Split, *, labels_given: bool) -> list[Item]:
    """The pictures of a dataset's split, with their image-level labels where these are to restrict the masks.

    Raises UserError for an id that would be written outside the folder of the predictions.
    """
    known = split.labels() if labels_given else None
    outside = next((name for name in split.ids() if leaves(name)), None)
    if outside is not None:
        raise UserError(
            f"split {split.name} of {split.folder} has an image {outside!r}, whose mask would lie outside the folder "
            "of the predictions; import it under another name."
        )
    return [
        Item(name, row=index, labels=None if known is None else tuple(np.flatnonzero(known[index]).tolist()))
        for index, name in enumerate(split.ids())
    ]


def _parent(path: str, filesystem: Any) -> None:
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
