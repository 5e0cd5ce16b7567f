"""The weak and the strong view of one crop (paper section 3; the release's dataloaders)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cosa_ray.config.schema import StrongOperation, Views

# Strong operations: (image, m, u) with m = views.magnitude and u uniform in [0, 1). At m = 0 each is the identity, at
# m = 1 the ranges are those usual in semi-supervised segmentation: factors 0.1..1.9, 4..8 bits, thresholds 1..256.
_Strong = Callable[[Image.Image, float, float], Image.Image]


def _factor(magnitude: float, u: float) -> float:
    return 1.0 + magnitude * 0.9 * (2.0 * u - 1.0)


def _partly(change: Callable[[Image.Image], Image.Image]) -> _Strong:
    # Autocontrast and equalise have no strength of their own: a magnitude below 1 mixes the change in.
    def apply(image: Image.Image, magnitude: float, u: float) -> Image.Image:
        changed = change(image)
        return changed if magnitude >= 1.0 else Image.blend(image, changed, magnitude)

    return apply


# As ImageOps.autocontrast, solarize and posterize, which build their tables anew in Python for every image.
def _autocontrasted(image: Image.Image) -> Image.Image:
    table: list[int] = []
    for band in image.split():
        low, high = band.getextrema()
        table += _stretched(int(low), int(high))  # type: ignore[arg-type]  # a band's are numbers
    return image.point(table)


@lru_cache(4096)
def _stretched(low: int, high: int) -> list[int]:
    if high <= low:
        return list(range(256))
    scale = 255.0 / (high - low)
    return [min(255, max(0, int(value * scale + -low * scale))) for value in range(256)]


@lru_cache
def _solarised(threshold: int) -> list[int]:
    return [value if value < threshold else 255 - value for value in range(256)] * 3


@lru_cache
def _posterised(bits: int) -> list[int]:
    return [value & ~(2 ** (8 - bits) - 1) for value in range(256)] * 3


_OPERATIONS: dict[StrongOperation, _Strong] = {
    "identity": lambda image, m, u: image,
    "autocontrast": _partly(_autocontrasted),
    "equalise": _partly(ImageOps.equalize),
    "solarise": lambda image, m, u: image.point(_solarised(round(256 - m * 255 * u))),
    "colour": lambda image, m, u: ImageEnhance.Color(image).enhance(_factor(m, u)),
    "contrast": lambda image, m, u: ImageEnhance.Contrast(image).enhance(_factor(m, u)),
    "brightness": lambda image, m, u: ImageEnhance.Brightness(image).enhance(_factor(m, u)),
    "sharpness": lambda image, m, u: ImageEnhance.Sharpness(image).enhance(_factor(m, u)),
    "posterise": lambda image, m, u: image.point(_posterised(8 - round(4 * m * u))),
}


def _place(length: int, crop: int, u: float) -> tuple[int, int, int]:
    """Along one axis: start in the scaled image, start in the crop, and how many pixels they share."""
    free = int(u * (abs(length - crop) + 1))
    return (free, 0, crop) if length >= crop else (0, free, length)


def two_views(image: Image.Image, views: Views, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weak and strong view of one random crop, pixel-aligned: uint8 (3, crop, crop) each, and the valid `box`.

    `image` is RGB; `box` int64 (4,) is (top, bottom, left, right) of the valid area in crop coordinates, ends excluded.
    Outside it both views are black. Scaling, flip, crop at a random place (a smaller image lands at a random place of
    the padding, as in the release), blur, then one strong operation. Ours: views.short_side and the random scaling are
    one resampling, only of the pixels that are kept; blur and strong operation see the valid area only, so that padding
    neither bleeds into the picture nor enters its histogram. The same `rng` state gives the same bits.
    """
    # Every draw is taken whatever the settings are, so that changing one setting leaves the other draws as they were.
    u_scale, u_flip, u_top, u_left, u_blur, u_radius, u_operation, u_strength = rng.random(8).tolist()

    low, high = views.scale
    factor = low + (high - low) * u_scale
    if views.short_side is not None:
        factor *= views.short_side / min(image.size)
    width, height = (max(1, int(side * factor + 1e-6)) for side in image.size)
    flip = u_flip < views.flip
    top_in, top, rows = _place(height, views.crop, u_top)
    left_in, left, columns = _place(width, views.crop, u_left)
    if flip:  # the place is drawn in the flipped image; what is resampled lies mirrored in the original
        left_in = width - columns - left_in
    across, down = image.width / width, image.height / height
    region = (
        left_in * across,
        top_in * down,
        min((left_in + columns) * across, image.width),
        min((top_in + rows) * down, image.height),
    )
    valid = image.resize((columns, rows), Image.Resampling.BILINEAR, box=region)
    if flip:
        valid = valid.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if u_blur < views.blur:
        small, large = views.blur_radius
        valid = valid.filter(ImageFilter.GaussianBlur(small + (large - small) * u_radius))
    operation = views.strong[int(u_operation * len(views.strong))]
    changed = _OPERATIONS[operation](valid, views.magnitude, u_strength)

    def padded(picture: Image.Image) -> np.ndarray:
        canvas = np.zeros((3, views.crop, views.crop), np.uint8)
        canvas[:, top : top + rows, left : left + columns] = np.asarray(picture).transpose(2, 0, 1)
        return canvas

    return padded(valid), padded(changed), np.array([top, top + rows, left, left + columns], np.int64)
