"""Learning rate, phases and the EMA."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from cosa_ray.config.schema import Config, Optimiser, Training
from cosa_ray.method.ema import MovingAverage
from cosa_ray.method.schedule import contrastive_weight, ema_momentum, learning_rate, phase


@pytest.mark.golden
def test_release_schedule(golden):
    arrays = golden("poly_warmup_schedule")
    optimiser = Optimiser(
        lr=float(arrays["base_lr"]),
        warmup_steps=int(arrays["warmup_steps"]),
        warmup_ratio=float(arrays["warmup_ratio"]),
        power=float(arrays["power"]),
    )
    rates = [
        optimiser.lr * learning_rate(optimiser, int(arrays["max_steps"]), int(step)) for step in arrays["step"].tolist()
    ]
    np.testing.assert_allclose(rates, arrays["lr"], rtol=1e-6)


def test_schedule_without_warmup_ends_at_nought():
    optimiser = Optimiser(warmup_steps=0, power=1.0)
    assert [learning_rate(optimiser, 4, step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def phases(ring: int = 2, **fields) -> list[str]:
    training = Training(steps=8, warmup_iters=5, **fields)
    return [phase(training, step, ring)[0] for step in range(8)]


def test_phases():
    assert "".join(phases()) == "wwwffccc"
    assert "".join(phases(ring=0)) == "wwwwwccc"
    assert "".join(phases(ring=100)) == "fffffccc"
    assert "".join(phases(decoder_in_warmup=True)) == "wwwwffcc"  # the release: that step is warm-up too
    assert phase(Training(steps=8, warmup_iters=0), 0, 100) == "cotraining"


def test_separation_fades_over_a_share_of_cotraining():
    content = {
        "training": {"steps": 18, "warmup_iters": 8},
        "losses": {"contrastive": 0.4},
        "optimiser": {"warmup_steps": 0},
    }
    for fade, expected in (
        (None, [0.4] * 10),
        (1.0, [0.4 - 0.04 * k for k in range(10)]),
        (0.5, [0.4, 0.32, 0.24, 0.16, 0.08, 0, 0, 0, 0, 0]),
        (0.05, [0.4] + [0] * 9),
    ):
        config = Config.model_validate(content | {"contrastive": {"fade": fade}})
        assert [contrastive_weight(config, step) for step in range(8, 18)] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="fade"):
        Config.model_validate(content | {"contrastive": {"fade": 0}})


def test_the_average_forgets_how_the_decoder_was_initialised():
    """With a ramp; without one its share after n steps of co-training is momentum^n."""

    def share_of_the_start(**assignment) -> list[float]:
        content = {"training": {"steps": 400, "warmup_iters": 8}, "assignment": {"momentum": 0.99} | assignment}
        config = Config.model_validate(content | {"optimiser": {"warmup_steps": 0}})
        return np.cumprod([ema_momentum(config, step) for step in range(400)]).tolist()

    constant, ramp, own = share_of_the_start(), share_of_the_start(ramp=True), share_of_the_start(warmup_momentum=0.5)
    assert constant == pytest.approx([0.99**n for n in range(1, 401)])
    assert ramp[:8] == constant[:8], "nothing of it in warm-up"
    # The product of (1 + k)/(10 + k) over k < n is 1 / C(n + 9, 9); 0.99 is reached at k = 890 only.
    assert ramp[8 + 19] / ramp[7] == pytest.approx(1 / math.comb(29, 9))
    assert own[8] == pytest.approx(0.5**8 * 0.99)
    longer = Config.model_validate(
        {
            "training": {"steps": 40, "warmup_iters": 8, "decoder_in_warmup": True},
            "assignment": {"momentum": 0.99, "warmup_momentum": 0.5},
            "optimiser": {"warmup_steps": 0},
        }
    )
    assert [ema_momentum(longer, step) for step in (7, 8, 9)] == [0.5, 0.5, 0.99], "as long as it is warm-up"
    late = share_of_the_start(ramp=True, momentum=0.9)
    assert late[-1] / late[-2] == pytest.approx(0.9)


@pytest.mark.parametrize(("warmup", "release"), [(8, False), (7, True)])
def test_a_classifier_only_run_fills_no_ring(warmup, release):
    """Nobody would read it, and it costs the assignment network's passes."""
    training = Training(steps=8, warmup_iters=warmup, decoder_in_warmup=release)
    assert {phase(training, step, 4) for step in range(8)} == {"warmup"}


@pytest.mark.golden
def test_release_ema(golden):
    arrays = golden("ema")
    teacher, student = nn.Linear(7, 1, bias=False), nn.Linear(7, 1, bias=False)
    for finite in (None, torch.ones(())):
        teacher.weight.data = torch.from_numpy(arrays["teacher"].copy())[None]
        student.weight.data = torch.from_numpy(arrays["student"])[None]
        MovingAverage(teacher, student).update(float(arrays["momentum"]), finite)
        np.testing.assert_allclose(teacher.weight.detach().numpy()[0], arrays["updated"], atol=1e-6)


def test_ema_copies_buffers_and_skips_a_step_that_is_not_finite():
    teacher, student = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.normal_(student.weight)
    student.running_mean += 2
    student.num_batches_tracked += 5
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    average = MovingAverage(teacher, student)
    average.update(0.9, torch.zeros(()))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    expected = 0.9 * before["weight"] + 0.1 * student.weight
    average.update(0.9, torch.ones((), dtype=torch.int64))
    torch.testing.assert_close(teacher.weight.detach(), expected.detach())
    assert torch.equal(teacher.running_mean, student.running_mean)
    assert int(teacher.num_batches_tracked) == 5
    assert teacher.weight.requires_grad
