"""Transfers of several ranks side by side: gaps are named, and no matrix is made of two transfers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dodoco_ext.errors import InputError
from dodoco_ext.transfer_alignment import AlignedTransfers, align_transfers
from dodoco_ext.transfers import COMBINE, DISPATCH, Transfers
from exchanges import SECOND, Exchange, aligned, exchanges, kept, transfers

RNG = np.random.default_rng(6)


def matrices(number: int, num_ranks: int, least: int = 0) -> list[Any]:
    return list(RNG.integers(least, 50, (number, num_ranks, num_ranks)))


def whole(run: list[Exchange], num_ranks: int, **options: Any) -> dict[int, Transfers]:
    return {rank: transfers(run, rank, **options) for rank in range(num_ranks)}


def true_numbers(found: AlignedTransfers) -> np.ndarray[Any, Any]:
    """Which transfer each rank's record of a row really is of, [n, R]; -1 where it has none."""
    numbers = found.field("bytes_per_row").astype(np.int64)
    return np.where(found.present, numbers, -1)


# --- What is there is put together ---------------------------------------------------------------


def test_every_matrix_is_what_senders_and_receivers_saw() -> None:
    run = exchanges(matrices(12, 4))
    found = aligned(whole(run, 4), 4)
    assert found.sound.all()
    assert len(found) == len(run)
    truth = np.stack([each.matrix for each in run])
    np.testing.assert_array_equal(found.sent(), truth)
    np.testing.assert_array_equal(found.received(), truth)
    np.testing.assert_array_equal(found.total(), truth.sum(axis=0))
    np.testing.assert_array_equal(found.received_rows(), truth.sum(axis=1))
    dispatched = [each.matrix for each in run if each.type == DISPATCH and each.layer == 1]
    chosen = found.of(DISPATCH, layer=1)
    np.testing.assert_array_equal(found.sent(chosen), np.stack(dispatched))
    np.testing.assert_array_equal(found.total(chosen), np.sum(dispatched, axis=0))
    assert found.keys["type"].tolist() == [DISPATCH, COMBINE] * 6
    assert (found.disputes == 0).all()


def test_backward_and_recomputed_transfers_are_rows_of_their_own() -> None:
    base = exchanges(matrices(2, 2), layers=1)
    run = [
        *base,
        replace(base[0], number=2, recompute=True),
        replace(base[1], number=3, backward=True),
    ]
    found = aligned(whole(run, 2), 2, layers=1)
    assert len(found) == 4
    assert found.of(DISPATCH).tolist() == [True, False, False, False]
    assert found.of(COMBINE, backward=True).tolist() == [False, False, False, True]
    assert (found.keys["occurrence"] == 0).all()


def test_a_key_that_comes_twice_is_told_apart_by_its_occurrence() -> None:
    run = exchanges(matrices(8, 3), layers=2, repeats=2)
    found = aligned(whole(run, 3), 3)
    assert found.keys["occurrence"].tolist() == [0, 1] * 4
    assert found.sound.all()


def test_the_last_occurrence_of_one_rank_is_not_the_first_of_another() -> None:
    """Rank 0 lost the first of two equal transfers, rank 1 died before the second."""
    run = exchanges(matrices(2, 2), layers=1, repeats=2)
    each = whole(run, 2)
    found = aligned({0: kept(each[0], [False, True]), 1: kept(each[1], [True, False])}, 2, 1)
    assert len(found) == 2
    assert not found.complete.any()
    assert found.out_of_step.all()


def test_numbers_of_transfers_go_on_after_2_to_the_32() -> None:
    run = exchanges(matrices(8, 2))
    each = whole(run, 2)
    for of in each.values():
        of.records["sequence"] -= np.uint32(5)
    found = aligned(each, 2)
    assert found.sound.all()
    assert len(found) == 8


# --- Gaps are named ------------------------------------------------------------------------------


