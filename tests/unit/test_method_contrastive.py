"""Contrastive separation: which pixels are compared, and the loss, against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from cosa_ray.method.contrastive import Sample, contrastive_loss, draws, sample_pixels
from cosa_ray.method.reliability import perplexity

PERPLEXITY = {"max_perplexity": 1.0, "perplexity_scale": 0.8, "perplexity_exponent": 1.0}


def auxiliary(batch: int = 3, classes: int = 4, size: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, classes, size, size, generator=generator)


def test_draws_depend_on_seed_step_position_and_pixel_only():
    position = torch.tensor([5, 0, 9])
    first = draws(1, 2, position, 50)
    assert torch.equal(first[[2, 0]], draws(1, 2, torch.tensor([9, 5]), 50))
    assert torch.equal(first[:, :20], draws(1, 2, position, 20))
    others = [draws(2, 2, position, 50), draws(1, 3, position, 50), draws(1, 2, position + 1, 50)]
    assert all((first != other).float().mean() > 0.99 for other in others)


def test_draws_are_uniform():
    values = draws(0, 0, torch.arange(200), 500).double() / 2**32
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values.flatten(), 20, 0, 1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 45  # chi square, 19 degrees of freedom, p about 0.001
    centred = values - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1)):
        assert (centred * other).mean().abs() / (1 / 12) < 0.02


@pytest.mark.parametrize("budget", [16, 40, 1000])
def test_sampled_pixels_are_confident_inside_and_balanced(budget):
    cam = auxiliary()
    inside = torch.ones(3, 12, 12, dtype=torch.bool)
    inside[0, :, :3] = False
    cam[2] *= 0.1  # all background in the last image
    sample = sample_pixels(cam, inside, 0.45, draws(0, 0, torch.arange(3), 144), budget=budget, **PERPLEXITY)
    assert sample.pixel.shape[1] == min(budget, 144)
    for b in range(3):
        candidates: dict[int, set[int]] = {}
        for pixel in range(144):
            values = cam[b].flatten(1)[:, pixel]
            v = values.max()
            if perplexity(v, 0.45, 0.8, 1.0) < 1 and inside[b].flatten()[pixel]:
                candidates.setdefault(int(values.argmax()) + 1 if v >= 0.45 else 0, set()).add(pixel)
        chosen: dict[int, set[int]] = {}
        for pixel, label, taken in zip(sample.pixel[b], sample.label[b], sample.taken[b], strict=True):
            if taken:
                chosen.setdefault(int(label), set()).add(int(pixel))
        assert sum(map(len, chosen.values())) == min(budget, sum(map(len, candidates.values())))
        most = max(map(len, chosen.values()))
        for label, pixels in candidates.items():
            assert chosen[label] <= pixels
            assert len(chosen[label]) >= min(len(pixels), most - 1)
    assert sample.both.tolist() == [True, True, False]


def test_sampling_does_not_depend_on_the_batch_around_a_sample():
    cam, inside = auxiliary(), torch.ones(3, 12, 12, dtype=torch.bool)

    def pick(rows: list[int]) -> Sample:
        random = draws(7, 3, torch.tensor(rows), 144)
        return sample_pixels(cam[rows], inside[rows], 0.45, random, budget=20, **PERPLEXITY)

    assert torch.equal(pick([0, 1, 2]).pixel[1], pick([1]).pixel[0])
    other = sample_pixels(cam, inside, 0.45, draws(7, 4, torch.arange(3), 144), budget=20, **PERPLEXITY)
    assert not torch.equal(other.pixel, pick([0, 1, 2]).pixel)


def loop_loss(vectors: torch.Tensor, sample: Sample, temperature: float) -> float:
    images = []
    for b in range(len(vectors)):
        picked = [(p, lab) for p, lab, t in zip(sample.pixel[b], sample.label[b], sample.taken[b], strict=True) if t]
        z = [vectors[b].flatten(1)[:, p] for p, _ in picked]
        z = [x / x.norm() for x in z]
        pairs = []
        for i, (_, own) in enumerate(picked):
            negatives = [float(z[i] @ z[k]) / temperature for k, (_, lab) in enumerate(picked) if lab != own]
            for j, (_, other) in enumerate(picked):
                if i != j and own == other:
                    s = float(z[i] @ z[j]) / temperature
                    pairs.append(-math.log(math.exp(s) / (math.exp(s) + sum(map(math.exp, negatives)))))
        if pairs and len({int(lab) for _, lab in picked}) > 1:
            images.append(sum(pairs) / len(pairs))
    return sum(images) / max(1, len(images))


@pytest.mark.parametrize("budget", [12, 1000])
def test_loss_against_loops_and_in_shares(budget):
    cam = auxiliary(size=6)
    cam[2] *= 0.1
    inside = torch.ones(3, 6, 6, dtype=torch.bool)
    sample = sample_pixels(cam, inside, 0.45, draws(0, 0, torch.arange(3), 36), budget=budget, **PERPLEXITY)
    vectors = torch.randn(3, 5, 6, 6, dtype=torch.float64)
    count = sample.both.sum()
    whole = contrastive_loss(vectors, sample, 0.5, count)
    assert whole.item() == pytest.approx(loop_loss(vectors, sample, 0.5), rel=1e-9)
    parts = [Sample(*(field[part] for field in sample)) for part in (slice(0, 1), slice(1, 3))]
    shares = contrastive_loss(vectors[:1], parts[0], 0.5, count) + contrastive_loss(vectors[1:], parts[1], 0.5, count)
    torch.testing.assert_close(shares, whole)


def test_one_pixel_a_label_is_no_positive_pair():
    sample = sample_pixels(
        torch.tensor([[[[0.99, 0.0]]]]),
        torch.ones(1, 1, 2, dtype=torch.bool),
        0.45,
        draws(0, 0, torch.arange(1), 2),
        budget=10,
        **PERPLEXITY,
    )
    assert sample.taken.all()
    assert not sample.both.any()
    vectors = torch.randn(1, 3, 1, 2, requires_grad=True)
    contrastive_loss(vectors, sample, 0.5, sample.both.sum()).backward()
    assert vectors.grad.abs().max() == 0


def test_gradient_even_at_a_small_temperature():
    cam, inside = auxiliary(batch=2, size=3), torch.ones(2, 3, 3, dtype=torch.bool)
    sample = sample_pixels(cam, inside, 0.45, draws(0, 0, torch.arange(2), 9), budget=8, **PERPLEXITY)
    vectors = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: contrastive_loss(x, sample, 0.5, torch.tensor(2.0)), vectors)
    cold = contrastive_loss(vectors.float(), sample, 0.01, torch.tensor(2.0))
    assert all(g.isfinite().all() for g in torch.autograd.grad(cold, vectors))
