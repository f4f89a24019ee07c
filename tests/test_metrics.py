"""Metrics have their documented ranges and equal their written definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dodoco_ext import metrics
from dodoco_ext.errors import InputError
from dodoco_ext.intervals import bootstrap_interval, bootstrap_ratio_interval

COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=40).map(np.array)
USED_COUNTS = COUNTS.filter(lambda counts: counts.sum() > 0)
SCALAR_METRICS = (
    metrics.gini,
    metrics.max_over_mean,
    metrics.balancedness,
    metrics.cv,
    metrics.normalized_entropy,
)
ALL_METRICS = (*SCALAR_METRICS, metrics.unused_experts)
by_name = pytest.mark.parametrize("metric", ALL_METRICS, ids=lambda metric: metric.__name__)


def pairwise_numerator(counts):
    """Sum over unordered pairs of |c_i - c_j|, as the definition is written."""
    values = [int(count) for count in counts]
    return sum(abs(a - b) for i, a in enumerate(values) for b in values[:i])


@given(USED_COUNTS)
def test_gini_equals_its_pairwise_definition(counts):
    numerator, total = pairwise_numerator(counts), int(counts.sum())
    assert metrics.gini(counts) == pytest.approx(
        2 * numerator / (2 * len(counts) * total), abs=1e-14
    )


@given(USED_COUNTS)
def test_gini_from_the_recorded_numerator_equals_gini_of_the_counts(counts):
    recorded = metrics.gini_from_numerator(pairwise_numerator(counts), counts.sum(), len(counts))
    assert recorded == pytest.approx(metrics.gini(counts), abs=1e-14)


@given(USED_COUNTS)
def test_ranges(counts):
    num_experts = len(counts)
    rounding = 1e-12
    assert 0 <= metrics.gini(counts) <= 1 - 1 / num_experts + rounding
    assert 1 - rounding <= metrics.max_over_mean(counts) <= num_experts + rounding
    assert 1 / num_experts - rounding <= metrics.balancedness(counts) <= 1 + rounding
    assert 0 <= metrics.cv(counts) <= np.sqrt(num_experts - 1) + 1e-9
    assert 0 <= metrics.normalized_entropy(counts) <= 1
    assert 0 <= metrics.unused_experts(counts) < num_experts


@given(USED_COUNTS)
def test_balancedness_is_the_inverse_of_max_over_mean(counts):
    assert metrics.balancedness(counts) * metrics.max_over_mean(counts) == pytest.approx(1)


@given(USED_COUNTS)
def test_cv_and_entropy_equal_their_definitions(counts):
    share = counts / counts.sum()
    mean = counts.mean()
    deviation = np.sqrt(sum((count - mean) ** 2 for count in counts) / len(counts))
    assert metrics.cv(counts) == pytest.approx(deviation / mean, abs=1e-12)
    if len(counts) > 1:
        entropy = -sum(p * np.log(p) for p in share if p > 0)
        expected = entropy / np.log(len(counts))
        assert metrics.normalized_entropy(counts) == pytest.approx(expected, abs=1e-12)


@given(USED_COUNTS, st.integers(1, 1000))
def test_metrics_ignore_scale(counts, factor):
    for metric in ALL_METRICS:
        assert metric(counts * factor) == pytest.approx(metric(counts), abs=1e-12)


@given(USED_COUNTS, st.randoms(use_true_random=False))
def test_metrics_ignore_which_expert_is_which(counts, random):
    shuffled = counts.copy()
    random.shuffle(shuffled)
    for metric in ALL_METRICS:
        assert metric(shuffled) == pytest.approx(metric(counts), abs=1e-12)


@by_name
def test_metrics_work_over_leading_axes_and_any_expert_axis(metric):
    counts = np.random.default_rng(0).integers(0, 9, (3, 4, 7)) + 1
    expected = [[metric(row) for row in layer] for layer in counts]
    np.testing.assert_allclose(metric(counts), expected)
    np.testing.assert_allclose(metric(np.moveaxis(counts, -1, 0), axis=0), expected)


def test_known_values():
    one_takes_all = np.array([12, 0, 0, 0])
    assert metrics.gini(one_takes_all) == 0.75
    assert metrics.max_over_mean(one_takes_all) == 4
    assert metrics.balancedness(one_takes_all) == 0.25
    assert metrics.cv(one_takes_all) == pytest.approx(np.sqrt(3))
    assert metrics.normalized_entropy(one_takes_all) == 0
    assert metrics.unused_experts(one_takes_all) == 3
    assert metrics.gini(np.array([1, 2, 3, 4])) == 0.25


def test_nothing_counted_is_nan_and_all_experts_unused():
    nothing = np.zeros((2, 5), dtype=np.uint64)
    for metric in SCALAR_METRICS:
        assert np.isnan(metric(nothing)).all()
    assert metrics.unused_experts(nothing).tolist() == [5, 5]
    assert np.isnan(metrics.gini_from_numerator(0, 0, 5))


def test_one_expert_is_balanced():
    counts = np.array([7])
    assert metrics.gini(counts) == 0
    assert metrics.max_over_mean(counts) == 1
    assert metrics.balancedness(counts) == 1
    assert metrics.cv(counts) == 0
    assert metrics.normalized_entropy(counts) == 1


def test_no_passes_give_no_values():
    assert metrics.gini(np.zeros((0, 4), dtype=np.int64)).shape == (0,)


def test_gini_keeps_small_differences_between_huge_unsigned_counts():
    counts = np.array([2**63, 2**63 + 4096], dtype=np.uint64)
    assert metrics.gini(counts) == pytest.approx(4096 / (2 * 2.0**64), rel=1e-9)


@given(USED_COUNTS, st.data())
def test_rank_counts_preserve_totals_and_equal_a_plain_sum(counts, data):
    num_ranks = data.draw(st.integers(1, len(counts)))
    extra = data.draw(
        st.lists(
            st.integers(0, num_ranks - 1),
            min_size=len(counts) - num_ranks,
            max_size=len(counts) - num_ranks,
        )
    )
    placement = np.array(data.draw(st.permutations([*range(num_ranks), *extra])))
    per_rank = metrics.rank_counts(np.stack([counts, counts * 2]), placement)
    expected = [int(counts[placement == rank].sum()) for rank in range(num_ranks)]
    assert per_rank.tolist() == [expected, [2 * count for count in expected]]
    assert per_rank.sum() == 3 * counts.sum()


@given(st.integers(1, 16), st.integers(1, 16))
def test_contiguous_placement_gives_every_rank_one_equal_run(per_rank, num_ranks):
    placement = metrics.contiguous_placement(per_rank * num_ranks, num_ranks)
    assert placement.tolist() == sorted(placement)
    assert np.bincount(placement).tolist() == [per_rank] * num_ranks


@given(COUNTS, st.integers(1, 8))
def test_merging_experts_into_equal_ranks_never_raises_max_over_mean(counts, num_ranks):
    assume(len(counts) % num_ranks == 0 and counts.sum() > 0)
    placement = metrics.contiguous_placement(len(counts), num_ranks)
    merged = metrics.max_over_mean(metrics.rank_counts(counts, placement))
    assert merged <= metrics.max_over_mean(counts) + 1e-12


@pytest.mark.parametrize("dtype", [np.uint64, np.uint8, np.int32, np.float32, np.bool_])
def test_every_number_type_is_summed_without_overflow(dtype):
    counts = np.ones(600, dtype=dtype)
    per_rank = metrics.rank_counts(counts, metrics.contiguous_placement(600, 2))
    assert per_rank.tolist() == [300, 300]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.gini([3, -1]), "-1"),
        (lambda: metrics.gini([0.5, np.nan]), "not finite"),
        (lambda: metrics.gini(5), "expert axis"),
        (lambda: metrics.gini(["a"]), "<U1"),
        (lambda: metrics.gini([1, 2], axis=1), "axis 1"),
        (lambda: metrics.gini(np.zeros((3, 0))), "0 experts"),
        (lambda: metrics.gini_from_numerator(1, 1, 0), "num_experts is 0"),
        (lambda: metrics.contiguous_placement(64, 6), "6 ranks do not divide 64"),
        (lambda: metrics.rank_counts([1, 2, 3], [0, 1]), "3 experts"),
        (lambda: metrics.rank_counts([1, 2, 3], [0, 2, 2]), "ranks 0 to 2"),
        (lambda: metrics.rank_counts([1, 2, 3], [-1, 0, 1]), "ranks -1 to 1"),
        (lambda: bootstrap_interval([1.0]), "at least 2"),
        (lambda: bootstrap_interval([]), "at least 2"),
        (lambda: bootstrap_interval([1.0, 2.0], blocks=[0, 0]), "at least 2"),
        (lambda: bootstrap_interval([1.0, 2.0], blocks=[0]), "one label a value"),
        (lambda: bootstrap_interval([1.0, 2.0], level=95), "level is 95"),
        (lambda: bootstrap_interval([1.0, 2.0], num_resamples=1), "num_resamples is 1"),
        (lambda: bootstrap_interval(3.0), "single number"),
    ],
)
def test_bad_input_is_one_line_that_names_the_value(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def coverage(make, truth, num_trials=150, num_resamples=200):
    """Share of trials whose interval holds the truth; make(rng) returns values and blocks."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(num_trials):
        values, blocks = make(rng)
        low, high = bootstrap_interval(
            values, blocks=blocks, num_resamples=num_resamples, seed=seed
        )
        held += low <= truth <= high
    return held / num_trials


