"""Figures of an evaluation: CAM confidence, reliability of pseudo-labels, threshold curves, confusion matrix."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

_BLUE, _GREEN, _RED, _GREY = "#3b6ea8", "#3f8f5f", "#b5473c", "#9a9a9a"
_NAMES = {"background": "background threshold", "low": "lower threshold", "high": "upper threshold"}


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


def threshold_curves(grid: np.ndarray, curves: Mapping[str, np.ndarray], thresholds: Mapping[str, float]) -> Image:
    """mIoU of the CAMs cut at every background threshold of the grid, by name, with the thresholds in force drawn."""
    figure, axes = _figure("CAM mIoU by background threshold (labels given)")
    for (name, curve), colour in zip(curves.items(), (_BLUE, _GREEN), strict=False):
        axes.plot(grid, 100 * curve, color=colour, label=name)
        if np.isfinite(curve).any():
            best = int(np.nanargmax(curve))
            axes.plot(grid[best], 100 * curve[best], color=colour, marker="o", markersize=5)
            axes.annotate(
                f"{100 * curve[best]:.1f} at {grid[best]:.2f}",
                (grid[best], 100 * curve[best]),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                zorder=3,
            )
    _draw_thresholds(axes, thresholds)
    axes.set_xlabel("background threshold")
    axes.set_ylabel("mIoU, %")
    axes.set_xlim(0, 1)
    axes.margins(y=0.12)
    return _picture(figure)


def confusion_picture(matrix: np.ndarray, classes: Sequence[str], title: str) -> Image:
    """A confusion matrix with every row as shares of its class's pixels; classes: background first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = len(classes)
    side = max(4.8, 0.26 * size + 2.0)
    figure = Figure(figsize=(side + 0.8, side), dpi=110 if size <= 40 else 80, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    counts = matrix.astype(np.float64)
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    shown = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(size), classes, rotation=90, fontsize=8)
    axes.set_yticks(range(size), classes, fontsize=8)
    if size <= 25:
        for row in range(size):
            for column in range(size):
                value = 100 * share[row, column]
                if value >= 0.5:
                    ink = "white" if value > 55 else "#303030"
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color=ink)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=11, loc="left")
    figure.colorbar(shown, ax=axes, shrink=0.8, format="{x:g} %")
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
