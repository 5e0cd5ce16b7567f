"""Any timm backbone as a feature extractor with two taps, built from the experiment's `model` section."""

from __future__ import annotations

import difflib
import inspect
import math
import traceback
import types
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cosa_ray.config.schema import Model
from cosa_ray.errors import UserError
from cosa_ray.method.attention import plain_attention, plain_is_faster
from cosa_ray.method.tokens import ConvolutionalStem, position_tokens
from cosa_ray.method.weights import load_weights

_OURS = (
    "pretrained",
    "num_classes",
    "features_only",
    "in_chans",
    "embed_layer",
    "dynamic_img_size",
    "checkpoint_path",
)


class Taps(NamedTuple):
    """Where the two feature maps come from: feature indices, channels, the stride of the last one, and the multiple.

    multiple: sides of an input are rounded to a multiple of this many pixels (patch size; 4 for stage networks' stems,
    or their stride where they take nothing finer).
    """

    aux: int
    last: int
    aux_channels: int
    last_channels: int
    stride: int
    plain: bool
    multiple: int

    def side(self, side: float) -> int:
        """A side in pixels rounded to what the encoder takes (exact where the release's sizes are)."""
        return max(1, math.floor(side / self.multiple + 0.5)) * self.multiple


class Examination(NamedTuple):
    """What a backbone gives, found without its weights.

    arguments: of timm.create_model, besides the user's. grids: (h, w) of the last map by side of a square input.
    unreached: names of the parameters that neither map depends on.
    """

    arguments: dict[str, Any]
    taps: Taps
    grids: dict[int, tuple[int, int]]
    unreached: frozenset[str]


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
        UserError: see `examine`; weights that cannot be fetched or do not fit.
    """
    found = examine(model, image_size, sides)
    fetch = initialise and model.pretrained and model.checkpoint is None
    if fetch:
        _check_pretrained(model, found.arguments)
    encoder = _create(model, found.arguments, "cpu", pretrained=fetch)
    if initialise and model.checkpoint is not None and weights is None:
        raise ValueError("model.checkpoint is set: its tensors must be passed as `weights`")
    if initialise and weights is not None:
        load_weights(encoder, weights, where=model.checkpoint or "the given weights")
    _prepare(encoder, found.taps, found.arguments)
    for name, parameter in encoder.named_parameters():
        if name in found.unreached:  # HRNet's other branches: DDP waits for every gradient
            parameter.requires_grad_(False)
    positions = getattr(encoder, "pos_embed", None)
    if model.freeze_position_embeddings and model.has_weights and isinstance(positions, nn.Parameter):
        positions.requires_grad_(False)
    return encoder, found.taps, found.grids


def examine(model: Model, image_size: int | None = None, sides: Sequence[float] = ()) -> Examination:
    """Try a backbone without its weights (on the meta device; with random ones where that cannot be).

    Args: as of `build_encoder`.

    Raises:
        UserError: unknown backbone, tag or argument, no feature maps, a bad tap, batch norm without trained weights,
            an input size that the backbone does not take.
    """
    _check_name(model)
    default = _create(model, {}, "meta")
    info = _feature_info(model, default)
    plain = len({stage["reduction"] for stage in info}) == 1
    taps = _taps(model, info, plain)
    arguments = _arguments(model, default, taps, image_size)
    if plain and image_size and image_size % taps.stride:
        raise UserError(
            f"the image size ({image_size}) must be a multiple of the patch size ({taps.stride}) of {model.backbone}; "
            f"the nearest is {max(1, round(image_size / taps.stride)) * taps.stride}"
        )
    if not model.has_weights and any(name.endswith("running_var") for name, _ in default.named_buffers()):
        raise UserError(
            f"model.backbone {model.backbone} has batch norm, which is frozen here and needs trained statistics; "
            "set model.pretrained or model.checkpoint, or take a backbone without batch norm"
        )
    own = int(default.pretrained_cfg["input_size"][-1])
    crop = image_size or int(model.backbone_args.get("img_size", own))
    recurrent = any(isinstance(module, nn.RNNBase) for module in default.modules())  # minutes on the meta device
    for device in ("cpu",) if recurrent else ("meta", "cpu"):
        with torch.random.fork_rng(devices=[]):
            encoder = _create(model, arguments, device)
        try:
            _prepare(encoder, taps, arguments)
        except Exception as error:
            raise UserError(
                f"model.backbone: {model.backbone} cannot be cut off after its last map ({_reason(error)}); "
                "choose another backbone"
            ) from error
        found = _trial(encoder, taps, arguments, crop, sides, device)
        if not isinstance(found, Examination) and not plain:  # rounded to its stride, all the same?
            coarser = _trial(encoder, taps._replace(multiple=taps.stride), arguments, crop, sides, device)
            found = coarser if isinstance(coarser, Examination) else found
        if isinstance(found, Examination):
            return found
        side, why = found
        if "meta" not in str(why) and not isinstance(why, NotImplementedError):
            break  # data would not help
    cure = f"set views.crop to its own {own}" if side == crop else "set the scales to 1, evaluation.size to null"
    raise UserError(
        f"model.backbone: {model.backbone} does not take images of {side} pixels ({_reason(why)}), which views.crop "
        f"or evaluation.size times assignment.scales and evaluation.scales gives; {cure}, or choose a backbone that "
        "takes any size"
    ) from why


def feature_maps(encoder: Any, images: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """(features, aux): the last map after the backbone's own final norm, and the un-normalised earlier one.

    Shapes (B, D, h, w) and (B, D_aux, h_aux, w_aux). Backbones whose last map carries no norm of its own (ConvNeXt
    and ResNet normalise after pooling or inside the blocks) give the map as it is.
    """
    tokens = (images.shape[-2] // taps.stride) * (images.shape[-1] // taps.stride)
    plain = taps.plain and plain_is_faster(images, tokens)
    with plain_attention(encoder) if plain else nullcontext():
        aux, last = encoder.forward_intermediates(
            images, indices=[taps.aux, taps.last], norm=False, output_fmt="NCHW", intermediates_only=True
        )
    norm = _final_norm(encoder)
    if norm is None:
        return last, aux
    if isinstance(norm, _BatchNorm | nn.GroupNorm) or type(norm).__name__.endswith("2d"):  # over a map's channels
        return norm(last), aux
    return norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), aux


def norm_parameters(module: nn.Module) -> set[int]:
    """Ids of the parameters that belong to normalisation layers of any kind."""
    kinds = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return {
        id(parameter)
        for layer in module.modules()
        if isinstance(layer, kinds) or type(layer).__name__.lower().startswith(("rmsnorm", "layernorm", "simplenorm"))
        for parameter in layer.parameters(recurse=False)
    }


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


def _check_pretrained(model: Model, arguments: dict[str, Any]) -> None:
    """Refuse, before any download, trained weights that do not exist or cannot fit what is built."""
    if ":" in model.backbone:
        return
    base = model.backbone.partition(".")[0]
    if not timm.list_pretrained(base) and not timm.list_pretrained(f"{base}.*"):
        raise UserError(
            f"model.pretrained: timm has no trained weights of {base}; set it to false, give model.checkpoint, "
            "or choose another backbone"
        )
    published = _create(Model(backbone=model.backbone), {}, "meta")
    built = _create(model, arguments, "meta")
    state = published.state_dict()
    if {name: value.shape for name, value in state.items()} != {n: v.shape for n, v in built.state_dict().items()}:
        size = published.pretrained_cfg["input_size"][-1]
        load_weights(built, state, where=f"model.pretrained: the trained state of {model.backbone} ({size} pixels)")


def _create(model: Model, arguments: dict[str, Any], device: str, *, pretrained: bool = False) -> Any:
    """timm.create_model without a head; on "meta" without tensors, to look at the architecture."""
    reserved = sorted(set(_OURS) & set(model.backbone_args))
    if reserved:
        raise UserError(f"model.backbone_args: {', '.join(reserved)} is set by cosa-ray itself; leave it out")
    try:
        with torch.device(device):
            return timm.create_model(
                model.backbone, pretrained=pretrained, num_classes=0, **{**model.backbone_args, **arguments}
            )
    except Exception as error:  # every family has its own way to say no
        if pretrained:
            raise UserError(
                f"model.pretrained: the weights of {model.backbone} could not be fetched "
                f"({type(error).__name__}: {_reason(error)}); give them as model.checkpoint"
            ) from error
        key = "model.backbone_args" if model.backbone_args else "model.backbone"
        if "output_stride" in str(error):
            key = "model.output_stride"
        raise UserError(f"{key}: {model.backbone} cannot be built like this ({_reason(error)})") from error


def _parameters(kind: type) -> set[str]:
    """Names of a model class's arguments, those it hands on to its parents included."""
    names: set[str] = set()
    for layer in kind.__mro__:
        parameters = inspect.signature(layer.__init__).parameters.values()  # type: ignore[misc]
        names |= {parameter.name for parameter in parameters}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names


