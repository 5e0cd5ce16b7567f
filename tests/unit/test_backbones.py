"""Every backbone family of docs/backbones.md takes a training step; what cannot work is refused before any download."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

from cosa_ray.config.load import apply_overrides, load_config
from cosa_ray.config.schema import Config, Model
from cosa_ray.errors import UserError
from cosa_ray.method.backbone import examine
from cosa_ray.method.ema import MovingAverage
from cosa_ray.method.network import Network, build_network, scaled_size
from cosa_ray.method.step import MicroBatch, cotraining_step
from cosa_ray.method.threshold import DynamicThresholds

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "backbones.md"
CLASSES, BATCH = 2, 2
VIT = {"embed_dim": 24, "depth": 4, "num_heads": 2}
ROTARY = {"embed_dim": 32, "depth": 4, "num_heads": 2}
WINDOWS = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
STAGES = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
RESIDUAL = {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 24), "stem_width": 8}


class Family(NamedTuple):
    """A tiny variant of a family: timm's name, arguments that make it small, and the crop in pixels."""

    backbone: str
    args: dict[str, Any]
    crop: int = 64
    output_stride: int | None = None
    stem: str = "patch"
    scales: tuple[float, ...] = (1.0, 0.5)


FAMILIES = {
    "ViT, patch 16": Family("vit_tiny_patch16_224", VIT),
    "ViT, patch 8": Family("vit_small_patch8_224", VIT),
    "ViT, convolutional stem": Family("vit_small_patch8_224", VIT, stem="convolutional"),
    "DeiT": Family("deit_tiny_patch16_224", VIT),
    "DeiT, distilled": Family("deit_tiny_distilled_patch16_224", VIT),
    "DeiT III": Family("deit3_small_patch16_224", VIT),
    "DINOv2, registers": Family("vit_small_patch14_reg4_dinov2", VIT, crop=56),
    "DINOv3": Family("vit_small_patch16_dinov3", ROTARY),
    "EVA02": Family("eva02_tiny_patch14_224", ROTARY, crop=56),
    "SigLIP": Family("vit_base_patch16_siglip_224", VIT),
    "Swin": Family("swin_tiny_patch4_window7_224", WINDOWS),
    "Swin V2": Family("swinv2_tiny_window8_256", WINDOWS),
    "ConvNeXt": Family("convnext_atto", STAGES),
    "ConvNeXt, stride 16": Family("convnext_atto", STAGES, output_stride=16),
    "ResNet": Family("resnet18", RESIDUAL),
    "ResNet, stride 16": Family("resnet18", RESIDUAL, output_stride=16),
    "EfficientNet": Family("efficientnet_b0", {}),
    "EfficientNet-lite, stride 16": Family("tf_efficientnet_lite0", {}, output_stride=16),
    "MobileNetV3": Family("mobilenetv3_small_050", {}),
    "RegNet": Family("regnetx_002", {}),
    "HRNet": Family("hrnet_w18_small", {}),
    "MaxViT": Family("test_maxvit", {}, scales=(1.0,)),
}


def table(heading: str) -> dict[str, list[str]]:
    """Rows of the documentation's table under a heading by their first cell, the rest without backquotes."""
    text = DOCS.read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip("`"): [cell.strip("`") for cell in row[1:]] for row in rows[2:]}


def build(family: Family) -> tuple[Config, Network]:
    """The paper's losses on a small crop; batch norm's statistics come from random weights given as a checkpoint."""
    torch.manual_seed(0)
    weights = timm.create_model(family.backbone, pretrained=False, num_classes=7, **family.args).state_dict()
    given = any(name.endswith("running_var") for name in weights)
    config = apply_overrides(
        load_config("presets/paper.yaml"),
        {
            "views.crop": family.crop,
            "model.backbone": family.backbone,
            "model.backbone_args": family.args,
            "model.stem": family.stem,
            "model.output_stride": family.output_stride,
            "model.pretrained": False,
            "model.checkpoint": "own.safetensors" if given else None,
            "model.decoder_width": 8,
            "model.decoder_dilation": 2,
            "assignment.scales": list(family.scales),
            "dynamic_threshold.min_values": 1,
            "optimiser.lr": 1e-3,
            "training.batch_size": BATCH,
        },
    )
    sides = [family.crop * scale for scale in family.scales]
    network = build_network(
        config.model, CLASSES, weights=weights if given else None, image_size=family.crop, sides=sides
    )
    with torch.no_grad():
        for parameter in network.parameters():
            if (
                not parameter.any()
            ):  # branches that start at nothing (Swin V2, RegNet) pass no gradient in the first step
                parameter.normal_(std=0.05)
    return config, network


