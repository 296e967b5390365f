from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_predictors.arrays import FloatArray
from moeless_predictors.base import capped_to_sum, one_hot
from moeless_predictors.metrics import coverage
from moeless_predictors.quantile import LoadBatches, LoadQuantile, draw_batches, load_moments

NUM_EXPERTS = 16


def routed_by(share_E: FloatArray, num_tokens: int, *, seed: int) -> FloatArray:
    """Top-2 routing of tokens that choose by `share_E`, shape (n, E)."""
    random = np.random.default_rng(seed)
    gumbel_nE = np.log(share_E) + random.gumbel(size=(num_tokens, len(share_E)))
    return one_hot(np.argsort(-gumbel_nE, axis=1)[:, :2], len(share_E))


def shares(seed: int) -> FloatArray:
    return np.random.default_rng(seed).dirichlet(np.full(NUM_EXPERTS, 0.8)) + 1e-3


def batches_of(
    truth_E: FloatArray, believed_E: FloatArray, *, sizes: tuple[int, ...], count: int, seed: int
) -> LoadBatches:
    """Batches routed by one share and predicted by another."""
    routing_nE = routed_by(truth_E, 8000, seed=seed)
    believed_nE = np.tile(routed_by(believed_E, 8000, seed=seed + 1).mean(axis=0), (8000, 1))
    return draw_batches(capped_to_sum(believed_nE, 2), routing_nE, sizes=sizes, batches_per_size=count, seed=seed)


def each(batches: LoadBatches) -> Iterator[tuple[FloatArray, FloatArray, FloatArray, int]]:
    return zip(batches.mean_BE, batches.variance_BE, batches.load_BE, batches.num_tokens_B.tolist(), strict=True)


def run(quantile: LoadQuantile, batches: LoadBatches, *, learn: bool) -> FloatArray:
    """The bounds of a stream of batches, shape (B, E), each made before its load was known."""
    bounds = []
    for mean_E, variance_E, load_E, num_tokens in each(batches):
        bounds.append(quantile.upper(mean_E, variance_E, num_tokens))
        if learn:
            quantile.update(mean_E, variance_E, load_E, num_tokens)
    return np.array(bounds)


@pytest.fixture(scope="module")
def calibration() -> LoadBatches:
    return batches_of(shares(0), shares(0), sizes=(1, 4, 16, 64, 256), count=150, seed=10)


