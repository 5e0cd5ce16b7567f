"""The bilateral filter against the release's lattice and the sum over all pairs, and what a linear map must satisfy."""

from __future__ import annotations

import pytest
import torch
from skimage import data, transform
from torch.autograd import gradcheck, gradgradcheck

from cosa_ray.method import bilateral
from cosa_ray.method.bilateral import BilateralLattice


def photograph(side: int) -> torch.Tensor:
    """(1, 3, side, side) in 0..255, whole numbers."""
    picture = transform.resize(data.astronaut(), (side, side), anti_aliasing=True) * 255
    return torch.from_numpy(picture.round()).float().permute(2, 0, 1)[None].contiguous()


def pairs(images: torch.Tensor, values: torch.Tensor, sigma_rgb: float, sigma_xy: float) -> torch.Tensor:
    """The filter by its definition: every pixel with every pixel, in float64."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([y, x]).double().flatten(1) / sigma_xy
    filtered = []
    for image, value in zip(images.double(), values.double(), strict=True):
        points = torch.cat([place, image.flatten(1) / sigma_rgb]).t()
        kernel = (-0.5 * torch.cdist(points, points).square()).exp()
        filtered.append(value.flatten(1) @ kernel)
    return torch.stack(filtered).view(values.shape)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1].item()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.golden
def test_release_lattice(golden):
    arrays = {name: torch.from_numpy(value) for name, value in golden("bilateral_filter").items() if value.ndim}
    filtered = BilateralLattice(arrays["image"], 15, 50).filter(arrays["values"])
    torch.testing.assert_close(filtered, arrays["lattice"], rtol=1e-4, atol=0)
    theirs = correlation(arrays["lattice"], arrays["exact"])
    assert correlation(filtered, arrays["exact"]) >= theirs - 1e-3
    exact = pairs(arrays["image"], arrays["values"], 15, 50)
    torch.testing.assert_close(exact, arrays["exact"].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("sigma_rgb", "sigma_xy"), [(15, 50), (40, 6)])
def test_close_to_the_sum_over_all_pairs(sigma_rgb, sigma_xy):
    images = photograph(48)
    values = torch.cat([noise(1, 2, 48, 48), (images[:, :1] > 128).float()], 1)
    filtered = BilateralLattice(images, sigma_rgb, sigma_xy).filter(values)
    exact = pairs(images, values, sigma_rgb, sigma_xy)
    for channel in range(3):
        assert correlation(filtered[:, channel], exact[:, channel]) > 0.95
    assert 0.4 < (filtered / exact).mean() < 0.75  # the lattice's own scale


def test_colours_far_apart_do_not_mix():
    images = torch.zeros(1, 3, 16, 16)
    images[..., 8:] = 255
    values = torch.zeros(1, 1, 16, 16)
    values[..., :8] = 1
    filtered = BilateralLattice(images, 15, 50).filter(values)
    assert filtered[..., :8].min() > 1
    assert filtered[..., 8:].abs().max() == 0


def test_is_a_linear_map_with_an_exact_adjoint():
    lattice = BilateralLattice(noise(2, 3, 9, 7) * 255, 60, 4)
    x = noise(2, 3, 9, 7, seed=1, dtype=torch.float64).requires_grad_()
    y = noise(2, 3, 9, 7, seed=2, dtype=torch.float64)
    torch.testing.assert_close(lattice.filter(2 * x - 3 * y), 2 * lattice.filter(x) - 3 * lattice.filter(y))
    forward = (lattice.filter(x) * y).sum()
    (adjoint,) = torch.autograd.grad(forward, x)
    torch.testing.assert_close((adjoint * x).sum(), forward, rtol=1e-12, atol=0)
    assert not torch.allclose(adjoint, lattice.filter(y))  # the blurs do not commute: W is not symmetric


def test_gradients():
    lattice = BilateralLattice(noise(2, 3, 4, 3) * 255, 80, 3)
    x = noise(2, 2, 4, 3, seed=1, dtype=torch.float64).requires_grad_()
    assert gradcheck(lattice.filter, x)
    assert gradcheck(lambda v: v * lattice.filter(v), x)  # used twice
    assert gradgradcheck(lambda v: v * lattice.filter(v), x)


def test_an_image_does_not_depend_on_its_batch_and_two_runs_agree_bitwise():
    images, values = torch.cat([photograph(24), noise(2, 3, 24, 24) * 255]), noise(3, 5, 24, 24, seed=3)
    together = BilateralLattice(images, 15, 12).filter(values)
    assert torch.equal(together, BilateralLattice(images, 15, 12).filter(values))
    for index in range(3):
        alone = BilateralLattice(images[index : index + 1], 15, 12).filter(values[index : index + 1])
        assert torch.equal(alone[0], together[index])


def test_the_table_of_an_accelerator_changes_no_bit(monkeypatch):
    images, values = photograph(20), noise(1, 7, 20, 20)
    expected = BilateralLattice(images, 15, 12).filter(values)
    monkeypatch.setattr(bilateral, "_asking_is_free", lambda device: False)
    lattice = BilateralLattice(images, 15, 12)
    assert lattice.points == 6 * 400
    assert torch.equal(lattice.filter(values), expected)


def test_channels_do_not_see_each_other():
    lattice, values = BilateralLattice(photograph(20), 15, 12), noise(1, 70, 20, 20)
    together = lattice.filter(values)
    for channel in (0, 31, 32, 69):
        torch.testing.assert_close(lattice.filter(values[:, channel : channel + 1])[:, 0], together[:, channel])


def test_the_host_is_never_asked():
    lattice = BilateralLattice(torch.zeros(2, 3, 8, 9, device="meta"), 15, 50)
    assert lattice.filter(torch.zeros(2, 4, 8, 9, device="meta")).shape == (2, 4, 8, 9)


def test_colours_are_clamped_and_what_cannot_be_numbered_is_refused():
    images, values = noise(1, 3, 8, 8) * 255, noise(1, 1, 8, 8)
    wide = torch.where(images > 128, 1e6, images)
    expected = BilateralLattice(wide.clamp(0, 255), 15, 4).filter(values)
    assert torch.equal(BilateralLattice(wide, 15, 4).filter(values), expected)
    with pytest.raises(ValueError, match="raise the deviations"):
        BilateralLattice(images, 0.01, 0.01)
