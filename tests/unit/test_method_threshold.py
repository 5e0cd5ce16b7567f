"""Dynamic thresholds: the mixture against the release and scikit-learn, the ring, and what keeps a threshold."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from cosa_ray.config.schema import DynamicThreshold, PseudoLabels
from cosa_ray.method.threshold import DynamicThresholds, fit_mixture

RELEASE = DynamicThreshold()
CONVERGED = DynamicThreshold(tolerance=1e-12, max_iterations=5000)


def histogram(values: np.ndarray, bins: int = 256) -> torch.Tensor:
    return torch.from_numpy(np.histogram(values, bins, (0, 1))[0])


def confidences(seed: int, components: int = 2) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = {2: [(0.2, 0.08), (0.75, 0.1)], 3: [(0.15, 0.04), (0.45, 0.06), (0.85, 0.05)]}[components]
    values = np.concatenate([generator.normal(m, s, 4000) for m, s in centres])
    return values[(values > 0.05) & (values < 1)]


@pytest.mark.golden
def test_release_thresholds(golden):
    arrays = golden("gmm_threshold")
    counts = histogram(arrays["confidence"][arrays["confidence"] >= arrays["filter"]])
    two, three = fit_mixture(counts, 2, RELEASE), fit_mixture(counts, 3, RELEASE)
    assert two.boundaries.item() == pytest.approx(float(arrays["two_component"]), abs=0.004)
    np.testing.assert_allclose(three.boundaries, arrays["three_component_low_high"], atol=0.004)
    assert int(two.steps) == 3
    assert fit_mixture(counts, 2, CONVERGED).boundaries.item() == pytest.approx(0.24, abs=0.01)


@pytest.mark.parametrize("components", [2, 3])
@pytest.mark.parametrize("settings", [RELEASE, CONVERGED], ids=["stopped early", "converged"])
def test_agrees_with_scikit_learn(components, settings):
    values = confidences(0, components)
    start = [values.min(), np.median(values), values.max()] if components == 3 else [values.min(), values.max()]
    reference = GaussianMixture(
        components,
        tol=settings.tolerance,
        max_iter=settings.max_iterations,
        means_init=np.array(start)[:, None],
        weights_init=np.full(components, 1 / components),
        precisions_init=np.ones((components, 1, 1)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        owner = reference.fit_predict(values[:, None])
    fit = fit_mixture(histogram(values, 1024), components, settings)
    order = reference.means_[:, 0].argsort()
    np.testing.assert_allclose(fit.means, reference.means_[order, 0], atol=2e-3)
    np.testing.assert_allclose(fit.variances, reference.covariances_[order, 0, 0], atol=1e-3)
    np.testing.assert_allclose(fit.weights, reference.weights_[order], atol=5e-3)
    assert abs(int(fit.steps) - reference.n_iter_) <= (0 if settings is RELEASE else 0.2 * reference.n_iter_)
    top = values[owner == order[0]].max()
    np.testing.assert_allclose(fit.boundaries[0], top, atol=0.01)
    if components == 3:
        np.testing.assert_allclose(fit.boundaries[1], values[owner == order[2]].min(), atol=0.01)


def test_masked_iterations_stop_each_mixture_on_its_own():
    counts = [histogram(confidences(seed)) for seed in range(3)] + [histogram(np.full(500, 0.3))]
    together = fit_mixture(torch.stack(counts), 2, RELEASE)
    for row, alone in enumerate(counts):
        single = fit_mixture(alone, 2, RELEASE)
        for one, all_ in zip(single, together, strict=True):
            torch.testing.assert_close(all_[row], one)
    capped = fit_mixture(counts[0], 2, DynamicThreshold(max_iterations=2))
    assert int(capped.steps) == 2


def test_a_wide_low_component_swallows_the_top_unless_searched_between_the_means():
    generator = np.random.default_rng(0)
    wide = generator.normal(0.3, 0.2, 20000)
    counts = histogram(np.concatenate([wide[(wide > 0.05) & (wide < 1)], generator.normal(0.7, 0.02, 5000)]))
    plain = fit_mixture(counts, 2, CONVERGED)
    between = fit_mixture(counts, 2, CONVERGED.model_copy(update={"between_means": True}))
    assert plain.boundaries.item() > 0.95
    assert between.means[0] <= between.boundaries.item() <= between.means[1] < 0.75


def thresholds(policy: str = "reliability", **fields) -> DynamicThresholds:
    return DynamicThresholds(DynamicThreshold(**fields), PseudoLabels(policy=policy, high_aux=0.6))


def test_names_and_start_values():
    one, two = thresholds(), thresholds("two_threshold")
    assert {k: round(float(v), 6) for k, v in one.values.items()} == {"background": 0.45, "background_aux": 0.45}
    expected = {"low": 0.25, "high": 0.7, "low_aux": 0.25, "high_aux": 0.6}
    assert {k: round(float(v), 6) for k, v in two.values.items()} == expected


def test_histogram_counts_what_passes_on_the_coarse_map():
    cam = torch.rand(2, 3, 64, 64)
    state = thresholds(minimum=0.3)
    coarse = torch.nn.functional.interpolate(cam, (4, 4), mode="bilinear").amax(1).numpy()
    expected = np.histogram(coarse[coarse >= 0.3], 256, (0, 1))[0]
    counts = state.histogram((cam, torch.zeros_like(cam)), crop=64)
    assert counts.dtype == torch.int64
    assert counts[0].tolist() == expected.tolist()
    assert counts[1].sum() == 0
    parts = state.histogram((cam[:1], cam[:1]), 64) + state.histogram((cam[1:], cam[1:]), 64)
    assert torch.equal(parts[0], counts[0])


def test_ring_keeps_the_last_batches_and_moves_by_ema():
    state = thresholds(batches=3, momentum=0.9, min_values=1)
    finite = torch.ones(())
    seen = []
    for batch in range(5):
        counts = torch.stack([histogram(confidences(batch)), histogram(confidences(batch + 10))])
        seen.append(counts)
        before = state.current.clone()
        proposal = state.propose(counts)
        assert torch.equal(state.current, before)  # a proposal changes nothing
        state.commit(proposal, finite)
        window = torch.stack(seen[-3:]).sum(0)
        assert torch.equal(state.ring.sum(1), window)
        for row in range(2):
            fresh = fit_mixture(window[row], 2, state.dynamic).boundaries.item()
            assert state.current[row].item() == pytest.approx(0.9 * before[row].item() + 0.1 * fresh, abs=1e-6)


def test_filling_and_a_step_that_is_not_finite_keep_the_thresholds():
    state = thresholds(min_values=1)
    counts = torch.stack([histogram(confidences(0))] * 2)
    state.commit(state.propose(counts, move=False), torch.ones(()))
    assert float(state.current[0]) == pytest.approx(0.45)
    assert int(state.seen) == 1
    untouched = {name: value.clone() for name, value in state.state_dict().items()}
    state.commit(state.propose(counts), torch.zeros(()))
    assert all(torch.equal(value, untouched[name]) for name, value in state.state_dict().items())


@pytest.mark.parametrize(
    "values",
    [np.array([]), np.full(20, 0.3), np.full(5000, 0.3)],
    ids=["nothing", "too few", "one value only: the other component is empty"],
)
@pytest.mark.parametrize("policy", ["reliability", "two_threshold"])
def test_nothing_to_fit_keeps_the_thresholds(values, policy):
    state = thresholds(policy)
    before = state.current.clone()
    state.commit(state.propose(torch.stack([histogram(values)] * 2)), torch.ones(()))
    assert torch.equal(state.current, before)
    assert state.current.isfinite().all()


def test_clamped():
    values = np.concatenate([np.full(900, 0.97), np.full(900, 0.999)])
    state = thresholds(momentum=0.0, tolerance=0.0, max_iterations=200)
    state.commit(state.propose(torch.stack([histogram(values)] * 2)), torch.ones(()))
    assert state.current.tolist() == [[pytest.approx(0.95)]] * 2


def test_state_comes_back_and_a_foreign_one_is_refused():
    state, copy = thresholds(), thresholds()
    state.commit(state.propose(torch.stack([histogram(confidences(0))] * 2)), torch.ones(()))
    copy.load_state_dict(state.state_dict())
    assert all(torch.equal(value, copy.state_dict()[name]) for name, value in state.state_dict().items())
    state.commit(state.propose(torch.stack([histogram(confidences(1))] * 2)), torch.ones(()))
    assert int(copy.seen) == 1  # its own tensors
    with pytest.raises(ValueError, match="thresholds: values"):
        thresholds("two_threshold").load_state_dict(state.state_dict())
