"""Protocols: read by name or file, refused with a sentence, and scored as they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cosa_ray.config.protocol import Protocol, in_run_protocol, load_protocol, shipped_protocols
from cosa_ray.config.schema import Config
from cosa_ray.data.loader import Resize
from cosa_ray.errors import UserError
from cosa_ray.evaluation.confusion import scores
from cosa_ray.evaluation.naming import protocol_prefix
from cosa_ray.evaluation.scorer import Scorer, Variant, half_of
from tests.unit.test_evaluation_evaluate import CLASSES, THRESHOLDS, config, miou, networks, run, split

__all__ = ["split"]  # the fixture


def test_every_shipped_protocol_is_read_and_named_after_its_file() -> None:
    assert shipped_protocols() == ["multi_scale", "peers", "release", "single_scale"]
    for name in shipped_protocols():
        assert load_protocol(name).name == name
    crf = load_protocol("release").crf
    assert crf is not None
    assert (crf.iterations, crf.bilateral_weight, crf.bilateral_sigma_xy, crf.bilateral_sigma_rgb) == (1, 4, 121, 5)
    peers = load_protocol("peers").crf
    assert peers is not None
    assert peers.iterations == 10
    assert load_protocol("peers").labels == ("none",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("scale: [1]", "did you mean scales?"),
        ("scales: []", "scales"),
        ("name: other", "remove `name`"),
        ("resize: own\nsize: 96", "own size"),
        ("labels: [none]\ncrf: {iterations: 1}", "crf.labels asks for given"),
        ("networks: [online]\ncrf: {iterations: 1}", "crf.networks asks for assignment"),
        ("cam_threshold: 1.5", "cam_threshold"),
    ],
)
def test_a_wrong_protocol_gets_one_sentence(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as refused:
        load_protocol(file)
    assert said in str(refused.value)
    assert str(file) in str(refused.value)


def test_an_unknown_protocol_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="single_scale"):
        load_protocol("releas")
    (tmp_path / "a b.yaml").write_text("scales: [1.0]")
    with pytest.raises(UserError, match="names every metric"):
        load_protocol(tmp_path / "a b.yaml")


def test_names_say_the_protocol() -> None:
    assert protocol_prefix(Protocol(name="release"), "val", 10) == "val/release"
    assert protocol_prefix(Protocol(name="release", subset=3), "val", 10) == "val_subset_3/release"
    assert protocol_prefix(Protocol(), "a/b", 10) == "a_b"
    names = [
        Variant(network, labels, crf).name
        for network in ("assignment", "online")
        for labels in ("none", "given", "predicted")
        for crf in (False, True)
    ]
    assert names == [
        "miou",
        "miou_crf",
        "miou_labels_given",
        "miou_labels_given_crf",
        "miou_labels_predicted",
        "miou_labels_predicted_crf",
        "miou_online",
        "miou_online_crf",
        "miou_online_labels_given",
        "miou_online_labels_given_crf",
        "miou_online_labels_predicted",
        "miou_online_labels_predicted_crf",
    ]


@pytest.mark.parametrize(
    ("rule", "size", "expected"),
    [("square", 32, (32, 32)), ("own", 7, (40, 30)), ("short_side", 60, (80, 60)), ("short_side", 15, (20, 15))],
)
def test_resize_rules(rule: str, size: int, expected: tuple[int, int]) -> None:
    assert Resize(rule, size).of(40, 30) == expected


def test_halves_depend_on_the_name_alone() -> None:
    halves = [half_of(f"2007_{number:06d}") for number in range(400)]
    assert 150 < sum(halves) < 250
    assert halves == [half_of(f"2007_{number:06d}") for number in range(400)]


def counted(split, protocol: Protocol, settings: Config | None = None):
    online, assignment = networks()
    scorer = Scorer(online, assignment, protocol, settings or config(), thresholds=THRESHOLDS)
    tally = scorer.tally(per_image=True)
    jobs = list(scorer.count(tally, split, range(len(split)), range(len(split))))
    return tally, jobs


def test_own_size_equals_one_image_at_a_time(split) -> None:
    """Rectangles of every size at two scales, against the network run on each image by itself."""
    tally, _ = counted(split, Protocol(name="own", resize="own", scales=(1.0, 1.5), flip=False, batch_size=3))
    online, assignment = networks()
    truths, plain, ons = [], [], []
    for number in range(len(split)):
        sample = split[number]
        image = torch.from_numpy(np.asarray(sample.decode_image()).copy()).permute(2, 0, 1)[None]
        truths.append(sample.decode_mask())
        for network, kept in ((assignment, plain), (online, ons)):
            total = 0
            for scale in (1.0, 1.5):
                size = [max(1, int(side * scale / 8 + 0.5)) * 8 for side in truths[-1].shape]
                view = F.interpolate(network.normalise(image), size=size, mode="bilinear", align_corners=False)
                with torch.no_grad():
                    logits = network(view).seg
                total = total + F.interpolate(logits, size=truths[-1].shape, mode="bilinear", align_corners=False)
            kept.append(total[0].argmax(0).numpy())
    found = tally.metrics(CLASSES)
    assert found["miou"] == pytest.approx(miou(truths, plain), abs=1e-3)
    assert found["miou_online"] == pytest.approx(miou(truths, ons), abs=1e-3)
    # Per image, and from there the interval.
    each = tally.totals("miou")
    assert each.shape == (len(split), 3, 4)
    assert each.sum(0)[1].tolist() == [sum(int((t == k).sum()) for t in truths) for k in range(4)]
    assert found["miou_ci_low"] <= found["miou"] <= found["miou_ci_high"]


def test_the_protocol_of_a_run_gives_the_runs_own_numbers(split) -> None:
    settings = config()
    tally, jobs = counted(split, in_run_protocol(settings), settings)
    assert not jobs
    inside = run(split, settings).metrics
    outside = {f"val/{name}": value for name, value in tally.metrics(CLASSES).items()}
    assert inside.keys() <= outside.keys()
    for name, value in inside.items():
        assert outside[name] == pytest.approx(value, abs=1e-9), name


def test_only_what_is_asked_for_is_scored(split) -> None:
    tally, _ = counted(split, Protocol(name="p", networks=("online",), labels=("given",), scales=(1.0,)))
    assert [name for name in tally.matrices if name.startswith("miou")] == ["miou_online_labels_given"]


def test_crf_jobs_carry_what_the_network_said(split) -> None:
    protocol = Protocol.model_validate({"name": "crf", "scales": [1.0], "flip": False, "crf": {"iterations": 1}})
    tally, jobs = counted(split, protocol)
    assert {job.name for job in jobs} == {"miou_crf", "miou_labels_given_crf"}
    assert len(jobs) == 2 * len(split)
    for job in jobs:
        sample = split[job.image]
        assert job.picture == sample.image
        np.testing.assert_array_equal(job.truth, sample.decode_mask())
        np.testing.assert_allclose(job.probabilities.sum(0), 1, atol=1e-4)
        absent = 1 + np.flatnonzero(sample.labels == 0)
        assert (job.probabilities[absent].max() < 1e-6) == (job.name == "miou_labels_given_crf")
    # Before refinement the jobs' own argmax is what the plain metric counts.
    plain = [job for job in jobs if job.name == "miou_crf"]
    assert miou([j.truth for j in plain], [j.probabilities.argmax(0) for j in plain]) == pytest.approx(
        scores(tally.matrices["miou"]).miou, abs=1e-3
    )


def dense_mean_field(probabilities: np.ndarray, image: np.ndarray, settings) -> np.ndarray:
    """Mean-field inference with every pair of pixels, kernels normalised symmetrically (as Krähenbühl's code)."""
    classes, height, width = probabilities.shape
    rows, columns = np.mgrid[0:height, 0:width]
    place = np.stack([columns.ravel(), rows.ravel()], 1).astype(float)
    colour = image.reshape(-1, 3).astype(float)

    def kernel(features: np.ndarray) -> np.ndarray:
        square = ((features[:, None] - features[None]) ** 2).sum(-1)
        values = np.exp(-0.5 * square)
        norm = 1 / np.sqrt(values.sum(1) + 1e-20)
        return norm[:, None] * values * norm[None]

    message = settings.gaussian_weight * kernel(place / settings.gaussian_sigma)
    bilateral = np.concatenate([place / settings.bilateral_sigma_xy, colour / settings.bilateral_sigma_rgb], 1)
    message = message + settings.bilateral_weight * kernel(bilateral)
    unary = -np.log(np.clip(probabilities, 1e-5, 1)).reshape(classes, -1)
    shares = np.exp(-unary) / np.exp(-unary).sum(0)
    for _ in range(settings.iterations):
        energy = -unary + shares @ message
        shares = np.exp(energy - energy.max(0))
        shares /= shares.sum(0)
    return shares.reshape(classes, height, width)


@pytest.mark.parametrize("iterations", [1, 5])
def test_crf_equals_the_sum_over_all_pairs(iterations: int) -> None:
    pytest.importorskip("pydensecrf")
    from cosa_ray.config.protocol import Crf
    from cosa_ray.evaluation.crf import crf

    rng = np.random.default_rng(0)
    image = np.zeros((18, 24, 3), np.uint8)
    image[:, 12:] = (180, 40, 90)
    image = (image + rng.integers(0, 12, image.shape)).astype(np.uint8)
    logits = rng.normal(size=(3, 18, 24))
    logits[0, :, :12] += 0.8
    logits[1, :, 12:] += 0.8
    probabilities = (np.exp(logits) / np.exp(logits).sum(0)).astype(np.float32)
    settings = Crf(iterations=iterations, bilateral_sigma_xy=12, bilateral_sigma_rgb=15)
    found = crf(probabilities, image, settings)
    expected = dense_mean_field(probabilities, image, settings)
    assert (found.argmax(0) == expected.argmax(0)).mean() > 0.97
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
    # It must have done something, and in the direction of the colours.
    truth = np.zeros((18, 24), int)
    truth[:, 12:] = 1
    assert (found.argmax(0) == truth).mean() > (probabilities.argmax(0) == truth).mean() + 0.1


def test_without_the_library_the_crf_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from cosa_ray.evaluation import crf

    monkeypatch.setattr(crf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"cosa-ray\[crf\]"):
        crf.require_crf("protocol release")


def test_refined_counts_are_those_of_the_refined_map() -> None:
    pytest.importorskip("pydensecrf")
    import io

    from cosa_ray.config.protocol import Crf
    from cosa_ray.evaluation.crf import crf, refine_here
    from cosa_ray.evaluation.scorer import CrfJob

    rng = np.random.default_rng(1)
    image = rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    probabilities = rng.dirichlet(np.ones(4), (10, 12)).transpose(2, 0, 1).astype(np.float32)
    truth = rng.integers(0, 4, (10, 12)).astype(np.uint8)
    truth[0] = 255
    (refined,) = refine_here(Crf())([CrfJob("miou_crf", 7, probabilities, stream.getvalue(), truth)])
    prediction = crf(probabilities, image, Crf()).argmax(0)
    expected = np.zeros((4, 4), int)
    np.add.at(expected, (truth[truth != 255], prediction[truth != 255]), 1)
    np.testing.assert_array_equal(refined.matrix, expected)
    assert (refined.name, refined.image) == ("miou_crf", 7)


@pytest.mark.parametrize("policy", ["single", "two_threshold"])
def test_refined_pseudo_labels_are_scored_as_training_makes_them(split, policy: str) -> None:
    """One image at a time: the valid CAM at its own size, refined at half of it with the affinity of the input."""
    from cosa_ray.evaluation.inference import infer
    from cosa_ray.method.pseudo_labels import refined_cam, two_threshold_labels
    from cosa_ray.method.refinement import pixel_affinity

    keys = {
        "policy": policy,
        "refinement": "pixel_adaptive",
        "refinement_dilations": [1, 2],
        "refinement_iterations": 3,
    }
    settings = config(pseudo_labels=keys)
    thresholds = {"low": 0.25, "high": 0.7} if policy == "two_threshold" else {"background": 0.4}
    online, assignment = networks()
    scorer = Scorer(online, assignment, in_run_protocol(settings), settings, thresholds=thresholds)
    tally = scorer.tally(per_image=False)
    list(scorer.count(tally, split, range(len(split)), range(len(split))))
    truths, found = [], []
    for number in range(len(split)):
        sample = split[number]
        truths.append(sample.decode_mask())
        pixels = np.asarray(sample.decode_image().resize((32, 32), Image.Resampling.BILINEAR))
        image = assignment.normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
        with torch.no_grad():
            cam = infer(assignment, image, [1.0], True).cam * torch.from_numpy(sample.labels)[None, :, None, None]
        cam = F.interpolate(cam, size=truths[-1].shape, mode="bilinear", align_corners=False)
        half = (truths[-1].shape[0] // 2, truths[-1].shape[1] // 2)
        affinity = pixel_affinity(F.interpolate(image, size=half, mode="bilinear", align_corners=False), (1, 2))
        if policy == "single":
            cam = refined_cam(cam, affinity, 3)
            labels = torch.where(cam.amax(1) >= 0.4, cam.argmax(1) + 1, 0)
        else:
            inside = torch.ones_like(cam[:, 0], dtype=torch.bool)
            present = torch.from_numpy(sample.labels)[None]
            labels = two_threshold_labels(cam, present, inside, 0.7, 0.25, affinity=affinity, iterations=3)
        found.append(labels[0].numpy())
    assert scores(tally.matrices["pseudo_miou"]).miou == pytest.approx(miou(truths, found), abs=1e-3)
    plain = Scorer(
        online, assignment, in_run_protocol(settings), config(pseudo_labels={"policy": policy}), thresholds=thresholds
    )
    other = plain.tally(per_image=False)
    list(plain.count(other, split, range(len(split)), range(len(split))))
    assert not torch.equal(other.matrices["pseudo_miou"], tally.matrices["pseudo_miou"]), (
        "the refinement does something"
    )
