"""evaluate(): against a plain loop over single images, and the same on any number of workers."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score, jaccard_score

from cosa_ray.config.schema import Config
from cosa_ray.data.dataset import Split, open_dataset
from cosa_ray.data.importing import write_dataset
from cosa_ray.data.shapes import CLASSES as CLASSES_OF_SHAPES
from cosa_ray.data.shapes import context_of, shapes_source
from cosa_ray.data.source import Source, stored_row
from cosa_ray.errors import UserError
from cosa_ray.evaluation.evaluate import EvaluationResult, evaluate, evaluation_order
from cosa_ray.evaluation.naming import best_metric, metric_prefix
from cosa_ray.method.network import Network, build_network

CLASSES = ("cat", "dog", "tv/monitor")
PALETTE = ((0, 0, 0), (200, 0, 0), (0, 200, 0), (0, 0, 200))
SIZES = [(20, 30), (32, 32), (32, 32), (25, 18), (20, 30), (40, 33), (32, 32)]
SIDE = 32


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


class Drawn:
    """Random pictures whose masks hold cat, mostly dog, background and ignored pixels."""

    def __init__(self, masks: bool) -> None:
        self.masks = masks

    def __call__(self, sample):
        (number,) = sample
        rng = np.random.default_rng(number)
        height, width = SIZES[number % len(SIZES)]
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        mask = np.zeros((height, width), np.uint8)
        labels = [0] if number % 3 == 0 else [0, 1]
        mask[: height // 2, : width // 2] = 1
        mask[height // 2 :, : width // 3] = len(labels)
        mask[-2:] = 255
        image[mask == 1] //= 2
        return stored_row(f"image{number}", png(image), png(mask) if self.masks else None, labels, 3, PALETTE)


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    return made(tmp_path_factory.mktemp("evaluation"), masks=True)


def made(folder, masks: bool) -> Split:
    samples = {"val": [(number,) for number in range(len(SIZES))]}
    source = Source("folder", None, {}, CLASSES, PALETTE, "here", "here", samples, Drawn(masks))
    write_dataset(source, str(folder / "data"), local=True)
    return open_dataset(str(folder / "data")).split("val")


def config(**changes) -> Config:
    content = {
        "data": {"loader_processes": 0},
        "views": {"crop": SIDE},
        "model": {
            "backbone": "vit_tiny_patch16_224",
            "backbone_args": {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": SIDE},
            "pretrained": False,
            "decoder_width": 8,
            "decoder_dilation": 1,
            "aux": 1,
        },
        "evaluation": {"scales": [1.0], "batch_size": 3, "panel_images": 2},
        "losses": {"contrastive": 0.0},
    }
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values}
    return Config.model_validate(content)


def networks() -> tuple[Network, Network]:
    torch.manual_seed(0)
    pair = build_network(config().model, 3, image_size=SIDE), build_network(config().model, 3, image_size=SIDE)
    for network in pair:
        for parameter in network.decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # a decoder that predicts more than one class
        for head in (network.classifier, network.aux_classifier):
            torch.nn.init.normal_(head.weight, std=1.0)
    return pair


THRESHOLDS = {"background": 0.4, "background_aux": 0.3}
PRESENCE = 0.5


def run(split: Split, settings: Config, pair: tuple[Network, Network] | None = None, **given) -> EvaluationResult:
    online, assignment = pair or networks()
    given = {"classes": CLASSES, "thresholds": THRESHOLDS, **given}
    return evaluate(online, assignment, split, settings, **given)


def miou(truths: list[np.ndarray], predictions: list[np.ndarray]) -> float:
    """Mean IoU over the classes that are true somewhere, by scikit-learn."""
    truth = np.concatenate([part.ravel() for part in truths])
    prediction = np.concatenate([part.ravel() for part in predictions])
    keep = (truth != 255) & (prediction != 255)
    present = np.unique(truth[keep])
    return float(np.mean(jaccard_score(truth[keep], prediction[keep], labels=present, average=None)))


def by_hand(split: Split) -> dict[str, float]:
    """Every metric from one image at a time: single scale with flip, nothing shared with the code under test."""
    online, assignment = networks()
    truths, plain, ons, given, predicted, ons_predicted, logits = [], [], [], [], [], [], []
    cams: list[torch.Tensor] = []
    auxes: list[torch.Tensor] = []
    for number in range(len(split)):
        sample = split[number]
        pixels = np.asarray(sample.decode_image().resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
        image = (image - torch.tensor([0.5, 0.5, 0.5])[:, None, None]) / torch.tensor([0.5, 0.5, 0.5])[:, None, None]
        truth = sample.decode_mask()
        truths.append(truth)

        def up(maps: torch.Tensor, size=truth.shape) -> torch.Tensor:
            crop = F.interpolate(maps, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
            return F.interpolate(crop, size=size, mode="bilinear", align_corners=False)

        with torch.no_grad():
            straight, flipped = assignment(image), assignment(image.flip(-1))
            on = [online(view) for view in (image, image.flip(-1))]
        seg = up(straight.seg + flipped.seg.flip(-1))[0]
        plain.append(seg.argmax(0).numpy())
        on_seg = up(on[0].seg + on[1].seg.flip(-1))[0]
        ons.append(on_seg.argmax(0).numpy())
        for kept, whole, passes in ((predicted, seg, (straight, flipped)), (ons_predicted, on_seg, on)):
            unlikely = 1 / (1 + torch.exp(-(passes[0].cls + passes[1].cls)[0] / 2)) < PRESENCE
            kept.append(torch.cat([whole[:1], whole[1:] - 1e5 * unlikely[:, None, None]]).argmax(0).numpy())
        seg[1:][torch.from_numpy(sample.labels) == 0] = -1e5
        given.append(seg.argmax(0).numpy())
        logits.append(((straight.cls + flipped.cls) / 2)[0].numpy())
        for kept, first, second in ((cams, straight.cam, flipped.cam), (auxes, straight.cam_aux, flipped.cam_aux)):
            whole = [F.interpolate(m, size=(SIDE, SIDE), mode="bilinear", align_corners=False) for m in (first, second)]
            cam = torch.maximum(whole[0], whole[1].flip(-1)).relu()
            low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
            cam = (cam - low) / (high - low + 1e-5)
            cam[0, torch.from_numpy(sample.labels) == 0] = 0
            kept.append(F.interpolate(cam, size=truth.shape, mode="bilinear", align_corners=False)[0])

    def at(maps: list[torch.Tensor], threshold: float) -> float:
        found = [torch.where(cam.amax(0) >= threshold, cam.argmax(0) + 1, 0).numpy() for cam in maps]
        return miou(truths, found)

    grid = [k / 100 for k in range(1, 100)]
    labels = np.stack([split[number].labels for number in range(len(split))])
    ap = [average_precision_score(labels[:, c], np.array(logits)[:, c]) for c in (0, 1)]
    return {
        "val/miou": miou(truths, plain),
        "val/miou_online": miou(truths, ons),
        "val/miou_labels_given": miou(truths, given),
        "val/miou_labels_predicted": miou(truths, predicted),
        "val/miou_online_labels_predicted": miou(truths, ons_predicted),
        "val/cam_miou_at_0.5": at(cams, 0.5),
        "val/cam_miou_best": max(at(cams, t) for t in grid),
        "val/cam_aux_miou_best": max(at(auxes, t) for t in grid),
        "val/pseudo_miou": at(cams, 0.4),
        "val/map": float(np.mean(ap)),
        "val/images": len(SIZES),
    }


def test_what_is_made_of_context(tmp_path) -> None:
    """Against the same pictures with masks in which everything but the context's background is ignored."""
    options = {"variant": "coexist", "train": 1, "val": 12, "size": 48, "seed": 3}
    shapes = shapes_source(**options)
    write_dataset(shapes, str(tmp_path / "shapes"), local=True)
    coexist = open_dataset(str(tmp_path / "shapes")).split("val")

    def reader(sample):
        found = coexist[sample[0]]
        context, truth = context_of(options, found.id), found.decode_mask()
        mask = np.where(context & (truth == 0), 0, 255).astype(np.uint8)
        labels = np.flatnonzero(found.labels).tolist()
        return stored_row(found.id, found.image, png(mask), labels, 5, shapes.palette)

    places = {"val": [(number,) for number in range(len(coexist))]}
    source = Source("folder", None, {}, CLASSES_OF_SHAPES, shapes.palette, "here", "here", places, reader)
    write_dataset(source, str(tmp_path / "context"), local=True)
    only = open_dataset(str(tmp_path / "context")).split("val")
    settings = config(evaluation={"scales": [1.0], "batch_size": 5, "panel_images": 2})
    torch.manual_seed(0)
    pair = tuple(build_network(settings.model, 5, image_size=SIDE) for _ in range(2))
    for network in pair:
        torch.nn.init.normal_(network.decoder.conv8.weight, std=0.3)
    there, masked = (run(each, settings, pair, classes=CLASSES_OF_SHAPES) for each in (coexist, only))
    background = masked.confusion[0]
    assert there.metrics["val/context_foreground"] == background[1:].sum() / background.sum()
    wrong, right, ignored = masked.outcomes.sum(0)
    assert (wrong, right) > (0, 0)
    assert there.metrics["val/pseudo_context_foreground"] == wrong / (wrong + right + ignored)
    assert not [name for name in masked.metrics if "context" in name]


