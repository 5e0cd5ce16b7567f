"""The network of CoSA: a timm encoder with two taps, two classifiers whose weights also give the CAMs, LargeFOV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosa_ray.config.schema import Model, Optimiser
from cosa_ray.method.backbone import Taps, build_encoder, feature_maps, norm_parameters


class Outputs(NamedTuple):
    """Raw outputs at feature resolution.

    cls, cls_aux (B, C) classification logits; features (B, D, h, w) after the final norm; cam (B, C, h, w) and
    cam_aux (B, C, h_aux, w_aux) raw CAM logits; seg (B, C+1, h, w) segmentation logits, class 0 = background, or None.
    """

    cls: Tensor
    cls_aux: Tensor
    features: Tensor
    cam: Tensor
    cam_aux: Tensor
    seg: Tensor | None


class LargeFOV(nn.Module):
    """Segmentation head: two dilated 3x3 convolutions with ReLU and a 1x1, no biases (method.md 1; DeepLab-LargeFOV).

    Initialised He-normal (fan in), the last layer normal(0, 0.01): all classes start nearly equal (ours).
    """

    def __init__(self, channels: int, classes: int, width: int, dilation: int) -> None:
        super().__init__()
        self.conv6 = nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv7 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv8 = nn.Conv2d(width, classes, 1, bias=False)
        for layer in (self.conv6, self.conv7):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.normal_(self.conv8.weight, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, h, w) -> logits (B, classes, h, w)."""
        x = F.relu(self.conv6(features), inplace=True)
        return self.conv8(F.relu(self.conv7(x), inplace=True))