def _feature_info(model: Model, encoder: nn.Module) -> list[dict[str, Any]]:
    """timm's description of the intermediate maps: num_chs and reduction of each."""
    info: Any = getattr(encoder, "feature_info", None)
    if not info or not hasattr(encoder, "forward_intermediates"):
        raise UserError(
            f"model.backbone: {model.backbone} (timm's {type(encoder).__name__}) gives no intermediate feature maps; "
            "choose another backbone"
        )
    return list(info.info if hasattr(info, "info") else info)


def _taps(model: Model, info: Sequence[dict[str, Any]], plain: bool) -> Taps:
    count, what = len(info), "blocks" if plain else "feature stages"
    aux = model.aux + count if model.aux < 0 else model.aux
    if not 0 <= aux < count - 1:
        raise UserError(
            f"model.aux ({model.aux}) must name one of the {count} {what} of {model.backbone} before the last: "
            f"0..{count - 2}, or {-count}..-2 from the end"
        )
    stride = int(info[-1]["reduction"]) if not model.output_stride else model.output_stride
    multiple = stride if plain else 4
    return Taps(aux, count - 1, int(info[aux]["num_chs"]), int(info[-1]["num_chs"]), stride, plain, multiple)


def _arguments(model: Model, default: nn.Module, taps: Taps, image_size: int | None) -> dict[str, Any]:
    """What timm.create_model is given besides the user's own arguments."""
    accepted = _parameters(type(default))
    extra: dict[str, Any] = {}
    if "strict_img_size" in accepted:  # Swin: windows and masks follow the input
        extra["strict_img_size"] = False
    elif "dynamic_img_size" in accepted:
        extra["dynamic_img_size"] = True
    fixed = not extra or (taps.plain and not model.has_weights)
    if image_size and fixed and "img_size" in accepted and "img_size" not in model.backbone_args:
        extra["img_size"] = image_size
    if model.output_stride is not None:
        if taps.plain:
            raise UserError(
                f"model.output_stride ({model.output_stride}) does not apply to the plain ViT {model.backbone}, "
                "whose stride is its patch size; leave it out"
            )
        extra["output_stride"] = model.output_stride
    if model.stem == "convolutional":
        if not taps.plain or "embed_layer" not in accepted:
            raise UserError(f"model.stem convolutional needs a plain ViT; {model.backbone} is not one: set it to patch")
        if model.has_weights:
            raise UserError(
                "model.stem convolutional has no trained weights; set model.pretrained to false, or the stem"
            )
        if taps.stride not in (8, 16):
            raise UserError(f"model.stem convolutional needs patch size 8 or 16, {model.backbone} has {taps.stride}")
        extra["embed_layer"] = ConvolutionalStem
    return extra


