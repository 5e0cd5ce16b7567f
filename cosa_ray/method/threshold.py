"""Thresholds that follow the CAMs' confidence: a ring of histograms and a Gaussian mixture fitted to their sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_ray.config.schema import DynamicThreshold, PseudoLabels

GRID = 16  # confidences are counted on maps of crop / GRID
_REGULARISATION = 1e-6  # added to variances, as scikit-learn does


class Proposal(NamedTuple):
    """What a step would make of the thresholds; `commit` takes it over, or not.

    values (2, T) for the main and the auxiliary CAM; ring (2, N, bins); seen () batches so far; steps (2,) EM steps.
    """

    values: Tensor
    ring: Tensor
    seen: Tensor
    steps: Tensor


class Fit(NamedTuple):
    """A fitted mixture: boundaries (..., 1 or 2), whether they can be trusted (...), EM steps taken (...)."""

    boundaries: Tensor
    valid: Tensor
    steps: Tensor
    means: Tensor
    variances: Tensor
    weights: Tensor


class DynamicThresholds:
    """Background threshold xi (or low and high) of the main and of the auxiliary CAM (paper 3.4; release `usegmm`).

    Lives on one device; nothing here asks the host. `values` maps threshold names to 0-dim float32 tensors:
    background, background_aux (single, reliability) or low, high, low_aux, high_aux (two_threshold).
    """

    def __init__(self, dynamic: DynamicThreshold, labels: PseudoLabels, device: torch.device | str = "cpu") -> None:
        self.dynamic = dynamic
        two = labels.policy == "two_threshold"
        self.names: tuple[str, ...] = ("low", "high") if two else ("background",)
        if two:
            low_aux = labels.low if labels.low_aux is None else labels.low_aux
            high_aux = labels.high if labels.high_aux is None else labels.high_aux
            start = [[labels.low, labels.high], [low_aux, high_aux]]
        else:
            start = [[labels.threshold], [labels.threshold]]
        self.current = torch.tensor(start, device=device)
        self.ring = torch.zeros(2, dynamic.batches, dynamic.bins, dtype=torch.int64, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def values(self) -> dict[str, Tensor]:
        """The thresholds in force, by name."""
        return named(self.names, self.current)

    def histogram(self, cams: Sequence[Tensor], crop: int) -> Tensor:
        """Count the confidences of valid CAMs (main, auxiliary), each (B, C, h, w): int64 (2, bins) over [0, 1].

        Bilinear to crop/16, then the maximum over classes, padding included; values below `minimum` do not count.
        """
        bins = self.dynamic.bins
        counts = []
        for cam in cams:
            side = max(1, crop // GRID)
            confidence = F.interpolate(cam, size=(side, side), mode="bilinear", align_corners=False).amax(1).flatten()
            bin_of = (confidence * bins).long().clamp_(0, bins - 1)
            counted = (confidence >= self.dynamic.minimum).long()
            counts.append(torch.zeros(bins, dtype=torch.int64, device=cam.device).scatter_add_(0, bin_of, counted))
        return torch.stack(counts)

    def propose(self, histograms: Tensor, *, move: bool = True) -> Proposal:
        """The ring with this step's histograms (2, bins) summed over workers, and the thresholds it gives.

        Args:
            move: False fills the ring only (the end of warm-up) and keeps the thresholds.
        """
        slot = torch.remainder(self.seen, self.dynamic.batches)
        here = torch.arange(self.dynamic.batches, device=self.ring.device) == slot
        ring = torch.where(here[None, :, None], histograms[:, None], self.ring)
        if not move:
            none = torch.zeros(2, dtype=torch.int64, device=ring.device)
            return Proposal(self.current, ring, self.seen + 1, none)
        fit = fit_mixture(ring.sum(1), len(self.names) + 1, self.dynamic)
        momentum, (low, high) = self.dynamic.momentum, self.dynamic.bounds
        moved = (momentum * self.current + (1 - momentum) * fit.boundaries.float()).clamp(low, high)
        return Proposal(torch.where(fit.valid[:, None], moved, self.current), ring, self.seen + 1, fit.steps)

    def commit(self, proposal: Proposal, finite: Tensor) -> None:
        """Take a proposal over where `finite` (0-dim) is not 0."""
        keep = finite != 0
        self.current = torch.where(keep, proposal.values, self.current)
        self.ring = torch.where(keep, proposal.ring, self.ring)
        self.seen = torch.where(keep, proposal.seen, self.seen)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint: values, ring, seen."""
        return {"values": self.current, "ring": self.ring, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's tensors; ValueError when they belong to another policy, ring or binning."""
        for name, mine in self.state_dict().items():
            if state[name].shape != mine.shape:
                raise ValueError(f"thresholds: {name} is {tuple(state[name].shape)}, expected {tuple(mine.shape)}")
        device = self.current.device
        self.current = state["values"].to(device, torch.float32, copy=True)
        self.ring = state["ring"].to(device, torch.int64, copy=True)
        self.seen = state["seen"].to(device, torch.int64, copy=True)


def named(names: Sequence[str], values: Tensor) -> dict[str, Tensor]:
    """(2, T) thresholds by name, those of the auxiliary CAM with the suffix `_aux`."""
    return {name + suffix: values[row, i] for row, suffix in enumerate(("", "_aux")) for i, name in enumerate(names)}


def fit_mixture(histogram: Tensor, components: int, settings: DynamicThreshold) -> Fit:
    """Fit Gaussian mixtures to histograms by EM and read the thresholds off (method.md 4.4; release's scikit-learn).

    Means start at min (, median) and max or at even quantiles, weights equal, variances 1; a mixture stops when its
    mean log-likelihood moves by less than `tolerance`, after `max_iterations` at the latest. The stopping rule is
    part of the method. Two components: largest confidence given to the lower; three: largest given to the lowest and
    smallest given to the highest. On an accelerator the iterations are a fixed number of masked ones, so that the
    host is not asked.

    Args:
        histogram: (..., bins) counts over [0, 1].
        components: 2 or 3.
    """
    bins = histogram.shape[-1]
    counts = histogram.double()
    total = counts.sum(-1, keepdim=True)
    share = counts / total.clamp(min=1)
    x = (torch.arange(bins, device=counts.device, dtype=torch.float64) + 0.5) / bins
    # Moments and densities become matrix products: fewer operations, which on a CPU is what an iteration costs.
    moments = torch.stack([torch.ones_like(x), x, x * x], -1)
    terms = torch.stack([torch.full_like(x, 0.5), x, -0.5 * x * x])
    start = _start(share, x, components, settings.start)
    mixture = torch.stack([start, torch.ones_like(start), torch.full_like(start, 1.0 / components)])
    steps = torch.zeros(histogram.shape[:-1], dtype=torch.int64, device=counts.device)
    active = total.squeeze(-1) > 0
    previous = torch.full_like(total.squeeze(-1), -math.inf)
    for _ in range(settings.max_iterations):
        joint = _log_joint(mixture, terms)
        shares = joint.log_softmax(-2)  # of every component in a bin
        likelihood = ((joint.select(-2, 0) - shares.select(-2, 0)) * share).sum(-1)
        mass, first, second = ((shares.exp_() * share.unsqueeze(-2)) @ moments).unbind(-1)
        mass = mass + torch.finfo(torch.float64).eps
        mean = first / mass
        variance = torch.addcmul(second / mass, mean, mean, value=-1).clamp_(min=0).add_(_REGULARISATION)
        moved = torch.stack([mean, variance, mass / mass.sum(-1, keepdim=True)])
        mixture = torch.where(active.unsqueeze(-1), moved, mixture)
        steps = steps + active
        active = active & ((likelihood - previous).abs() >= settings.tolerance)
        previous = likelihood
        if active.device.type == "cpu" and not active.any():  # free to ask there; the result is the same
            break
    order = mixture[0].argsort(-1)
    mixture = mixture.gather(-1, order.expand_as(mixture))
    means, variances, weights = mixture.unbind()
    owner = _log_joint(mixture, terms).argmax(-2)
    occupied = counts > 0
    if settings.between_means:
        occupied = occupied & (x >= means[..., :1]) & (x <= means[..., -1:])
    lowest, highest = occupied & (owner == 0), occupied & (owner == components - 1)
    top = torch.where(lowest, x, -math.inf).amax(-1)
    bottom = torch.where(highest, x, math.inf).amin(-1)
    boundaries = top[..., None] if components == 2 else torch.stack([top, bottom], -1)
    taken = torch.stack([((owner == k) & (counts > 0)).any(-1) for k in range(components)], -1).all(-1)
    valid = (total.squeeze(-1) >= settings.min_values) & taken & boundaries.isfinite().all(-1)
    if components == 3:
        valid = valid & (top < bottom)
    return Fit(boundaries, valid, steps, means, variances, weights)


def _log_joint(mixture: Tensor, terms: Tensor) -> Tensor:
    """log(weight * normal density) + log(2 pi) / 2 of every component at every bin: (..., K, bins).

    terms (3, bins): 1/2, x and -x^2/2 of the bins' centres.
    """
    means, variances, weights = mixture.unbind()
    precision = variances.reciprocal()
    slope = means * precision
    constant = torch.addcmul((weights * weights * precision).log_(), means, slope, value=-1)
    return torch.stack([constant, slope, precision], -1) @ terms


def _start(share: Tensor, x: Tensor, components: int, start: str) -> Tensor:
    """Initial means (..., K): the release's extremes (and median), or even quantiles."""
    reached = share.cumsum(-1)

    def quantile(q: float) -> Tensor:
        index = (reached < q).sum(-1).clamp(max=x.numel() - 1)
        return x[index]

    if start == "quantiles":
        return torch.stack([quantile((k + 0.5) / components) for k in range(components)], -1)
    occupied = share > 0
    low = torch.where(occupied, x, 1.0).amin(-1)
    high = torch.where(occupied, x, 0.0).amax(-1)
    return torch.stack([low, high] if components == 2 else [low, quantile(0.5), high], -1)
