"""The bilateral filter of dense CRFs on a permutohedral lattice, in plain tensor operations on the tensor's device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DIMENSIONS = 5  # x, y, red, green, blue
_VERTICES = DIMENSIONS + 1
_NO_KEY = 1 << 62  # greater than any key
_CHANNELS = 32  # filtered at a time: 8 images of 224 x 224 then need 310 MB a table at the very worst


class BilateralLattice:
    """Unnormalised 5-D Gaussian filter W of a batch of images (Adams et al. 2010; Krähenbühl and Koltun 2011).

    (W v)(p) = sum_q exp(-|x_p - x_q|^2 / 2 sigma_xy^2 - |I_p - I_q|^2 / 2 sigma_rgb^2) v(q), up to the lattice's own
    scale of roughly 0.55. Built once for a batch, it filters any number of channels; an image's result does not depend
    on the rest of the batch, and two runs give the same bits. On an accelerator the host is never asked.

    Values are splatted to the six corners of each pixel's simplex, blurred along the six axes of the lattice points
    that exist, and sliced back: three sparse matrix products, each written as sums over bags of rows.
    """

    def __init__(self, images: Tensor, sigma_rgb: float, sigma_xy: float) -> None:
        """Build the lattice.

        Args:
            images: (B, 3, H, W), any dtype, colours in 0..255 (clamped to it).
            sigma_rgb: standard deviation in colour, 0..255.
            sigma_xy: standard deviation in pixels.

        Raises:
            ValueError: the deviations are so small that lattice points cannot be numbered in 62 bits.
        """
        batch, _, height, width = images.shape
        self.batch = batch
        extent = [(width - 1) / sigma_xy, (height - 1) / sigma_xy, *[255 / sigma_rgb] * 3]
        radix, lowest = _radix(extent)
        strides = [math.prod(radix[axis + 1 :]) for axis in range(DIMENSIONS)]
        if batch * math.prod(radix) >= _NO_KEY:
            raise ValueError(
                f"{batch} images of {height} x {width} pixels with sigma_rgb {sigma_rgb:g} and sigma_xy {sigma_xy:g} "
                "need more lattice points than can be numbered; raise the deviations"
            )
        keys, self._weights = _simplices(_positions(images, sigma_rgb, sigma_xy), strides, lowest)
        image = torch.arange(batch, device=images.device) * math.prod(radix)
        keys = (keys.view(batch, -1) + image[:, None]).flatten()  # an image's points stay apart from another's
        self._connect(keys, strides)

    def _connect(self, keys: Tensor, strides: Sequence[int]) -> None:
        """Number the lattice points that occur among the pixels' corners (B*N*6,) and find their neighbours."""
        device, entries = keys.device, len(keys)
        ordered, order = keys.sort(stable=True)
        number = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).cumsum(0)])
        # The number of points is known on the host only where asking it is free; else every corner could be a point.
        self.points = int(number[-1]) + 1 if _asking_is_free(device) else entries
        first = torch.searchsorted(number, torch.arange(self.points + 1, device=device))
        points = torch.where(first < entries, ordered[first.clamp(max=entries - 1)], _NO_KEY)  # the last is a spare
        self._corners = torch.empty_like(order).scatter_(0, order, number).view(-1, _VERTICES).int()
        self._pixels = (order // _VERTICES).int()
        self._splat_weights = self._weights.flatten()[order]
        self._starts = first.int()
        own = torch.arange(self.points + 1, device=device)
        neighbours = []
        for axis in range(_VERTICES):
            # One step along an axis adds d to its coordinate and -1 to the others; the last coordinate has no digit.
            step = (_VERTICES * strides[axis] if axis < DIMENSIONS else 0) - sum(strides)
            both = [_find(points, points + sign * step, self.points) for sign in (1, -1)]
            neighbours.append(torch.stack([own, *both], 1).int())
        self._neighbours = neighbours
        self._blur_weights = torch.full((self.points + 1, 3), 0.5, device=device)
        self._blur_weights[:, 0] = 1

    def filter(self, values: Tensor) -> Tensor:
        """W v of values (B, K, H, W), float32 or float64, same shape; differentiable any number of times."""
        return _Filter.apply(values, self, False)

    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        """W v, or W^T v: the blurs of the axes do not commute where neighbours are missing, so their order turns."""
        filtered = []
        for part in values.flatten(2).split(_CHANNELS, dim=1):
            rows = self._filter_rows(part.transpose(1, 2).flatten(0, 1), transpose)
            filtered.append(rows.view(self.batch, -1, rows.shape[1]).transpose(1, 2))
        return torch.cat(filtered, 1).reshape(values.shape)

    def _filter_rows(self, rows: Tensor, transpose: bool) -> Tensor:
        """Splat, blur and slice rows (B*N, K)."""
        table = _bags(self._pixels, rows.contiguous(), self._splat_weights, self._starts)
        for neighbours in reversed(self._neighbours) if transpose else self._neighbours:
            table = _bags(neighbours, table, self._blur_weights)
        return _bags(self._corners, table, self._weights).mul_(1 / (1 + 2.0**-DIMENSIONS))


class _Filter(torch.autograd.Function):
    """The lattice's linear map; its derivative is the transposed map, of which the same holds."""

    @staticmethod
    def forward(ctx, values: Tensor, lattice: BilateralLattice, transpose: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.lattice, ctx.transpose = lattice, transpose
        return lattice._apply(values, transpose)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        return _Filter.apply(gradient, ctx.lattice, not ctx.transpose), None, None


def _asking_is_free(device: torch.device) -> bool:
    """True where a tensor's value is at hand without waiting for the device."""
    return device.type == "cpu"


def _positions(images: Tensor, sigma_rgb: float, sigma_xy: float) -> list[Tensor]:
    """Coordinates in standard deviations, five tensors (B, H, W): x, y and the colours."""
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device, dtype=torch.float32) / sigma_xy
    y = torch.arange(height, device=images.device, dtype=torch.float32)[:, None] / sigma_xy
    colours = images.float().clamp(0, 255) / sigma_rgb
    return [x.expand_as(colours[:, 0]), y.expand_as(colours[:, 0]), *colours.unbind(1)]


def _scales() -> list[float]:
    """Factors of the positions such that the lattice's blur has unit deviation: sqrt(2/3) (d+1) / sqrt(i (i+1))."""
    return [math.sqrt(2 / 3) * _VERTICES / math.sqrt((i + 1) * (i + 2)) for i in range(DIMENSIONS)]


def _radix(extent: Sequence[float]) -> tuple[list[int], list[int]]:
    """(digits' sizes, least values) of the first d lattice coordinates for positions in 0..extent, neighbours too.

    Lattice coordinates are sums of positions with factors of either sign (see `_simplices`), so their bounds are known
    on the host; a corner lies within 2(d+1) of its pixel and a neighbour within d of a corner.
    """
    reach = [size * scale for size, scale in zip(extent, _scales(), strict=True)]
    lowest, radix = [], []
    for axis in range(DIMENSIONS):
        low = -axis * reach[axis - 1] if axis else 0.0
        low, high = math.floor(low) - 3 * _VERTICES, math.ceil(sum(reach[axis:])) + 3 * _VERTICES
        lowest.append(low)
        radix.append(high - low + 1)
    return radix, lowest


def _simplices(positions: Sequence[Tensor], strides: Sequence[int], lowest: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keys (P, 6) int64 and barycentric weights (P, 6) of the corners of each pixel's simplex, P = B*H*W.

    A key is the mixed-radix number of the first d lattice coordinates (they sum to 0, so the last is known).
    """
    elevated, total = [], torch.zeros_like(positions[0])
    for axis in range(DIMENSIONS, 0, -1):  # onto the plane of d+1 coordinates that sum to 0
        part = positions[axis - 1] * _scales()[axis - 1]
        elevated.append(total - axis * part)
        total = total + part
    height = torch.stack([total, *reversed(elevated)]).flatten(1)  # (6, P)
    # The nearest point whose coordinates are all multiples of d+1, and each coordinate's rank by distance from it.
    nearest = (height / _VERTICES).round()
    excess = nearest.sum(0).long()  # of multiples: the nearest such point may lie off the plane
    distance = height - nearest * _VERTICES
    rank = excess.repeat(_VERTICES, 1)
    for i in range(_VERTICES):
        for j in range(i + 1, _VERTICES):
            behind = distance[i] < distance[j]
            rank[i] += behind
            rank[j] += ~behind
    wrap = (rank < 0).long() - (rank >= _VERTICES).long()  # back onto the plane
    rank += wrap * _VERTICES
    origin = nearest.long() + wrap
    offset = (height - origin * _VERTICES) / _VERTICES
    by_rank = torch.empty_like(offset).scatter_(0, rank, offset)
    descending = by_rank.flip(0)
    weights = descending - torch.cat([by_rank[:1] - 1, descending[:-1]])
    # Corner k adds k to every coordinate and takes d+1 off the k of highest rank.
    units = torch.stack([torch.full_like(rank[0], stride) for stride in (*strides, 0)])
    taken = torch.empty_like(rank).scatter_(0, rank, units).flip(0).cumsum(0)
    digits = [(_VERTICES * origin[axis] - lowest[axis]) * strides[axis] for axis in range(DIMENSIONS)]
    base = torch.stack(digits).sum(0)
    corners = [base] + [base + k * sum(strides) - _VERTICES * taken[k - 1] for k in range(1, _VERTICES)]
    return torch.stack(corners, 1), weights.t().contiguous()


def _find(points: Tensor, wanted: Tensor, missing: int) -> Tensor:
    """Place of each wanted key among the ascending points, `missing` where it is not one."""
    place = torch.searchsorted(points, wanted).clamp(max=len(points) - 1)
    return torch.where(points[place] == wanted, place, missing)


def _bags(index: Tensor, table: Tensor, weights: Tensor, starts: Tensor | None = None) -> Tensor:
    """Weighted sums of a table's rows over bags: rows of `index`, or runs of it that begin at `starts`."""
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights.to(table.dtype))
