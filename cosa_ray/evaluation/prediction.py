"""From pictures to masks with a trained model: what one process does with a few of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cosa_ray.config.protocol import NetworkName, Protocol
from cosa_ray.data.loader import Resize
from cosa_ray.evaluation.inference import infer
from cosa_ray.evaluation.scorer import absent
from cosa_ray.evaluation.trained import Trained
from cosa_ray.method.assignment import valid_cam
from cosa_ray.method.pseudo_labels import ABSENT, IGNORED, policy_labels

MaskSource = Literal["segmentation", "cam"]


class Prediction(NamedTuple):
    """mask uint8 (H, W): 0 background, 1..C, or 255 where a pseudo-label is undecided; scores float16 (K, H, W): class
    probabilities, background first (for CAMs: 1 - their maximum, then the CAMs), or None."""

    mask: np.ndarray
    scores: np.ndarray | None


@dataclass(frozen=True)
class Segmenter:
    """Masks of one network of a trained model, at the pictures' own sizes, by the scales and sizes of a protocol.

    network: None is the one that was better when the checkpoint was written. source: the segmentation, or the CAMs
    cut by the run's pseudo-label policy at its thresholds (labels are needed then). presence: a segmentation leaves out
    the classes that the network's classifier gives less than this probability.
    """

    trained: Trained
    protocol: Protocol
    network: NetworkName | None = None
    source: MaskSource = "segmentation"
    device: torch.device | str = "cpu"
    autocast: torch.dtype | None = None
    presence: float = 0.0

    def __call__(
        self, pictures: Sequence[Image.Image], labels: Sequence[np.ndarray | None], *, scores: bool = False
    ) -> list[Prediction]:
        """Masks of RGB pictures; labels: 0 or 1 by class (C,) where a picture's classes are known, else None.

        Known labels restrict a segmentation to them and the background (the release's way), and `presence` does not
        count then. Raises ValueError for CAMs without labels.
        """
        resize = Resize(self.protocol.resize, self.protocol.size or self.trained.config.views.crop)
        sizes = [resize.of(picture.height, picture.width) for picture in pictures]
        found: list[Prediction] = []
        for start in range(0, len(pictures), self.protocol.batch_size if resize.rule == "square" else 1):
            end = start + (self.protocol.batch_size if resize.rule == "square" else 1)
            height, width = sizes[start]
            batch = np.stack(
                [np.asarray(p.resize((width, height), Image.Resampling.BILINEAR)) for p in pictures[start:end]]
            )
            images = torch.from_numpy(batch).permute(0, 3, 1, 2)
            own = [(picture.height, picture.width) for picture in pictures[start:end]]
            found += self._batch(images, own, labels[start:end], scores)
        return found

    @torch.inference_mode()
    def _batch(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        labels: Sequence[np.ndarray | None],
        scores: bool,
    ) -> list[Prediction]:
        network = self.trained.network(self.network)
        segment = self.source == "segmentation"
        inputs = network.normalise(images.to(self.device))
        thresholds, settings = self.trained.description.thresholds, self.trained.config.pseudo_labels
        maps = infer(
            network,
            inputs,
            self.protocol.scales,
            self.protocol.flip,
            segment=segment,
            autocast=self.autocast,
        )
        found = []
        for row, (size, known) in enumerate(zip(sizes, labels, strict=True)):
            present = None if known is None else torch.from_numpy(known).to(self.device)[None]
            if maps.seg is not None:
                if present is None and self.presence > 0:
                    present = maps.cls[row : row + 1].sigmoid() >= self.presence
                shares = _shares(_resized(maps.seg[row : row + 1], size), present)
                mask = shares[0].argmax(0)
            else:
                if present is None:
                    raise ValueError("CAMs say where a class is, not whether it is there: labels are needed")
                cam = _resized(valid_cam(maps.cam[row : row + 1], present), size)
                mask = policy_labels(cam, present, thresholds, settings, inputs[row : row + 1])[0]
                shares = torch.cat([1 - cam.amax(1, keepdim=True), cam], 1)
            kept = shares[0].half().cpu().numpy() if scores else None
            found.append(Prediction(mask.to(torch.uint8).cpu().numpy(), kept))
        return found


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _shares(logits: Tensor, present: Tensor | None) -> Tensor:
    """Class probabilities (1, K, H, W), of the present classes only where these are known."""
    if present is not None:
        logits = logits.masked_fill(absent(present), ABSENT)
    return logits.softmax(1)


def mask_png(mask: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> bytes:
    """A palette PNG of a mask uint8 (H, W): its values are the class indices, its colours the palette's, 255 white-ish.

    255 takes (224, 224, 192), VOC's colour for it, so that the file reads back by index and by colour.
    """
    picture = Image.fromarray(mask)
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    colours[IGNORED] = (224, 224, 192)
    picture.putpalette(colours.tobytes())
    return _encoded(picture, "PNG", optimize=True)


def overlay_jpeg(picture: Image.Image, mask: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> bytes:
    """The picture with its mask's colours laid over it and the borders of regions drawn; background stays as it is."""
    colours = np.zeros((256, 3), np.float32)
    colours[: len(palette)] = palette
    colours[IGNORED] = (224, 224, 192)
    pixels = np.asarray(picture.convert("RGB")).astype(np.float32)
    laid = np.where((mask > 0)[..., None], 0.45 * pixels + 0.55 * colours[mask], pixels)
    border = np.zeros(mask.shape, bool)
    border[1:] |= mask[1:] != mask[:-1]
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    laid[border] = 255
    return _encoded(Image.fromarray(laid.round().astype(np.uint8)), "JPEG", quality=90)


def scores_npz(scores: np.ndarray, classes: Sequence[str]) -> bytes:
    """A compressed .npz of scores float16 (K, H, W) and the names of their channels; numpy reads it without pickle."""
    stream = io.BytesIO()
    np.savez_compressed(stream, scores=scores, classes=np.array(["background", *classes]))
    return stream.getvalue()


def _encoded(picture: Image.Image, kind: str, **options: int | bool) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()
