"""Perplexity of a CAM's confidence and the reliability weights made of it."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-6  # the logarithm's argument is clamped here: perplexity stays below 13.9 at exponent 1


def perplexity(confidence: Tensor, threshold: Tensor | float, scale: float, exponent: float) -> Tensor:
    """P(x) of confidences v against the background threshold xi; high = close to the threshold = unreliable.

    [-log(la (v - xi) / (1 - xi))]^lb for v >= xi and [-log(la (xi - v) / xi)]^lb below. [reconstructed]: the idea is
    the paper's (3.4), the exact symbols could not be checked.

    Args:
        confidence: v, any shape, in [0, 1].
        threshold: xi in (0, 1), number or 0-dim tensor.
        scale, exponent: lambda_alpha in (0, 1), lambda_beta > 0.
    """
    distance = confidence - threshold
    relative = torch.where(distance >= 0, distance / (1 - threshold), -distance / threshold)
    value = -(scale * relative).clamp(_LEAST, 1.0).log()
    return value if exponent == 1 else value**exponent


def reliability(trust: Tensor, inside: Tensor, over: str) -> Tensor:
    """Weights from trust (B, H, W), P^-1 for the perplexity P: |R| P^-1 / sum_R P^-1, R the pixels `inside` an image.

    With `over` "image" they average to 1 in every image; with "batch" they are P^-1, and the caller scales them by
    |R| / sum_R P^-1 over the global batch. 0 outside. [reconstructed], as `perplexity`.
    """
    trust = trust * inside
    if over == "batch":
        return trust
    pixels = inside.sum((1, 2), keepdim=True)
    return trust * (pixels / trust.sum((1, 2), keepdim=True).clamp(min=torch.finfo(trust.dtype).tiny))
