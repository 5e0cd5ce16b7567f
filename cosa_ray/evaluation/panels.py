"""Pictures of an evaluation: the panel of images, the CAM-confidence histogram, the reliability curve."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosa_ray.data.pictures import voc_palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

IGNORE = 255
_SIDE = 160  # pixels of a panel's cell
_GAP = 6
_HEAD = 22
_INK = (40, 40, 40)
_BLUE, _GREEN, _RED, _GREY = "#3b6ea8", "#3f8f5f", "#b5473c", "#9a9a9a"
_NAMES = {"background": "background threshold", "low": "lower threshold", "high": "upper threshold"}


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


def confidence_histogram(counts: np.ndarray, thresholds: Mapping[str, float]) -> Image:
    """Share of pixels by the valid CAM's maximum (equal bins over 0..1), with the thresholds in force drawn."""
    figure, axes = _figure("CAM confidence on the validation images")
    bins = len(counts)
    edges = np.linspace(0, 1, bins + 1)
    share = 100 * counts / max(1, counts.sum())
    axes.bar(edges[:-1], share, width=1 / bins, align="edge", color=_BLUE, linewidth=0)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(0, max(1.0, 1.6 * float(share.max())))
    axes.set_yticks([tick for tick in (0, 0.1, 1, 10, 100) if tick <= axes.get_ylim()[1]])
    axes.yaxis.set_major_formatter("{x:g} %")
    _draw_thresholds(axes, thresholds)
    axes.set_xlabel("largest CAM value among the image's classes")
    axes.set_ylabel("share of pixels")
    axes.set_xlim(0, 1)
    return _picture(figure)


def reliability_curve(outcomes: np.ndarray, thresholds: Mapping[str, float], groups: int = 20) -> Image:
    """Accuracy of the pseudo-labels by CAM confidence, with the share of pixels behind it.

    outcomes: pixels (bins, 3) by wrong, right and ignored pseudo-label; bins are drawn together as `groups`.
    """
    figure, axes = _figure("How reliable are the pseudo-labels?")
    parts = np.array([part.sum(0) for part in np.array_split(outcomes, groups)])
    edges = np.linspace(0, 1, groups + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    share = parts / max(1, parts.sum())
    behind = axes.twinx()
    behind.bar(middle, 100 * share[:, :2].sum(1), width=0.9 / groups, color=_BLUE, alpha=0.25, label="share of pixels")
    if parts[:, 2].any():
        bottom = 100 * share[:, :2].sum(1)
        behind.bar(
            middle, 100 * share[:, 2], width=0.9 / groups, bottom=bottom, color=_GREY, alpha=0.35, label="ignored"
        )
    behind.set_ylabel("share of pixels")
    behind.yaxis.set_major_formatter("{x:g} %")
    behind.spines[["top"]].set_visible(False)
    labelled = parts[:, :2].sum(1)
    shown = labelled > 0
    accuracy = 100 * parts[shown, 1] / labelled[shown]
    axes.plot(middle[shown], accuracy, color=_GREEN, marker="o", markersize=4, label="accuracy of the pseudo-labels")
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.set_ylim(0, 103)
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.set_xlim(0, 1)
    axes.set_xlabel("largest CAM value among the image's classes")
    axes.set_ylabel("pseudo-labels that are right")
    _draw_thresholds(axes, thresholds, behind)
    return _picture(figure)


def _figure(title: str) -> tuple[Figure, Axes]:
    """A figure outside pyplot, which keeps figures for ever and is not safe in threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=110)
    FigureCanvasAgg(figure)
    # Margins by hand: an automatic layout draws everything several times.
    axes = figure.add_axes((0.13, 0.23, 0.76, 0.69))
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_thresholds(axes: Axes, thresholds: Mapping[str, float], behind: Axes | None = None) -> None:
    """Mark the thresholds, and put one legend below the plot for everything drawn."""
    for (name, value), style in zip(thresholds.items(), ("--", ":"), strict=False):
        axes.axvline(value, color=_RED, linestyle=style, linewidth=1.4, label=f"{_NAMES.get(name, name)} {value:.2f}")
    handles, labels = axes.get_legend_handles_labels()
    if behind is not None:
        more, texts = behind.get_legend_handles_labels()
        handles, labels = handles + more, labels + texts
    axes.figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)


def _picture(figure: Figure) -> Image:
    from PIL import Image as Pictures

    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return Pictures.open(stream).convert("RGB")
