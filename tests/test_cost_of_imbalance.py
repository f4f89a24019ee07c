"""What imbalance costs, on loads whose cost is known; and its floor, against direct simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dodoco_ext import metrics, nulls
from dodoco_ext.cost_of_imbalance import Cost, cost_of, cost_of_peaks
from dodoco_ext.errors import InputError
from dodoco_ext.null_grid import floors

LOADS = st.lists(st.lists(st.integers(0, 1000), min_size=4, max_size=4), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("loads", "waiting", "speedup"),
    [
        ([[5, 5, 5, 5]], 0.0, 1.0),
        ([[10, 0, 0, 0]], 0.75, 4.0),
        ([[3, 1]], 1 / 3, 1.5),
        ([[10, 0], [0, 10]], 0.5, 2.0),  # each step waits, although in sum they are even
        ([[1, 0], [50, 50]], 1 - 50.5 / 51, 51 / 50.5),  # a short step weighs little
    ],
)
def test_waiting_is_what_the_ranks_do_not_compute(
    loads: list[list[int]], waiting: float, speedup: float
) -> None:
    cost = cost_of(loads, num_experts=4, top_k=1)
    assert cost.waiting == pytest.approx(waiting)
    assert cost.speedup == pytest.approx(speedup)


def test_nothing_counted_costs_nothing_that_is_known() -> None:
    for cost in (Cost(), cost_of([[0, 0]], 4, 1), cost_of(np.empty((0, 2)), 4, 1)):
        assert cost.steps == 0
        assert math.isnan(cost.waiting)
        assert math.isnan(cost.speedup)
        assert math.isnan(cost.beyond_chance)


def test_steps_without_load_change_nothing() -> None:
    assert cost_of([[3, 1], [0, 0]], 4, 1) == cost_of([[3, 1]], 4, 1)


@given(LOADS, LOADS)
@settings(max_examples=50, deadline=None)
def test_costs_of_steps_add_up(some: list[list[int]], others: list[list[int]]) -> None:
    both = cost_of(some + others, 4, 0)
    added = cost_of(some, 4, 0) + cost_of(others, 4, 0)
    assert (both.steps, both.mean, both.hottest) == (added.steps, added.mean, added.hottest)


@given(LOADS)
@settings(max_examples=50, deadline=None)
def test_sums_of_steps_give_a_lower_bound(loads: list[list[int]]) -> None:
    each, summed = cost_of(loads, 4, 0), cost_of([np.sum(loads, axis=0)], 4, 0)
    if each.steps:
        assert summed.waiting <= each.waiting + 1e-12
        assert 0 <= each.waiting <= 0.75


def test_peaks_and_totals_are_enough() -> None:
    loads = np.random.default_rng(1).integers(0, 50, (20, 8))
    whole = cost_of(loads, 8, 2)
    parts = cost_of_peaks(loads.sum(axis=1), loads.max(axis=1), 8, 8, 2)
    assert whole == parts


@pytest.mark.parametrize("tokens", [8, 37, 300, 5000])
@pytest.mark.parametrize("num_ranks", [4, 16])
def test_uniform_routing_waits_what_chance_says(tokens: int, num_ranks: int) -> None:
    rng = np.random.default_rng(tokens)
    scores = rng.random((400, tokens, 16)) if tokens <= 300 else rng.random((60, tokens, 16))
    chosen = np.argpartition(scores, 2, axis=2)[:, :, :2].reshape(len(scores), -1)
    counts = np.array([np.bincount(c, minlength=16) for c in chosen])
    loads = metrics.rank_counts(counts, metrics.contiguous_placement(16, num_ranks))
    cost = cost_of(loads, 16, 2)
    assert cost.waiting == pytest.approx(cost.waiting_by_chance, rel=0.08)
    assert cost.beyond_chance < 0.02


def test_skew_stands_out_from_chance() -> None:
    loads = np.tile([400, 100, 100, 100], (10, 1))
    cost = cost_of(loads, 16, 2)
    assert cost.waiting == pytest.approx(1 - 175 / 400)
    assert cost.waiting_by_chance < 0.1
    assert cost.beyond_chance == pytest.approx(1 - cost.chance / cost.hottest)
    assert cost.beyond_chance > 0.5


@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 0), (10, 2)])
def test_chance_is_unknown_where_nothing_is_known_of_it(num_experts: int, top_k: int) -> None:
    cost = cost_of([[3, 2, 1, 2]], num_experts, top_k)
    assert math.isnan(cost.waiting_by_chance)
    assert cost.waiting == pytest.approx(1 / 3)
    assert math.isnan(cost_of([[3, 2, 1, 2]], 16, 2, assignments=False).waiting_by_chance)


def test_loads_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(3,\): give \[steps, ranks\]"):
        cost_of([1, 2, 3], 4, 1)


@pytest.mark.parametrize(("num_experts", "top_k", "ranks"), [(64, 6, None), (128, 8, 8), (8, 2, 4)])
def test_floors_between_powers_of_two_are_close(
    num_experts: int, top_k: int, ranks: int | None
) -> None:
    sizes = np.array([1, 3, 11, 24, 90, 181, 700, 3000, 50_000])
    found = floors(sizes * top_k, num_experts, top_k, ranks)
    placement = None if ranks is None else metrics.contiguous_placement(num_experts, ranks)
    exact = [nulls.null(int(size), num_experts, top_k, placement) for size in sizes]
    assert found.gini == pytest.approx([null.gini_mean for null in exact], rel=0.02)
    assert found.peak - 1 == pytest.approx([n.max_over_mean_mean - 1 for n in exact], rel=0.06)


def test_floors_of_nothing_are_unknown() -> None:
    assert np.isnan(floors([0, 5], 8, 0).gini).all()
    assert np.isnan(floors([0], 8, 2).peak).all()
    assert np.isnan(floors([0], 8, 2).corrected([0.3])).all()
    assert floors([16], 8, 8).peak == pytest.approx([1.0])


def test_the_corrected_gini_is_that_of_one_histogram() -> None:
    for gini in (0.05, 0.2, 0.6):
        ours = floors([4 * 256], 64, 4).corrected([gini])
        assert ours == pytest.approx([nulls.corrected_gini([gini], 256, 64, 4)], abs=1e-9)