def test_a_lost_rank_leaves_no_complete_row() -> None:
    run = exchanges(matrices(8, 3))
    each = whole(run, 3)
    del each[1]
    found = aligned(each, 3)
    assert found.members[1] is None
    assert found.present[:, 1].tolist() == [False] * 8
    assert not found.sound.any()
    assert (found.total() == 0).all()
    assert (found.sent()[:, 1, :] == 0).all()
    np.testing.assert_array_equal(found.sent()[:, 2], [e.matrix[2] for e in run])


def test_unequal_iterations_leave_the_rest_incomplete() -> None:
    run = exchanges(matrices(12, 2))
    each = whole(run, 2)
    found = aligned({0: each[0], 1: kept(each[1], np.arange(12) < 7)}, 2)
    assert found.complete.tolist() == [True] * 7 + [False] * 5
    assert found.lost == {0: 0, 1: 5}


def test_a_late_joiner_is_not_taken_for_the_others() -> None:
    """It counts from 0 when they are at 2: even if every message is the same, its clock says no."""
    same = [np.full((3, 3), 4)] * 16
    run = exchanges(same)
    each = {0: transfers(run, 0), 1: transfers(run, 1), 2: transfers(run, 2, late=2)}
    found = aligned(each, 3)
    assert found.complete.sum() == 8
    assert found.agree.all()
    assert not found.sound.any()
    assert found.apart[found.complete].all()
    assert (found.total() == 0).all()


def test_a_late_joiner_contradicts_the_others() -> None:
    run = exchanges(matrices(16, 3, least=1))
    each = {
        rank: transfers(run, rank, late=2 * (rank == 2), spacing_ns=1000, timed=False)
        for rank in range(3)
    }
    found = aligned(each, 3)
    assert not found.apart.any()
    assert not found.sound.any()
    assert found.disputes[2, 0] == found.disputes[0, 2] == 8
    assert found.disputes[0, 1] == 0


@pytest.mark.parametrize(("host", "apart"), [("host", True), ("other", False)])
def test_clocks_of_two_hosts_are_given_a_minute(host: str, apart: bool) -> None:
    run = exchanges(matrices(2, 2, least=1), layers=1)
    each = whole(run, 2)
    for name in ("begin_ns", "end_ns"):
        each[1].records[name] += np.uint64(30 * SECOND)
    found = aligned(each, 2, 1)
    members = [member for member in found.members if member is not None]
    again = {0: members[0], 1: replace(members[1], host=host)}
    found = align_transfers("ep", (0, 1), again, found.layers)
    assert found.apart.tolist() == [apart, apart]


def test_what_sender_and_receiver_say_differently_is_no_matrix() -> None:
    run = exchanges(matrices(8, 2))
    each = whole(run, 2)
    each[1].received[3, 0] += 1
    found = aligned(each, 2)
    assert found.agree.tolist() == [True] * 3 + [False] + [True] * 4
    assert found.disputes.tolist() == [[0, 1], [0, 0]]
    truth = sum(each.matrix for each in run if each.number != 3)
    np.testing.assert_array_equal(found.total(), truth)


def test_rows_and_tokens_are_not_compared() -> None:
    each = whole(exchanges(matrices(4, 2)), 2)
    each[0].records["unit"] = 1
    assert not aligned(each, 2).agree.any()


def test_what_a_damaged_file_says_is_left_out() -> None:
    run = exchanges(matrices(8, 2))
    each = whole(run, 2)
    each[0].records["layer"][0] = 99
    each[0].records["type"][1] = 7
    each[0].records["lane"][2] = 3
    each[0].records["direction"][3] = 9
    for name in ("iteration", "layer", "type", "sequence"):  # a key that comes twice
        each[0].records[name][4] = each[0].records[name][5]
    found = aligned(each, 2)
    assert found.left_out == {0: 5, 1: 0}
    assert found.sound.sum() == 3


def test_a_group_of_another_size_brings_nothing() -> None:
    run = exchanges(matrices(4, 2))
    wide = exchanges(matrices(4, 3))
    found = aligned({0: transfers(run, 0), 1: transfers(wide, 1)}, 2)
    assert found.left_out == {0: 0, 1: 4}
    assert not found.complete.any()


