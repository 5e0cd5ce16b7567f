"""Confusion matrices, scores, the threshold sweep and average precision against plain references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.metrics import confusion_matrix as sklearn_matrix
from torchmetrics.classification import MulticlassJaccardIndex

from cosa_ray.evaluation.confusion import (
    IGNORE,
    ThresholdSweep,
    bootstrap_interval,
    confusion_matrix,
    scores,
    totals_of,
)
from cosa_ray.evaluation.naming import tracked_names
from cosa_ray.evaluation.tally import Tally, mean_average_precision, per_class


@pytest.fixture
def maps() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 5, (3, 17, 23)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.1] = IGNORE
    prediction = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 5, truth.shape)).astype(np.uint8)
    return truth, prediction


@pytest.mark.golden
def test_scores_equal_the_release(golden) -> None:
    given = golden("segmentation_scores")
    truth = torch.from_numpy(given["ground_truth"])
    found = scores(confusion_matrix(truth, torch.from_numpy(given["prediction"]), 6))
    assert found.miou == pytest.approx(given["miou"], abs=1e-9)
    assert found.pixel_accuracy == pytest.approx(given["pixel_accuracy"], abs=1e-9)
    assert found.mean_recall == pytest.approx(given["mean_accuracy"], abs=1e-9)
    np.testing.assert_allclose(found.iou, given["iou"], atol=1e-9)
    pseudo = scores(confusion_matrix(truth, torch.from_numpy(given["pseudo_label"]), 6))
    assert pseudo.miou == pytest.approx(given["pseudo_miou"], abs=1e-9)
    np.testing.assert_allclose(pseudo.iou, given["pseudo_iou"], atol=1e-9)


def test_confusion_matrix_equals_sklearn(maps) -> None:
    truth, prediction = maps
    keep = (truth != IGNORE) & (prediction != IGNORE)
    expected = sklearn_matrix(truth[keep], prediction[keep], labels=range(5))
    np.testing.assert_array_equal(confusion_matrix(torch.from_numpy(truth), torch.from_numpy(prediction), 5), expected)


def test_iou_equals_torchmetrics(maps) -> None:
    truth, prediction = (torch.from_numpy(part).long() for part in maps)
    prediction[prediction == IGNORE] = 0
    reference = MulticlassJaccardIndex(num_classes=5, average="none", ignore_index=IGNORE)(prediction, truth)
    np.testing.assert_allclose(scores(confusion_matrix(truth, prediction, 5)).iou, reference, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_confusion_matrix_takes_any_integer(maps, dtype) -> None:
    truth, prediction = (torch.from_numpy(part) for part in maps)
    expected = confusion_matrix(truth, prediction, 5)
    assert torch.equal(confusion_matrix(truth.to(dtype), prediction.to(dtype), 5), expected)


@pytest.mark.parametrize("wrong", [5, 6, 254])
def test_confusion_matrix_refuses_values_that_are_no_class(maps, wrong) -> None:
    truth, prediction = (torch.from_numpy(part.copy()) for part in maps)
    truth[0, 0, 0] = wrong
    prediction[0, 0, 0] = 0
    with pytest.raises(ValueError, match=r"neither 0\.\.4 nor 255"):
        confusion_matrix(truth, prediction, 5)


def test_miou_counts_classes_with_truth_only() -> None:
    # Class 2 is predicted and never true, class 3 is neither: both stay out of the mean.
    truth = torch.tensor([0, 0, 1, 1, 255])
    prediction = torch.tensor([0, 2, 1, 1, 3])
    found = scores(confusion_matrix(truth, prediction, 4))
    np.testing.assert_allclose(found.iou, [0.5, 1.0, np.nan, np.nan])
    assert found.miou == pytest.approx(0.75)
    assert found.pixel_accuracy == pytest.approx(0.75)


def test_nothing_to_score_is_not_a_number() -> None:
    found = scores(torch.zeros(3, 3, dtype=torch.int64))
    assert np.isnan([found.miou, found.pixel_accuracy, found.mean_recall, *found.iou]).all()


def test_sweep_equals_one_labelling_per_threshold() -> None:
    rng = np.random.default_rng(0)
    cam = torch.from_numpy(rng.random((2, 4, 13, 11), dtype=np.float32))
    # Values exactly on a threshold, and a hair below: `>=` must hold bit for bit.
    edges = torch.tensor([0.25, 0.5, 0.07, 0.29, 0.57])
    cam[0, 1, 0, :5] = edges
    cam[0, 2, 1, :5] = torch.nextafter(edges, torch.zeros(5))
    cam[0, :, :2, 5:] = 0
    cam[1, :, 0] = 1.0
    truth = torch.from_numpy(rng.integers(0, 5, (2, 13, 11)).astype(np.uint8))
    truth[:, -1] = IGNORE
    sweep = ThresholdSweep(5)
    confidence, strongest = cam.max(1)
    for image in range(2):  # in two parts: counts add up
        part = slice(image, image + 1)
        sweep.add(truth[part], strongest[part], sweep.bins(confidence[part]), torch.tensor([image]))
    assert len(sweep.thresholds) == 99
    mious = []
    for threshold, matrix in zip(sweep.thresholds, sweep.matrices(), strict=True):
        labels = torch.where(confidence >= float(threshold), strongest + 1, 0)
        expected = confusion_matrix(truth, labels, 5).numpy()
        np.testing.assert_array_equal(matrix, expected)
        mious.append(scores(expected).miou)
    best = sweep.best()
    assert best.miou == max(mious)
    assert best.threshold == pytest.approx(float(sweep.thresholds[int(np.argmax(mious))]))
    # Held out: each image is a half; it is cut at the threshold that is best on the other one.
    pooled = np.zeros((5, 5), np.int64)
    for image in range(2):
        other = [labelled(cam[1 - image], truth[1 - image], float(t)) for t in sweep.thresholds]
        chosen = int(np.argmax([scores(matrix).miou for matrix in other]))
        pooled += labelled(cam[image], truth[image], float(sweep.thresholds[chosen]))
    assert sweep.held_out() == pytest.approx(scores(pooled).miou, abs=1e-12)
    assert sweep.held_out() <= best.miou
    np.testing.assert_array_equal(sweep.matrices(0) + sweep.matrices(1), sweep.matrices())


def labelled(cam: torch.Tensor, truth: torch.Tensor, threshold: float) -> np.ndarray:
    """The confusion matrix of one image's CAM (C, H, W) cut at a threshold."""
    value, strongest = cam.max(0)
    return confusion_matrix(truth, torch.where(value >= threshold, strongest + 1, 0), 5).numpy()


