"""The bilateral filter of the dense energy against the sum over all pairs of pixels: how close, and how much faster.

    python benchmarks/bilateral_filter.py --threads 2
    python benchmarks/bilateral_filter.py --side 112 --channels 21 --batch 8 --json

Accuracy on a small photograph in float64; time on photographs of `--side` pixels at the dense energy's deviations (15
in colour, 50 pixels), medians of `--repeats`. The sum over all pairs is timed once, on one image, and taken times the
batch. On a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from skimage import data, transform
from torch import Tensor

from cosa_ray.method.bilateral import BilateralLattice

SIGMA_RGB, SIGMA_XY = 15.0, 50.0


def photographs(batch: int, side: int) -> Tensor:
    """(B, 3, side, side) in 0..255: crops of one photograph, each another."""
    whole = torch.from_numpy(data.astronaut()).permute(2, 0, 1).float()
    edge, pictures = 384, []
    for index in range(batch):
        top, left = 16 * index % (whole.shape[1] - edge), 48 * index % (whole.shape[2] - edge)
        crop = whole[:, top : top + edge, left : left + edge].permute(1, 2, 0).numpy()
        resized = transform.resize(crop, (side, side), anti_aliasing=True, preserve_range=True)
        pictures.append(torch.from_numpy(resized).float().permute(2, 0, 1))
    return torch.stack(pictures).round()


def shares(batch: int, channels: int, side: int) -> Tensor:
    """Smooth maps (B, K, side, side) that sum to 1 over the channels, like a segmentation's softmax."""
    draw = torch.Generator().manual_seed(0)
    coarse = 3 * torch.randn(batch, channels, 7, 7, generator=draw)
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").softmax(1)


def sum_over_pairs(image: Tensor, values: Tensor, rows: int = 512) -> Tensor:
    """The filter by its definition on one image (3, H, W) and its maps (K, H, W), `rows` pixels at a time."""
    height, width = image.shape[1:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([x, y]).to(image).flatten(1) / SIGMA_XY
    points = torch.cat([place, image.flatten(1) / SIGMA_RGB]).t().contiguous()
    flat = values.flatten(1).t().contiguous()
    filtered = [torch.cdist(part, points).square_().mul_(-0.5).exp_() @ flat for part in points.split(rows)]
    return torch.cat(filtered).t().reshape(values.shape)


def seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of a call; the first call does not count where there are several."""
    spent = []
    for _ in range(repeats + (repeats > 1)):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[-repeats:])


def accuracy(side: int, device: torch.device) -> dict[str, float]:
    """How the lattice compares with the sum over all pairs on one photograph, over its pixels and 3 maps."""
    images, values = photographs(1, side).to(device), shares(1, 3, side).double().to(device)
    filtered = BilateralLattice(images, SIGMA_RGB, SIGMA_XY).filter(values)[0]
    exact = sum_over_pairs(images[0].double(), values[0])
    ratio = filtered / exact
    correlation = torch.corrcoef(torch.stack([filtered.flatten(), exact.flatten()]))[0, 1]
    return {
        "side": side,
        "correlation": correlation.item(),
        "mean_ratio": ratio.mean().item(),
        "deviation_of_ratio": ratio.std().item(),
    }


def speed(batch: int, channels: int, side: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds to build the lattice of a batch and to filter its maps."""
    images, values = photographs(batch, side).to(device), shares(batch, channels, side).to(device)
    lattice = BilateralLattice(images, SIGMA_RGB, SIGMA_XY)
    return {
        "batch": batch,
        "channels": channels,
        "points_an_image": lattice.points / batch,
        "build": seconds(lambda: BilateralLattice(images, SIGMA_RGB, SIGMA_XY), device, repeats),
        "filter": seconds(lambda: lattice.filter(values), device, repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=224, help="pixels; 224 is half a crop of 448")
    parser.add_argument("--channels", type=int, nargs="+", default=[21, 81])
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--accuracy-side", type=int, default=80, help="side of the photograph that accuracy is for")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-pairs", action="store_true", help="do not time the sum over all pairs")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    close, rows = accuracy(given.accuracy_side, device), []
    for channels in given.channels:
        slow = None
        if not given.no_pairs:
            image, values = photographs(1, given.side)[0].to(device), shares(1, channels, given.side)[0].to(device)
            slow = seconds(lambda image=image, values=values: sum_over_pairs(image, values), device, 1)  # type: ignore[misc]
        for batch in given.batch:
            row: dict[str, Any] = speed(batch, channels, given.side, given.repeats, device)
            if slow is not None:
                row |= {"pairs": slow * batch, "times_faster": slow * batch / (row["build"] + row["filter"])}
            rows.append(row)
    if given.json:
        machine = {"device": str(device), "threads": given.threads, "torch": torch.__version__}
        print(json.dumps({"side": given.side, "accuracy": close, "speed": rows, "repeats": given.repeats, **machine}))
        return
    print(
        f"{close['side']} px: correlation {close['correlation']:.4f} with the sum over all pairs, "
        f"ratio {close['mean_ratio']:.3f} (deviation {close['deviation_of_ratio']:.3f})"
    )
    print(f"{given.side} px, {device}, {given.threads} threads: median of {given.repeats}")
    for row in rows:
        print(
            f"  batch {row['batch']:2d} x {row['channels']:3d} channels: build {1000 * row['build']:7.1f} ms, "
            f"filter {1000 * row['filter']:7.1f} ms"
            + (f", {row['times_faster']:6.0f} times faster than all pairs" if "pairs" in row else "")
        )


if __name__ == "__main__":
    main()
