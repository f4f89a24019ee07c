"""The EP scan: what it counts is what a re-partition gives, and what cannot be measured is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dodoco_ext import metrics
from dodoco_ext.errors import InputError
from dodoco_ext.observatory.ep_placements import placed_peaks, random_orders
from dodoco_ext.observatory.ep_results import (
    FIXED_GLOBAL,
    FIXED_PER_RANK,
    Change,
    EpScan,
    from_plain,
)
from dodoco_ext.observatory.ep_scan import ep_scan, rank_loads
from dodoco_ext.observatory.ep_words import against, ep_findings, ep_sentences
from dodoco_ext.observatory.result import plain
from dodoco_ext.sampling import sample_counts

EXPERTS, TOP_K, TOKENS = 64, 4, 128


def planted(
    log_weights: NDArray[np.float64] | None = None,
    sequences: int = 128,
    layers: int = 2,
    experts: int = EXPERTS,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Counts [sequences, layers, experts] of tokens that choose experts independently."""
    rng = np.random.default_rng(seed)
    drawn = sample_counts(rng, TOKENS, experts, TOP_K, sequences * layers, log_weights)
    return drawn.reshape(sequences, layers, experts)


def scan(counts: NDArray[np.int64], placements: int = 200, **options: object) -> EpScan:
    return ep_scan(counts, TOP_K, num_placements=placements, **options)  # type: ignore[arg-type]


def test_figures_are_those_of_the_re_partitioned_counts() -> None:
    counts = planted(np.linspace(-1, 1, EXPERTS))
    found = scan(counts)
    for arm, per_pass in ((FIXED_GLOBAL, lambda _: 8), (FIXED_PER_RANK, lambda ranks: ranks)):
        for point in found.arm(arm).points:
            many = per_pass(point.num_ranks)
            passes = counts.reshape(-1, many, 2, EXPERTS).sum(axis=1)
            placement = metrics.contiguous_placement(EXPERTS, point.num_ranks)
            of_ranks = metrics.max_over_mean(metrics.rank_counts(passes, placement))
            assert point.rank.value == pytest.approx(np.mean(of_ranks))
            assert point.expert.value == pytest.approx(np.mean(metrics.max_over_mean(passes)))
            assert point.rank_layers == pytest.approx(np.mean(of_ranks, axis=0))
            assert (point.passes, point.tokens_per_pass) == (len(passes), many * TOKENS)


def test_experts_at_the_same_tokens_cannot_depend_on_ep_and_are_labelled_so() -> None:
    found = scan(planted(np.linspace(-1, 1, EXPERTS)))
    same, grown = found.arms
    assert same.expert_by_construction
    assert {point.expert.value for point in same.points} == {same.points[0].expert.value}
    assert all(p.expert_change == Change(0.0, (0.0, 0.0), 0.0) for p in same.points)
    assert not grown.expert_by_construction
    assert len({point.expert.value for point in grown.points}) == 4
    assert "by construction" in ep_sentences(found)[0]


def test_more_ranks_are_never_more_even_at_the_same_tokens() -> None:
    values = [point.rank.value for point in scan(planted()).arm(FIXED_GLOBAL).points]
    assert values == sorted(values)


def test_uniform_routing_shows_its_null_and_no_more() -> None:
    for arm in scan(planted(sequences=512)).arms:
        for point in arm.points:
            for peak in (point.expert, point.rank):
                assert peak.value - 1 == pytest.approx(peak.null - 1, rel=0.06)
            low, high = point.random.band
            assert low <= point.rank.value <= high


def test_hot_experts_side_by_side_are_worse_than_at_random() -> None:
    weights = np.where(np.arange(EXPERTS) < EXPERTS // 4, 1.5, 0.0)
    for point in scan(planted(weights)).arm(FIXED_GLOBAL).points:
        assert point.random.share_below == 1.0
        assert point.rank.value > point.random.band[1] > point.random.best


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 3, 6, 12]),
    seed=st.integers(0, 2**16),
    layers=st.integers(1, 3),
    passes=st.integers(1, 5),
)
def test_many_placements_at_once_are_as_one_by_one(
    ranks: int, seed: int, layers: int, passes: int
) -> None:
    counts = np.random.default_rng(seed).integers(1, 50, (passes, layers, 12))
    orders = random_orders(7, layers, 12, seed)
    peaks = placed_peaks(counts, orders, ranks)
    for placement in range(7):
        for layer in range(layers):
            on_rank = orders[placement, layer] // (12 // ranks)
            one = metrics.max_over_mean(metrics.rank_counts(counts[:, layer], on_rank))
            assert peaks[placement, layer] == pytest.approx(np.mean(one))


def test_random_orders_hold_every_expert_once_and_differ() -> None:
    orders = random_orders(50, 3, 16, seed=1)
    assert (np.sort(orders, axis=-1) == np.arange(16)).all()
    assert len(np.unique(orders.reshape(-1, 16), axis=0)) == 150


