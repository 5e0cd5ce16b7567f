"""Running both networks over images by a protocol, and counting what they make of them."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_ray.config.protocol import LabelUse, NetworkName, Protocol
from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import Split
from cosa_ray.data.loader import EvaluationBatch, Resize, evaluation_batches
from cosa_ray.evaluation.inference import Inference, infer
from cosa_ray.evaluation.panels import Tile
from cosa_ray.evaluation.tally import Tally
from cosa_ray.method.assignment import valid_cam
from cosa_ray.method.network import Network
from cosa_ray.method.pseudo_labels import ABSENT, policy_labels


class Variant(NamedTuple):
    """A segmentation that is scored: which network's, restricted to which classes, before or after the CRF."""

    network: NetworkName
    labels: LabelUse = "none"
    crf: bool = False

    @property
    def name(self) -> str:
        """Its metric's name: miou, then _online, _labels_given or _labels_predicted, and _crf where they apply."""
        online = "_online" if self.network == "online" else ""
        labels = "" if self.labels == "none" else f"_labels_{self.labels}"
        return f"miou{online}{labels}{'_crf' if self.crf else ''}"


class CrfJob(NamedTuple):
    """A prediction to be refined: probabilities float32 (K, H, W), the encoded picture, the mask uint8 (H, W)."""

    name: str
    image: int
    probabilities: np.ndarray
    picture: bytes
    truth: np.ndarray


class Refined(NamedTuple):
    """A refined prediction's confusion matrix int64 (K, K), and whose it is."""

    name: str
    image: int
    matrix: np.ndarray


RunCrf = Callable[[Iterable[CrfJob]], Iterator[Refined]]


class _Seen(NamedTuple):
    """What was found on one image, at its own size, on the device."""

    segmentation: Tensor | None
    confidence: Tensor
    pseudo: Tensor


