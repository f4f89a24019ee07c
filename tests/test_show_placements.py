"""`dodoco show` says where experts lie, and folds counts into ranks by it."""

from __future__ import annotations

import pytest

from dodoco_ext import _C
from dodoco_ext.placement_spec import PlacementSpec
from served import Served
from shown import Capture, show, show_json

DOUBLED = [0, 1, 2, 3, 4, 0, 1, 5, 6, 7]
IDS = [[0, 1], [0, 7], [0, 3]]


def placed(rank: int = 0, world_size: int = 1, slots: int = 10) -> Served:
    return Served(
        rank, layers=2, placements=PlacementSpec(slots, 2), world_size=world_size, run="placed"
    )


def test_one_line_says_where_experts_lie(capsys: Capture) -> None:
    made = placed()
    made.recorder.record_placement({0: [*range(8)], 1: [*range(8)]}, 2)
    made.recorder.record_placement({1: DOUBLED}, 2)
    text = show(capsys, made.path)
    assert "placed    10 slots a layer on 2 ranks, 1 change, recorded" in text
    assert "ago; 2 of 16 experts have replicas" in text
    found = show_json(capsys, made.path)["placements"]
    del found["last_unix_ns"]
    assert found == {
        "changes": 1, "num_ranks": 2, "num_slots": 10, "experts": 16, "replicated": 2, "split": 2,
    }  # fmt: skip


def test_ranks_are_those_of_the_recorded_placement(capsys: Capture) -> None:
    made = placed()
    made.recorder.record_placement({0: [*range(8)], 1: [*range(8)]}, 2)
    made.route(0, IDS)
    made.recorder.record_placement({0: DOUBLED}, 2)
    made.route(0, IDS)
    ranks = show_json(capsys, made.path)["layers"][0]["ranks"]
    # 0 0 0 1 3 and 7; then half of 0 0 0 1 each.
    assert ranks["counts"] == [5 + 2 + 1, 1 + 2 + 1]
    assert (ranks["recorded"], ranks["estimated"], ranks["unplaced"]) == (True, 4, 0)
    assert ranks["busiest"] == 0
    text = show(capsys, made.path)
    assert "per expert-parallel rank: 2 ranks, as placed" in text
    assert "estimated: 33.3 % is an even split over replicas on several ranks" in text


def test_other_ranks_than_those_placed_are_an_assumption(capsys: Capture) -> None:
    made = placed()
    made.recorder.record_placement({0: [*range(8)], 1: [*range(8)]}, 2)
    made.route(0, IDS)
    assert "4 ranks, assuming equal contiguous runs" in show(capsys, made.path, "--ep", 4)
    assert "2 ranks, as placed" in show(capsys, made.path, "--ep", 2)


def test_a_window_is_placed_by_itself(capsys: Capture, tmp_path: object) -> None:
    made = placed()
    made.recorder.record_placement({0: [*range(8)], 1: [*range(8)]}, 2)
    made.route(0, IDS)
    saved = f"{tmp_path}/saved"
    show(capsys, made.path, "--save", saved)
    made.recorder.record_placement({0: [*range(7, -1, -1)]}, 2)
    made.route(0, [[0, 1]])
    ranks = show_json(capsys, made.path, "--since", saved)["layers"][0]["ranks"]
    assert ranks["counts"] == [0, 2]


def test_placements_that_are_gone_are_said_to_be(capsys: Capture) -> None:
    made = placed()
    for _ in range(3):
        made.recorder.record_placement({0: [*range(8)], 1: [*range(8)]}, 2)
        made.route(0, IDS)
    assert "left out: 6 assignments under placements that are gone" in show(capsys, made.path)


@pytest.mark.parametrize("known", [True, False])
def test_a_run_sums_what_its_ranks_sent(known: bool, capsys: Capture) -> None:
    ranks = [placed(rank, 2) for rank in (0, 1)]
    for rank in ranks[: 2 if known else 1]:
        rank.recorder.record_placement({0: [*range(8)], 1: [*range(8)]}, 2)
    ranks[0].route(0, IDS)
    ranks[1].route(0, [[7, 6], [5, 0]])
    found = show_json(capsys, "placed", "--fleet")
    assert found["placements"]["changes"] == 0
    if known:
        assert found["layers"][0]["ranks"]["counts"] == [6, 4]
        assert "2 ranks, as placed" in show(capsys, "placed", "--fleet")
    else:
        assert found["layers"][0]["ranks"] is None


def test_without_placements_nothing_is_said(capsys: Capture) -> None:
    made = Served()
    made.route(0, IDS)
    assert "placed" not in show(capsys, made.path)
    assert show_json(capsys, made.path)["placements"] is None


def test_faults_are_shown_by_reason(capsys: Capture) -> None:
    made = Served()
    for fault in (_C.Fault.BAD_SHAPE, _C.Fault.NO_LANE, _C.Fault.BAD_SHAPE):
        made.recorder.add_fault(fault)
    assert "FAULTS: 3 (2 bad_shape, 1 no_lane), the last BAD_SHAPE" in show(capsys, made.path)
    assert show_json(capsys, made.path)["faults"]["by_reason"] == {"bad_shape": 2, "no_lane": 1}
