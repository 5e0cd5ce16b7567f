"""Pixel-adaptive refinement against the release's numbers and plain loops, and what it does to pseudo-labels."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from cosa_ray.config.schema import PseudoLabels
from cosa_ray.method.assignment import resize
from cosa_ray.method.pseudo_labels import deciding_size, pseudo_label, refined_cam, two_threshold_labels
from cosa_ray.method.refinement import ROW_SUM, pixel_affinity, refine

DILATIONS = (1, 2, 4, 8, 12, 24)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.golden
def test_release_refinement(golden):
    arrays = golden("pixel_adaptive_refinement")
    image, masks, expected = (torch.from_numpy(arrays[name]) for name in ("image", "masks", "refined"))
    affinity = pixel_affinity(image, arrays["dilations"].tolist())
    refined = refine(masks, affinity, int(arrays["iterations"]))
    torch.testing.assert_close(refined, expected, atol=1e-5, rtol=0)


def loops(image: torch.Tensor, maps: torch.Tensor, dilations: tuple[int, ...], iterations: int) -> torch.Tensor:
    """One image (3, h, w) and its maps (K, h, w), neighbour by neighbour."""
    height, width = image.shape[1:]
    steps = [(d * i, d * j) for d in dilations for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    lengths = [math.hypot(*step) for step in steps]
    near = [math.exp(-((length / (statistics.stdev(lengths) + 1e-8) / 0.3) ** 2)) for length in lengths]

    def at(i: int, j: int, step: tuple[int, int]) -> tuple[int, int]:
        return min(max(i + step[0], 0), height - 1), min(max(j + step[1], 0), width - 1)

    for _ in range(iterations):
        result = torch.zeros_like(maps)
        for i in range(height):
            for j in range(width):
                alike = []
                places = [at(i, j, step) for step in steps]
                for row, column in places:
                    terms = []
                    for c in range(3):
                        colours = [image[c, y, x].item() for y, x in places]
                        unit = statistics.stdev(colours) + 1e-8
                        terms.append((abs(image[c, row, column].item() - image[c, i, j].item()) / unit / 0.3) ** 2)
                    alike.append(math.exp(-sum(terms) / 3))
                for (row, column), a, n in zip(places, alike, near, strict=True):
                    result[:, i, j] += (a / sum(alike) + 0.01 * n / sum(near)) * maps[:, row, column]
        maps = result
    return maps


def test_against_loops():
    images, maps = noise(2, 3, 4, 5), noise(2, 2, 4, 5, seed=1)
    refined = refine(maps, pixel_affinity(images, (1, 3)), 2)
    for b in range(2):
        torch.testing.assert_close(refined[b], loops(images[b], maps[b], (1, 3), 2), atol=1e-5, rtol=1e-5)


def test_constants_grow_by_the_row_sum_and_nothing_leaves_its_range():
    affinity = pixel_affinity(noise(2, 3, 16, 20), DILATIONS)
    constant = torch.full((2, 1, 16, 20), 0.7)
    torch.testing.assert_close(refine(constant, affinity, 10), constant * ROW_SUM**10)
    torch.testing.assert_close(refined_cam(constant, affinity, 10, stride=2), constant)
    cam = noise(2, 3, 32, 40, seed=1)
    refined = refined_cam(cam, affinity, 10)
    assert refined.shape == cam.shape
    assert 0 <= refined.min() < refined.max() <= 1
    assert torch.equal(
        refine(cam, affinity, 0),
        torch.nn.functional.interpolate(cam, size=(16, 20), mode="bilinear", align_corners=True),
    )


def test_scale_and_offset_of_a_channel_do_not_matter():
    images, maps = noise(2, 3, 16, 16), noise(2, 2, 16, 16, seed=1)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = refine(maps, pixel_affinity(images, DILATIONS), 10)
    for other in (images * 255, (images - mean) / std):
        torch.testing.assert_close(refine(maps, pixel_affinity(other, DILATIONS), 10), expected, atol=1e-5, rtol=0)


def test_an_image_does_not_depend_on_its_batch():
    images, maps = noise(3, 3, 12, 12), noise(3, 2, 12, 12, seed=1)
    together = refine(maps, pixel_affinity(images, (1, 2)), 3)
    for b in range(3):
        alone = refine(maps[b : b + 1], pixel_affinity(images[b : b + 1], (1, 2)), 3)
        assert torch.equal(alone[0], together[b])


def scene() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A bright square on a dark ground, a CAM that only saw its middle, the square, and image-level labels."""
    square = torch.zeros(1, 64, 64, dtype=torch.bool)
    square[:, 16:48, 16:48] = True
    image = torch.where(square[:, None], 0.8, 0.2) + 0.02 * torch.randn(1, 3, 64, 64, generator=_generator())
    cam = torch.zeros(1, 2, 64, 64)
    cam[:, 0, 20:44, 20:44] = 1
    cam[:, 0, 4:8, 4:8] = 0.9  # and a spot of the ground
    return image, cam, square, torch.tensor([[1.0, 0.0]])


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a & b).sum() / (a | b).sum()).item()


@pytest.mark.parametrize("policy", ["single", "reliability", "two_threshold"])
@pytest.mark.parametrize("stride", [1, 2])
def test_labels_follow_the_image(policy, stride):
    image, cam, square, labels = scene()
    settings = PseudoLabels(policy=policy, threshold=0.2, high=0.3, low=0.1)
    cam, square = cam[..., ::stride, ::stride], square[..., ::stride, ::stride]
    values = {"background": 0.2, "high": 0.3, "low": 0.1}
    thresholds = {name: torch.tensor(value) for name, value in values.items()}
    inside = torch.ones_like(square)
    affinity = pixel_affinity(resize(image, deciding_size(tuple(square.shape[1:]), stride)), DILATIONS)
    plain = pseudo_label(cam, labels, inside, thresholds, settings, stride=stride)
    refined = pseudo_label(cam, labels, inside, thresholds, settings, stride=stride, affinity=affinity)
    assert overlap(plain.labels == 1, square) < 0.6
    assert overlap(refined.labels == 1, square) > 0.85
    assert not (refined.labels == 2).any()
    assert (plain.weights is None) == (refined.weights is None) == (policy != "reliability")


def test_two_thresholds_refine_their_shares():
    """Against the definition spelt out: softmax over background and present classes, PAR, bilinear up, argmax."""
    image, cam, labels = noise(1, 3, 24, 24), noise(1, 3, 24, 24, seed=1), torch.tensor([[1.0, 0.0, 1.0]])
    cam = cam * labels[:, :, None, None]
    affinity = pixel_affinity(resize(image, (12, 12)), (1, 2))
    inside = torch.ones(1, 24, 24, dtype=torch.bool)
    result = two_threshold_labels(cam, labels, inside, 0.55, 0.45, affinity=affinity, iterations=3)
    said = []
    for threshold in (0.55, 0.45):
        present = torch.cat([torch.full((1, 1, 12, 12), threshold), resize(cam, (12, 12))[:, [0, 2]]], 1)
        shares = resize(refine(present.softmax(1), affinity, 3), (24, 24))
        said.append(torch.tensor([0, 1, 3])[shares.argmax(1)])
    high, low = said
    expected = torch.where(high > 0, high, torch.where(low > 0, 255, 0))
    assert torch.equal(result, expected)
    assert result.unique().tolist() == [0, 1, 3, 255]
    assert not torch.equal(result, two_threshold_labels(cam, labels, inside, 0.55, 0.45))