class Network(nn.Module):
    """Encoder, classifier, auxiliary classifier and decoder (paper 3.1); online and assignment network alike.

    The encoder always stays in evaluation mode: no dropout, no drop path, no random rotary coordinates, and batch
    norm with its trained statistics (frozen; its scale and shift are trained), so no layer mixes samples.
    Attributes: num_classes (C, without background), stride (pixels per location of the last map),
    mean and std (3,), of the input in 0..1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        taps: Taps,
        model: Model,
        num_classes: int,
        grids: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self._grids = dict(grids or {})
        self.encoder = encoder
        self.classifier = nn.Conv2d(taps.last_channels, num_classes, 1, bias=False)
        self.aux_classifier = nn.Conv2d(taps.aux_channels, num_classes, 1, bias=False)
        self.decoder = LargeFOV(taps.last_channels, num_classes + 1, model.decoder_width, model.decoder_dilation)
        for head in (self.classifier, self.aux_classifier):
            nn.init.normal_(head.weight, std=0.01)
        self.taps, self.num_classes, self.stride = taps, num_classes, taps.stride
        self.pool = _pool_max if model.pooling == "max" else _pool_average
        own: Any = getattr(encoder, "pretrained_cfg", {})
        for name, given in (("mean", model.mean), ("std", model.std)):
            value = torch.tensor([float(v) for v in (given or own[name])])
            self.register_buffer(name, value, persistent=False)
        self.train()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the last map for an input of this many pixels.

        Measured for the inputs the network was built for: stage networks round differently.
        """
        if height == width and height in self._grids:
            return self._grids[height]
        if self.taps.plain:
            return height // self.stride, width // self.stride
        return -(-height // self.stride), -(-width // self.stride)

    @property
    def classification(self) -> ClassificationView:
        """A module over encoder and classifiers only, sharing them: what DDP wraps during warm-up."""
        return ClassificationView(self)

    def train(self, mode: bool = True) -> Network:
        """Training mode of the heads; the encoder stays in evaluation mode (see the class)."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor, *, segment: bool = True) -> Outputs:
        """Normalised images (B, 3, H, W) -> Outputs; `segment=False` leaves the decoder out (seg is None)."""
        features, aux = feature_maps(self.encoder, images, self.taps)
        return Outputs(
            cls=self.classifier(self.pool(features)).flatten(1),
            cls_aux=self.aux_classifier(self.pool(aux)).flatten(1),
            features=features,
            cam=self.classifier(features),
            cam_aux=self.aux_classifier(aux),
            seg=self.decoder(features) if segment else None,
        )

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W), 0..255 -> float32 with the backbone's mean and standard deviation."""
        scale = (255.0 * self.std).reciprocal()[:, None, None]
        return images.float().mul_(scale).sub_((self.mean / self.std)[:, None, None])

    def denormalise(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`: normalised images (B, 3, H, W) -> float32 in 0..255, up to rounding."""
        return (images.float() * self.std[:, None, None] + self.mean[:, None, None]) * 255.0

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the segmentation head, which takes no part in warm-up."""
        return self.decoder.parameters()

    def parameter_groups(self, optimiser: Optimiser) -> list[dict[str, Any]]:
        """AdamW groups of the trainable parameters, each with "name", "params", "lr" and "weight_decay".

        encoder and encoder_norm at lr, classifiers and decoder at head_lr_factor * lr (method.md 1; release).
        """
        norms = norm_parameters(self.encoder)
        encoder = [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]
        head_lr = optimiser.lr * optimiser.head_lr_factor
        groups: list[tuple[str, list[nn.Parameter], float]] = [
            ("encoder", [p for p in encoder if id(p) not in norms], optimiser.lr),
            ("encoder_norm", [p for p in encoder if id(p) in norms], optimiser.lr),
            ("classifiers", [*self.classifier.parameters(), *self.aux_classifier.parameters()], head_lr),
            ("decoder", list(self.decoder_parameters()), head_lr),
        ]
        return [
            {"name": name, "params": params, "lr": lr, "weight_decay": optimiser.weight_decay}
            for name, params, lr in groups
            if params
        ]


class ClassificationView(nn.Module):
    """Encoder and classifiers of a network, without its decoder: every parameter gets a gradient in warm-up."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.encoder, self.taps, self.pool = network.encoder, network.taps, network.pool
        self.classifier, self.aux_classifier = network.classifier, network.aux_classifier
        self.train()

    def train(self, mode: bool = True) -> ClassificationView:
        """As Network.train."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W) -> (cls, cls_aux), each (B, C) logits."""
        features, aux = feature_maps(self.encoder, images, self.taps)
        return self.classifier(self.pool(features)).flatten(1), self.aux_classifier(self.pool(aux)).flatten(1)


def build_network(
    model: Model,
    num_classes: int,
    *,
    weights: Mapping[str, Tensor] | None = None,
    image_size: int | None = None,
    initialise: bool = True,
    sides: Sequence[float] = (),
) -> Network:
    """Build the network of an experiment, on the CPU.

    Args:
        model: the experiment's `model` section.
        num_classes: C, without background.
        weights: state dict of the backbone when `model.checkpoint` is set (its classification head may be in it).
        image_size: side of the crop, pixels.
        initialise: False builds the architecture without fetching or loading trained weights, for a state dict of
            ours that is loaded next (resume, evaluation).
        sides: sides in pixels, before rounding, of the square inputs it will be given besides the crop.

    Raises:
        UserError: see `backbone.build_encoder`.
    """
    sides = [*sides, *([image_size] if image_size else [])]
    encoder, taps, grids = build_encoder(model, weights, image_size, initialise, sides)
    return Network(encoder, taps, model, num_classes, grids)


def mixed_precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast of the forward passes inside; None is float32 throughout."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def scaled_size(network: Network, height: int, width: int, scale: float) -> tuple[int, int]:
    """Input size at a scale, rounded to what the encoder takes."""
    return network.taps.side(height * scale), network.taps.side(width * scale)


def _pool_max(features: Tensor) -> Tensor:
    return features.flatten(2).max(dim=2).values[:, :, None, None]


def _pool_average(features: Tensor) -> Tensor:
    return features.mean(dim=(2, 3), keepdim=True)
