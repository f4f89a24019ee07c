"""The null over many pass sizes: exact where they are few, close where they are many, cheap always."""

from __future__ import annotations

import numpy as np
import pytest

from dodoco_ext import metrics, nulls
from dodoco_ext.sampling import sample_counts
from dodoco_ext.views.null_curve import MAX_SIMULATED, NullCurve

SHAPES = [(8, 2), (64, 4), (60, 6)]
MANY = np.unique(np.rint(np.geomspace(1, 3000, 60)).astype(np.int64))


@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_few_sizes_are_exact(num_experts: int, top_k: int) -> None:
    sizes = np.array([3, 40, 500])
    curve = NullCurve.over(sizes, num_experts, top_k)
    exact = [nulls.null(int(size), num_experts, top_k) for size in sizes]
    np.testing.assert_allclose(curve.gini_mean(sizes), [n.gini_mean for n in exact], rtol=1e-9)
    peaks = [n.max_over_mean_mean for n in exact]
    np.testing.assert_allclose(curve.max_over_mean_mean(sizes), peaks, rtol=1e-9)
    for size, n in zip(sizes, exact, strict=True):
        gini, peak = curve.gini_band(int(size)), curve.max_over_mean_band(int(size))
        assert (gini.low, gini.high) == pytest.approx((n.gini_low, n.gini_high))
        assert (peak.low, peak.high) == pytest.approx((n.max_over_mean_low, n.max_over_mean_high))


@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_many_sizes_are_close(num_experts: int, top_k: int) -> None:
    curve = NullCurve.over(MANY, num_experts, top_k)
    assert len(curve.simulated) <= MAX_SIMULATED
    exact = nulls.null_gini_mean(MANY, num_experts, top_k)
    np.testing.assert_allclose(curve.gini_mean(MANY), exact, rtol=0.01)
    some = MANY[::12]
    peaks = [nulls.null(int(size), num_experts, top_k).max_over_mean_mean for size in some]
    np.testing.assert_allclose(curve.max_over_mean_mean(some) - 1, np.array(peaks) - 1, rtol=0.08)


def test_a_band_between_simulated_sizes_is_given_only_where_it_is_smooth() -> None:
    curve = NullCurve.over(MANY, 8, 2)
    few, many = 2, 2500
    assert not {few, many} & set(curve.simulated.tolist())
    assert np.isnan(curve.max_over_mean_band(few).high)
    exact = nulls.null(many, 8, 2)
    assert curve.gini_band(many).high == pytest.approx(exact.gini_high, rel=0.1)
    assert curve.max_over_mean_band(many).high == pytest.approx(exact.max_over_mean_high, abs=0.02)


@pytest.mark.parametrize("skew", [0.0, 0.5, 2.0])
def test_the_corrected_gini_of_many_sizes_is_that_of_nulls(skew: float) -> None:
    rng = np.random.default_rng(5)
    num_experts, top_k = 16, 2
    sizes = rng.integers(8, 400, 300)
    weights = skew * np.linspace(-1, 1, num_experts)
    counts = [sample_counts(rng, int(t), num_experts, top_k, 1, weights)[0] for t in sizes]
    gini = np.asarray(metrics.gini(np.array(counts)))
    cheap = NullCurve.over(sizes, num_experts, top_k).corrected_gini(gini, sizes)
    assert cheap == pytest.approx(nulls.corrected_gini(gini, sizes, num_experts, top_k), abs=0.003)


def test_where_routing_leaves_no_choice_every_floor_is_zero() -> None:
    curve = NullCurve.over(MANY, 4, 4)
    assert not curve.gini_mean(MANY).any()
    assert (curve.max_over_mean_mean(MANY) == 1).all()
    assert curve.corrected_gini(np.zeros(len(MANY)), MANY) == 0
    assert curve.gini_band(1).high == 0


def test_per_rank(recwarn: pytest.WarningsRecorder) -> None:
    placement = metrics.contiguous_placement(8, 2)
    curve = NullCurve.over([100], 8, 2, placement)
    exact = nulls.null(100, 8, 2, placement)
    assert curve.gini_band(100).mean == pytest.approx(exact.gini_mean)
    assert curve.max_over_mean_band(100).high == pytest.approx(exact.max_over_mean_high)
    assert not recwarn.list
