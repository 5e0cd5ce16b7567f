"""The state of a run: what a step that is not finite leaves untouched, and input sizes tried before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from cosa_ray.config.schema import Config
from cosa_ray.errors import UserError
from cosa_ray.training.state import TrainState

Make = Callable[..., Config]


def everything(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of a state by name: weights, moments and step counters, thresholds and rings; copied."""
    found = {f"online {name}": value for name, value in state.online.state_dict().items()}
    found |= {f"assignment {name}": value for name, value in state.assignment.state_dict().items()}
    found |= {f"thresholds {name}": value for name, value in state.thresholds.state_dict().items()}
    for index, moments in state.optimiser.state_dict()["state"].items():
        found |= {f"optimiser {index} {name}": value for name, value in moments.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def step(state: TrainState, finite: float, gradient: float) -> None:
    """An optimiser step with one value as every gradient, and a proposal of the thresholds."""
    for parameter in state.online.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, gradient)
    proposal = state.thresholds.propose(torch.full((2, state.config.dynamic_threshold.bins), 5))
    ready = torch.tensor(finite)
    state.optimise(ready, state.gradient_norm())
    state.thresholds.commit(proposal, ready)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("gradient", [float("nan"), float("inf"), 1.0])
def test_a_step_that_is_not_finite_changes_nothing(tiny: Make, clip: float | None, gradient: float) -> None:
    state = TrainState(tiny(optimiser__clip_norm=clip), 3, torch.device("cpu"))
    first = everything(state)
    step(state, 1.0, 0.5)
    before = everything(state)
    kinds = ("online encoder", "assignment encoder", "thresholds ring", "thresholds seen")
    for kind in kinds:
        assert any(not torch.equal(first[name], before[name]) for name in first if name.startswith(kind)), kind
    assert any(name.endswith("exp_avg") for name in before)
    assert {float(value) for name, value in before.items() if name.endswith(" step")} == {1.0}
    step(state, 0.0, gradient)
    after = everything(state)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    step(state, 1.0, 0.5)
    assert {float(value) for name, value in everything(state).items() if name.endswith(" step")} == {2.0}


@pytest.mark.parametrize("gradient", [1e-6, 0.5])
def test_clipping_is_torchs(tiny: Make, gradient: float) -> None:
    """Below the limit and above it, against torch's own clipping before an optimiser that knows of none."""
    clipped, plain = (TrainState(tiny(optimiser__clip_norm=clip), 3, torch.device("cpu")) for clip in (0.25, None))
    torch.manual_seed(1)
    for one, other in zip(clipped.online.parameters(), plain.online.parameters(), strict=True):
        if one.requires_grad:
            one.grad = gradient * torch.randn_like(one)
            other.grad = one.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(plain.online.parameters(), 0.25)
    assert (norm > 0.25) == (gradient == 0.5)
    for state in (clipped, plain):
        state.optimise(torch.ones(()), state.gradient_norm())
    a, b = everything(clipped), everything(plain)
    for name in a:
        torch.testing.assert_close(a[name], b[name])
    assert any(name.endswith("exp_avg") for name in a)


def test_a_skipped_step_leaves_the_next_one_as_if_it_had_not_been(tiny: Make) -> None:
    """Against a twin that never met the bad step; only the learning rate, which follows the count, is pinned."""
    config = tiny(optimiser__warmup_steps=0, optimiser__power=0.0)
    disturbed, undisturbed = (TrainState(config, 3, torch.device("cpu")) for _ in range(2))
    for state in (disturbed, undisturbed):
        step(state, 1.0, 0.5)
    step(disturbed, 0.0, float("nan"))
    for state in (disturbed, undisturbed):
        step(state, 1.0, -0.25)
    a, b = everything(disturbed), everything(undisturbed)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


FIXED = {
    "backbone": "beit_base_patch16_224",
    "stem": "patch",
    "backbone_args": {"embed_dim": 16, "depth": 2, "num_heads": 2},
}


@pytest.mark.parametrize("section", ["assignment", "evaluation"])
def test_a_size_the_backbone_does_not_take_is_refused_at_once(tiny: Make, section: str) -> None:
    """One sentence with backbone and size, instead of a crash at the first evaluation."""
    config = tiny()
    changed = config.model_copy(
        update={
            "model": config.model.model_copy(update=deepcopy(FIXED)),
            section: getattr(config, section).model_copy(update={"scales": (1.0, 2.0)}),
        }
    )
    with pytest.raises(UserError, match=r"beit_base_patch16_224 does not take images of 96 pixels"):
        TrainState(changed, 3, torch.device("cpu"))
    same = {"scales": (1.0,)}
    fits = changed.model_copy(update={section: getattr(config, section).model_copy(update=same)})
    TrainState(fits, 3, torch.device("cpu"))