def test_metrics_equal_a_loop_over_single_images(split) -> None:
    settings = config(model={"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}, evaluation={"presence": PRESENCE})
    found = run(split, settings).metrics
    expected = by_hand(split)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    assert len({round(expected[name], 3) for name in expected}) >= 9, "the metrics must differ to tell them apart"
    assert found["val/pseudo_coverage"] == 1
    assert found["val/iou/background"] >= 0
    assert "val/iou/tv_monitor" not in found, "a class without pixels has no IoU"


@pytest.mark.parametrize("world", [2, 3, len(SIZES) + 2])
def test_any_number_of_workers_gives_the_same(split, world) -> None:
    # One image a batch, so that not even rounding may differ; with more workers than images some have none.
    settings = config(evaluation={"batch_size": 1})
    alone = run(split, settings)
    barrier = threading.Barrier(world, timeout=60)
    handed: list[torch.Tensor] = [torch.zeros(0)] * world
    results: list[EvaluationResult | None] = [None] * world

    def work(rank: int) -> None:
        def total(tensor: torch.Tensor) -> torch.Tensor:
            handed[rank] = tensor
            barrier.wait()
            result = torch.stack(handed).sum(0)
            barrier.wait()
            return result

        results[rank] = run(split, settings, pairs[rank], rank=rank, world=world, sum_over_workers=total)

    pairs = [networks() for _ in range(world)]  # built here: threads would draw from one seed
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert result is not None
        assert result.metrics == alone.metrics
        np.testing.assert_array_equal(result.confusion, alone.confusion)
        np.testing.assert_array_equal(result.outcomes, alone.outcomes)
    assert results[0] is not None
    assert results[0].pictures()
    assert not any(result.pictures() for result in results[1:] if result)


def test_before_the_decoder_is_trained_only_cams_are_scored(split) -> None:
    online, assignment = networks()
    online.train()
    found = evaluate(online, assignment, split, config(), classes=CLASSES, thresholds=THRESHOLDS, segment=False)
    assert not [name for name in found.metrics if "/miou" in name or "/iou/" in name or "accuracy" in name]
    whole = run(split, config()).metrics
    for name, value in found.metrics.items():
        assert value == pytest.approx(whole[name], abs=1e-6)
    assert online.training, "evaluation leaves the training mode as it was"
    assert found.pictures()["val/panel"].width < run(split, config()).pictures()["val/panel"].width


def test_two_thresholds_leave_pixels_out(split) -> None:
    settings = config(pseudo_labels={"policy": "two_threshold"})
    found = run(split, settings, thresholds={"low": 0.25, "high": 0.7, "low_aux": 0.2, "high_aux": 0.6})
    assert 0 < found.metrics["val/pseudo_coverage"] < 1
    assert found.outcomes.sum() == found.confusion.sum()
    assert set(found.thresholds) == {"low", "high"}


def test_a_subset_says_so_and_is_the_same_for_every_seed(split) -> None:
    settings = config(evaluation={"subset": 3})
    found = run(split, settings)
    assert found.images == 3
    assert {name.split("/")[0] for name in found.metrics} == {"val_subset_3"}
    other = run(split, settings.model_copy(update={"seed": 7}))
    assert other.metrics == found.metrics
    assert metric_prefix(settings, 3) == "val"
    assert metric_prefix(settings, 4) == "val_subset_3"
    assert metric_prefix(settings, 4, "test 1?") == "test 1__subset_3"


def test_best_metric_follows_what_is_trained() -> None:
    assert best_metric(config(training={"steps": 2000, "warmup_iters": 10}), "val") == "val/miou"
    assert best_metric(config(training={"steps": 2000, "warmup_iters": 2000}), "val") == "val/cam_miou_best"


def test_a_split_without_masks_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="without masks"):
        run(made(tmp_path, masks=False), config())


def test_panel_shows_the_truth_in_its_colours(split) -> None:
    result = run(split, config(), palette=PALETTE)
    picture = np.asarray(result.pictures()["val/panel"])
    tile = result.tiles[0]
    assert (tile.truth == 1).any()
    # Second column, first row; the cell is 160 wide with a border of 6, below a heading of 22.
    cell = picture[22 : 22 + 160, 6 + 166 : 6 + 166 + 160].reshape(-1, 3)
    for number in np.unique(tile.truth):
        colour = (255, 255, 255) if number == 255 else PALETTE[number]
        assert (cell == colour).all(1).any()
    assert not (cell == PALETTE[3]).all(1).any()


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9), st.integers(1, 12))
def test_every_image_is_dealt_once_and_the_panel_to_rank_0(images, subset, panel_images, world) -> None:
    order, shown = evaluation_order(images, subset, panel_images, world)
    assert len(order) == len(set(order)) == min(images, subset)
    assert set(shown) <= set(order[0::world])
    assert shown == evaluation_order(images, subset, panel_images, 1)[1][: len(shown)]
    assert len(shown) == min(panel_images, len(order[0::world]))
    assert sorted(order) == sorted(evaluation_order(images, subset, 0, 1)[0])
