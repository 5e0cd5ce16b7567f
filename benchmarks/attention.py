"""Attention by torch's fused kernel and by plain matrix products, over numbers of tokens, with and without a gradient.

    python benchmarks/attention.py --rounds 15 --threads 2
    python benchmarks/attention.py --precision bf16 --heads 12

For what `cosa_ray.method.attention` chooses. One attention layer as timm builds it (projections
included), heads of 64 channels (the demo's of 32), forward alone or forward and backward. Below 1 the plain products
are the faster ones. Needs torch and timm.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from measuring import in_turns, machine, medians, ratio, save
from timm.layers import Attention


def contender(layer: Any, tokens: torch.Tensor, fused: bool, bf16: bool) -> Callable[[], None]:
    """A pass through the layer, with its backward pass where the tokens want a gradient."""

    def run() -> None:
        layer.fused_attn = fused
        with (
            torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=bf16),
            torch.set_grad_enabled(tokens.requires_grad),
        ):
            out = layer(tokens)
        if tokens.requires_grad:
            out.float().sum().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[3, 12])
    parser.add_argument("--tokens", type=int, nargs="+", default=[36, 144, 197, 785, 1765])
    parser.add_argument("--images", type=int, default=2, help="a pass; twice as many without a gradient, for the flips")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", metavar="FILE", help="write the result as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"machine": machine("torch", "timm"), "precision": given.precision, "cases": []}
    print(json.dumps(result["machine"]))
    print(f"{'heads':>6s}{'tokens':>8s}{'gradient':>10s}{'fused, ms':>11s}{'plain, ms':>11s}{'plain / fused':>15s}")
    for heads in given.heads:
        width = heads * (64 if heads > 3 else 32)
        layer = Attention(width, num_heads=heads, qkv_bias=True).to(device)
        for count in given.tokens:
            for gradient in (False, True):
                images = given.images if gradient else 2 * given.images
                tokens = torch.randn(images, count, width, device=device, requires_grad=gradient)
                calls = {
                    name: contender(layer, tokens, name == "fused", given.precision == "bf16")
                    for name in ("fused", "plain")
                }
                seconds = in_turns(calls, given.rounds, warm_up=2)
                whole, factor = medians(seconds), ratio(seconds["plain"], seconds["fused"])
                print(
                    f"{heads:6d}{count:8d}{'yes' if gradient else 'no':>10s}{1000 * whole['fused']:11.2f}"
                    f"{1000 * whole['plain']:11.2f}{factor:15.2f}",
                    flush=True,
                )
                result["cases"].append(
                    {"heads": heads, "tokens": count, "gradient": gradient, "plain / fused": factor} | whole
                )
    save(result, given.out)


if __name__ == "__main__":
    main()
