"""Null floors equal direct simulation, and the corrected Gini finds known truths."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dodoco_ext import nulls, sampling
from dodoco_ext.errors import InputError
from dodoco_ext.intervals import bootstrap_interval
from dodoco_ext.metrics import contiguous_placement, gini, max_over_mean, rank_counts

NUM_PASSES = 200
SIZES = [(1, 2, 8), (11, 6, 64), (7, 8, 8), (20, 7, 8), (43, 6, 64), (300, 1, 4), (32, 8, 128)]
sizes = pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"), SIZES, ids=[f"T{t}-k{k}-E{e}" for t, k, e in SIZES]
)


def directly_drawn_counts(num_tokens, top_k, num_experts, num_draws, seed=1, log_weights=None):
    """Counts [num_draws, E] drawn token by token: the k largest of E random keys."""
    rng = np.random.default_rng(seed)
    counts = np.empty((num_draws, num_experts), dtype=np.int64)
    for row in counts:
        keys = rng.gumbel(size=(num_tokens, num_experts))
        if log_weights is not None:
            keys += log_weights
        chosen = np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k]
        row[:] = np.bincount(chosen.ravel(), minlength=num_experts)
    return counts


def assert_null_matches(null, counts):
    """Moments within 5 standard errors; bands cover about 95 %, more where values are few."""
    for name in ("gini", "max_over_mean"):
        drawn = (gini if name == "gini" else max_over_mean)(counts)
        slack = 5 * drawn.std() * np.sqrt(1 / len(drawn) + 1 / 500) + 1e-9
        if name == "gini":  # exact, so only the direct simulation errs
            slack = 5 * drawn.std() / np.sqrt(len(drawn)) + 1e-9
        assert getattr(null, f"{name}_mean") == pytest.approx(drawn.mean(), abs=slack)
        low, high = getattr(null, f"{name}_low"), getattr(null, f"{name}_high")
        assert low <= getattr(null, f"{name}_mean") + 1e-9
        assert high >= getattr(null, f"{name}_mean") - 1e-9
        inside = np.mean((drawn >= low - 1e-9) & (drawn <= high + 1e-9))
        assert inside >= 0.93
        distinct = len(np.unique(drawn.round(12)))
        if distinct > 200:
            assert inside <= 0.97
    squares = gini(counts) ** 2
    slack = 5 * squares.std() / np.sqrt(len(squares)) + 1e-9
    assert null.gini_second_moment == pytest.approx(squares.mean(), abs=slack)
    assert null.gini_square_sd == pytest.approx(squares.std(), rel=0.12, abs=1e-9)


@sizes
def test_null_per_expert_matches_direct_simulation(num_tokens, top_k, num_experts):
    counts = directly_drawn_counts(num_tokens, top_k, num_experts, 2000)
    assert_null_matches(nulls.null(num_tokens, num_experts, top_k), counts)


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "placement"),
    [
        (11, 6, contiguous_placement(64, 4)),
        (40, 2, contiguous_placement(8, 2)),
        (16, 6, np.arange(64) % 5),
        (9, 8, np.repeat([0, 1, 2], [1, 2, 13])),
    ],
    ids=["4-ranks", "2-ranks", "5-unequal-ranks", "3-unequal-ranks"],
)
def test_null_per_rank_matches_direct_simulation(num_tokens, top_k, placement):
    counts = directly_drawn_counts(num_tokens, top_k, len(placement), 2000)
    null = nulls.null(num_tokens, len(placement), top_k, placement)
    assert_null_matches(null, rank_counts(counts, placement))


def test_null_of_long_passes_matches_a_simulation_of_their_length():
    num_tokens, num_experts, top_k = 60_000, 64, 6
    rng = np.random.default_rng(3)
    counts = sampling.sample_counts(rng, num_tokens, num_experts, top_k, 4000)
    assert_null_matches(nulls.null(num_tokens, num_experts, top_k), counts)


def test_design_figures_at_one_token_per_expert():
    null = nulls.null(11, 64, 6)
    assert null.gini_mean == pytest.approx(0.49, abs=0.01)
    assert 3 <= null.max_over_mean_mean <= 4.5


def bessel(order, x):
    """Modified Bessel function of the first kind, by its integral."""
    angles = (np.arange(2000) + 0.5) * np.pi / 2000
    return np.mean(np.exp(x * np.cos(angles)) * np.cos(order * angles))


@pytest.mark.parametrize("rate", [1, 4, 16])
def test_gini_mean_tends_to_the_poisson_closed_form(rate):
    num_experts = 4096  # with k = 1 of many, counts are nearly independent Poisson
    poisson = np.exp(-2 * rate) * (bessel(0, 2 * rate) + bessel(1, 2 * rate))
    mean = nulls.null_gini_mean(rate * num_experts, num_experts, 1)
    assert mean == pytest.approx(poisson * (1 - 1 / num_experts), rel=1e-3)
    fewer = nulls.null_gini_mean(rate * 64 // 8, 64, 8)
    assert fewer < poisson * (1 - 1 / 64)


def exact_mean_distance(num_tokens, p):
    """E|walk| by convolving the step distribution num_tokens times."""
    law = np.array([1.0])
    for _ in range(num_tokens):
        law = np.convolve(law, [p, 1 - 2 * p, p])
    return law @ np.abs(np.arange(-num_tokens, num_tokens + 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(2, 40), st.data())
def test_gini_mean_is_exact(num_tokens, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    p = top_k / num_experts * (num_experts - top_k) / (num_experts - 1)
    expected = (num_experts - 1) / (2 * num_tokens * top_k) * exact_mean_distance(num_tokens, p)
    mean = nulls.null_gini_mean(num_tokens, num_experts, top_k)
    assert mean == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 6), (1024, 1)])
def test_gini_mean_series_meets_the_exact_sum(num_experts, top_k, monkeypatch):
    exact = nulls.null_gini_mean(200_000, num_experts, top_k)
    monkeypatch.setattr(nulls, "_MAX_EXACT_STEPS", 0)
    series = nulls._mean_distance.__wrapped__(200_000, num_experts, top_k, 1, 1)
    series *= (num_experts - 1) / (2 * 200_000 * top_k)
    assert series == pytest.approx(exact, rel=1e-5)


def test_degenerate_nulls():
    assert np.isnan(nulls.null(0, 8, 2).gini_mean)
    one = nulls.null(5, 1, 1)
    assert (one.gini_mean, one.gini_high, one.max_over_mean_mean) == (0, 0, 1)
    everyone = nulls.null(10**7, 8, 8)
    assert everyone.gini_mean == pytest.approx(0, abs=1e-12)
    assert everyone.max_over_mean_high == 1
    single = nulls.null(1, 64, 6)
    assert single.gini_mean == pytest.approx(1 - 6 / 64)
    assert single.gini_square_sd == pytest.approx(0, abs=1e-12)


def test_null_means_of_many_pass_sizes_agree_with_the_null():
    means = nulls.null_gini_mean(np.array([[0, 5], [64, 5]]), 8, 2)
    assert np.isnan(means[0, 0])
    assert means[0, 1] == means[1, 1] == nulls.null(5, 8, 2).gini_mean
    assert means[1, 0] == nulls.null(64, 8, 2).gini_mean


def test_null_is_deterministic_and_cached():
    first = nulls.null(33, 16, 2)
    assert nulls.null(33, 16, 2) is first
    nulls._null.cache_clear()
    nulls._simulate.cache_clear()
    assert nulls.null(33, 16, 2) == first


@sizes
def test_sampled_counts_have_k_distinct_experts_a_token(num_tokens, top_k, num_experts):
    rng = np.random.default_rng(0)
    counts = sampling.sample_counts(rng, num_tokens, num_experts, top_k, 50)
    assert (counts.sum(axis=1) == num_tokens * top_k).all()
    assert counts.min() >= 0
    assert counts.max() <= num_tokens


def test_weighted_samples_follow_the_law_of_their_weights():
    weights = np.array([0.5, -1.0, 2.0, 0.0, 1.0])
    sets = [(a, b) for a in range(5) for b in range(a)]
    odds = np.array([np.exp(weights[a] + weights[b]) for a, b in sets])
    odds /= odds.sum()
    inclusion = [sum(odds[i] for i, s in enumerate(sets) if e in s) for e in range(5)]
    np.testing.assert_allclose(sampling.inclusion_probabilities(weights, 2), inclusion, atol=1e-12)
    counts = sampling.sample_counts(np.random.default_rng(0), 1, 5, 2, 40_000, weights)
    for (a, b), expected in zip(sets, odds, strict=True):
        seen = np.mean(counts[:, a] & counts[:, b])
        assert seen == pytest.approx(expected, abs=5 * np.sqrt(expected / 40_000))


def bell_weights(num_experts, strength):
    grid = (np.arange(num_experts) + 0.5) / num_experts
    return strength * np.array([NormalDist().inv_cdf(x) for x in grid])


def hot_weights(num_experts, strength):
    return np.where(np.arange(num_experts) % 8 == 0, strength, 0.0)


def errors(weights, tokens_per_expert, num_sets, estimate, num_experts=64, top_k=6):
    """Errors of an estimator over sets of NUM_PASSES passes of a router with known true Gini."""
    truth = float(gini(sampling.inclusion_probabilities(weights, top_k)))
    num_tokens = round(tokens_per_expert * num_experts / top_k)
    rng = np.random.default_rng(tokens_per_expert)
    draws = num_sets * NUM_PASSES
    counts = sampling.sample_counts(rng, num_tokens, num_experts, top_k, draws, weights)
    sets = counts.reshape(num_sets, NUM_PASSES, num_experts)
    return np.array([estimate(counts, num_tokens, num_experts, top_k) - truth for counts in sets])


def corrected(counts, *size):
    return nulls.corrected_gini(gini(counts), *size)


def corrected_with_counts(counts, *size):
    return nulls.corrected_gini(gini(counts), *size, counts=counts.sum(axis=0))


def plain_difference(counts, *size):
    return gini(counts).mean() - nulls.null(*size).gini_mean


STRENGTHS = [0.0, 0.155, 0.57, 1.25]
by_truth = pytest.mark.parametrize(
    "strength", STRENGTHS, ids=["uniform", "mild", "medium", "strong"]
)
by_load = pytest.mark.parametrize(
    ("tokens_per_expert", "limit"), [(4, 0.03), (16, 0.01), (64, 0.01)]
)


def test_the_known_truths_are_those_of_the_acceptance():
    truths = [
        float(gini(sampling.inclusion_probabilities(bell_weights(64, strength), 6)))
        for strength in STRENGTHS
    ]
    assert truths == pytest.approx([0, 0.08, 0.28, 0.53], abs=0.02)


@by_truth
@by_load
def test_corrected_gini_is_near_the_truth(strength, tokens_per_expert, limit):
    off = errors(bell_weights(64, strength), tokens_per_expert, 20, corrected)
    assert np.mean(np.abs(off) <= limit) >= 0.9
    assert abs(np.median(off)) <= limit / 1.5


@by_truth
@by_load
def test_corrected_gini_with_counts_is_nearer_the_truth(strength, tokens_per_expert, limit):
    off = errors(bell_weights(64, strength), tokens_per_expert, 3, corrected_with_counts)
    assert abs(np.median(off)) <= limit / 2


@by_load
def test_a_few_hot_experts_need_the_counts(tokens_per_expert, limit):
    weights = hot_weights(64, 2.0)
    assert np.abs(errors(weights, tokens_per_expert, 3, corrected_with_counts)).max() <= limit
    assert errors(weights, tokens_per_expert, 3, corrected).min() > limit


@by_load
def test_the_plain_difference_fails_the_same_test(tokens_per_expert, limit):
    for strength in STRENGTHS[1:]:
        off = errors(bell_weights(64, strength), tokens_per_expert, 3, plain_difference)
        assert (off < -limit).all()


def test_the_plain_difference_makes_the_trend_that_it_should_remove():
    weights = bell_weights(64, 0.57)
    low, high = (errors(weights, load, 3, plain_difference).mean() for load in (4, 256))
    assert high - low > 0.1
    low, high = (errors(weights, load, 3, corrected).mean() for load in (4, 256))
    assert abs(high - low) < 0.03


def test_passes_of_unequal_size_are_corrected_each_by_its_own_floor():
    rng = np.random.default_rng(0)
    weights = bell_weights(64, 0.57)
    tokens = np.repeat(rng.integers(40, 3000, 20), NUM_PASSES // 20)

    def drawn(weights):
        sizes = tokens[:: NUM_PASSES // 20]
        each = [
            sampling.sample_counts(rng, int(t), 64, 6, NUM_PASSES // 20, weights) for t in sizes
        ]
        return gini(np.concatenate(each))

    raw = drawn(weights)
    truth = float(gini(sampling.inclusion_probabilities(weights, 6)))
    assert nulls.corrected_gini(raw, tokens, 64, 6) == pytest.approx(truth, abs=0.02)
    assert nulls.corrected_gini(drawn(None), tokens, 64, 6) < 0.02


def test_interpolated_noise_equals_noise_simulated_at_each_size():
    tokens = np.arange(20, 200, 20)
    noise, square_sd, _ = nulls._noise(tokens, 16, 2, None, None)
    each = [nulls.null(int(t), 16, 2) for t in tokens]
    np.testing.assert_allclose(noise, [null.gini_second_moment for null in each], rtol=0.01)
    np.testing.assert_allclose(square_sd, [null.gini_square_sd for null in each], rtol=0.06)


def test_per_rank_gini_is_corrected_by_the_ranks_floor():
    placement = contiguous_placement(64, 8)
    weights = bell_weights(64, 0.57)
    inclusion = sampling.inclusion_probabilities(weights, 6)
    truth = float(gini(rank_counts(inclusion, placement)))
    rng = np.random.default_rng(0)
    counts = sampling.sample_counts(rng, 43, 64, 6, NUM_PASSES, weights)
    raw = gini(rank_counts(counts, placement))
    size = (43, 64, 6)
    assert nulls.corrected_gini(raw, *size, placement=placement) == pytest.approx(truth, abs=0.03)
    pooled = counts.sum(axis=0)
    found = nulls.corrected_gini(raw, *size, counts=pooled, placement=placement)
    assert found == pytest.approx(truth, abs=0.01)


def test_empty_and_weightless_passes_are_left_out():
    raw = np.array([0.4, np.nan, 0.5, 0.9])
    tokens = np.array([50, 0, 50, 50])
    kept = nulls.corrected_gini([0.4, 0.5], 50, 8, 2)
    assert nulls.corrected_gini(raw, tokens, 8, 2, weights=[1, 1, 1, 0]) == pytest.approx(kept)
    assert np.isnan(nulls.corrected_gini([np.nan], 0, 8, 2))
    assert np.isnan(nulls.corrected_gini([], 5, 8, 2))


@pytest.mark.parametrize("top_k", [1, 8])
def test_uniform_passes_that_cannot_differ_are_exactly_zero(top_k):
    num_tokens = 1 if top_k == 1 else 30
    raw = gini(sampling.sample_counts(np.random.default_rng(0), num_tokens, 8, top_k, 10))
    assert nulls.corrected_gini(raw, num_tokens, 8, top_k) == 0


def test_experts_that_all_or_no_tokens_pick_are_fitted():
    counts = np.array([100, 100, 0, 0, 60, 40, 0, 0])  # 100 tokens, top-3
    found = nulls.corrected_gini([float(gini(counts))] * 5, 100, 8, 3, counts=counts)
    assert found == pytest.approx(float(gini(counts)), abs=0.01)


def test_interval_of_the_corrected_gini_holds_the_truth():
    weights = bell_weights(64, 0.57)
    truth = float(gini(sampling.inclusion_probabilities(weights, 6)))
    counts = sampling.sample_counts(np.random.default_rng(0), 43, 64, 6, NUM_PASSES, weights)
    pooled = counts.sum(axis=0)
    low, high = bootstrap_interval(
        gini(counts),
        lambda sample: nulls.corrected_gini(sample, 43, 64, 6, counts=pooled),
        num_resamples=300,
    )
    assert low < truth < high
    assert high - low < 0.03


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nulls.null(10, 8, 0), "top_k is 0 (unknown)"),
        (lambda: nulls.null(10, 8, 9), "top_k is 9"),
        (lambda: nulls.null(10, 0, 1), "num_experts is 0"),
        (lambda: nulls.null(-1, 8, 2), "-1"),
        (lambda: nulls.null(1.5, 8, 2), "float64"),
        (lambda: nulls.null(10, 8, 2, [0, 1]), "8 experts"),
        (lambda: nulls.null_gini_mean([3, -4], 8, 2), "-4"),
        (lambda: sampling.sample_counts(np.random.default_rng(), 1, 8, 2, 1, [0.0]), "(1,)"),
        (lambda: sampling.inclusion_probabilities([0.0, np.inf], 1), "finite"),
        (lambda: nulls.corrected_gini([0.1], 10, 8, 0), "top_k is 0 (unknown)"),
        (lambda: nulls.corrected_gini([0.1, 1.2], 10, 8, 2), "1.2"),
        (lambda: nulls.corrected_gini([0.1, np.nan], 10, 8, 2), "nan"),
        (lambda: nulls.corrected_gini([0.1, 0.2], [1, 2, 3], 8, 2), "(3,)"),
        (lambda: nulls.corrected_gini([0.1], 10, 8, 2, weights=[-1]), "negative"),
        (lambda: nulls.corrected_gini([0.1], 10, 8, 2, counts=[1, 2]), "(2,)"),
        (lambda: nulls.corrected_gini([0.1], 10, 2, 2, counts=[5, 0]), "fewer than top_k"),
    ],
)
def test_bad_input_is_one_line_that_names_the_value(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