@pytest.mark.parametrize("nominal", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("size", [8, 16, 50, 64, 200, 256])
def test_the_bound_covers_its_share_of_the_loads(calibration: LoadBatches, size: int, nominal: float) -> None:
    fresh = batches_of(shares(0), shares(0), sizes=(size,), count=150, seed=30)
    bounds_BE = run(LoadQuantile(nominal).fit(calibration), fresh, learn=True)
    assert coverage(bounds_BE, fresh.load_BE) == pytest.approx(nominal, abs=0.03)


@pytest.mark.parametrize("size", [16, 64, 256])
def test_coverage_is_regained_on_traces_of_another_kind(calibration: LoadBatches, size: int) -> None:
    shifted = batches_of(shares(1), shares(0), sizes=(size,), count=200, seed=50)
    frozen_BE = run(LoadQuantile(drift_half_life_tokens=None).fit(calibration), shifted, learn=False)
    adapted_BE = run(LoadQuantile().fit(calibration), shifted, learn=True)
    assert coverage(frozen_BE, shifted.load_BE) < 0.8
    assert coverage(adapted_BE, shifted.load_BE) == pytest.approx(0.9, abs=0.03)


def test_knowing_the_drift_keeps_the_bounds_low(calibration: LoadBatches) -> None:
    shifted = batches_of(shares(1), shares(0), sizes=(64,), count=200, seed=50)
    with_drift_BE = run(LoadQuantile().fit(calibration), shifted, learn=True)
    without_BE = run(LoadQuantile(drift_half_life_tokens=None).fit(calibration), shifted, learn=True)
    assert with_drift_BE.sum() < 0.75 * without_BE.sum()


def test_the_drift_corrects_the_mean(calibration: LoadBatches) -> None:
    shifted = batches_of(shares(1), shares(0), sizes=(64,), count=100, seed=50)
    quantile = LoadQuantile().fit(calibration)
    mean_E, _, _, num_tokens = next(each(shifted))
    assert quantile.corrected_mean(mean_E, num_tokens).tolist() == mean_E.tolist()
    run(quantile, shifted, learn=True)
    true_E = shifted.load_BE.mean(axis=0)
    corrected_E = quantile.corrected_mean(mean_E, num_tokens)
    assert np.abs(corrected_E - true_E).sum() < 0.2 * np.abs(mean_E - true_E).sum()
    assert corrected_E.sum() == pytest.approx(mean_E.sum(), rel=0.05)


def test_loads_that_vary_together_make_the_bound_wider() -> None:
    even = batches_of(shares(0), shares(0), sizes=(64,), count=100, seed=10)
    random = np.random.default_rng(0)
    bursty = LoadBatches(
        mean_BE=even.mean_BE,
        variance_BE=even.variance_BE,
        load_BE=np.round(even.mean_BE * random.gamma(4, 1 / 4, size=even.mean_BE.shape)),
        num_tokens_B=even.num_tokens_B,
    )
    steady = LoadQuantile(drift_half_life_tokens=None).fit(even)
    wide = LoadQuantile(drift_half_life_tokens=None).fit(bursty)
    assert wide.spread_ == pytest.approx(1 / 4, rel=0.3)
    assert steady.spread_ < 0.02
    moments = (even.mean_BE[0], even.variance_BE[0], 64)
    assert wide.upper(*moments).sum() > steady.upper(*moments).sum() + 10


def test_several_quantiles_are_bounds_in_order(calibration: LoadBatches) -> None:
    fresh = batches_of(shares(1), shares(0), sizes=(16, 64), count=100, seed=30)
    bounds_BQE = run(LoadQuantile((0.5, 0.9, 0.99)).fit(calibration), fresh, learn=True)
    assert bounds_BQE.shape == (200, 3, NUM_EXPERTS)
    assert (np.diff(bounds_BQE, axis=1) >= 0).all()
    for level, nominal in enumerate((0.5, 0.9, 0.99)):
        assert coverage(bounds_BQE[:, level], fresh.load_BE) == pytest.approx(nominal, abs=0.06)


def test_many_single_tokens_do_not_lower_the_bound_of_larger_batches(calibration: LoadBatches) -> None:
    quantile = LoadQuantile().fit(calibration)
    run(quantile, batches_of(shares(0), shares(0), sizes=(1,), count=3000, seed=30), learn=True)
    larger = batches_of(shares(0), shares(0), sizes=(64,), count=100, seed=40)
    assert coverage(run(quantile, larger, learn=False), larger.load_BE) > 0.85


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), num_tokens=st.integers(1, 1000), steps=st.integers(0, 5))
def test_bounds_are_always_between_zero_and_the_tokens(seed: int, num_tokens: int, steps: int) -> None:
    random = np.random.default_rng(seed)
    quantile = LoadQuantile((0.1, 0.9)).fit(draw_batches(*_random_tokens(random, 50), sizes=(1, 8), batches_per_size=6))
    probabilities_nE, _ = _random_tokens(random, num_tokens)
    mean_E, variance_E = load_moments(probabilities_nE)
    for _ in range(steps):
        load_E = random.integers(0, num_tokens + 1, size=len(mean_E))
        quantile.update(mean_E, variance_E, load_E, num_tokens)
    upper_QE = quantile.upper(mean_E, variance_E, num_tokens)
    assert upper_QE.shape == (2, len(mean_E))
    assert upper_QE.min() >= 0
    assert upper_QE.max() <= num_tokens


def test_when_no_bound_was_high_enough_it_keeps_rising(calibration: LoadBatches) -> None:
    quantile = LoadQuantile(drift_half_life_tokens=None).fit(calibration)
    mean_E, variance_E, _, num_tokens = next(item for item in each(calibration) if item[3] == 64)
    before_E = quantile.upper(mean_E, variance_E, num_tokens)
    for _ in range(200):
        quantile.update(mean_E, variance_E, np.full(NUM_EXPERTS, 64.0), num_tokens)
    assert (before_E < 64).all()
    assert (quantile.upper(mean_E, variance_E, num_tokens) == 64).mean() >= 0.85


