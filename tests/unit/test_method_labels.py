"""Pseudo-labels, reliability and the loss terms against the release's numbers and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from cosa_ray.config.schema import PseudoLabels
from cosa_ray.method.assignment import valid_cam
from cosa_ray.method.losses import cam_to_seg_loss, classification_loss, seg_to_cam_loss
from cosa_ray.method.pseudo_labels import (
    IGNORED,
    PseudoLabel,
    guided_cam_target,
    inside_box,
    pseudo_label,
    segmentation_target,
    threshold_labels,
    two_threshold_labels,
)
from cosa_ray.method.reliability import perplexity, reliability


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}


def case(batch: int = 2, classes: int = 3, size: int = 8):
    """A valid CAM, image-level labels (one class at least), boxes and the pixels inside them."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(batch, classes, generator=generator) < 0.5).float()
    labels[:, 0] = 1
    cam = torch.rand(batch, classes, size, size, generator=generator) * labels[:, :, None, None]
    box = torch.tensor([[1, size, 0, size - 2], [0, size - 1, 2, size]])[:batch]
    return cam, labels, box, inside_box(box, (size, size), (size, size))


@pytest.mark.golden
@pytest.mark.parametrize(("name", "down"), [("mask_downscale2", 2), ("mask_full", 1)])
def test_release_two_threshold_labels(golden, name, down):
    arrays = tensors(golden("cam_to_mask"))
    cam = valid_cam(arrays["cams"], arrays["image_labels"])
    torch.testing.assert_close(cam, arrays["valid_cams"])
    inside = inside_box(arrays["boxes"].long(), (64, 64), (64, 64))
    high, low = arrays["threshold_high"].float(), arrays["threshold_low"].float()
    labels = two_threshold_labels(cam, arrays["image_labels"], inside, high, low, down=down)
    assert (labels == arrays[name]).double().mean() >= 0.999