def test_no_threshold_is_held_out_without_two_halves() -> None:
    sweep = ThresholdSweep(3)
    cam = torch.rand(1, 2, 4, 4)
    value, strongest = cam.max(1)
    sweep.add(torch.ones(1, 4, 4, dtype=torch.uint8), strongest, sweep.bins(value), torch.tensor([1]))
    assert np.isnan(sweep.held_out())
    assert sweep.best().miou >= 0


def test_precision_and_recall_equal_sklearn(maps) -> None:
    from sklearn.metrics import precision_recall_fscore_support

    truth, prediction = maps
    keep = (truth != IGNORE) & (prediction != IGNORE)
    precision, recall, _, pixels = precision_recall_fscore_support(truth[keep], prediction[keep], labels=range(5))
    matrix = confusion_matrix(torch.from_numpy(truth), torch.from_numpy(prediction), 5).numpy()
    found = scores(matrix)
    np.testing.assert_allclose(found.precision, precision)
    np.testing.assert_allclose(found.recall, recall)
    assert found.mean_precision == pytest.approx(precision.mean())
    rows = per_class(matrix, ["a", "b", "c", "d"])
    assert [row["class"] for row in rows] == ["background", "a", "b", "c", "d"]
    assert [row["pixels"] for row in rows] == pixels.tolist()


def test_bootstrap_interval_equals_one_resample_after_the_other() -> None:
    rng = np.random.default_rng(5)
    matrices = rng.integers(0, 50, (20, 4, 4))
    matrices[:, 3] = 0  # a class without truth
    matrices[:15, 2] = 0  # a class in a few images: some resamples lack it
    low, high = bootstrap_interval(totals_of(matrices), resamples=400)
    draws = np.random.default_rng(9)
    mious = [scores(matrices[draws.integers(0, 20, 20)].sum(0)).miou for _ in range(4000)]
    assert (low, high) == pytest.approx(tuple(np.quantile(mious, [0.025, 0.975])), abs=0.01)
    assert low < scores(matrices.sum(0)).miou < high
    assert bootstrap_interval(totals_of(matrices), resamples=400) == (low, high), "a fixed seed"
    assert bootstrap_interval(totals_of(matrices[:1]))[0] == pytest.approx(scores(matrices[0]).miou)
    assert np.isnan(bootstrap_interval(totals_of(matrices[:0]))).all()


def test_parts_of_a_tally_merge_to_the_whole(maps) -> None:
    truth, prediction = (torch.from_numpy(part) for part in maps)
    cam = torch.rand(3, 4, 17, 23)
    confidence, strongest = cam.max(1)

    def counted(images: list[int]) -> Tally:
        tally = Tally(4, ["miou", "pseudo_miou"], per_image=True)
        for image in images:
            part = slice(image, image + 1)
            tally.add_prediction("miou", [image], truth[part], prediction[part])
            tally.add_prediction("pseudo_miou", [image], truth[part], strongest[part] + 1)
            tally.main.add(truth[part], strongest[part], tally.main.bins(confidence[part]), torch.tensor([image % 2]))
            tally.class_scores[image] = torch.stack([cam[image].amax((1, 2)), torch.tensor([1.0, 0, 1, 0])])
            tally.images += 1
        return tally

    whole = counted([0, 1, 2])
    merged = counted([2]).on_cpu()
    merged.merge(counted([0, 1]))
    assert merged.metrics(list("abcd")) == whole.metrics(list("abcd"))
    np.testing.assert_array_equal(merged.totals("miou"), whole.totals("miou"))
    assert whole.totals("miou").shape == (3, 3, 5)
    reference = scores(confusion_matrix(truth[1], prediction[1], 5)).iou
    from cosa_ray.evaluation.confusion import ious

    np.testing.assert_allclose(ious(whole.totals("miou"))[1], reference)


def test_mean_average_precision_equals_sklearn() -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random((60, 7)) < 0.3).astype(np.float32)
    labels[:, 4] = 0  # no positives: left out
    logits = np.round(rng.normal(size=(60, 7)) + labels, 1).astype(np.float32)  # many equal scores
    expected = np.mean([average_precision_score(labels[:, c], logits[:, c]) for c in range(7) if c != 4])
    assert mean_average_precision(logits, labels) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(mean_average_precision(logits, np.zeros_like(labels)))


def test_metric_names_are_plain_and_distinct() -> None:
    names = tracked_names(["tv/monitor", "tv monitor", "tv?monitor", "Bär", "..", "a.b-c:d"])
    assert names == ["tv_monitor", "tv monitor", "tv_monitor_2", "B_r", "_", "a.b-c:d"]
