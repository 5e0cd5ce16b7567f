"""The panel of an evaluation: images beside what the networks make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosa_ray.data.pictures import voc_palette

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 160  # pixels of a panel's cell
_GAP = 6
_HEAD = 22
_INK = (40, 40, 40)


@dataclass(frozen=True)
class Tile:
    """One image of the panel at its own size H x W: RGB image, maps of 0..C or 255, CAM maximum in 0..1."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    segmentation: np.ndarray | None
    cam: np.ndarray
    pseudo: np.ndarray


def panel(
    tiles: Sequence[Tile], classes: Sequence[str], palette: Sequence[tuple[int, int, int]] | None = None
) -> Image:
    """A row per image: image, truth, AN's segmentation, CAM and pseudo-label; below, the classes' colours.

    classes: background first. palette: RGB per class, VOC's where None. Ignored pixels are white.
    """
    import matplotlib
    from PIL import Image as Pictures
    from PIL import ImageDraw, ImageFont

    colours = np.full((256, 3), 255, np.uint8)
    colours[: len(classes)] = (palette or voc_palette(len(classes)))[: len(classes)]
    heat = matplotlib.colormaps["inferno"]
    columns = ["image", "truth", "segmentation", "CAM (labels given)", "pseudo-label"]
    if all(tile.segmentation is None for tile in tiles):
        columns.remove("segmentation")
    font = ImageFont.load_default(13)
    step = _SIDE + _GAP
    width = _GAP + len(columns) * step
    seen = np.zeros(256, bool)
    for tile in tiles:
        for part in (tile.truth, tile.segmentation, tile.pseudo):
            if part is not None:
                seen[part] = True
    present = np.flatnonzero(seen[: len(classes)]).tolist()
    legend = _legend(present, classes, width, font)
    height = _HEAD + len(tiles) * step + _GAP + 20 * (1 + max((row for _, row, _ in legend), default=-1))
    sheet = Pictures.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, column in enumerate(columns):
        pen.text((_GAP + number * step + _SIDE / 2, _HEAD / 2 + 2), column, fill=_INK, font=font, anchor="mm")
    for row, tile in enumerate(tiles):
        grey = tile.image.mean(2, keepdims=True)
        cells = {
            "image": tile.image,
            "truth": colours[tile.truth],
            "segmentation": None if tile.segmentation is None else colours[tile.segmentation],
            "CAM (labels given)": (0.3 * grey + 0.7 * 255 * heat(tile.cam)[..., :3]).astype(np.uint8),
            "pseudo-label": colours[tile.pseudo],
        }
        for number, column in enumerate(columns):
            pixels = cells[column]
            if pixels is None:
                continue
            scale = _SIDE / max(pixels.shape[:2])
            size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
            smooth = column in ("image", "CAM (labels given)")
            kind = Pictures.Resampling.BILINEAR if smooth else Pictures.Resampling.NEAREST
            corner = (_GAP + number * step + (_SIDE - size[0]) // 2, _HEAD + row * step + (_SIDE - size[1]) // 2)
            sheet.paste(Pictures.fromarray(pixels).resize(size, kind), corner)
            pen.rectangle(
                (corner[0] - 1, corner[1] - 1, corner[0] + size[0], corner[1] + size[1]), outline=(210, 210, 210)
            )
    top = _HEAD + len(tiles) * step + 2
    for left, row, number in legend:
        y = top + 20 * row
        pen.rectangle(
            (left, y + 3, left + 12, y + 15), fill=tuple(int(c) for c in colours[number]), outline=(120, 120, 120)
        )
        pen.text((left + 18, y + 9), classes[number], fill=_INK, font=font, anchor="lm")
    return sheet


def _legend(numbers: Sequence[int], classes: Sequence[str], width: int, font: object) -> list[tuple[int, int, int]]:
    """(left edge, row, class) of every entry of the legend, wrapped at the width."""
    entries, left, row = [], _GAP, 0
    for number in numbers:
        needed = 34 + int(font.getlength(classes[number]))  # type: ignore[attr-defined]
        if left + needed > width and left > _GAP:
            left, row = _GAP, row + 1
        entries.append((left, row, number))
        left += needed
    return entries