@pytest.mark.golden
def test_release_cam_to_seg_loss(golden):
    arrays = tensors(golden("cam_to_seg_loss"))
    logits, labels = arrays["seg_logits"].requires_grad_(), arrays["mask"].long()
    counts = torch.tensor([((labels > 0) & (labels < 255)).sum(), (labels == 0).sum(), 0, 0, 0]).double()
    alpha = float(arrays["fg_alpha"])
    pseudo = PseudoLabel(labels, None, counts)
    loss = cam_to_seg_loss(logits.log_softmax(1), pseudo, counts, alpha, batch_weights=False)
    loss.backward()
    torch.testing.assert_close(loss.detach(), arrays["loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.grad, arrays["grad"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.grad, arrays["grad"], atol=1e-8, rtol=1e-3)


@pytest.mark.golden
def test_release_guided_cam_loss(golden):
    arrays = tensors(golden("seg_to_cam_loss"))
    temperature = float(arrays["temperature"])
    spl = segmentation_target(arrays["seg_logits"], arrays["image_labels"], temperature)
    torch.testing.assert_close(spl, arrays["seg_pseudo_label"], atol=1e-5, rtol=0)
    target = guided_cam_target(arrays["seg_logits"], arrays["image_labels"], temperature, (16, 16))
    cam = arrays["cam_logits"].requires_grad_()
    loss = seg_to_cam_loss(cam, target, global_batch=3)
    loss.backward()
    torch.testing.assert_close(loss.detach(), arrays["loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(cam.grad, arrays["grad"], atol=1e-8, rtol=1e-3)


@pytest.mark.golden
def test_release_classification_loss(golden):
    arrays = tensors(golden("classification_loss"))
    logits = arrays["logits"].requires_grad_()
    loss = classification_loss(logits, arrays["image_labels"], global_batch=3)
    loss.backward()
    torch.testing.assert_close(loss.detach(), arrays["loss"], atol=1e-6, rtol=0)
    torch.testing.assert_close(logits.grad, arrays["grad"], atol=1e-6, rtol=0)


def test_classification_loss_is_torchs_over_the_global_batch():
    logits, labels = torch.randn(4, 3), (torch.rand(4, 3) < 0.5).float()
    expected = torch.nn.functional.multilabel_soft_margin_loss(logits, labels)
    shares = [classification_loss(logits[part], labels[part], 4) for part in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(shares), expected)


def test_inside_box_is_the_box_and_scales_with_the_map():
    box = torch.tensor([[2, 7, 0, 5]])
    whole = torch.zeros(1, 8, 8, dtype=torch.bool)
    whole[:, 2:7, 0:5] = True
    assert torch.equal(inside_box(box, (8, 8), (8, 8)), whole)
    half = torch.zeros(1, 4, 4, dtype=torch.bool)
    half[:, 1:3, 0:2] = True  # centres at 1, 3, 5, 7: rows 3 and 5 of [2, 7), columns 1 and 3 of [0, 5)
    assert torch.equal(inside_box(box, (8, 8), (4, 4)), half)


def test_single_threshold_against_loops():
    cam, _, box, inside = case()
    labels, confidence = threshold_labels(cam, inside, 0.45)
    for b in range(2):
        top, bottom, left, right = box[b].tolist()
        for i in range(8):
            for j in range(8):
                values = cam[b, :, i, j].tolist()
                expected = values.index(max(values)) + 1 if max(values) >= 0.45 else 0
                if not (top <= i < bottom and left <= j < right):
                    expected = IGNORED
                assert labels[b, i, j] == expected
                assert confidence[b, i, j] == max(values)


def test_two_thresholds_ignore_between_and_only_know_present_classes():
    cam, image_labels, _, inside = case()
    labels = two_threshold_labels(cam, image_labels, inside, 0.7, 0.25, down=1)
    best = cam.max(1).values
    # with one softmax over shared channels the argmax is that of the values themselves
    assert (labels[inside & (best > 0.7)] > 0).all()
    assert (labels[inside & (best < 0.25)] == 0).all()
    assert (labels[inside & (best > 0.25) & (best < 0.7)] == IGNORED).all()
    assert (labels[~inside] == IGNORED).all()
    for b in range(2):
        found = set(labels[b].unique().tolist()) - {0, IGNORED}
        assert found <= {c + 1 for c in range(3) if image_labels[b, c]}


@pytest.mark.parametrize(("xi", "scale", "exponent"), [(0.45, 0.8, 1.0), (0.2, 0.5, 2.0), (0.9, 0.95, 0.5)])
def test_perplexity_against_the_formula(xi, scale, exponent):
    values = [0.0, 0.1, xi - 1e-3, xi, xi + 1e-3, 0.95, 1.0]
    result = perplexity(torch.tensor(values, dtype=torch.float64), xi, scale, exponent)
    for v, value in zip(values, result.tolist(), strict=True):
        relative = (v - xi) / (1 - xi) if v >= xi else (xi - v) / xi
        assert value == pytest.approx((-math.log(max(scale * relative, 1e-6))) ** exponent)
        assert math.isfinite(value)


def test_perplexity_falls_with_the_distance_to_the_threshold():
    p = perplexity(torch.linspace(0.45, 1, 50), 0.45, 0.8, 1.0)
    assert (p.diff() < 0).all()
    assert p.min() == pytest.approx(-math.log(0.8), abs=1e-4)
    q = perplexity(torch.linspace(0, 0.449, 50), torch.tensor(0.45), 0.8, 1.0)
    assert (q.diff() > 0).all()


def test_reliability_averages_to_one_in_every_image():
    cam, _, _, inside = case()
    p = perplexity(cam.max(1).values, 0.45, 0.8, 1.0)
    weights = reliability(1 / p, inside, "image")
    for b in range(2):
        pixels = inside[b].nonzero().tolist()
        inverse = {(i, j): 1 / p[b, i, j].item() for i, j in pixels}
        for i, j in pixels:
            assert weights[b, i, j].item() == pytest.approx(len(pixels) * inverse[i, j] / sum(inverse.values()))
        assert weights[b][~inside[b]].abs().max() == 0
    torch.testing.assert_close(reliability(1 / p, inside, "batch")[inside], 1 / p[inside])


@pytest.mark.parametrize("policy", ["single", "reliability", "two_threshold"])
@pytest.mark.parametrize("over", ["image", "batch"])
def test_cam_to_seg_against_loops_and_in_shares(policy, over):
    settings = PseudoLabels(policy=policy, reliability_over=over, foreground_share=0.3)
    cam, image_labels, _, inside = case()
    thresholds = {"background": torch.tensor(0.45), "low": torch.tensor(0.55), "high": torch.tensor(0.65)}
    pseudo = pseudo_label(cam, image_labels, inside, thresholds, settings)
    logits = torch.randn(2, 4, 8, 8)

    sums, pixels = {"fg": 0.0, "bg": 0.0}, {"fg": 0, "bg": 0}
    p = perplexity(cam.max(1).values, 0.45, 0.8, 1.0)
    regions = [[(b, *at) for at in inside[b].nonzero().tolist()] for b in range(2)]
    if over == "batch":
        regions = [regions[0] + regions[1]]
    for region in regions:
        total = sum(1 / p[at].item() for at in region)
        for at in region:
            label = pseudo.labels[at].item()
            if label == IGNORED:
                continue
            weight = len(region) / p[at].item() / total if policy == "reliability" else 1.0
            b, i, j = at
            side = "fg" if label else "bg"
            sums[side] -= weight * logits[b, :, i, j].log_softmax(0)[label].item()
            pixels[side] += 1
    expected = 0.3 * sums["fg"] / pixels["fg"] + 0.7 * sums["bg"] / pixels["bg"]

    def share(part: slice) -> torch.Tensor:
        mine = pseudo_label(cam[part], image_labels[part], inside[part], thresholds, settings)
        log_p = logits[part].log_softmax(1)
        return cam_to_seg_loss(log_p, mine, pseudo.counts, 0.3, batch_weights=over == "batch")

    assert (policy == "two_threshold") == bool((pseudo.labels[inside] == IGNORED).any())
    assert pseudo.counts[:2].tolist() == [pixels["fg"], pixels["bg"]]
    assert share(slice(None)).item() == pytest.approx(expected, rel=1e-5)
    assert (share(slice(0, 1)) + share(slice(1, 2))).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("policy", ["single", "reliability", "two_threshold"])
@pytest.mark.parametrize("over", ["image", "batch"])
def test_regions_that_weigh_the_same_and_agreement_against_loops(policy, over):
    settings = PseudoLabels(
        policy=policy, reliability_over=over, foreground_share=0.3, foreground_over="regions", agreement=0.5
    )
    cam, image_labels, _, inside = case()
    thresholds = {"background": torch.tensor(0.45), "low": torch.tensor(0.55), "high": torch.tensor(0.65)}
    shares = torch.randn(2, 4, 8, 8).softmax(1)
    pseudo = pseudo_label(cam, image_labels, inside, thresholds, settings, shares=shares)
    logits = torch.randn(2, 4, 8, 8)

    p = perplexity(cam.max(1).values, 0.45, 0.8, 1.0)
    trust, losses = {}, {}
    for b, i, j in inside.nonzero().tolist():
        label = pseudo.labels[b, i, j].item()
        trust[b, i, j] = 1 / p[b, i, j].item() if policy == "reliability" else 1.0
        if label != IGNORED:
            trust[b, i, j] *= shares[b, label, i, j].item() ** 0.5
            losses[b, i, j] = -logits[b, :, i, j].log_softmax(0)[label].item()
    by_region = {}
    for at, loss in losses.items():
        among = [value for other, value in trust.items() if over == "batch" or other[0] == at[0]]
        weighted = loss * trust[at] * len(among) / sum(among)
        label = pseudo.labels[at].item()
        by_region.setdefault((at[0], label) if label else "background", []).append(weighted)
    background = by_region.pop("background")
    assert len(by_region) > 2
    foreground = sum(sum(each) / len(each) for each in by_region.values()) / len(by_region)
    expected = 0.3 * foreground + 0.7 * sum(background) / len(background)

    def share(part: slice) -> torch.Tensor:
        mine = pseudo_label(cam[part], image_labels[part], inside[part], thresholds, settings, shares=shares[part])
        log_p = logits[part].log_softmax(1)
        return cam_to_seg_loss(log_p, mine, pseudo.counts, 0.3, batch_weights=over == "batch")

    assert share(slice(None)).item() == pytest.approx(expected, rel=1e-5)
    assert (share(slice(0, 1)) + share(slice(1, 2))).item() == pytest.approx(expected, rel=1e-5)


def test_cam_to_seg_without_foreground_is_finite():
    settings = PseudoLabels(policy="reliability")
    cam, labels, inside = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3), torch.ones(1, 4, 4, dtype=torch.bool)
    pseudo = pseudo_label(cam, labels, inside, {"background": torch.tensor(0.45)}, settings)
    log_p = torch.randn(1, 4, 4, 4).log_softmax(1)
    loss = cam_to_seg_loss(log_p, pseudo, pseudo.counts, 0.5, batch_weights=False)
    assert loss.item() == pytest.approx(0.5 * -log_p[:, 0].mean().item(), rel=1e-5)


def test_pixels_outside_the_box_do_not_matter():
    settings = PseudoLabels(policy="reliability")
    cam, image_labels, _, inside = case()
    noisy = torch.where(inside[:, None], cam, torch.rand_like(cam) * image_labels[:, :, None, None])
    thresholds = {"background": torch.tensor(0.45)}
    logits = torch.randn(2, 4, 8, 8).double().requires_grad_()
    results = []
    for maps in (cam, noisy):
        pseudo = pseudo_label(maps, image_labels, inside, thresholds, settings)
        loss = cam_to_seg_loss(logits.log_softmax(1), pseudo, pseudo.counts, 0.5, batch_weights=False)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(results[0], results[1])
    assert results[0][1].transpose(1, 3).transpose(1, 2)[~inside].abs().max() == 0


def test_guided_cam_loss_against_loops():
    seg, image_labels, temperature = torch.randn(2, 4, 6, 6), torch.tensor([[1.0, 0, 1], [0, 1, 0]]), 0.1
    target = guided_cam_target(seg, image_labels, temperature, (6, 6))
    cam = torch.randn(2, 3, 6, 6)
    total = 0.0
    for b in range(2):
        for i in range(6):
            for j in range(6):
                logits = [seg[b, 0, i, j].item()]
                logits += [seg[b, c + 1, i, j].item() if image_labels[b, c] else -1e5 for c in range(3)]
                exps = [math.exp((x - max(logits)) / temperature) for x in logits]
                for c in range(3):
                    t, x = exps[c + 1] / sum(exps), max(cam[b, c, i, j].item(), 0)
                    assert target[b, c, i, j].item() == pytest.approx(t, abs=1e-5)
                    total -= (t * math.log(1 / (1 + math.exp(-x))) + (1 - t) * math.log(1 / (1 + math.exp(x)))) / 3
    assert seg_to_cam_loss(cam, target, 2).item() == pytest.approx(total / (2 * 36), rel=1e-5)


def test_gradients():
    settings = PseudoLabels(policy="reliability")
    cam, image_labels, _, inside = case(size=4)
    cam = cam.double()
    pseudo = pseudo_label(cam, image_labels, inside, {"background": torch.tensor(0.45)}, settings)

    def segmentation(logits):
        return cam_to_seg_loss(logits.log_softmax(1), pseudo, pseudo.counts, 0.5, batch_weights=False)

    assert gradcheck(segmentation, torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True))
    target = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    own = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    own = (own.sign() * (own.abs() + 0.1)).requires_grad_()  # away from ReLU's corner
    assert gradcheck(lambda x: seg_to_cam_loss(x, target, 2), own)
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: classification_loss(x, image_labels, 2), logits)
