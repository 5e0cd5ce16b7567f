"""Encoded pictures and masks: decoding, checking, and bringing masks to class indices."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

IGNORED = 255
Palette = tuple[tuple[int, int, int], ...]

_VOID = (224 << 16) + (224 << 8) + 192  # VOC's border
_KEPT = ("JPEG", "MPO", "PNG", "WEBP")


class Broken(Exception):
    """A picture, mask or label of the source that cannot be used; the message is the reason, without the name."""


def voc_palette(colours: int) -> Palette:
    """The colours PASCAL VOC gives to indices 0..colours-1: bits of the index spread over the bits of R, G and B."""
    return tuple(
        (
            sum((index >> 3 * bit & 1) << 7 - bit for bit in range(3)),
            sum((index >> 3 * bit + 1 & 1) << 7 - bit for bit in range(3)),
            sum((index >> 3 * bit + 2 & 1) << 7 - bit for bit in range(3)),
        )
        for index in range(colours)
    )


def decode_rgb(data: bytes) -> Image.Image:
    """RGB picture of any encoded one: grey, CMYK, palette, 16-bit and transparent ones are converted.

    Pixels are as stored (an EXIF rotation is not applied, so that masks stay aligned). Raises what PIL raises.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I"):  # 16 bits: PIL's own conversion would clip everything above 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixel values {values.min()}..{values.max()} are not 16-bit")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no range to bring to 8 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode_indices(data: bytes) -> np.ndarray:
    """Class indices, uint8 (H, W), of a stored mask."""
    return np.asarray(Image.open(io.BytesIO(data)))


def encode_indices(indices: np.ndarray) -> bytes:
    """PNG of a mask of class indices, uint8 (H, W)."""
    out = io.BytesIO()
    Image.fromarray(indices).save(out, "PNG")
    return out.getvalue()


def checked_image(data: bytes) -> tuple[bytes, int, int]:
    """Bytes to store, height and width of a picture that was really decoded. Raises Broken.

    JPEG, PNG and WebP stay as they are, byte for byte; anything else becomes a PNG.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            kind = opened.format
        image = decode_rgb(data)
    except Exception as error:
        # PIL's decoders raise a dozen kinds of exception for damaged files; all of them mean the same here.
        raise Broken(f"the image cannot be decoded ({_short(error)})") from None
    if kind not in _KEPT:
        out = io.BytesIO()
        image.save(out, "PNG")
        data = out.getvalue()
    return data, image.height, image.width


def checked_mask(data: bytes, height: int, width: int, num_classes: int, palette: Palette) -> np.ndarray:
    """Class indices, uint8 (H, W), of a mask file: indices (grey or palette PNG) or colours. Raises Broken.

    Values are 0 (background), 1..num_classes, and 255 (ignored). A palette file is read by its colours when all of
    those in use are the data set's, because programs that rewrite pictures number colours anew; else by its indices. An
    RGB file is read by colour. (224, 224, 192), VOC's border, is ignored.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:
        raise Broken(f"the mask cannot be decoded ({_short(error)})") from None
    if image.size != (width, height):
        sizes = f"the mask is {image.width} x {image.height} and the image {width} x {height}"
        turned = ": the image seems to be turned by its EXIF rotation, which masks do not follow"
        raise Broken(sizes + (turned if image.size == (height, width) else ""))
    if image.mode == "P":
        meaning = _meaning(image, palette)
        return _by_index(np.asarray(image), num_classes) if meaning is None else meaning[np.asarray(image)]
    if image.mode in ("1", "L") or image.mode.startswith("I"):
        return _by_index(np.asarray(image).astype(np.int64), num_classes)
    if image.mode not in ("RGB", "RGBA"):
        raise Broken(f"the mask has mode {image.mode}, neither indices nor colours")
    return _by_colour(np.asarray(image.convert("RGB")), palette)


def _by_index(values: np.ndarray, num_classes: int) -> np.ndarray:
    strange = np.unique(values[(values > min(num_classes, IGNORED - 1)) & (values != IGNORED) | (values < 0)])
    if strange.size:
        raise Broken(f"the mask holds {_some(strange)}, beyond the {num_classes} classes")
    return values.astype(np.uint8)


def _codes(palette: Palette) -> dict[int, int]:
    """What each colour, as 0xrrggbb, means."""
    return {_VOID: IGNORED} | {(r << 16) + (g << 8) + b: index for index, (r, g, b) in enumerate(palette)}


def _meaning(image: Image.Image, palette: Palette) -> np.ndarray | None:
    """Class of each index of a palette file by its colour, uint8 (256,); None when the colours do not tell."""
    known = _codes(palette)
    table = (np.array(image.getpalette("RGB"), np.int64).reshape(-1, 3) @ np.array([65536, 256, 1])).tolist()
    # The end of a palette is often filled with black: such an index has no colour of its own.
    filled = len(table)
    while filled and table[filled - 1] == table[-1]:
        filled -= 1
    filled += table[-1] not in table[:filled]
    meaning = np.zeros(256, np.uint8)
    seen: set[int] = set()
    for index in np.unique(np.asarray(image)):
        code = table[index] if index < filled else None
        if code in known and code not in seen:
            meaning[index] = known[code]
            seen.add(code)
        elif index == IGNORED:
            meaning[index] = IGNORED
        else:
            return None
    return meaning


def _by_colour(pixels: np.ndarray, palette: Palette) -> np.ndarray:
    codes = pixels.astype(np.int64) @ np.array([65536, 256, 1])
    known = _codes(palette)
    found, inverse = np.unique(codes, return_inverse=True)
    strange = [code for code in found if int(code) not in known]
    if strange:
        colours = ", ".join(f"#{int(code):06x}" for code in strange[:3])
        raise Broken(f"the mask has colours that are no class of the palette ({colours})")
    return np.array([known[int(code)] for code in found], np.uint8)[inverse].reshape(codes.shape)


def classes_in(indices: np.ndarray) -> tuple[int, ...]:
    """Classes (0-based, background left out) that a mask of indices shows."""
    present = np.flatnonzero(np.bincount(indices.ravel(), minlength=256)[1:IGNORED])
    return tuple(int(index) for index in present)


def _some(values: np.ndarray) -> str:
    return ", ".join(str(value) for value in values[:4]) + (", ..." if len(values) > 4 else "")


def _short(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text has an address in memory, another one every time
        return "not a picture"
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
