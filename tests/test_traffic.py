"""Traffic of a run from its files alone: matrices, imbalance with its null, waiting, experts."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dodoco_ext import metrics, nulls
from dodoco_ext.errors import InputError
from dodoco_ext.fleet import Fleet
from dodoco_ext.recorder import LayerSpec
from dodoco_ext.traffic.experts import expert_rows
from dodoco_ext.traffic.imbalance import RankNull, per_dispatch
from dodoco_ext.traffic.totals import traffic_of
from dodoco_ext.traffic.waiting import durations, waiting
from dodoco_ext.transfers import COMBINE, DISPATCH
from exchanges import Exchange, aligned, exchanges, kept, transfers
from runs import rank_of
from traffic_runs import Rank, record, recorded

RNG = np.random.default_rng(66)


def some_run(number: int, num_ranks: int, layers: int = 2) -> list[Exchange]:
    return exchanges(list(RNG.integers(0, 30, (number, num_ranks, num_ranks))), layers)


def summed(run: list[Exchange], layer: int, type: int) -> Any:  # noqa: A002
    return sum(each.matrix for each in run if (each.layer, each.type) == (layer, type))


# --- Matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 16])
def test_matrices_from_files_are_what_was_sent(num_ranks: int) -> None:
    run = some_run(12, num_ranks)
    recorded(run, num_ranks)
    (found,) = Fleet.open("job").transfers()
    assert found.sound.all()
    np.testing.assert_array_equal(found.sent(), np.stack([each.matrix for each in run]))
    assert found.keys["iteration"].tolist() == [each.iteration for each in run]
    (traffic,) = traffic_of(Fleet.open("job"))
    assert traffic.absent == ()
    for each in traffic.layers:
        layer = int(each.layer.split(".")[1])
        np.testing.assert_array_equal(each.sent, summed(run, layer, each.op))
        np.testing.assert_array_equal(each.received, each.sent)
        assert each.complete
        assert each.agree
        assert each.each("executions").tolist() == [3] * num_ranks
    total = traffic.total(DISPATCH)
    np.testing.assert_array_equal(total.sent, summed(run, 0, 2) + summed(run, 1, 2))
    np.testing.assert_array_equal(total.received_rows, total.sent.sum(axis=0))


def test_whole_run_matrices_stay_exact_when_the_ring_has_lapped() -> None:
    run = some_run(2400, 2, layers=1)
    ranks = {rank: Rank(rank, (0, 1), layers=1, max_bytes=1 << 16) for rank in range(2)}
    record(run, ranks)
    fleet = Fleet.open("job")
    (found,), (traffic,) = fleet.transfers(), traffic_of(fleet)
    assert 0 < len(found) < len(run)
    assert found.sound.all()
    assert found.lost[0] > 0
    np.testing.assert_array_equal(found.sent()[-1], run[-1].matrix)
    np.testing.assert_array_equal(traffic.layers[0].sent, summed(run, 0, DISPATCH))
    np.testing.assert_array_equal(traffic.layers[1].sent, summed(run, 0, COMBINE))


def test_several_groups_of_a_run_have_a_matrix_each() -> None:
    groups = [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]
    runs = [some_run(4, 4) for _ in groups]
    for group, run in zip(groups, runs, strict=True):
        record(run, {rank: Rank(rank, group, world_size=16) for rank in group})
    fleet = Fleet.open("job")
    found, traffic = fleet.transfers(), traffic_of(fleet)
    assert [each.ranks for each in found] == [each.ranks for each in traffic] == groups
    for each, exact, run in zip(found, traffic, runs, strict=True):
        assert each.sound.all()
        np.testing.assert_array_equal(each.sent(), np.stack([e.matrix for e in run]))
        np.testing.assert_array_equal(exact.total(DISPATCH).sent, each.total(each.of(DISPATCH)))


def test_the_order_of_a_group_is_its_own() -> None:
    run = some_run(4, 3)
    group = (5, 2, 4)
    record(run, {rank: Rank(rank, group, world_size=6) for rank in group})
    (found,) = Fleet.open("job").transfers()
    assert found.ranks == group
    np.testing.assert_array_equal(found.sent(), np.stack([each.matrix for each in run]))


def test_backward_and_recomputed_transfers_are_counted_apart() -> None:
    base = some_run(2, 2, layers=1)
    again = [replace(base[0], number=2, recompute=True), replace(base[1], number=3, backward=True)]
    record([*base, *again], {rank: Rank(rank, (0, 1), layers=1) for rank in range(2)})
    fleet = Fleet.open("job")
    (found,), (traffic,) = fleet.transfers(), traffic_of(fleet)
    assert len(found) == 4
    np.testing.assert_array_equal(traffic.layers[0].sent, base[0].matrix)
    assert traffic.layers[0].each("recomputed").tolist() == [1, 1]
    assert traffic.layers[1].each("backward").tolist() == [1, 1]


# --- Ranks that are missing, late, ahead, or of something else -----------------------------------


def test_a_lost_rank_is_named_and_leaves_no_matrix() -> None:
    paths = recorded(some_run(4, 3), 3)
    paths[1].unlink()
    fleet = Fleet.open("job")
    (found,), (traffic,) = fleet.transfers(), traffic_of(fleet)
    assert [(part.rank, part.state) for part in found.absent] == [(1, "missing")]
    assert [(part.rank, part.state) for part in traffic.absent] == [(1, "missing")]
    assert not found.sound.any()
    assert not any(each.complete for each in traffic.layers)
    assert traffic.layers[0].present.tolist() == [True, False, True]
    assert traffic.layers[0].agree


def test_ranks_that_counted_unequally_are_no_matrix_of_a_run() -> None:
    run = some_run(12, 2)
    ranks = {rank: Rank(rank, (0, 1)) for rank in range(2)}
    record(run, ranks, until={1: 9})
    (found,), (traffic,) = Fleet.open("job").transfers(), traffic_of(Fleet.open("job"))
    assert found.sound.tolist() == [True] * 9 + [False] * 3
    assert [each.equal for each in traffic.layers] == [True, False, False, False]
    assert not traffic.total(COMBINE).equal


def test_a_late_joiner_is_never_merged() -> None:
    run = some_run(40, 3)
    ranks = {rank: Rank(rank, (0, 1, 2)) for rank in range(3)}
    now = time.monotonic_ns()
    for each in run:
        for number, rank in ranks.items():
            if number < 2 or each.iteration >= 4:
                rank.push(each, now + each.number * 1_000_000_000, 1000)
    (found,) = Fleet.open("job").transfers()
    assert found.complete.any()
    assert not found.sound.any()
    assert (found.total() == 0).all()
    assert found.apart[found.complete].all()


def test_a_recording_of_another_group_or_none_is_named_and_never_merged() -> None:
    run = some_run(4, 2)
    wide = some_run(4, 4)
    ranks = {
        0: Rank(0, (0, 1, 2, 3)),
        1: Rank(1, (0, 1, 2, 3)),
        2: Rank(2, (2, 3), world_size=4),
        3: Rank(3, (), world_size=4, index=0),
    }
    record(wide, {rank: ranks[rank] for rank in (0, 1)})
    record(run, {2: ranks[2]})
    all_four, two = Fleet.open("job").transfers()
    assert [(p.rank, p.state) for p in all_four.absent] == [(2, "foreign"), (3, "foreign")]
    assert "rank 2 is of the group 'ep' (2, 3)" in all_four.absent[0].problem
    assert "rank 3 records no transfers" in all_four.absent[1].problem
    assert str(ranks[3].path) in all_four.absent[1].problem
    assert [p.rank for p in two.absent] == [3]
    assert not all_four.sound.any()
    assert not two.sound.any()


def test_a_recording_that_claims_the_place_of_another_is_foreign() -> None:
    ranks = {0: Rank(0, (0, 1)), 1: Rank(1, (0, 1), index=0)}
    record(some_run(4, 2), ranks)
    (found,) = Fleet.open("job").transfers()
    assert [(part.rank, part.state) for part in found.absent] == [(1, "foreign")]
    assert "says that its place is 0 of the group 'ep' (0, 1)" in found.absent[0].problem


def test_recordings_of_another_run_are_named_and_never_merged(recordings: Path) -> None:
    recorded(some_run(4, 2), 2, run_name="old")
    recorded(some_run(4, 2), 2)
    fleet = Fleet.open(recordings)
    assert fleet.run == "job"
    assert fleet.foreign == {"old": 2}
    assert Fleet.open("job").foreign == {}


def test_other_layers_are_refused_and_both_files_named() -> None:
    ranks = [
        Rank(0, (0, 1), specs=[LayerSpec("mlp", 8, 2)]),
        Rank(1, (0, 1), specs=[LayerSpec("mlp", 16, 2)]),
    ]
    with pytest.raises(InputError, match=r"top 2 of 8 experts in .* and top 2 of 16") as caught:
        Fleet.open("job")
    assert all(str(rank.path) in str(caught.value) for rank in ranks)


def test_a_run_without_transfers_has_no_groups() -> None:
    made = rank_of(0, 1)
    made.route_all([4])
    fleet = Fleet.open("job")
    assert fleet.groups == fleet.transfers() == traffic_of(fleet) == ()


# --- Imbalance and its null ----------------------------------------------------------------------


def routed(rng: np.random.Generator, tokens: int, E: int, k: int, R: int, *, by_token: bool) -> Any:
    """Rows that each rank receives when every token picks k of E experts: the definition."""
    experts = np.argsort(rng.random((tokens, E)), axis=1)[:, :k]
    held = np.zeros((tokens, R), np.int64)
    for slot in range(k):
        np.add.at(held, (np.arange(tokens), experts[:, slot] // (E // R)), 1)
    return (held > 0).sum(axis=0) if by_token else held.sum(axis=0)


@pytest.mark.parametrize("by_token", [False, True], ids=["assignments", "tokens"])
@pytest.mark.parametrize(
    ("tokens", "E", "k", "R"),
    [(3, 8, 2, 4), (10, 8, 2, 8), (37, 64, 6, 8), (600, 16, 4, 2), (1500, 32, 8, 16)],
)
def test_the_null_is_that_of_uniform_routing(
    tokens: int, E: int, k: int, R: int, by_token: bool
) -> None:
    rng = np.random.default_rng(tokens)
    draws = 1200
    rows = np.array([routed(rng, tokens, E, k, R, by_token=by_token) for _ in range(draws)])
    null = RankNull(E, k, R, by_token)
    found = null.at(round(tokens * null.rows_per_token))
    for name, each in (
        ("gini", metrics.gini(rows)),
        ("max_over_mean", metrics.max_over_mean(rows)),
    ):
        values = np.asarray(each)
        error = 5 * values.std() / np.sqrt(draws)
        assert getattr(found, f"{name}_mean") == pytest.approx(values.mean(), abs=error)
        low, high = getattr(found, f"{name}_low"), getattr(found, f"{name}_high")
        assert np.mean((values >= low - 1e-9) & (values <= high + 1e-9)) > 0.925
    squares = np.asarray(metrics.gini(rows)) ** 2
    error = 5 * squares.std() / np.sqrt(draws)
    assert found.gini_second_moment == pytest.approx(squares.mean(), abs=error)
    assert rows.sum(axis=1).mean() == pytest.approx(tokens * null.rows_per_token, rel=0.02)


@pytest.mark.parametrize("by_token", [False, True])
def test_between_the_sizes_simulated_the_null_is_interpolated(by_token: bool) -> None:
    null = RankNull(64, 6, 8, by_token)
    sizes = np.rint(np.geomspace(4, 20_000, 40) * null.rows_per_token)
    gini, square, _, peak = null.over(sizes)
    for index in range(0, 40, 3):
        at = null.at(int(sizes[index]))
        assert gini[index] == pytest.approx(at.gini_mean, rel=0.06)
        assert square[index] == pytest.approx(at.gini_second_moment, rel=0.12)
        assert peak[index] - 1 == pytest.approx(at.max_over_mean_mean - 1, rel=0.12)


def test_where_nothing_is_uneven_but_by_chance_the_corrected_gini_is_0() -> None:
    rng = np.random.default_rng(1)
    rows = np.array([routed(rng, 64, 64, 6, 8, by_token=False) for _ in range(300)])
    found = per_dispatch(rows, RankNull(64, 6, 8))
    assert found.dispatches == 300
    assert found.gini == pytest.approx(found.gini_null, rel=0.05)
    assert found.gini_corrected < 0.015
    assert found.max_over_mean == pytest.approx(found.max_over_mean_null, rel=0.05)


@pytest.mark.parametrize("tokens", [16, 64, 256])
def test_loads_that_differ_show_at_their_true_gini_however_short_the_passes(tokens: int) -> None:
    rng = np.random.default_rng(2)
    loads = np.linspace(0.5, 1.5, 8)
    truth = float(metrics.gini(loads))
    found = per_dispatch(rng.multinomial(tokens, loads / 8, 3000), RankNull(8, 1, 8))
    assert found.gini_corrected == pytest.approx(truth, abs=0.02)
    assert found.gini > found.gini_corrected
    assert (found.gini > truth + 0.1) == (tokens == 16)


def test_what_is_not_known_is_not_made_up() -> None:
    rows = np.array([[3, 1], [0, 0], [2, 2]])
    found = per_dispatch(rows, None)
    assert (found.dispatches, found.gini) == (2, pytest.approx(0.125))
    assert np.isnan([found.gini_null, found.gini_corrected, found.max_over_mean_null]).all()
    assert per_dispatch(rows[1:2], RankNull(4, 1, 2)).dispatches == 0
    assert np.isnan(RankNull(4, 1, 2).at(0).gini_mean)
    with pytest.raises(InputError, match="3 ranks do not divide 8"):
        RankNull(8, 2, 3)
    with pytest.raises(InputError, match="top_k=0"):
        RankNull(8, 0, 2)


def test_the_null_of_assignments_is_that_of_all_other_views() -> None:
    placement = metrics.contiguous_placement(16, 4)
    assert RankNull(16, 2, 4).at(200) == nulls.null(100, 16, 2, placement)


# --- Waiting -------------------------------------------------------------------------------------


def test_waiting_is_ones_own_duration_over_the_shortest() -> None:
    run = some_run(8, 3)
    record(run, {r: Rank(r, (0, 1, 2)) for r in range(3)}, lasted_ns=[5000, 2000, 9000])
    (found,) = Fleet.open("job").transfers()
    assert durations(found).tolist() == [[5000, 2000, 9000]] * 8
    waits = waiting(found)
    assert waits.waited_ns.tolist() == [24_000, 0, 56_000]
    assert waits.duration_ns.tolist() == [40_000, 16_000, 72_000]
    assert waits.last.tolist() == [0, 8, 0]
    assert (waits.transfers, waits.untimed, waits.unsound) == (8, 0, 0)
    assert waiting(found, found.of(DISPATCH)).transfers == 4


def test_clocks_of_nodes_do_not_matter_for_waiting() -> None:
    run = some_run(4, 2)
    each = {rank: transfers(run, rank, durations_ns=[1000 * (rank + 1)] * 4) for rank in range(2)}
    before = waiting(aligned(each, 2)).waited_ns.tolist()
    for name in ("begin_ns", "end_ns"):
        each[1].records[name] += np.uint64(700_000_000)
    assert waiting(aligned(each, 2)).waited_ns.tolist() == before == [0, 4000]


def test_transfers_without_a_duration_are_left_out_and_counted() -> None:
    run = some_run(8, 2)
    each = {rank: transfers(run, rank) for rank in range(2)}
    each[1].records["timed"][2] = False
    each[0].records["end_ns"][3] = each[0].records["begin_ns"][3] - np.uint64(5)
    each[1] = kept(each[1], np.arange(8) != 6)
    waits = waiting(aligned(each, 2))
    assert (waits.transfers, waits.untimed, waits.unsound) == (5, 2, 1)


# --- Experts -------------------------------------------------------------------------------------


def test_rows_of_experts_are_numbered_where_they_cover_the_layer() -> None:
    run = some_run(8, 4)
    each = {rank: transfers(run, rank, experts=2) for rank in range(4)}
    first, second = expert_rows(aligned(each, 4))
    assert (first.layer, second.layer) == (0, 1)
    for found in (first, second):
        assert found.numbered
        expected = sum(e.matrix.sum(axis=0) for e in run if (e.layer, e.type) == (found.layer, 2))
        np.testing.assert_array_equal(found.counts.sum(axis=1), expected)
        assert found.transfers.tolist() == [2] * 4
        assert (found.name(0, 1), found.name(3, 0)) == ("1", "6")


def test_elsewhere_they_are_numbered_on_their_rank() -> None:
    run = some_run(4, 2)
    each = {rank: transfers(run, rank, experts=3) for rank in range(2)}
    found = expert_rows(aligned(each, 2))[0]
    assert not found.numbered
    assert found.name(1, 2) == "2 of the rank's own"


def test_without_counts_per_expert_there_are_none() -> None:
    run = some_run(4, 2)
    assert expert_rows(aligned({r: transfers(run, r) for r in range(2)}, 2)) == ()
