"""The networks: the release's numbers, weights, and what is refused (families: test_backbones.py)."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from cosa_ray.config.schema import Model, Optimiser
from cosa_ray.errors import UserError
from cosa_ray.method.assignment import assign
from cosa_ray.method.network import Network, build_network
from cosa_ray.method.tokens import resize_positions

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2}
ROTARY = {"embed_dim": 32, "depth": 3, "num_heads": 2}
RELEASE = {"backbone": "vit_base_patch16_224", "backbone_args": {"embed_dim": 48, "depth": 5, "num_heads": 4}}


def model(**fields) -> Model:
    return Model(**{"pretrained": False, "aux": -2, "decoder_width": 8, "decoder_dilation": 2, **fields})


def release_network(arrays: dict[str, np.ndarray]) -> Network:
    network = build_network(Model(pretrained=False, **RELEASE), 5, image_size=64)
    names = [name for name in arrays if name.startswith("state::") and "encoder.head" not in name]
    network.load_state_dict({name.removeprefix("state::"): torch.from_numpy(arrays[name]) for name in names})
    return network


@pytest.mark.golden
@pytest.mark.parametrize("size", ["native", "wide"])
def test_release_network(golden, size):
    arrays = golden("network")
    with torch.no_grad():
        outputs = release_network(arrays)(torch.from_numpy(arrays[f"{size}_x"]))
    for name, value in outputs._asdict().items():
        np.testing.assert_allclose(value.numpy(), arrays[f"{size}_{name}"], atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.golden
def test_release_multi_scale_assignment(golden):
    arrays, network = golden("multi_scale_assignment"), release_network(golden("network"))
    images = torch.from_numpy(arrays["x"])
    fused = assign(network, images, arrays["scales"].tolist(), True)
    np.testing.assert_allclose(fused.cam.numpy(), arrays["cam"], atol=1e-4)
    np.testing.assert_allclose(fused.seg.numpy(), arrays["seg"], atol=1e-4)
    last = assign(network, images, [1.5], True)  # what the release's slip keeps of the auxiliary CAM
    np.testing.assert_allclose(last.cam_aux.numpy(), arrays["cam_aux_last_scale_only"], atol=1e-4)
    assert (fused.cam_aux - last.cam_aux).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("backbone", "args", "side"),
    [
        ("convnext_atto", {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}, 2),  # 80 / 32, rounded down
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
            3,  # and up
        ),
    ],
)
def test_the_grid_is_the_maps_own_where_the_stride_does_not_divide(backbone, args, side):
    network = build_network(model(backbone=backbone, backbone_args=args), 3, image_size=80)
    with torch.no_grad():
        assert network(torch.randn(1, 3, 80, 80)).cam.shape[-2:] == network.grid(80, 80) == (side, side)


def test_batch_norm_needs_weights_and_stays_frozen():
    with pytest.raises(UserError, match="batch norm"):
        build_network(model(backbone="resnet10t"), 3)
    state = timm.create_model("resnet10t", pretrained=False).state_dict()
    network = build_network(model(backbone="resnet10t", checkpoint="own.safetensors"), 3, weights=state)
    assert (network.classifier.in_channels, network.aux_classifier.in_channels) == (512, 256)
    before = {name: value.clone() for name, value in network.encoder.named_buffers()}
    network.train()
    outputs = network(torch.randn(2, 3, 64, 64))
    (outputs.cls.sum() + outputs.cls_aux.sum() + outputs.seg.sum()).backward()
    assert all(torch.equal(value, before[name]) for name, value in network.encoder.named_buffers())
    assert [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None] == []
    groups = {group["name"]: group["params"] for group in network.parameter_groups(Optimiser())}
    scale = next(m.weight for m in network.encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    assert any(scale is parameter for parameter in groups["encoder_norm"])


def test_samples_do_not_mix_and_training_is_deterministic():
    args = {"embed_dim": 24, "depth": 3, "num_heads": 2, "drop_path_rate": 0.5, "proj_drop_rate": 0.5}
    network = build_network(model(backbone="vit_small_patch8_224", backbone_args=args), 3, image_size=32).train()
    images = torch.randn(3, 3, 32, 32)
    both, alone = network(images), network(images[1:2])
    torch.testing.assert_close(both.cls[1:2], alone.cls)
    torch.testing.assert_close(network(images).seg, both.seg)


def test_weights_load_with_their_head_and_positions_freeze():
    source = timm.create_model("vit_tiny_patch16_224", pretrained=False, **TINY)
    settings = model(backbone="vit_tiny_patch16_224", backbone_args=TINY, checkpoint="own.pth")
    network = build_network(settings, 3, weights=source.state_dict(), image_size=64)
    own = network.encoder.state_dict()
    assert set(source.state_dict()) - set(own) == {"head.weight", "head.bias"}
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in own.items())
    assert not network.encoder.pos_embed.requires_grad
    trained = model(backbone="vit_tiny_patch16_224", backbone_args=TINY)
    assert build_network(trained, 3, image_size=64).encoder.pos_embed.requires_grad  # nothing pretrained to keep
    resumed = build_network(settings, 3, image_size=64, initialise=False)  # for a state dict of ours
    resumed.load_state_dict(network.state_dict())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"backbone": "vit_bass_patch16_224"}, "nearest: .*vit_base_patch16_224"),
        ({"backbone": "vit_base_patch16_224.nonsense"}, "no pretrained tag 'nonsense'"),
        ({"backbone_args": {"embed_dmi": 3}}, "model.backbone_args.*embed_dmi"),
        ({"backbone_args": {"num_classes": 3}}, "num_classes is set by cosa-ray"),
        ({"aux": -1}, "model.aux"),
        ({"aux": 3}, "model.aux"),
        ({"output_stride": 16}, "model.output_stride"),
        ({"backbone": "swin_tiny_patch4_window7_224", "backbone_args": {}, "output_stride": 16}, "output_stride"),
        ({"backbone": "convnext_atto", "backbone_args": {}, "stem": "convolutional"}, "plain ViT"),
        ({"checkpoint": "x.pth", "stem": "convolutional"}, "no trained weights"),
        ({"backbone": "vit_small_patch14_dinov2", "stem": "convolutional"}, "patch size 8 or 16"),
        ({"backbone": "vit_small_patch14_dinov2"}, "multiple of the patch size.*nearest is 70"),
    ],
)
def test_refused(fields, says):
    with pytest.raises(UserError, match=says):
        build_network(model(**{"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, **fields}), 3, image_size=64)


def test_weights_that_do_not_fit_are_named():
    state = timm.create_model("vit_tiny_patch16_224", pretrained=False, **TINY).state_dict()
    state["surplus"] = state.pop("blocks.0.norm1.weight")
    state["norm.weight"] = torch.ones(3)
    settings = model(backbone="vit_tiny_patch16_224", backbone_args=TINY, checkpoint="own.pth")
    with pytest.raises(UserError, match=r"missing: blocks.0.norm1.weight.*unexpected: surplus.*shape: norm.weight"):
        build_network(settings, 3, weights=state, image_size=64)


def test_positions_keep_the_prefix_and_interpolate_without_antialias():
    positions = torch.randn(1, 2 + 16, 6)
    small = resize_positions(positions, (4, 4), (2, 2), prefix=2)
    assert torch.equal(small[:, :2], positions[:, :2])
    # the cubic kernel half-way between samples: (-0.09375, 0.59375, 0.59375, -0.09375) for a = -0.75
    kernel = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375])
    grid = positions[0, 2:].reshape(4, 4, 6)

    def line(centre: float) -> torch.Tensor:
        weights = torch.zeros(4)
        for offset, weight in zip((-1, 0, 1, 2), kernel, strict=True):
            weights[min(max(int(centre) + offset, 0), 3)] += weight
        return weights

    for row in range(2):
        for column in range(2):
            expected = torch.einsum("i,j,ijd->d", line(2 * row + 0.5), line(2 * column + 0.5), grid)
            torch.testing.assert_close(small[0, 2 + 2 * row + column], expected)


def test_normalise_is_the_backbones_own_unless_given():
    network = build_network(model(backbone="vit_tiny_patch16_224", backbone_args=TINY), 3, image_size=32)
    assert network.mean.tolist() == network.std.tolist() == [0.5, 0.5, 0.5]
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(network.normalise(images), images / 127.5 - 1)
    given = model(backbone="vit_tiny_patch16_224", backbone_args=TINY, mean=(0.1, 0.2, 0.3), std=(1, 2, 4))
    expected = (images / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([1, 2, 4])[:, None, None]
    torch.testing.assert_close(build_network(given, 3, image_size=32).normalise(images), expected)


def test_parameter_groups_cover_every_trainable_parameter_once():
    network = build_network(model(backbone="vit_small_patch16_dinov3", backbone_args=ROTARY), 3, image_size=32)
    groups = {group["name"]: group for group in network.parameter_groups(Optimiser(lr=1e-3, head_lr_factor=7))}
    listed = [parameter for group in groups.values() for parameter in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == sum(1 for p in network.parameters() if p.requires_grad)
    assert {name: group["lr"] for name, group in groups.items()} == {
        "encoder": 1e-3,
        "encoder_norm": 1e-3,
        "classifiers": pytest.approx(7e-3),
        "decoder": pytest.approx(7e-3),
    }
    norm = dict(network.named_parameters())["encoder.blocks.0.norm1.weight"]
    assert any(norm is parameter for parameter in groups["encoder_norm"]["params"])
    assert {id(p) for p in groups["decoder"]["params"]} == {id(p) for p in network.decoder_parameters()}


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_classification_view_shares_the_network(pooling):
    settings = model(backbone="vit_tiny_patch16_224", backbone_args=TINY, pooling=pooling)
    network = build_network(settings, 3, image_size=32)
    view, images = network.classification, torch.randn(2, 3, 32, 32)
    outputs = network(images)
    cls, cls_aux = view(images)
    assert torch.equal(cls, outputs.cls)
    assert torch.equal(cls_aux, outputs.cls_aux)
    decoder = {id(p) for p in network.decoder_parameters()}
    assert {id(p) for p in view.parameters()} == {id(p) for p in network.parameters()} - decoder
    pooled = outputs.features.amax((2, 3)) if pooling == "max" else outputs.features.mean((2, 3))
    torch.testing.assert_close(outputs.cls, pooled @ network.classifier.weight[:, :, 0, 0].T)
    torch.testing.assert_close(
        outputs.cam.mean((2, 3)), outputs.features.mean((2, 3)) @ network.classifier.weight[:, :, 0, 0].T
    )
    assert network(images, segment=False).seg is None


def test_assignment_against_loops():
    network = build_network(model(backbone="vit_tiny_patch16_224", backbone_args=TINY), 3, image_size=64)
    images, scales = torch.randn(2, 3, 64, 64), (1.0, 0.5)
    fused = assign(network, images, scales, True)
    halved = assign(network, images, scales, True, stride=2, segment=False)
    assert halved.seg is None
    assert halved.cam.shape == (2, 3, 32, 32)

    def up(maps):
        return nn.functional.interpolate(maps, (64, 64), mode="bilinear")

    for name in ("cam", "cam_aux"):
        for b in range(2):
            total, seg = torch.zeros(3, 64, 64), torch.zeros(4, 64, 64)
            for scale in scales:
                side = int(64 * scale)
                view = nn.functional.interpolate(images[b : b + 1], (side, side), mode="bilinear")
                with torch.no_grad():
                    straight, mirrored = network(view), network(view.flip(-1))
                total += torch.maximum(up(getattr(straight, name))[0], up(getattr(mirrored, name))[0].flip(-1)).clamp(
                    min=0
                )
                seg += (up(straight.seg) + up(mirrored.seg).flip(-1))[0]
            for c in range(3):
                expected = (total[c] - total[c].min()) / (total[c].max() - total[c].min() + 1e-5)
                torch.testing.assert_close(getattr(fused, name)[b, c], expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(fused.seg[b], seg, atol=1e-5, rtol=1e-4)
