"""The dense energy against the release's numbers and its formula in plain loops, and both gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from cosa_ray.config.schema import DenseEnergy
from cosa_ray.method.bilateral import BilateralLattice
from cosa_ray.method.dense_energy import SCALE, dense_energy
from cosa_ray.method.network import Network
from cosa_ray.method.pseudo_labels import IGNORED, inside_box

CROP = 12


def case(dtype: torch.dtype = torch.float64, crop: int = CROP):
    """Logits (2, 3, S, S), images in 0..255, labels with 255 in the box and outside, and the box."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, crop, crop, generator=generator, dtype=dtype)
    images = torch.rand(2, 3, crop, crop, generator=generator) * 255
    inside = inside_box(torch.tensor([[0, 12, 0, 12], [3, 12, 0, crop - 4]]), (crop, crop), (crop, crop))
    labels = torch.randint(0, 3, (2, crop, crop), generator=generator)
    labels[torch.rand(2, crop, crop, generator=generator) < 0.3] = IGNORED
    return logits, images, torch.where(inside, labels, IGNORED), inside


@pytest.mark.golden
def test_release_loss_and_gradient(golden):
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in golden("dense_energy_loss").items()}
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    logits = arrays["seg_logits"].requires_grad_()
    inside = inside_box(arrays["boxes"].long(), (96, 96), (96, 96))
    settings = DenseEnergy(sigma_rgb=float(arrays["sigma_rgb"]), sigma_xy=float(arrays["sigma_xy"]))
    images = (arrays["images"] * std + mean) * 255
    loss = dense_energy(logits.softmax(1), images, arrays["mask"].long(), inside, 2, settings)
    loss.backward()
    torch.testing.assert_close(loss.detach(), arrays["loss"][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(logits.grad, arrays["grad"], rtol=0, atol=1e-11)
    assert F.cosine_similarity(logits.grad.flatten().double(), arrays["grad"].flatten().double(), dim=0) > 0.99999


def test_against_loops():
    logits, images, labels, inside = case()
    shares = F.avg_pool2d(logits.softmax(1), 2)  # bilinear to half size is the mean of four
    colours, ignored, box = images[..., ::2, ::2], labels[:, ::2, ::2] == IGNORED, inside[:, ::2, ::2]
    filtered = BilateralLattice(colours, 15, 50).filter(shares * box[:, None])
    total, gradient = 0.0, torch.zeros_like(shares)
    for b in range(2):
        for i in range(CROP // 2):
            for j in range(CROP // 2):
                if not box[b, i, j]:
                    continue
                gate = 1.0 if ignored[b, i, j] else 1 - shares[b, :, i, j].max().item()
                for c in range(3):
                    total += shares[b, c, i, j].item() * gate * filtered[b, c, i, j].item()
                    gradient[b, c, i, j] = -2 * SCALE / 5 * gate * filtered[b, c, i, j]
    probabilities = shares.requires_grad_()
    energy = dense_energy(probabilities, images, labels, inside, 5, DenseEnergy())
    energy.backward()
    assert energy.item() == pytest.approx(-SCALE / 5 * total, rel=1e-9)
    torch.testing.assert_close(probabilities.grad, gradient)


def test_autograd_is_the_true_gradient_and_the_value_is_the_same():
    logits, images, labels, inside = case(crop=6)

    def energy(x: torch.Tensor, gradient: str = "autograd") -> torch.Tensor:
        return dense_energy(x.softmax(1), images, labels, inside, 2, DenseEnergy(gradient=gradient)) / SCALE

    assert gradcheck(energy, logits.requires_grad_())
    torch.testing.assert_close(energy(logits), energy(logits, "release"))
    true, defined = (torch.autograd.grad(energy(logits, kind), logits)[0] for kind in ("autograd", "release"))
    assert not torch.allclose(true, defined)


@pytest.mark.parametrize("gradient", ["release", "autograd"])
def test_shares_add_up_to_the_batch(gradient):
    logits, images, labels, inside = case(torch.float32)
    settings, logits = DenseEnergy(gradient=gradient), logits.requires_grad_()

    def share(part: slice) -> torch.Tensor:
        return dense_energy(logits[part].softmax(1), images[part], labels[part], inside[part], 2, settings)

    whole, split = share(slice(None)), share(slice(0, 1)) + share(slice(1, 2))
    torch.testing.assert_close(split, whole, rtol=1e-6, atol=0)
    expected, got = (torch.autograd.grad(energy, logits)[0] for energy in (whole, split))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_size_of_the_maps_is_half_the_crop_whatever_the_losses_size():
    images = case()[1]
    inside = torch.ones(2, CROP, CROP, dtype=torch.bool)
    energies = []
    for stride in (1, 2, 4):
        side = CROP // stride
        shares = torch.tensor([0.2, 0.5, 0.3]).double().view(1, 3, 1, 1).expand(2, -1, side, side)
        labels = torch.zeros(2, side, side, dtype=torch.int64)
        energies.append(dense_energy(shares, images, labels, inside, 2, DenseEnergy()).item())
    assert energies[1:] == pytest.approx([energies[0]] * 2, rel=1e-9)


def test_what_lies_outside_the_box_gets_no_gradient():
    logits, images, labels, inside = case()
    logits.requires_grad_()
    dense_energy(logits.softmax(1), images, labels, inside, 2, DenseEnergy()).backward()
    reached = logits.grad.abs().amax(1) > 0
    assert not reached[1, :3].any()
    assert not reached[1, :, 8:].any()
    assert reached[0].all()


def test_images_are_brought_back_to_their_colours():
    network = Network.__new__(Network)
    torch.nn.Module.__init__(network)
    network.mean, network.std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    torch.testing.assert_close(network.denormalise(network.normalise(images)), images.float(), atol=1e-3, rtol=0)
