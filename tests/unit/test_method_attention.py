"""The attention kernel: chosen by what the pass is, the same numbers either way."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from cosa_ray.config.load import load_config
from cosa_ray.method.attention import PLAIN_TOKENS, plain_attention, plain_is_faster
from cosa_ray.method.network import Network, build_network


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    small = ["model.backbone_args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}", "model.aux=0"]
    return build_network(load_config("shapes", ["views.crop=48", *small]).model, 3, image_size=48)


def calls(network: Network, bf16: bool, gradient: bool) -> list[str]:
    """The attention operators of a pass, by the profiler."""
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
        torch.set_grad_enabled(gradient),
    ):
        network(torch.zeros(1, 3, 48, 48))
    return [event.name for event in profile.events() if event.name == "aten::scaled_dot_product_attention"]


@pytest.mark.parametrize(
    ("bf16", "gradient", "fused"), [(False, False, 2), (False, True, 2), (True, False, 2), (True, True, 0)]
)
def test_only_a_bf16_pass_with_a_gradient_multiplies_plainly(
    network: Network, bf16: bool, gradient: bool, fused: int
) -> None:
    assert len(calls(network, bf16, gradient)) == fused
    assert len(calls(network, False, False)) == 2, "and the layers are as they were"


def test_many_tokens_take_the_fused_kernel() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain_is_faster(torch.zeros(1, 3, 8, 8), PLAIN_TOKENS)
        assert not plain_is_faster(torch.zeros(1, 3, 8, 8), PLAIN_TOKENS + 1)


def test_both_give_the_same_maps_and_gradients(network: Network) -> None:
    images = torch.randn(2, 3, 48, 48)
    found = []
    for context in (nullcontext(), plain_attention(network.encoder)):
        network.zero_grad()
        with context:
            outputs = network(images)
            (outputs.seg.square().sum() + outputs.cls.sum()).backward()  # type: ignore[union-attr]
        found.append([outputs.cam.detach(), outputs.seg.detach(), *(p.grad for p in network.encoder.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_an_error_inside_leaves_the_layers_as_they_were(network: Network) -> None:
    with pytest.raises(ZeroDivisionError), plain_attention(network.encoder):
        raise ZeroDivisionError
    assert len(calls(network, False, False)) == 2