def micro_batch(crop: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    weak = torch.randn(BATCH, 3, crop, crop, generator=generator)
    strong = weak + 0.3 * torch.randn(BATCH, 3, crop, crop, generator=generator)
    box = torch.tensor([[0, crop, 0, crop], [4, crop, 0, crop - 8]])
    return MicroBatch(weak, strong, torch.tensor([[1.0, 1.0], [0.0, 1.0]]), box, torch.arange(BATCH))


def copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_the_documentation_lists_the_families_that_run():
    assert {name: row[0] for name, row in table("Families").items()} == {n: f.backbone for n, f in FAMILIES.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_takes_a_step(name):
    family, (_, stride, _, aux_stride, norm, positions, _) = FAMILIES[name], table("Families")[name]
    config, online = build(family)
    assignment = copy.deepcopy(online).requires_grad_(False)
    before, start, crop = copied(assignment), copied(online), family.crop

    shapes = online(torch.zeros(1, 3, crop, crop))
    assert shapes.seg.shape[-2:] == shapes.cam.shape[-2:] == online.grid(crop, crop) == (crop // int(stride),) * 2
    assert shapes.cam_aux.shape == (1, CLASSES, *(crop // int(aux_stride),) * 2)
    assert ("yes" if isinstance(getattr(online.encoder, "norm", None), nn.LayerNorm) else "no") == norm
    assert positions.startswith("learned") == isinstance(getattr(online.encoder, "pos_embed", None), nn.Parameter)
    for scale in family.scales:
        size = scaled_size(online, crop, crop, scale)
        assert size == (crop * scale, crop * scale)
        with torch.no_grad():
            assert online(torch.zeros(1, 3, *size)).cam.shape[-2:] == online.grid(*size)

    thresholds = DynamicThresholds(config.dynamic_threshold, config.pseudo_labels)
    micro = [micro_batch(crop)]
    output = cotraining_step(
        online,
        assignment,
        micro,
        thresholds,
        config,
        7,
        global_batch=BATCH,
        sum_over_workers=lambda tensor: tensor,
    )
    assert all(value.isfinite() for value in output.losses.values())
    assert output.losses["loss_cam_to_seg"] > 0
    assert output.losses["loss_seg_to_cam"] > 0
    trained = {name: parameter for name, parameter in online.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())

    torch.optim.AdamW(online.parameter_groups(config.optimiser), weight_decay=0).step()
    assert [name for name, parameter in trained.items() if torch.equal(parameter, start[name])] == []
    unchanged = set(start) - set(trained)  # batch norm's statistics, and frozen position embeddings
    assert all(torch.equal(online.state_dict()[name], start[name]) for name in unchanged)
    assert all(torch.equal(value, before[name]) for name, value in assignment.state_dict().items())
    MovingAverage(assignment, online).update(0.5, torch.ones(()))
    name = "classifier.weight"
    torch.testing.assert_close(assignment.state_dict()[name], (before[name] + online.state_dict()[name]) / 2)


@pytest.mark.parametrize("name", table("Full-size names"))
def test_full_size_names_give_the_maps_that_the_documentation_says(name):
    found = examine(Model(backbone=name), 448, [336])
    with torch.device("meta"):
        info = timm.create_model(name, pretrained=False).feature_info
    reductions = [int(stage["reduction"]) for stage in (info.info if hasattr(info, "info") else info)]
    taps, stride = found.taps, 448 // found.grids[448][0]
    assert [f"{taps.last_channels} at {stride}", f"{taps.aux_channels} at {reductions[-3]}", str(taps.multiple)] == (
        table("Full-size names")[name]
    )
    assert timm.is_model_pretrained(name)


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """Names of the classes whose weights timm was asked to fetch; nothing is fetched."""
    names: list[str] = []
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda model, **_: names.append(type(model).__name__))
    return names


def test_weights_are_fetched_once_where_nothing_is_wrong(fetched):
    build_network(Model(backbone="test_vit"), CLASSES, image_size=64, sides=[32])
    assert fetched == ["VisionTransformer"]
    build_network(Model(backbone="test_vit"), CLASSES, image_size=64, initialise=False)
    assert fetched == ["VisionTransformer"]


@pytest.mark.parametrize(
    ("fields", "crop", "sides", "says"),
    [
        ({"backbone": "beit_base_patch16_224"}, 64, [32], "32 pixels .*match.*set the scales to 1"),
        ({"backbone": "test_maxvit"}, 64, [32], r"32 pixels \(.*divisible.*set the scales to 1"),
        ({"backbone": "efficientformer_l1"}, 64, [], "64 pixels .*set views.crop to its own 224"),
        ({"backbone": "halonet26t"}, 64, [], r"64 pixels \(_assert\(.*set views.crop to its own 256"),
        ({"backbone": "gmlp_s16_224"}, 64, [], r"model.pretrained.*\(224 pixels\).*of another shape"),
        ({"backbone": "vit_tiny_patch16_224", "backbone_args": {"depth": 4}}, 64, [], "model.pretrained.*unexpected"),
        ({"backbone": "starnet_s050"}, 64, [], "timm has no trained weights of starnet_s050"),
        (
            {"backbone": "vit_tiny_patch16_224", "backbone_args": {"depth": "many"}},
            64,
            [],
            "model.backbone_args.*built",
        ),
        ({"backbone": "vit_tiny_patch16_224", "backbone_args": {"checkpoint_path": "x"}}, 64, [], "leave it out"),
        ({"backbone": "local-dir:/nowhere"}, 64, [], "model.backbone: local-dir:/nowhere cannot be built"),
    ],
)
def test_what_cannot_work_is_refused_before_any_weights_are_fetched(fetched, fields, crop, sides, says):
    with pytest.raises(UserError, match=says) as refusal:
        build_network(Model(**fields), CLASSES, image_size=crop, sides=sides)
    assert "\n" not in str(refusal.value)
    assert fetched == []


def test_a_model_without_feature_maps_is_refused(monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *_, **__: nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"Linear\) gives no intermediate feature maps"):
        examine(Model(backbone="resnet18"))


def test_sides_are_rounded_to_the_stride_where_nothing_finer_is_taken():
    assert examine(Model(backbone="resnet18"), 64, [36]).taps.multiple == 4
    coarse = examine(Model(backbone="hrnet_w18_small"), 64, [36])
    assert (coarse.taps.multiple, sorted(coarse.grids)) == (32, [32, 64])


def test_the_grid_of_the_crop_itself_is_measured():
    found = examine(Model(backbone="convnext_atto", backbone_args=STAGES), 66, [66.0])
    assert found.grids == {66: (2, 2), 68: (2, 2)}


@pytest.mark.parametrize("data", [False, True])
def test_an_examination_draws_no_random_numbers(monkeypatch, data):
    """Also where the backbone has to be run on the CPU, because it asks for a value."""
    if data:
        forward = timm.models.vision_transformer.VisionTransformer.forward_intermediates

        def asking(self, x, *args, **kwargs):
            assert not x.sum().isnan().item()
            return forward(self, x, *args, **kwargs)

        monkeypatch.setattr(timm.models.vision_transformer.VisionTransformer, "forward_intermediates", asking)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = examine(Model(backbone="vit_tiny_patch16_224", backbone_args=VIT, pretrained=False), 64, [32])
    assert found.grids == {64: (4, 4), 32: (2, 2)}
    assert torch.equal(torch.get_rng_state(), before)
