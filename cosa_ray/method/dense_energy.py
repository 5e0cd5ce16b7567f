"""Dense energy: pixels that look alike and lie close should be segmented alike (method.md 4.7; Tang et al. 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_ray.config.schema import DenseEnergy
from cosa_ray.method.assignment import resize
from cosa_ray.method.bilateral import BilateralLattice
from cosa_ray.method.pseudo_labels import IGNORED

SCALE = 1e-7


def dense_energy(
    probabilities: Tensor,
    images: Tensor,
    labels: Tensor,
    inside: Tensor,
    global_batch: int,
    settings: DenseEnergy,
) -> Tensor:
    """E = -1e-7/N sum S G (W S) over maps of half the crop, a share of the global batch's; 0-dim.

    S = probabilities x box, W = the unnormalised bilateral kernel on the images, gate G = relu(box - max_c S), or 1
    where the label is 255. The release's gradient is a definition, dE/dS = -2e-7/N G (W S) box: gate and filtered map
    count as fixed, and once for each of the two factors; `settings.gradient` "autograd" gives the true one instead.

    Args:
        probabilities: softmax of ON's segmentation (B, C+1, h, w) in float32 or float64; bilinear to half the crop.
        images: strong views in 0..255, (B, 3, H, W); by nearest neighbour to half the crop, like labels and box.
        labels: the main CAM's pseudo-labels, (B, H', W') int64.
        inside: (B, H, W) bool, the valid area of the crop.
        global_batch: N.
    """
    size = (max(1, images.shape[-2] // 2), max(1, images.shape[-1] // 2))
    box = _nearest(inside[:, None].float(), size)
    ignored = _nearest((labels == IGNORED)[:, None].float(), size) > 0
    shares = resize(probabilities, size)
    lattice = BilateralLattice(_nearest(images.float(), size), settings.sigma_rgb, settings.sigma_xy / 2)
    gate = torch.where(ignored, 1.0, F.relu(box - shares.amax(1, keepdim=True)))
    shares = shares * box
    if settings.gradient == "autograd":
        return (shares * gate * lattice.filter(shares)).sum() * (-SCALE / global_batch)
    with torch.no_grad():
        held = gate * lattice.filter(shares) * (-SCALE / global_batch)
    energy = (shares * held).sum()
    return 2 * energy - energy.detach()  # the value once, the gradient twice


def _nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, K, H, W) to a size by nearest neighbour; at half size, every second pixel from the first."""
    return F.interpolate(maps, size=size, mode="nearest")
