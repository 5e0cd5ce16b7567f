"""Contact sheets: images, masks, labels, and the two views as training sees them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cosa_ray.config.schema import Sampling, Views
from cosa_ray.data.dataset import Dataset, Sample
from cosa_ray.data.loader import order_of
from cosa_ray.data.order import draw
from cosa_ray.data.pictures import IGNORED, Palette
from cosa_ray.data.views import two_views
from cosa_ray.errors import UserError

_CELL = 192
_GAP = 8
_TEXT = 22
_HEAD = 24
_COLUMNS = ("image", "mask", "weak view", "strong view")
_INK = (30, 30, 30)
_PAPER = (255, 255, 255)


def paint_mask(mask: np.ndarray, palette: Palette) -> Image.Image:
    """Mask of class indices, uint8 (H, W), in the palette's colours; 255 (ignored) is near white."""
    colours = np.full((256, 3), 224, np.uint8)
    colours[: len(palette)] = palette
    colours[IGNORED] = (224, 224, 192)
    return Image.fromarray(colours[mask])


def contact_sheet(
    dataset: Dataset,
    split: str,
    *,
    views: Views,
    seed: int = 0,
    images: int = 8,
    batch_size: int = 8,
    sampling: Sampling = "even",
) -> Image.Image:
    """A sheet with one row for each of the first `images` samples that training on `split` with `seed` draws.

    Training takes `batch_size` of them a step, and the views depend on the step and on the place in its batch.

    Columns: image, mask, weak view, strong view; the valid box is outlined in the views, labels stand below each row
    in their colours. Raises UserError for an empty or unknown split.
    """
    samples = dataset.split(split)
    if not len(samples):
        raise UserError(f"split {split} of {dataset.uri} has no images: choose another one")
    count = min(images, len(samples))
    order = order_of(samples, seed, sampling)
    row_height = _CELL + _TEXT + _GAP
    width = len(_COLUMNS) * (_CELL + _GAP) + _GAP
    sheet = Image.new("RGB", (width, _HEAD + count * row_height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for column, title in enumerate(_COLUMNS):
        pen.text((_GAP + column * (_CELL + _GAP), 4), title, _INK, font)
    for row in range(count):
        step, position = divmod(row, batch_size)
        sample = samples[int(order.indices(step, batch_size)[position])]
        top = _HEAD + row * row_height
        pictures = _pictures(sample, views, draw(seed, step, position), dataset.card.palette)
        for column, picture in enumerate(pictures):
            if picture is not None:
                sheet.paste(_fitted(picture), (_GAP + column * (_CELL + _GAP), top))
        left = float(_GAP)
        for text, colour in [(f"{sample.id}:", _INK), *_named(sample, dataset)]:
            pen.text((left, top + _CELL + 2), text, colour, font)
            left += pen.textlength(text + "  ", font)
    return sheet


def _pictures(
    sample: Sample, views: Views, rng: np.random.Generator, palette: Palette
) -> tuple[Image.Image, Image.Image | None, Image.Image, Image.Image]:
    image = sample.decode_image()
    mask = None if sample.mask is None else paint_mask(sample.decode_mask(), palette)
    weak, strong, (top, bottom, left, right) = two_views(image, views, rng)
    shown = []
    for view in (weak, strong):
        picture = Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0)))
        if (bottom - top, right - left) != (views.crop, views.crop):
            ImageDraw.Draw(picture).rectangle(
                (int(left), int(top), int(right) - 1, int(bottom) - 1), outline=(255, 0, 255)
            )
        shown.append(picture)
    return image, mask, shown[0], shown[1]


def _fitted(picture: Image.Image) -> Image.Image:
    """The picture within a cell; small ones are enlarged without smoothing, so that pixels stay visible."""
    scale = _CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _named(sample: Sample, dataset: Dataset) -> list[tuple[str, tuple[int, int, int]]]:
    present = np.flatnonzero(sample.labels)
    if not len(present):
        return [("no label", _INK)]
    darker = (tuple(int(0.8 * part) for part in dataset.card.palette[index + 1]) for index in present)
    return [(dataset.classes[index], (r, g, b)) for index, (r, g, b) in zip(present, darker, strict=True)]