def test_nothing_is_no_error() -> None:
    for found in (aligned({}, 2), aligned({0: transfers([], 0)}, 1)):
        assert len(found) == 0
        assert (found.total() == 0).all()
        assert found.sound.shape == (0,)
        assert found.out_of_step.shape == (0,)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(InputError, match="no field 'bytes'"):
        aligned({}, 2).field("bytes")


# --- Whatever is lost ----------------------------------------------------------------------------


@st.composite
def lossy_runs(draw: st.DrawFn) -> tuple[list[Exchange], dict[int, Transfers], int]:
    """A run, and what is left of it: any ranks absent, any records lost, some ranks late."""
    num_ranks = draw(st.integers(1, 4))
    number = draw(st.integers(0, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    late = [draw(st.integers(0, 2)) for _ in range(num_ranks)]
    # Messages as alike as can be. Where ranks are late none is empty: nothing says when it was.
    run = exchanges(
        list(rng.integers(int(any(late)), 3, (number, num_ranks, num_ranks))),
        layers=draw(st.integers(1, 2)),
        repeats=draw(st.integers(1, 2)),
    )
    each: dict[int, Transfers] = {}
    for rank in range(num_ranks):
        match draw(st.sampled_from(["whole", "tail", "head", "holes", "absent"])):
            case "absent":
                continue
            case kind:
                of = transfers(run, rank, late=late[rank])
        place = np.arange(len(of))
        cut = draw(st.integers(0, max(len(of), 1)))
        masks = {"whole": place >= 0, "tail": place >= cut, "head": place < cut}
        each[rank] = kept(of, masks.get(kind, rng.random(len(of)) < 0.7))
    return run, each, num_ranks


@given(lossy_runs())
def test_no_loss_makes_a_wrong_matrix(
    lossy: tuple[list[Exchange], dict[int, Transfers], int],
) -> None:
    run, each, num_ranks = lossy
    found = aligned(each, num_ranks)
    numbers = true_numbers(found)
    for row in np.flatnonzero(found.sound):
        assert set(numbers[row]) == {numbers[row, 0]}, "records of two transfers are one row"
    truth = [run[n].matrix for n in numbers[found.sound, 0]]
    if truth:
        np.testing.assert_array_equal(found.sent(found.sound), np.stack(truth))
        np.testing.assert_array_equal(found.received(found.sound), np.stack(truth))
        np.testing.assert_array_equal(found.total(), np.sum(truth, axis=0))
    else:
        assert (found.total() == 0).all()


@given(lossy_runs())
def test_every_record_is_in_one_row_or_named(
    lossy: tuple[list[Exchange], dict[int, Transfers], int],
) -> None:
    _, each, num_ranks = lossy
    found = aligned(each, num_ranks)
    for rank in range(num_ranks):
        there = found.rows[:, rank][found.rows[:, rank] >= 0]
        assert len(set(there)) == len(there)
        assert len(there) == (len(each[rank]) if rank in each else 0)
        assert found.left_out.get(rank, 0) == 0
    assert found.present.any(axis=1).all()
    assert (found.complete == found.present.all(axis=1)).all()


@given(lossy_runs())
def test_what_ranks_in_step_all_hold_is_never_given_up(
    lossy: tuple[list[Exchange], dict[int, Transfers], int],
) -> None:
    run, each, num_ranks = lossy
    held = [set(of.records["bytes_per_row"].tolist()) for of in each.values()]
    in_step = all(
        run[int(r["bytes_per_row"])].iteration == r["iteration"]
        for of in each.values()
        for r in of.records
    )
    if len(each) < num_ranks or not in_step:
        return
    found = aligned(each, num_ranks)
    everywhere = set.intersection(*held) if held else set()
    assert set(true_numbers(found)[found.sound, 0].tolist()) == everywhere
