"""Pictures of the images on which two sides differ most, and the difference of their confusion matrices."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.pictures import voc_palette
from cosa_ray.errors import UserError
from cosa_ray.evaluation.confusion import IGNORE
from cosa_ray.evaluation.panels import Tile
from cosa_ray.reporting.differences import Compared
from cosa_ray.training.evaluating import draw_images

SHOWN = 6
_SIDE = 320  # pixels of a picture's longer side


@dataclass(frozen=True)
class Row:
    """An image as the page shows it: data URIs of the image, the truth and what the two sides make of it."""

    id: str
    values: tuple[float, float]
    difference: float
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class Pictures:
    """Images on which the first two sides differ most, and the colours (name, #rrggbb) of the classes in them.

    note: what is drawn, or why there is nothing.
    """

    rows: list[Row]
    legend: list[tuple[str, str]]
    note: str


def draw_pictures(compared: Compared) -> Pictures:
    """Run both networks once more over the images that differ most; a note says why where that cannot be done.

    Drawn is the prediction that the metric is of, before any CRF; pseudo-labels where it is of CAMs. Of several runs
    the first is drawn.
    """
    found = compared.comparison
    images = found.images[:SHOWN]
    if found.evaluated is None or not found.evaluated["images"]:
        return Pictures([], [], "There is no image to show: evaluations of the same images are needed.")
    if not images:
        return Pictures([], [], "There is no image on which they differ.")
    ids, metric = [image["id"] for image in images], found.evaluated["metric"]
    pair = [side[0] for side in compared.pair]
    try:
        tiles = [draw_images(each.run, each.report, ids, metric) for each in pair]
        dataset = open_dataset(pair[0].report.dataset)
    except UserError as error:
        return Pictures([], [], f"The images cannot be drawn: {error}")
    classes = ["background", *dataset.classes]
    colours = np.full((256, 3), 255, np.uint8)
    colours[: len(classes)] = (dataset.card.palette or voc_palette(len(classes)))[: len(classes)]
    segmented = metric.startswith("miou")

    def label_map(tile: Tile) -> np.ndarray:
        made = tile.segmentation if segmented else tile.pseudo
        assert made is not None  # an evaluation without segmentation has no such metric
        return made

    rows, seen = [], np.zeros(256, bool)
    for image in images:
        first, second = (each[image["id"]] for each in tiles)
        maps = [first.truth, label_map(first), label_map(second)]
        for labels in maps:
            seen[labels] = True
        drawn = (_photograph(first.image), *(_map(labels, colours) for labels in maps))
        rows.append(Row(image["id"], tuple(image["values"]), image["difference"], drawn))
    names = {**dict(enumerate(classes)), IGNORE: "ignored or undecided"}
    legend = [(names[label], "#{:02x}{:02x}{:02x}".format(*colours[label])) for label in np.flatnonzero(seen).tolist()]
    what = f"segmentations behind {metric.removesuffix('_crf')}" if segmented else "pseudo-labels"
    note = f"Drawn are the {what}" + (", before the CRF." if metric.endswith("_crf") else ".")
    if any(len(side) > 1 for side in compared.pair):
        note += f" Of several runs one is drawn: {' and '.join(each.run.record.name for each in pair)}."
    return Pictures(rows, legend, note)


def confusion_difference(compared: Compared) -> tuple[list[str], np.ndarray] | None:
    """(classes, second - first of the confusion matrices' row shares (K, K), of several runs the mean), or None."""
    evaluated = compared.comparison.evaluated
    if evaluated is None or not compared.comparison.per_class:  # other classes
        return None
    sides = []
    for side in compared.pair:
        matrices = [matrix for each in side if (matrix := each.confusion(evaluated["metric"])) is not None]
        if len(matrices) != len(side):
            return None
        sides.append(np.mean([matrix / np.maximum(1, matrix.sum(1, keepdims=True)) for matrix in matrices], axis=0))
    return [row["class"] for row in compared.comparison.per_class], sides[1] - sides[0]


def _photograph(pixels: np.ndarray) -> str:
    """An RGB image (H, W, 3) as a data URI."""
    stream = io.BytesIO()
    _resized(Image.fromarray(pixels), Image.Resampling.BILINEAR).save(stream, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _map(labels: np.ndarray, colours: np.ndarray) -> str:
    """A map of labels (H, W) in the colours (256, 3) as a data URI."""
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(colours.tobytes())
    stream = io.BytesIO()
    _resized(picture, Image.Resampling.NEAREST).save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _resized(picture: Image.Image, how: Image.Resampling) -> Image.Image:
    scale = _SIDE / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), how)
