"""The training step: splitting the batch changes nothing, every parameter is reached, the host is never asked."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cosa_ray.config.schema import Config
from cosa_ray.method import step as step_module
from cosa_ray.method.contrastive import Sample, sample_pixels
from cosa_ray.method.ema import MovingAverage
from cosa_ray.method.network import build_network
from cosa_ray.method.step import (
    LOSS_NAMES,
    MicroBatch,
    StepOutput,
    classification_step,
    cotraining_step,
    fill_step,
)
from cosa_ray.method.threshold import DynamicThresholds

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2}
CLASSES, CROP, BATCH = 3, 32, 4
PATCH = 8
GRID = CROP // PATCH


def alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def config(**sections) -> Config:
    base = {
        "seed": 3,
        "views": {"crop": CROP},
        "model": {
            "backbone": "vit_small_patch8_224",
            "backbone_args": TINY,
            "pretrained": False,
            "aux": -2,
            "decoder_width": 8,
            "decoder_dilation": 1,
        },
        "assignment": {"scales": [1.0, 0.5]},
        "dynamic_threshold": {"batches": 3, "min_values": 1},
        "losses": {
            "cam_to_seg": 0.7,
            "seg_to_cam": 0.3,
            "contrastive": 0.4,
            "dense_energy": 1e4,  # a sum over few pixels here: enough to be seen in the gradients
            "seg_to_cam_temperature": 0.1,
        },
        "contrastive": {"pixels": 6},
        "training": {"batch_size": BATCH},
    }
    for name, fields in sections.items():
        value = base.get(name)
        base[name] = {**value, **fields} if isinstance(value, dict) else fields
    return Config(**base)


def batch(crop: int = CROP, device: str = "cpu") -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(BATCH, CLASSES, generator=generator) < 0.5).float()
    labels[:, 1] = 1
    box = torch.tensor([[0, crop, 0, crop], [3, crop, 0, crop - 5], [0, crop - 7, 0, crop], [0, crop, 8, crop]])
    weak = torch.randn(BATCH, 3, crop, crop, generator=generator)
    strong = weak + 0.3 * torch.randn(BATCH, 3, crop, crop, generator=generator)
    return MicroBatch(*(t.to(device) for t in (weak, strong, labels, box, torch.arange(BATCH))))


def part(whole: MicroBatch, rows) -> MicroBatch:
    return MicroBatch(*(field[rows] for field in whole))


class Worker:
    """A network pair with thresholds, as one worker holds them; all workers start alike."""

    def __init__(self, settings: Config, crop: int = CROP, weights=None) -> None:
        torch.manual_seed(0)
        self.config = settings
        self.online = build_network(settings.model, CLASSES, image_size=crop, weights=weights)
        for head in (self.online.classifier, self.online.aux_classifier):
            nn.init.normal_(head.weight, std=0.5)  # CAMs worth a threshold
        self.assignment = copy.deepcopy(self.online).requires_grad_(False)
        self.thresholds = DynamicThresholds(settings.dynamic_threshold, settings.pseudo_labels)

    def step(self, micro, step: int = 5, world: int = 1, sum_over=alone, online=None, autocast=None) -> StepOutput:
        output = cotraining_step(
            self.online if online is None else online,
            self.assignment,
            micro,
            self.thresholds,
            self.config,
            step,
            global_batch=BATCH,
            world=world,
            sum_over_workers=sum_over,
            autocast=autocast,
        )
        if output.proposal is not None:
            self.thresholds.commit(output.proposal, torch.ones_like(output.losses["loss"]))
        return output

    def gradients(self) -> dict[str, torch.Tensor]:
        return {n: p.grad.clone() for n, p in self.online.named_parameters() if p.grad is not None}


class Sum:
    """The all-reduce of a few threads."""

    def __init__(self, world: int) -> None:
        self.barrier, self.given = threading.Barrier(world, timeout=60), [None] * world

    def of(self, rank: int):
        def add(tensor: torch.Tensor) -> torch.Tensor:
            self.given[rank] = tensor
            self.barrier.wait()
            total = torch.stack(self.given).sum(0)
            self.barrier.wait()
            return total

        return add


def run_workers(settings: Config, slices: list[list], steps: int = 2) -> tuple[list[Worker], list[StepOutput]]:
    """Several workers in threads, each with its micro-batches; the last step's outputs."""
    whole, world = batch(), len(slices)
    workers, outputs, exchange = [Worker(settings) for _ in slices], [None] * world, Sum(world)

    def work(rank: int) -> None:
        for step in range(steps):
            workers[rank].online.zero_grad()
            micro = [part(whole, rows) for rows in slices[rank]]
            outputs[rank] = workers[rank].step(micro, step, world, exchange.of(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(output is not None for output in outputs)
    return workers, outputs


VARIANTS = {
    "paper": {},
    "batch reliability": {"pseudo_labels": {"reliability_over": "batch"}},
    "single, fixed": {"pseudo_labels": {"policy": "single"}, "dynamic_threshold": {"enabled": False}},
    "two thresholds": {
        "pseudo_labels": {"policy": "two_threshold"},
        "contrastive": {"threshold": 0.4, "on": "features"},
        "dense_energy": {"gradient": "autograd"},
    },
    "half size": {"training": {"loss_stride": 2}},
    "regions and agreement": {
        "pseudo_labels": {"foreground_over": "regions", "agreement": 1.0, "reliability_over": "batch"},
        "losses": {"seg_to_cam": 0.0},
    },
    "refined": {"pseudo_labels": {"refinement": "pixel_adaptive", "refinement_iterations": 2}},
    "quarter size, two thresholds, refined": {
        "pseudo_labels": {"policy": "two_threshold", "refinement": "pixel_adaptive", "refinement_dilations": [1, 3]},
        "contrastive": {"threshold": 0.4},
        "training": {"loss_stride": 4},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "slices",
    [
        [[slice(0, 2), slice(2, 4)]],
        [[slice(0, 3)], [slice(3, 4)]],
        [[slice(0, 1), slice(1, 2)], [slice(2, 3), slice(3, 4)]],
    ],
    ids=["2 micro-batches", "2 unequal workers", "2 workers x 2 micro-batches"],
)
def test_splitting_the_batch_changes_nothing(variant, slices):
    settings = config(**VARIANTS[variant])
    (single,), (whole,) = run_workers(settings, [[slice(0, 4)]])
    workers, outputs = run_workers(settings, slices)
    for name in LOSS_NAMES:
        total = sum(output.losses[name] for output in outputs)
        absolute = 0 if name == "loss_dense_energy" else 1e-6  # that one is about 1e-6 itself
        torch.testing.assert_close(total, whole.losses[name], atol=absolute, rtol=1e-5, msg=name)
    assert whole.losses["loss_contrastive"] > 0
    assert whole.losses["loss_dense_energy"] < 0
    for output in outputs:
        for name, value in whole.statistics.items():
            torch.testing.assert_close(output.statistics[name], value, atol=1e-6, rtol=1e-5, msg=name)
    expected = single.gradients()
    for name, gradient in expected.items():
        mean = sum(worker.online.get_parameter(name).grad for worker in workers) / len(workers)  # what DDP does
        torch.testing.assert_close(mean, gradient, atol=1e-6, rtol=1e-4, msg=name)
    for worker in workers:  # the same ring and thresholds on all workers, bit for bit
        for name, value in single.thresholds.state_dict().items():
            assert torch.equal(worker.thresholds.state_dict()[name], value), name


def test_order_of_the_batch_does_not_matter():
    order = [2, 0, 3, 1]
    first, second = Worker(config()), Worker(config())
    one, two = first.step([batch()]), second.step([part(batch(), order)])
    for name in LOSS_NAMES:
        torch.testing.assert_close(one.losses[name], two.losses[name], atol=1e-6, rtol=1e-5)
    for name, gradient in first.gradients().items():
        torch.testing.assert_close(second.gradients()[name], gradient, atol=1e-6, rtol=1e-4)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    settings = config(pseudo_labels={"auxiliary_share": 0.3})
    losses = Worker(settings).step([batch()]).losses
    assert tuple(losses) == LOSS_NAMES
    expected = losses["loss_cls"] + losses["loss_cls_aux"] + 0.3 * losses["loss_seg_to_cam"]
    expected = expected + 0.7 * (0.7 * losses["loss_cam_to_seg"] + 0.3 * losses["loss_cam_to_seg_aux"])
    expected = expected + 0.4 * losses["loss_contrastive"] + 1e4 * losses["loss_dense_energy"]
    torch.testing.assert_close(losses["loss"], expected)
    assert not any(value.requires_grad for value in losses.values())
    assert losses["loss_dense_energy"] < 0  # by construction
    assert all(losses[name] > 0 for name in LOSS_NAMES[1:-1])


def test_separation_that_has_faded_is_as_good_as_none():
    schedule = {"steps": 10, "warmup_iters": 2}  # four steps of co-training until it is gone

    def at(step: int, weight: float = 0.4, fade: float | None = 0.5) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        worker = Worker(
            config(
                losses={"contrastive": weight},
                training=schedule,
                contrastive={"fade": fade},
                optimiser={"warmup_steps": 0},
            )
        )
        losses = worker.step([batch()], step).losses
        return losses, worker.gradients()["classifier.weight"]

    (full, whole), (half, part_of) = at(4, fade=None), at(4)
    torch.testing.assert_close(half["loss_contrastive"], full["loss_contrastive"])
    torch.testing.assert_close(half["loss"], full["loss"] - 0.2 * full["loss_contrastive"])
    without = at(4, weight=0.0)[1]
    torch.testing.assert_close(part_of, (whole + without) / 2)
    assert (whole - without).abs().max() > 1e-4
    (gone, faded), nothing = at(6), at(6, weight=0.0)
    assert gone["loss_contrastive"] == 0
    torch.testing.assert_close(faded, nothing[1])


def test_a_term_reaches_what_it_should():
    def reached(**losses) -> dict[str, float]:
        worker = Worker(
            config(losses={"cam_to_seg": 0, "seg_to_cam": 0, "contrastive": 0, "dense_energy": 0, **losses})
        )
        worker.step([batch()])
        return {n: float(g.abs().max()) for n, g in worker.gradients().items()}

    nothing, cam_to_seg = reached(), reached(cam_to_seg=0.5)
    assert nothing["decoder.conv6.weight"] == 0
    assert cam_to_seg["decoder.conv6.weight"] > 0
    assert cam_to_seg["classifier.weight"] == nothing["classifier.weight"]  # CAMs are the other network's
    assert reached(seg_to_cam=0.5)["classifier.weight"] != nothing["classifier.weight"]
    assert reached(contrastive=0.5)["classifier.weight"] != nothing["classifier.weight"]
    energy = reached(dense_energy=1e3)
    assert energy["decoder.conv6.weight"] > 0
    assert energy["classifier.weight"] == nothing["classifier.weight"]


def test_the_assignment_network_is_not_touched_and_follows_by_ema():
    worker = Worker(config())
    before = copy.deepcopy(worker.assignment.state_dict())
    worker.step([batch()])
    assert all(torch.equal(value, before[name]) for name, value in worker.assignment.state_dict().items())
    assert all(p.grad is None for p in worker.assignment.parameters())
    with torch.no_grad():
        for parameter in worker.online.parameters():
            parameter += 1
    MovingAverage(worker.assignment, worker.online).update(0.75, torch.ones(()))
    for name, parameter in worker.assignment.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.25)


def test_what_is_padded_does_not_matter(monkeypatch: pytest.MonkeyPatch):
    """Labels outside the box are ignored, and no compared pixel lies there."""
    sampled: list[Sample] = []

    def kept(*args, **more) -> Sample:
        sampled.append(sample_pixels(*args, **more))
        return sampled[-1]

    monkeypatch.setattr(step_module, "sample_pixels", kept)
    worker, other = Worker(config(losses={"seg_to_cam": 0})), Worker(config(losses={"seg_to_cam": 0}))
    whole = batch()
    narrow = whole._replace(box=whole.box.clone())
    narrow.box[:] = torch.tensor([8, 24, 8, 24])
    shares = [w.step([b]).statistics for w, b in ((worker, whole), (other, narrow))]
    assert shares[0]["foreground_share"] != shares[1]["foreground_share"]
    for sample, at in zip(sampled, (whole, narrow), strict=True):
        for image, (top, bottom, left, right) in enumerate(at.box.tolist()):
            taken = sample.pixel[image][sample.taken[image]]
            y, x = PATCH * (taken // GRID + 0.5), PATCH * (taken % GRID + 0.5)
            assert ((y > top) & (y < bottom) & (x > left) & (x < right)).all()
    assert all(sample.taken.any() for sample in sampled)
    empty = whole._replace(box=torch.zeros_like(whole.box))
    losses = Worker(config()).step([empty]).losses
    assert losses["loss_cam_to_seg"] == losses["loss_contrastive"] == losses["loss_dense_energy"] == 0
    assert all(value.isfinite() for value in losses.values())


def test_random_draws_follow_seed_and_step():
    def contrastive(step: int, seed: int = 3) -> torch.Tensor:
        return Worker(config(seed=seed)).step([batch()], step).losses["loss_contrastive"]

    assert contrastive(1) == contrastive(1)
    assert contrastive(1) != contrastive(2)
    assert contrastive(1) != contrastive(1, seed=4)


def test_bf16_forward_keeps_losses_in_float32():
    output = Worker(config()).step([batch()], 0, autocast=torch.bfloat16)
    exact = Worker(config()).step([batch()], 0)
    for name in LOSS_NAMES:
        assert output.losses[name].dtype == torch.float32
        assert output.losses[name] == pytest.approx(float(exact.losses[name]), rel=0.1)


def test_warmup_is_the_classification_losses_and_fills_the_ring():
    worker, whole = Worker(config()), batch()
    halves = [part(whole, slice(0, 1)), part(whole, slice(1, 4))]
    output = classification_step(worker.online.classification, halves, global_batch=BATCH)
    logits = worker.online(whole.strong)
    soft_margin = nn.functional.multilabel_soft_margin_loss
    torch.testing.assert_close(output.losses["loss_cls"], soft_margin(logits.cls, whole.labels).detach())
    torch.testing.assert_close(output.losses["loss_cls_aux"], soft_margin(logits.cls_aux, whole.labels).detach())
    torch.testing.assert_close(output.losses["loss"], output.losses["loss_cls"] + output.losses["loss_cls_aux"])
    gradients = worker.gradients()
    assert not any(name.startswith("decoder") for name in gradients)
    worker.online.zero_grad()
    (soft_margin(logits.cls, whole.labels) + soft_margin(logits.cls_aux, whole.labels)).backward()
    for name, gradient in worker.gradients().items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4)

    def fill(micro: list[MicroBatch]):
        return fill_step(worker.assignment, micro, worker.thresholds, worker.config, sum_over_workers=alone)

    proposal = fill(halves)
    assert torch.equal(proposal.ring, fill([whole]).ring)
    assert proposal.ring.sum() > 0
    assert torch.equal(proposal.values, worker.thresholds.current)


@pytest.fixture(scope="module")
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "losses",
    [
        {},
        {"cam_to_seg": 0.0},
        {"seg_to_cam": 0.0, "contrastive": 0.0},
        {"cam_to_seg": 0, "seg_to_cam": 0, "contrastive": 0},
        {"cam_to_seg": 0, "seg_to_cam": 0, "contrastive": 0, "dense_energy": 0},
    ],
)
def test_ddp_needs_no_search_for_unused_parameters(process_group, losses):
    worker = Worker(config(losses=losses))
    wrapped = DistributedDataParallel(worker.online)
    micro = [part(batch(), slice(0, 2)), part(batch(), slice(2, 4))]
    for step in range(2):  # DDP complains one step late
        worker.step(micro, step, online=wrapped)
    view = DistributedDataParallel(worker.online.classification)
    for _ in range(2):
        classification_step(view, micro, global_batch=BATCH)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_host_is_never_asked(variant):
    """On the meta device tensors have no values: a step that reads one, or mixes devices, fails."""
    worker = Worker(config(**VARIANTS[variant]))
    worker.online.to("meta")
    worker.assignment.to("meta")
    state = worker.thresholds
    state.current, state.ring, state.seen = (t.to("meta") for t in (state.current, state.ring, state.seen))
    output = worker.step([batch(device="meta")])
    assert all(value.is_meta for value in (*output.losses.values(), *output.statistics.values()))
    MovingAverage(worker.assignment, worker.online).update(0.9, torch.ones((), device="meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_gives_the_same_step_without_synchronising(variant):
    here, there = Worker(config(**VARIANTS[variant])), Worker(config(**VARIANTS[variant]))
    expected = here.step([batch()])
    there.online.cuda()
    there.assignment.cuda()
    state = there.thresholds
    state.current, state.ring, state.seen = (t.cuda() for t in (state.current, state.ring, state.seen))
    micro = batch(device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = there.step([micro])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in LOSS_NAMES:
        torch.testing.assert_close(output.losses[name].cpu(), expected.losses[name], atol=1e-4, rtol=1e-3)