def test_what_it_does_not_learn_it_does_not_change(calibration: LoadBatches) -> None:
    quantile = LoadQuantile(learning_rate=0, drift_half_life_tokens=None).fit(calibration)
    mean_E, variance_E, load_E, num_tokens = next(each(calibration))
    before_E = quantile.upper(mean_E, variance_E, num_tokens)
    quantile.update(mean_E, variance_E, 0 * load_E, num_tokens)
    assert quantile.upper(mean_E, variance_E, num_tokens).tolist() == before_E.tolist()


def test_between_two_calibrated_sizes_the_bound_lies_between_theirs(calibration: LoadBatches) -> None:
    quantile = LoadQuantile(drift_half_life_tokens=None).fit(calibration)
    low, high = quantile._scales_above_mean(16)[0], quantile._scales_above_mean(64)[0]
    assert quantile._scales_above_mean(32)[0] == pytest.approx((low + high) / 2)
    assert quantile._scales_above_mean(4096).tolist() == quantile._scales_above_mean(256).tolist()


def test_the_moments_are_those_of_independent_tokens() -> None:
    mean_E, variance_E = load_moments(np.array([[0.5, 1.0], [0.25, 0.0]]))
    assert mean_E.tolist() == [0.75, 1.0]
    np.testing.assert_allclose(variance_E, [0.5 * 0.5 + 0.25 * 0.75, 0.0])


def test_shuffled_batches_use_every_token_once_before_any_twice() -> None:
    routing_nE = np.eye(12)
    batches = draw_batches(np.full((12, 12), 1 / 12), routing_nE, sizes=(4,), batches_per_size=3)
    assert batches.load_BE.sum(axis=0).tolist() == [1] * 12
    assert len(draw_batches(np.full((12, 12), 1 / 12), routing_nE, sizes=(4,), batches_per_size=7)) == 7


def test_contiguous_batches_stay_within_a_sequence_and_in_order() -> None:
    batches = draw_batches(np.full((7, 7), 1 / 7), np.eye(7), sizes=(2, 3), sequence_starts=[0, 3, 7])
    runs = [
        np.flatnonzero(load_E).tolist() for size in (2, 3) for load_E in batches.load_BE[batches.num_tokens_B == size]
    ]
    assert runs == [[0, 1], [3, 4], [5, 6], [0, 1, 2], [3, 4, 5]]


def test_of_more_chunks_than_asked_for_some_are_taken_in_their_order() -> None:
    batches = draw_batches(
        np.full((30, 30), 1 / 30), np.eye(30), sizes=(2,), batches_per_size=5, sequence_starts=[0, 20, 30]
    )
    first = [int(load_E.argmax()) for load_E in batches.load_BE]
    assert len(first) == 5
    assert first == sorted(set(first))


def test_calibrations_whose_arrays_do_not_fit_are_refused(calibration: LoadBatches) -> None:
    quantile = LoadQuantile().fit(calibration)
    quantile.residuals_ = quantile.residuals_[:, :-1]
    with pytest.raises(ValueError, match=r"residuals_ must have the shape \(5, 401\), got \(5, 400\)"):
        quantile._restore()


def test_sizes_are_mixed_in_the_order_of_batches() -> None:
    batches = draw_batches(np.full((40, 4), 0.5), routed_by(np.ones(4), 40, seed=0), sizes=(1, 4), batches_per_size=8)
    assert batches.num_tokens_B.tolist() == [1, 4] * 8