class Scorer:
    """Runs both networks over images by a protocol and counts what they make of them."""

    def __init__(
        self,
        online: Network,
        assignment: Network,
        protocol: Protocol,
        config: Config,
        *,
        thresholds: Mapping[str, float],
        segment: bool = True,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        """See `evaluate`; of `config`, crop, pseudo-label policy and loader processes matter."""
        self.networks: dict[NetworkName, Network] = {"assignment": assignment, "online": online}
        self.protocol, self.config, self.thresholds = protocol, config, thresholds
        self.segment, self.device, self.autocast = segment, torch.device(device), autocast
        self.variants = [Variant(n, use) for n in protocol.networks for use in protocol.labels]
        crf = protocol.crf if segment else None
        self.refined = [Variant(n, use, True) for n in crf.networks for use in crf.labels] if crf else []
        self.fixed = f"cam_miou_at_{protocol.cam_threshold:g}"
        self.fixed_aux = f"cam_aux_miou_at_{protocol.cam_threshold:g}"

    def tally(self, *, per_image: bool) -> Tally:
        """An empty tally of what this scorer counts."""
        names = [variant.name for variant in (*self.variants, *self.refined)]
        classes = self.networks["assignment"].num_classes
        names += [self.fixed, self.fixed_aux, "pseudo_miou"]
        return Tally(classes, names, device=self.device, per_image=per_image)

    @torch.no_grad()
    def count(
        self,
        tally: Tally,
        split: Split,
        indices: Sequence[int],
        places: Sequence[int],
        *,
        tiles: dict[int, Tile] | None = None,
        wanted: Sequence[int] = (),
        each_batch: Callable[[], None] = lambda: None,
    ) -> Iterator[CrfJob]:
        """Count the images `indices` of a split into `tally`; yields what the protocol's CRF is to refine, if any.

        places: of the images in the whole evaluation's order. tiles: receives those of the images `wanted`. A refined
        prediction is counted by the caller (`Tally.add_matrix`). each_batch: called after every batch.
        """
        batches = evaluation_batches(
            split,
            indices,
            resize=Resize(self.protocol.resize, self.protocol.size or self.config.views.crop),
            batch_size=self.protocol.batch_size,
            processes=self.config.data.loader_processes,
        )
        done = 0
        for batch in batches:
            images = self.networks["assignment"].normalise(batch.images.to(self.device, non_blocking=True))
            segmented = self.protocol.networks if self.segment else ()
            maps = self._run("assignment", images, segment="assignment" in segmented)
            found = {"assignment": maps} if "assignment" in segmented else {}
            if "online" in segmented:
                found["online"] = self._run("online", images, segment=True)
            scored = torch.stack([maps.cls.cpu(), batch.labels.to(maps.cls.dtype)], 1)
            tally.class_scores |= dict(zip(places[done : done + len(scored)], scored, strict=True))
            done += len(scored)
            for position, seen, jobs in self._own_size(tally, batch, images, maps, found):
                if tiles is not None and batch.index[position] in wanted:
                    tiles[batch.index[position]] = _tile(batch, position, seen)
                for job in jobs:
                    yield job._replace(picture=split[batch.index[position]].image)
            each_batch()

    def _run(self, name: NetworkName, images: Tensor, *, segment: bool) -> Inference:
        return infer(
            self.networks[name],
            images,
            self.protocol.scales,
            self.protocol.flip,
            segment=segment,
            autocast=self.autocast,
        )

    def _own_size(
        self,
        tally: Tally,
        batch: EvaluationBatch,
        images: Tensor,
        maps: Inference,
        networks: Mapping[str, Inference],
    ) -> Iterator[tuple[int, _Seen, list[CrfJob]]]:
        """Count a batch at each image's own size: (position in the batch, what was found, CRF jobs) per image."""
        labels = batch.labels.to(self.device)
        cam, cam_aux = valid_cam(maps.cam, labels), valid_cam(maps.cam_aux, labels)
        for where, masks in _by_shape(batch.masks).items():
            rows = torch.tensor(where, device=self.device)
            truth = torch.from_numpy(np.stack(masks)).to(self.device)
            size = (truth.shape[1], truth.shape[2])

            def own(whole: Tensor, rows: Tensor = rows, size: tuple[int, int] = size) -> Tensor:
                part = whole if len(rows) == len(whole) else whole[rows]
                if part.shape[-2:] == size:
                    return part
                return F.interpolate(part, size=size, mode="bilinear", align_corners=False)

            indices = [batch.index[position] for position in where]
            jobs: dict[int, list[CrfJob]] = defaultdict(list)
            plain: Tensor | None = None
            for network, inference in networks.items():
                assert inference.seg is not None
                whole = own(inference.seg)
                present = {"given": labels, "predicted": inference.cls.sigmoid() >= self.protocol.presence}
                for variant in self.variants:
                    if variant.network != network:
                        continue
                    shown = whole
                    if variant.labels != "none":
                        shown = whole.masked_fill(absent(present[variant.labels][rows]), ABSENT)
                    found = shown.max(1).indices  # on the CPU several times faster than argmax
                    tally.add_prediction(variant.name, indices, truth, found)
                    plain = found if plain is None else plain
                    refined = variant._replace(crf=True)
                    if refined in self.refined:
                        for row, index in enumerate(indices):
                            shares = shown[row].softmax(0).cpu().numpy()
                            jobs[row].append(CrfJob(refined.name, index, shares, b"", truth[row].cpu().numpy()))
            half = torch.tensor([half_of(batch.ids[position]) for position in where], device=self.device)
            own_cam = own(cam)
            confidence = self._cams(tally, indices, truth, own_cam, own(cam_aux), half)
            pseudo = policy_labels(own_cam, labels[rows], self.thresholds, self.config.pseudo_labels, images[rows])
            tally.add_pseudo_labels(indices, truth, confidence, pseudo)
            contexts = [each for position in where if (each := batch.contexts[position]) is not None]
            if len(contexts) == len(where):
                context = torch.from_numpy(np.stack(contexts))
                tally.add_context(context.to(self.device) & (truth == 0), plain, pseudo)
            tally.images += len(where)
            for row, position in enumerate(where):
                seen = _Seen(None if plain is None else plain[row], confidence[row], pseudo[row])
                yield position, seen, jobs[row]

    def _cams(
        self, tally: Tally, indices: Sequence[int], truth: Tensor, cam: Tensor, cam_aux: Tensor, half: Tensor
    ) -> Tensor:
        """Count CAMs (B, C, H, W) at every threshold; returns the main one's maximum."""
        confidence, strongest = cam.max(1)
        confidence_aux, strongest_aux = cam_aux.max(1)
        for name, sweep, value, label in (
            (self.fixed, tally.main, confidence, strongest),
            (self.fixed_aux, tally.aux, confidence_aux, strongest_aux),
        ):
            sweep.add(truth, label, sweep.bins(value), half)
            cut = torch.where(value >= self.protocol.cam_threshold, label + 1, 0)
            tally.add_prediction(name, indices, truth, cut)
        return confidence


def absent(labels: Tensor) -> Tensor:
    """Labels (B, C) -> bool (B, C+1, 1, 1): True for the classes an image does not have, never for the background."""
    return F.pad(labels == 0, (1, 0))[:, :, None, None]


def half_of(name: str) -> int:
    """0 or 1: the half of the images that one belongs to, by its id, so that every run and subset divides alike."""
    return zlib.crc32(name.encode()) & 1


def _by_shape(masks: Sequence[np.ndarray | None]) -> dict[tuple[int, ...], list[np.ndarray]]:
    """Masks of one shape together, by their positions."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, mask in enumerate(masks):
        assert mask is not None  # the split has masks
        groups[mask.shape].append(position)
    return {tuple(where): [m for p in where if (m := masks[p]) is not None] for where in groups.values()}


def _tile(batch: EvaluationBatch, where: int, seen: _Seen) -> Tile:
    from PIL import Image

    truth = batch.masks[where]
    assert truth is not None
    pixels = Image.fromarray(batch.images[where].permute(1, 2, 0).numpy())
    return Tile(
        name=batch.ids[where],
        image=np.asarray(pixels.resize((truth.shape[1], truth.shape[0]), Image.Resampling.BILINEAR)),
        truth=truth,
        segmentation=None if seen.segmentation is None else seen.segmentation.cpu().numpy(),
        cam=seen.confidence.cpu().numpy(),
        pseudo=seen.pseudo.cpu().numpy(),
    )