@pytest.mark.parametrize(
    ("experts", "measurable"),
    [(60, [4]), (72, [4, 8]), (16, [4, 8, 16]), (6, []), (160, [4, 8, 16, 32])],
)
def test_what_does_not_divide_is_not_measurable_and_says_why(
    experts: int, measurable: list[int]
) -> None:
    found = scan(planted(experts=experts, sequences=64), placements=20)
    for arm in found.arms:
        assert [p.num_ranks for p in arm.points] == [4, 8, 16, 32]
        assert [p.num_ranks for p in arm.measured] == measurable
        for point in arm.points:
            if point.num_ranks not in measurable:
                assert point.reason == f"{point.num_ranks} ranks do not divide {experts} experts"
                assert point.rank is None
    text = " ".join(ep_sentences(found))
    assert text.count("Not measurable at EP") == 4 - len(measurable)


def test_too_few_sequences_for_an_ep_size_are_named() -> None:
    found = scan(planted(sequences=16), placements=20)
    last = found.arm(FIXED_PER_RANK).points[-1]
    assert last.reason == "a pass needs 32 sequences, of which there are 16"
    assert [p.num_ranks for p in found.arm(FIXED_PER_RANK).measured] == [4, 8, 16]
    assert [p.num_ranks for p in found.arm(FIXED_GLOBAL).measured] == [4, 8, 16, 32]


def test_same_seed_same_figures_and_another_within_the_intervals() -> None:
    counts = planted(np.linspace(-1, 1, EXPERTS))
    found = scan(counts)
    assert scan(counts) == found
    other = scan(counts, seed=1)
    for a, b in zip(found.arm(FIXED_GLOBAL).points, other.arm(FIXED_GLOBAL).points, strict=True):
        assert a.random != b.random
        assert a.random.band[0] < b.random.mean < a.random.band[1]
        assert a.rank.value == b.rank.value


def test_a_scan_comes_back_from_json() -> None:
    for found in (scan(planted()), scan(planted(experts=12), placements=5)):
        stored = json.loads(json.dumps(plain(found), allow_nan=False))
        assert from_plain(stored) == found


def test_data_seeds_are_laid_end_to_end() -> None:
    counts = planted()
    split = counts.reshape(4, 32, 2, EXPERTS)
    assert scan(split) == scan(counts)


def test_intervals_cover_what_many_sequences_show() -> None:
    """A change between EP sizes, of routing that is known, over 30 samples."""
    weights = np.linspace(-1, 1, EXPERTS)
    truth = scan(planted(weights, 8192, 1, seed=9), placements=1)
    target = truth.arm(FIXED_GLOBAL).points[-1].rank_change.relative
    covered = 0
    for seed in range(30):
        found = scan(planted(weights, 128, 1, seed=100 + seed), placements=1, ep_sizes=[4, 32])
        low, high = found.arm(FIXED_GLOBAL).points[-1].rank_change.interval
        covered += low <= target <= high
    assert covered >= 25  # 28.5 expected; fewer in 3 of 1000 by chance


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.01, 0.04), "within"),
        ((-0.05, 0.05), "within"),
        ((0.06, 0.2), "beyond"),
        ((-0.2, -0.06), "beyond"),
        ((0.04, 0.06), "undecided"),
        ((-0.06, 0.01), "undecided"),
        ((float("nan"), float("nan")), "undecided"),
    ],
)
def test_verdicts_need_the_whole_interval(interval: tuple[float, float], verdict: str) -> None:
    assert against(Change(0.0, interval, 0.0)) == verdict


def test_findings_count_their_cells() -> None:
    even = scan(planted(), model="even", condition="a")
    hot = scan(planted(np.where(np.arange(EXPERTS) < 8, 2.0, 0.0)), model="hot", condition="b")
    first, construction, grown, placed = ep_findings([even, hot])
    assert "most for hot under b" in first
    assert "by construction" in construction
    assert "of 2 cells" in grown
    assert "less even than 97.5 % in 1" in placed
    assert "nothing is said" in ep_findings([scan(planted(experts=6), placements=5)])[0]


def test_loads_of_ranks_refuse_what_does_not_divide() -> None:
    with pytest.raises(InputError, match="7 ranks do not divide 64"):
        rank_loads(planted(), 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": np.zeros((4, 2, 8))}, "whole numbers"),
        ({"counts": np.ones((4, 8), np.int64)}, r"\[sequences, layers, experts\]"),
        ({"counts": np.zeros((4, 2, 8), np.int64)}, "without assignments"),
        ({"top_k": [2]}, "for 2 layers"),
        ({"ep_sizes": []}, "above 0"),
        ({"num_placements": 0}, "above 0"),
        ({"sequences_per_pass": 0}, "above 0"),
        (
            {"ep_sizes": [5, 8, 9], "counts": np.ones((16, 2, 360), np.int64)},
            "share a block of 360",
        ),
    ],
)
def test_bad_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ep_scan(**{"counts": planted(), "top_k": TOP_K, **options})