def test_sizes_that_do_not_fit_are_left_out_and_one_must_fit() -> None:
    tokens = (np.full((6, 4), 0.5), routed_by(np.ones(4), 6, seed=0))
    assert set(draw_batches(*tokens, sizes=(2, 64)).num_tokens_B.tolist()) == {2}
    with pytest.raises(ValueError, match=r"sizes must hold one that fits the data \(6 tokens\), got \(64,\)"):
        draw_batches(*tokens, sizes=(64,))
    with pytest.raises(ValueError, match="sizes must hold one that fits"):
        draw_batches(*tokens, sizes=(4,), sequence_starts=[0, 3, 6])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"quantile": 1.0}, "quantile must be between 0 and 1, got 1.0"),
        ({"quantile": ()}, r"quantile must be between 0 and 1, got \(\)"),
        ({"quantile": (0.9, 0.5)}, r"quantile must be in ascending order, got \(0.9, 0.5\)"),
        ({"learning_rate": -1}, "learning_rate must be >= 0, got -1"),
        ({"drift_half_life_tokens": 0}, "drift_half_life_tokens must be > 0 or None, got 0"),
    ],
)
def test_parameters_out_of_range_are_refused(
    calibration: LoadBatches, parameters: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LoadQuantile(**parameters).fit(calibration)


def test_batches_of_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mean_BE must have the shape \(batches, experts\) = \(2, 3\), got \(2, 4\)"):
        LoadBatches(
            mean_BE=np.ones((2, 4)), variance_BE=np.ones((2, 3)), load_BE=np.ones((2, 3)), num_tokens_B=np.ones(2)
        )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("load_BE", -1.0, "load_BE must hold loads that are finite and >= 0, got -1.0 at batch "),
        ("variance_BE", np.nan, "variance_BE must hold loads that are finite and >= 0, got nan at batch "),
        ("num_tokens_B", 0, "num_tokens_B must be >= 1, got 0"),
    ],
)
def test_batches_with_impossible_values_are_refused(name: str, value: float, message: str) -> None:
    values = {key: np.ones((2, 3)) for key in ("mean_BE", "variance_BE", "load_BE")}
    values["num_tokens_B"] = np.ones(2)
    values[name] = values[name] * value
    with pytest.raises(ValueError, match=message):
        LoadBatches(**values)


def test_no_batches_are_refused() -> None:
    empty = LoadBatches(
        mean_BE=np.ones((0, 3)), variance_BE=np.ones((0, 3)), load_BE=np.ones((0, 3)), num_tokens_B=np.ones(0)
    )
    with pytest.raises(ValueError, match="batches must hold at least one batch, got 0"):
        LoadQuantile().fit(empty)


def test_a_bound_of_other_experts_or_of_no_tokens_is_refused(calibration: LoadBatches) -> None:
    quantile = LoadQuantile().fit(calibration)
    with pytest.raises(ValueError, match=r"mean_E must have the shape \(16,\) as when fitted, got \(4,\)"):
        quantile.upper(np.ones(4), np.ones(4), 8)
    with pytest.raises(ValueError, match="num_tokens must be >= 1, got 0"):
        quantile.upper(np.zeros(16), np.zeros(16), 0)


def _random_tokens(random: np.random.Generator, num_tokens: int) -> tuple[FloatArray, FloatArray]:
    probabilities_nE = capped_to_sum(random.random((num_tokens, 5)), 2)
    return probabilities_nE, routed_by(np.ones(5), num_tokens, seed=int(random.integers(2**31)))


@pytest.mark.parametrize("fault", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("name", ["mean_E", "variance_E", "load_E"])
def test_an_update_with_what_is_no_load_is_refused_and_nothing_is_learned(name: str, fault: float) -> None:
    quantile = LoadQuantile().fit(calibration_batches())
    values = {key: np.ones(quantile.drift_.shape) for key in ("mean_E", "variance_E", "load_E")}
    values[name][1] = fault
    before = quantile.miscoverage_.tolist()
    with pytest.raises(ValueError, match=f"{name} must hold loads that are finite and >= 0, got {fault} at expert 1"):
        quantile.update(**values, num_tokens=4)
    assert (quantile.miscoverage_.tolist(), quantile.drift_.any()) == (before, False)


def calibration_batches() -> LoadBatches:
    random = np.random.default_rng(0)
    mean_BE = random.random((50, 4)) * 4
    return LoadBatches(
        mean_BE=mean_BE,
        variance_BE=mean_BE / 2,
        load_BE=random.poisson(mean_BE).astype(float),
        num_tokens_B=np.full(50, 4),
    )
