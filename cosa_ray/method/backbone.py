"""Any timm backbone as a feature extractor with two taps, built from the experiment's `model` section."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cosa_ray.config.schema import Model
from cosa_ray.errors import UserError

_OURS = ("pretrained", "num_classes", "features_only", "in_chans", "embed_layer", "dynamic_img_size")


class Taps(NamedTuple):
    """Where the two feature maps come from: feature indices, channels, and the stride of the last one."""

    aux: int
    last: int
    aux_channels: int
    last_channels: int
    stride: int
    plain: bool

    @property
    def multiple(self) -> int:
        """Sides of an input must be a multiple of this many pixels (patch size; 4 for stage networks' stems)."""
        return self.stride if self.plain else 4

    def side(self, side: float) -> int:
        """A side in pixels rounded to what the encoder takes (exact where the release's sizes are)."""
        return max(1, math.floor(side / self.multiple + 0.5)) * self.multiple


class ConvolutionalStem(PatchEmbed):
    """Patch embedding by four 3x3 convolutions, GroupNorm and GELU between them; total stride = patch size (ours).

    From scratch it learns much faster than one linear patch embedding. Widths D/8, D/4, D/2, D as in the stems of
    Xiao et al. 2021; strides 2,2,2,1 (patch 8) or 2,2,2,2 (16).
    """

    def __init__(self, *args: Any, patch_size: int = 16, embed_dim: int = 768, **kwargs: Any) -> None:
        super().__init__(*args, patch_size=patch_size, embed_dim=embed_dim, **kwargs)
        strides = {8: (2, 2, 2, 1), 16: (2, 2, 2, 2)}[int(self.patch_size[0])]
        widths = (3, *(max(8, embed_dim // share) for share in (8, 4, 2)), embed_dim)
        layers: list[nn.Module] = []
        for index, stride in enumerate(strides):
            inner = index < len(strides) - 1
            layers.append(nn.Conv2d(widths[index], widths[index + 1], 3, stride, padding=1, bias=not inner))
            if inner:
                groups = next(g for g in (8, 4, 2, 1) if widths[index + 1] % g == 0)
                layers += [nn.GroupNorm(groups, widths[index + 1]), nn.GELU()]
        self.proj = nn.Sequential(*layers)


def build_encoder(
    model: Model,
    weights: Mapping[str, Tensor] | None,
    image_size: int | None,
    initialise: bool,
    sides: Sequence[float] = (),
) -> tuple[Any, Taps, dict[int, tuple[int, int]]]:
    """The timm model with its head removed, its two taps, and the last map's (h, w) by side of a square input.

    Args:
        weights: the backbone's state dict, for `model.checkpoint`.
        image_size: side of the crop in pixels; sizes the position embeddings of a plain ViT without trained weights.
        initialise: False builds the architecture only, for weights of ours that are loaded afterwards.
        sides: every side in pixels, before rounding, that inputs will have; each is tried.

    Raises:
        UserError: unknown backbone, tag or argument, a bad tap, batch norm without trained weights, weights that
            do not fit, an input size that the backbone does not take.
    """
    _check_name(model)
    probe = _create(model, {}, meta=True)
    plain = _is_plain(probe)
    accepted = _parameters(type(probe))
    extra: dict[str, Any] = {}
    if "strict_img_size" in accepted:  # Swin: windows and masks follow the input
        extra["strict_img_size"] = False
    elif "dynamic_img_size" in accepted:
        extra["dynamic_img_size"] = True
    if image_size and "img_size" in accepted and "img_size" not in model.backbone_args:
        dynamic = "strict_img_size" in extra or "dynamic_img_size" in extra
        if not dynamic or (plain and not model.has_weights):
            extra["img_size"] = image_size
    if model.output_stride is not None:
        if plain:
            raise UserError(
                f"model.output_stride ({model.output_stride}) does not apply to the plain ViT {model.backbone}, "
                "whose stride is its patch size; leave it out"
            )
        extra["output_stride"] = model.output_stride
    if model.stem == "convolutional":
        extra["embed_layer"] = _stem_for(model, probe, plain, accepted)
    taps = _taps(model, probe, plain, image_size)
    probe = _create(model, extra, meta=True)  # a family that cannot dilate refuses here, before any download
    fetch = initialise and model.pretrained and model.checkpoint is None
    encoder = _create(model, extra, meta=False, pretrained=fetch)
    if initialise and model.checkpoint is not None and weights is None:
        raise ValueError("model.checkpoint is set: its tensors must be passed as `weights`")
    if initialise and weights is not None:
        load_weights(encoder, weights, where=model.checkpoint or "the given weights")
    if not model.has_weights and any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        raise UserError(
            f"model.backbone {model.backbone} has batch norm, which is frozen here and needs trained statistics; "
            "set model.pretrained or model.checkpoint, or take a backbone without batch norm"
        )
    for each in (encoder, probe):
        _strip(each, taps)
        if "dynamic_img_size" in extra and hasattr(each, "_pos_embed"):
            each._pos_embed = types.MethodType(_position_tokens, each)
    probe.eval()
    if not plain:
        _freeze_unreached(encoder, probe, taps, image_size or 224)
    grids = {side: _grid(model, encoder, probe, taps, side) for side in sorted({taps.side(side) for side in sides})}
    positions = getattr(encoder, "pos_embed", None)
    if model.freeze_position_embeddings and model.has_weights and isinstance(positions, nn.Parameter):
        positions.requires_grad_(False)
    return encoder, taps, grids


def feature_maps(encoder: Any, images: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """(features, aux): the last map after the backbone's own final norm, and the un-normalised earlier one.

    Shapes (B, D, h, w) and (B, D_aux, h_aux, w_aux). Backbones whose last map carries no norm of its own (ConvNeXt
    and ResNet normalise after pooling or inside the blocks) give the map as it is.
    """
    aux, last = encoder.forward_intermediates(
        images, indices=[taps.aux, taps.last], norm=False, output_fmt="NCHW", intermediates_only=True
    )
    norm = getattr(encoder, "norm", None)
    if not isinstance(norm, nn.Module) or isinstance(norm, nn.Identity):
        return last, aux
    if _channels_last(norm):
        return norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), aux
    return norm(last), aux


def load_weights(encoder: Any, weights: Mapping[str, Tensor], where: str) -> None:
    """Load a backbone's state dict; keys of the classification head may be left over, nothing may be missing.

    Raises:
        UserError: missing, unexpected or misshapen keys, naming them.
    """
    state = dict(weights)
    convert = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    if convert is not None:  # timm's own: other projects' names, other sizes
        try:
            state = dict(convert(state, encoder))
        except (KeyError, RuntimeError, AttributeError, IndexError) as error:
            raise UserError(f"{where} holds no weights of {type(encoder).__name__} ({error}); give its own") from error
    head = encoder.pretrained_cfg.get("classifier") or ()
    heads = tuple(name.split(".")[0] + "." for name in ((head,) if isinstance(head, str) else head))
    own = encoder.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(key for key in state.keys() - own.keys() if not key.startswith(heads))
    misshapen = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    if missing or unexpected or misshapen:
        found = "; ".join(
            f"{what}: {', '.join(keys[:6])}{f' and {len(keys) - 6} more' if len(keys) > 6 else ''}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
            if keys
        )
        raise UserError(f"{where} does not fit the backbone ({found}); check model.backbone and model.backbone_args")
    encoder.load_state_dict({key: state[key] for key in own})


def norm_parameters(module: nn.Module) -> set[int]:
    """Ids of the parameters that belong to normalisation layers of any kind."""
    kinds = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return {
        id(parameter)
        for layer in module.modules()
        if isinstance(layer, kinds) or type(layer).__name__.lower().startswith(("rmsnorm", "layernorm", "simplenorm"))
        for parameter in layer.parameters(recurse=False)
    }


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """Position embeddings (1, prefix + h*w, D) on another grid: bicubic, no antialias, in float32 (release)."""
    if old == new:
        return positions
    grid = positions[:, prefix:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(positions.dtype)
    return torch.cat([positions[:, :prefix], grid], dim=1)


def _position_tokens(self: Any, x: Tensor) -> Any:
    """timm's `_pos_embed` of plain ViTs and EVA/DINOv3, with the release's interpolation kernel.

    timm resizes with antialias, another kernel. x is (B, h, w, D); EVA also returns its rotary embedding.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height * width, channels)
    tokens = (getattr(self, name, None) for name in ("cls_token", "dist_token", "reg_token"))
    prefix = [token.expand(batch, -1, -1) for token in tokens if token is not None]
    positions = None
    if self.pos_embed is not None:
        count = 0 if self.no_embed_class else self.num_prefix_tokens
        positions = resize_positions(self.pos_embed, tuple(self.patch_embed.grid_size), (height, width), count)
    if positions is not None and self.no_embed_class:
        x = x + positions
    if prefix:
        x = torch.cat([*prefix, x], dim=1)
    if positions is not None and not self.no_embed_class:
        x = x + positions
    if not hasattr(self, "rope"):
        return x
    return x, self.rope.get_embed(shape=(height, width)) if self.rope is not None else None


def _check_name(model: Model) -> None:
    """Refuse a backbone or tag that timm does not have, naming the nearest."""
    name = model.backbone
    if ":" in name:  # hf-hub:... and the like are timm's to resolve
        return
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
        raise UserError(
            f"model.backbone: timm has no model {base!r}"
            + (f"; nearest: {', '.join(near)}" if near else "; see timm.list_models()")
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise UserError(f"model.backbone: {base} has no pretrained tag {tag!r}; it has: {', '.join(tags) or 'none'}")


def _create(model: Model, extra: dict[str, Any], *, meta: bool, pretrained: bool = False) -> Any:
    """timm.create_model without a head; `meta` builds no tensors, to look at the architecture."""
    reserved = sorted(set(_OURS) & set(model.backbone_args))
    if reserved:
        raise UserError(f"model.backbone_args: {', '.join(reserved)} is set by cosa-ray itself; leave it out")
    try:
        with torch.device("meta" if meta else "cpu"):
            return timm.create_model(
                model.backbone, pretrained=pretrained, num_classes=0, **{**model.backbone_args, **extra}
            )
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        key = "model.output_stride" if "output_stride" in str(error) else "model.backbone_args"
        raise UserError(f"{key}: {model.backbone} cannot be built like this ({error})") from error
    except Exception as error:
        if not pretrained:
            raise
        raise UserError(
            f"model.pretrained: the weights of {model.backbone} could not be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}); give them as model.checkpoint"
        ) from error


def _parameters(kind: type) -> set[str]:
    """Names of a model class's arguments, those it hands on to its parents included."""
    names: set[str] = set()
    for layer in kind.__mro__:
        parameters = inspect.signature(layer.__init__).parameters.values()  # type: ignore[misc]
        names |= {parameter.name for parameter in parameters}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names


def _is_plain(probe: nn.Module) -> bool:
    """True for a plain ViT: a list of blocks that all work on one grid."""
    return hasattr(probe, "blocks") and len({info["reduction"] for info in _feature_info(probe)}) == 1


def _feature_info(probe: nn.Module) -> list[dict[str, Any]]:
    info: Any = getattr(probe, "feature_info", None)
    if not info or not hasattr(probe, "forward_intermediates"):
        raise UserError(
            f"model.backbone: timm's {type(probe).__name__} gives no intermediate feature maps; choose another"
        )
    return list(info.info if hasattr(info, "info") else info)


def _taps(model: Model, probe: nn.Module, plain: bool, image_size: int | None) -> Taps:
    info = _feature_info(probe)
    count, what = len(info), "blocks" if plain else "feature stages"
    aux = model.aux + count if model.aux < 0 else model.aux
    if not 0 <= aux < count - 1:
        raise UserError(
            f"model.aux ({model.aux}) must name one of the {count} {what} of {model.backbone} before the last: "
            f"0..{count - 2}, or {-count}..-2 from the end"
        )
    stride = int(info[-1]["reduction"]) if not model.output_stride else model.output_stride
    if plain and image_size and image_size % stride:
        raise UserError(
            f"the image size ({image_size}) must be a multiple of the patch size ({stride}) of {model.backbone}; "
            f"the nearest is {max(1, round(image_size / stride)) * stride}"
        )
    return Taps(aux, count - 1, int(info[aux]["num_chs"]), int(info[-1]["num_chs"]), stride, plain)


def _stem_for(model: Model, probe: nn.Module, plain: bool, accepted: set[str]) -> type[ConvolutionalStem]:
    if not plain or "embed_layer" not in accepted:
        raise UserError(f"model.stem convolutional needs a plain ViT; {model.backbone} is not one: set it to patch")
    if model.has_weights:
        raise UserError("model.stem convolutional has no trained weights; set model.pretrained to false, or the stem")
    patch = int(_feature_info(probe)[-1]["reduction"])
    if patch not in (8, 16):
        raise UserError(f"model.stem convolutional needs patch size 8 or 16, {model.backbone} has {patch}")
    return ConvolutionalStem


def _strip(encoder: Any, taps: Taps) -> None:
    """Remove what the two maps do not pass through, so that every parameter left receives a gradient (DDP)."""
    norm = getattr(encoder, "norm", None)
    pooled = getattr(encoder, "fc_norm", None)
    if isinstance(norm, nn.Identity) and isinstance(pooled, nn.Module) and not isinstance(pooled, nn.Identity):
        norm = pooled  # average-pooled ViTs keep their final norm behind the pooling
    keep = isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity | nn.ModuleList)
    encoder.prune_intermediate_layers([taps.aux, taps.last], prune_norm=not keep, prune_head=True)
    if keep:
        encoder.norm = norm
    if getattr(encoder, "attn_pool", None) is not None:
        encoder.attn_pool = None


def _freeze_unreached(encoder: nn.Module, probe: nn.Module, taps: Taps, size: int) -> None:
    """Freeze parameters that neither map depends on (HRNet's other branches), because DDP waits for every gradient.

    They are found by walking the graph of a forward pass of `probe`, the same model without data.
    """
    try:
        maps = feature_maps(probe, torch.empty(1, 3, size, size, device="meta"), taps)
    except NotImplementedError:
        return  # an operation that cannot be traced without data; DDP will name what is unused
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"model.backbone: {type(encoder).__name__} gives no feature maps for images of {size} pixels "
            f"({str(error).splitlines()[0][:200]}); choose another size or backbone"
        ) from error
    reached: set[int] = set()
    seen: set[Any] = set()
    pending = [node.grad_fn for node in maps]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        pending += [parent for parent, _ in node.next_functions]
    unreached = {name for name, parameter in probe.named_parameters() if id(parameter) not in reached}
    for name, parameter in encoder.named_parameters():
        if name in unreached:
            parameter.requires_grad_(False)


@torch.no_grad()
def _grid(model: Model, encoder: nn.Module, probe: nn.Module, taps: Taps, side: int) -> tuple[int, int]:
    """(h, w) of the last map of a square input; UserError when the backbone does not take it.

    `probe`, the same model without data, says it at no cost; where it cannot, the encoder itself does.
    """
    failed: Exception | None = None
    training = encoder.training
    for each, device in ((probe, "meta"), (encoder.eval(), "cpu")):
        try:
            last, _ = feature_maps(each, torch.zeros(1, 3, side, side, device=device), taps)
        except Exception as error:  # every family has its own way to say no
            failed = error
        else:
            encoder.train(training)
            return last.shape[-2], last.shape[-1]
    why = (str(failed) or type(failed).__name__).splitlines()[0][:200]
    raise UserError(
        f"model.backbone: {model.backbone} does not take images of {side} pixels ({why}), which views.crop or "
        "evaluation.size times assignment.scales and evaluation.scales gives; set the scales to 1, or choose a "
        "backbone that takes any size"
    )


def _channels_last(norm: nn.Module) -> bool:
    """True for norms over the last dimension; false for those over channels of a map (BatchNorm2d, LayerNorm2d)."""
    return not isinstance(norm, _BatchNorm | nn.GroupNorm) and not type(norm).__name__.endswith("2d")
