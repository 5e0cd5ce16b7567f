"""The embedded data set: textured shapes on noisy gradients, drawn from a seed, with exact masks."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from cosa_ray.data.pictures import classes_in, encode_indices
from cosa_ray.data.shard import Row
from cosa_ray.data.source import Source
from cosa_ray.errors import UserError

CLASSES = ("disc", "square", "triangle", "cross", "star")
VARIANTS = ("plain", "coexist")

_HUES = (0.00, 0.60, 0.32, 0.14, 0.82)  # of each class; drawn within +-0.04
_PALETTE = ((0, 0, 0), (226, 61, 61), (61, 127, 226), (61, 196, 72), (235, 190, 52), (186, 71, 214))
_FINE = 2  # outlines are drawn this many times finer, for soft edges
_CONTEXT = {0: "planks", 2: "ripples", 4: "gravel"}  # coexist: these classes mostly stand on a patch of their own
_TOGETHER = 0.88  # share of their objects that do
_ALONE = 0.06  # share of coexist images with a patch and no object on it
_VISIBLE = 0.65  # share of an object that later ones must leave visible


def shapes_source(
    *, variant: str = "plain", train: int = 2000, val: int = 200, size: int = 96, seed: int = 0
) -> Source:
    """Generated pictures, `size` pixels square, with 1 to 3 objects of 5 classes each.

    `plain`: backgrounds tell nothing. `coexist`: disc, triangle and star mostly stand on a patch of their own (as
    trains do on rails), which is background in the mask. Each picture depends on (seed, split, index) only. Ours.
    """
    if variant not in VARIANTS:
        raise UserError(f"there is no variant {variant!r} of shapes: choose {' or '.join(VARIANTS)}")
    if size < 32 or train < 1 or val < 1:
        raise UserError("shapes needs a size of at least 32 pixels and at least one image in each split")
    if not 0 <= seed < 2**63:
        raise UserError(f"the seed of shapes must be from 0 to 2^63 - 1, not {seed}")
    return Source(
        kind="shapes",
        uri=None,
        options={"variant": variant, "train": train, "val": val, "size": size, "seed": seed},
        classes=CLASSES,
        palette=_PALETTE,
        labels_from="the drawn masks",
        masks_from="drawn",
        splits={"train": _Numbered("train", train), "val": _Numbered("val", val)},
        reader=_Draw(variant, size, seed),
    )


class _Numbered:
    """The samples of a split, (name, split, index), made when asked: no list grows with the set."""

    def __init__(self, split: str, count: int) -> None:
        self._split = split
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> list[tuple[str, str, int]]:
        return [(f"{self._split}-{index:06d}", self._split, index) for index in range(self._count)[part]]


@dataclass(frozen=True)
class _Draw:
    variant: str
    size: int
    seed: int

    def __call__(self, sample: tuple[str, str, int]) -> Row:
        name, split, index = sample
        pixels, mask = draw_picture(_generator(self.seed, split, index), self.size, self.variant)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=92)
        return Row(name, out.getvalue(), encode_indices(mask), classes_in(mask), self.size, self.size)


def draw_picture(rng: np.random.Generator, size: int, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """One picture, uint8 (size, size, 3), and its mask of class indices, uint8 (size, size)."""
    canvas, objects, _ = _scene(rng, size, variant)
    mask = np.zeros((size, size), np.uint8)
    for kind, alpha, _, _ in objects:
        canvas += alpha[..., None] * (_surface(rng, kind, size) - canvas)
        mask[alpha >= 0.5] = kind + 1
    canvas += rng.normal(0.0, rng.uniform(0.01, 0.05), canvas.shape)
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8), mask


def context_of(options: Mapping[str, Any], name: str) -> np.ndarray | None:
    """Where the patches of a picture lie, bool (size, size), objects on them included; None where there are none.

    Drawn again from the options of the dataset's import and the picture's id, since no mask tells them from the rest
    of the background.
    """
    if options.get("variant") != "coexist":
        return None
    split, _, index = name.partition("-")
    size = options["size"]
    bits = np.frombuffer(_patches(options["seed"], size, split, int(index)), np.uint8)
    return np.unpackbits(bits, count=size * size).reshape(size, size).astype(bool)


@lru_cache(8192)
def _patches(seed: int, size: int, split: str, index: int) -> bytes:
    """Where patches lie, a bit a pixel: evaluations come back to the same pictures, and a scene takes milliseconds."""
    return np.packbits(_scene(_generator(seed, split, index), size, "coexist")[2]).tobytes()


def _generator(seed: int, split: str, index: int) -> np.random.Generator:
    key = (seed, ("train", "val").index(split))
    return np.random.Generator(np.random.Philox(key=key, counter=[0, index, 0, 0]))


def _scene(rng: np.random.Generator, size: int, variant: str) -> tuple[np.ndarray, list[_Object], np.ndarray]:
    """What objects are painted on, the objects, and where patches lie, bool (size, size)."""
    canvas = _background(rng, size)
    objects = _objects(rng, size)
    patches = np.zeros((size, size), bool)
    if variant == "coexist":
        for kind, _, centre, radius in objects:
            if kind in _CONTEXT and rng.random() < _TOGETHER:
                patches |= _patch(canvas, rng, _CONTEXT[kind], centre, radius)
        if rng.random() < _ALONE:
            context = tuple(_CONTEXT.values())[rng.integers(len(_CONTEXT))]
            patches |= _patch(canvas, rng, context, rng.uniform(0.2, 0.8, 2) * size, rng.uniform(0.12, 0.2) * size)
    return canvas, objects, patches


_Object = tuple[int, np.ndarray, np.ndarray, float]  # class, coverage (size, size) in 0..1, centre (y, x), radius


def _objects(rng: np.random.Generator, size: int) -> list[_Object]:
    wanted = int(rng.integers(1, 4))
    largest = (0.34, 0.28, 0.24)[wanted - 1]
    objects: list[_Object] = []
    for _ in range(wanted * 20):
        kind = int(rng.integers(len(CLASSES)))
        radius = rng.uniform(0.15, largest) * size
        centre = rng.uniform(0.75 * radius, size - 0.75 * radius, 2)
        alpha = _coverage(kind, centre, radius, rng.uniform(0, 2 * np.pi), size)
        hidden = [np.minimum(alpha, other).sum() / other.sum() for _, other, _, _ in objects]
        if all(share < 1 - _VISIBLE for share in hidden) and sum(hidden) < 0.5:
            objects.append((kind, alpha, centre, radius))
        if len(objects) == wanted:
            break
    return objects


def _outline(kind: int, angle: float) -> np.ndarray:
    """Corners (n, 2) of a class in units of its radius; the areas are about alike."""
    if kind == 1:
        corners = 1.15 * np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]]) * 0.75
    elif kind == 2:
        turns = np.pi * np.array([0.5, 0.5 + 2 / 3, 0.5 + 4 / 3])
        corners = 1.25 * np.stack([np.sin(turns), np.cos(turns)], axis=1)
    elif kind == 3:
        a, b = 0.42, 1.15
        around = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a)]
        corners = np.array([*around, (-a, -a)])
    else:
        turns = np.pi * np.arange(10) / 5
        corners = np.where(np.arange(10) % 2, 0.55, 1.25)[:, None] * np.stack([np.sin(turns), np.cos(turns)], axis=1)
    c, s = np.cos(angle), np.sin(angle)
    return corners @ np.array([[c, -s], [s, c]])


def _coverage(kind: int, centre: np.ndarray, radius: float, angle: float, size: int) -> np.ndarray:
    from skimage.draw import disk, polygon

    fine = (size * _FINE, size * _FINE)
    canvas = np.zeros(fine, np.float32)
    middle = centre * _FINE
    if kind == 0:
        rows, columns = disk(middle, 0.9 * radius * _FINE, shape=fine)
    else:
        corners = _outline(kind, angle) * radius * _FINE + middle
        rows, columns = polygon(corners[:, 0], corners[:, 1], shape=fine)
    canvas[rows, columns] = 1.0
    return canvas.reshape(size, _FINE, size, _FINE).mean((1, 3))


def _colour(
    rng: np.random.Generator, hue: float, saturation: tuple[float, float], value: tuple[float, float]
) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(*saturation), rng.uniform(*value)))


def _grid(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (size, size) along and across a random direction, pixels."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size]
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _waves(values: np.ndarray, period: float, rng: np.random.Generator) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(2 * np.pi * (values / period + rng.random()))


def _clouds(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise (size, size) in 0..1 with about `cells` spots along a side."""
    coarse = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255.0


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A gradient between two dull colours of any hue, with clouds."""
    along, _ = _grid(rng, size)
    ramp = (along - along.min()) / np.ptp(along)
    first, second = (_colour(rng, rng.random(), (0.05, 0.4), (0.25, 0.85)) for _ in range(2))
    ramp = np.clip(ramp + 0.5 * (_clouds(rng, size, int(rng.integers(3, 9))) - 0.5), 0, 1)[..., None]
    shade = 0.25 * (_clouds(rng, size, int(rng.integers(8, 24))) - 0.5)[..., None]
    return first + ramp * (second - first) + shade


def _surface(rng: np.random.Generator, kind: int, size: int) -> np.ndarray:
    """The textured colour of a class, (size, size, 3): stripes, checks, spots, waves or plain clouds."""
    along, across = _grid(rng, size)
    period = size * rng.uniform(0.07, 0.11)
    if kind == 0:
        texture = _clouds(rng, size, 12)
    elif kind == 1:
        texture = (_waves(along, period, rng) > 0.5).astype(float)
    elif kind == 2:
        texture = ((_waves(along, period, rng) > 0.5) ^ (_waves(across, period, rng) > 0.5)).astype(float)
    elif kind == 3:
        texture = _waves(along, period, rng) * _waves(across, period, rng)
    else:
        texture = _waves(along + 0.12 * size * _clouds(rng, size, 6), period, rng)
    hue = _HUES[kind] + rng.uniform(-0.04, 0.04)
    light = _colour(rng, hue, (0.55, 0.95), (0.7, 1.0))
    dark = light * rng.uniform(0.45, 0.65)
    return dark + texture[..., None] * (light - dark)


def _patch(canvas: np.ndarray, rng: np.random.Generator, context: str, centre: np.ndarray, radius: float) -> np.ndarray:
    """Paint a context under an object, an ellipse with soft edge, about twice as wide; returns where, bool."""
    size = len(canvas)
    y, x = np.mgrid[:size, :size]
    centre = centre + rng.uniform(-0.3, 0.3, 2) * radius
    distance = np.hypot((y - centre[0]) / (1.5 * radius), (x - centre[1]) / (2.1 * radius))
    alpha = np.clip((1 - distance) * 6, 0, 1)[..., None]
    if context == "planks":
        light, dark, texture = (0.62, 0.45, 0.30), (0.30, 0.20, 0.13), _waves(x + 0.3 * y, size * 0.08, rng) > 0.4
    elif context == "ripples":
        light, dark, texture = (0.45, 0.78, 0.80), (0.15, 0.42, 0.50), _waves(y + 3 * np.sin(x / 5), size * 0.09, rng)
    else:
        light, dark, texture = (0.80, 0.80, 0.76), (0.32, 0.32, 0.30), _clouds(rng, size, size // 3) > 0.5
    paint = np.array(dark) + np.asarray(texture, float)[..., None] * (np.array(light) - np.array(dark))
    canvas += alpha * (paint - canvas)
    return np.asarray(alpha[..., 0] >= 0.5)