def _prepare(encoder: Any, taps: Taps, arguments: Mapping[str, Any]) -> None:
    """Remove what the two maps do not pass through, so that every parameter left receives a gradient (DDP)."""
    norm = _final_norm(encoder)
    pooled = getattr(encoder, "fc_norm", None)
    if norm is None and isinstance(pooled, nn.Module) and not isinstance(pooled, nn.Identity):
        norm = pooled  # average-pooled ViTs keep their final norm behind the pooling
    encoder.prune_intermediate_layers([taps.aux, taps.last], prune_norm=norm is None, prune_head=True)
    if norm is not None:
        encoder.norm = norm
    if getattr(encoder, "attn_pool", None) is not None:
        encoder.attn_pool = None
    if "dynamic_img_size" in arguments and hasattr(encoder, "_pos_embed"):
        encoder._pos_embed = types.MethodType(position_tokens, encoder)
    encoder.eval()


def _final_norm(encoder: nn.Module) -> nn.Module | None:
    """The norm over the last map; one norm for each stage or branch (a list) is none of these."""
    norm = getattr(encoder, "norm", None)
    return norm if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity | nn.ModuleList) else None


@torch.enable_grad()
def _trial(
    encoder: nn.Module, taps: Taps, arguments: dict[str, Any], crop: int, sides: Sequence[float], device: str
) -> Examination | tuple[int, Exception]:
    """Both maps of the crop and of every other side; else the first side that the encoder does not take, and why."""
    grids: dict[int, tuple[int, int]] = {}
    unreached: frozenset[str] = frozenset()
    for side in (crop, *sorted({taps.side(side) for side in sides} - {crop})):
        try:
            last, aux = feature_maps(encoder, torch.zeros(1, 3, side, side, device=device), taps)
            if (last.ndim, aux.ndim) != (4, 4):
                raise ValueError(f"its maps have shapes {tuple(last.shape)} and {tuple(aux.shape)}")
        except Exception as error:  # every family has its own way to say no
            return side, error
        if side == crop:
            taps = taps._replace(aux_channels=aux.shape[1], last_channels=last.shape[1])
            unreached = _unreached(encoder, (last, aux))
        grids[side] = (last.shape[-2], last.shape[-1])
    return Examination(arguments, taps, grids, unreached)


def _unreached(encoder: nn.Module, maps: Sequence[Tensor]) -> frozenset[str]:
    """Names of the parameters that no map depends on, found by walking the graph."""
    reached: set[int] = set()
    seen: set[Any] = set()
    pending: list[Any] = [each.grad_fn for each in maps]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        pending += [parent for parent, _ in node.next_functions]
    return frozenset(name for name, parameter in encoder.named_parameters() if id(parameter) not in reached)


def _reason(error: Exception) -> str:
    """An error's first line, or timm's statement that raised it, short enough for a sentence."""
    frames = traceback.extract_tb(error.__traceback__)
    statements = [frame.line for frame in frames if "timm" in frame.filename and frame.line]
    return (str(error).strip() or (statements or [repr(error)])[-1]).splitlines()[0][:200]