@pytest.mark.parametrize("num_values", [6, 30])
def test_bootstrap_interval_covers_the_mean_of_independent_values(num_values):
    def make(rng):
        return rng.normal(3.0, 1.0, num_values), None

    assert 0.90 <= coverage(make, 3.0, num_resamples=500) <= 0.99


def test_resampling_blocks_covers_where_resampling_tokens_does_not():
    def make(rng):
        texts = np.repeat(np.arange(20), 10)
        return rng.normal(0, 1, 20)[texts] + rng.normal(0, 0.3, 200), texts

    assert coverage(make, 0.0) >= 0.90
    assert coverage(lambda rng: (make(rng)[0], None), 0.0) < 0.70


def test_default_statistic_equals_the_same_mean_given_as_a_function():
    values = np.random.default_rng(0).normal(size=40)
    blocks = np.repeat(np.arange(8), [1, 2, 3, 4, 6, 7, 8, 9])
    same = bootstrap_interval(values, lambda rows: rows.mean(), blocks)
    assert bootstrap_interval(values, blocks=blocks) == pytest.approx(same)


def test_bootstrap_is_seeded_and_keeps_rows_together():
    rows = np.stack([np.arange(30.0), 2 * np.arange(30.0)], axis=1)

    def slope(sample):
        return sample[:, 1].sum() / sample[:, 0].sum()

    assert bootstrap_interval(rows, slope, num_resamples=100) == pytest.approx((2, 2))
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_blocks_may_be_of_unequal_size_and_labelled_by_text():
    values = np.array([1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 3.0])
    low, high = bootstrap_interval(values, blocks=["a", "a", "a", "a", "b", "b", "c"])
    assert 1 <= low < values.mean() < high <= 5


def test_ratio_interval_covers_the_ratio_of_two_independent_samples():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(100):
        mock, real = rng.normal(4, 1, 40), rng.normal(2, 0.5, 30)
        low, high = bootstrap_ratio_interval(mock, real, num_resamples=200, seed=seed)
        held += low <= 2 <= high
    assert 88 <= held <= 100


def test_ratio_over_nothing_is_infinite_not_nan():
    low, high = bootstrap_ratio_interval([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], num_resamples=100)
    assert (low, high) == (np.inf, np.inf)
