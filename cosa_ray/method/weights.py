"""Trained weights of a backbone: they fit, or what does not is named."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cosa_ray.errors import UserError


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
