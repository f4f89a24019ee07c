"""The live view takes experts to lie where recordings say, from change to change."""

from __future__ import annotations

import pytest

from dodoco_ext.cost_of_imbalance import cost_of
from dodoco_ext.placement_spec import PlacementSpec
from dodoco_ext.recording import Reader
from dodoco_ext.views.top.frame import Frame
from dodoco_ext.views.top.session import Session
from dodoco_ext.views.top.text import detail_lines
from served import Served

pytestmark = pytest.mark.timeout(60)

RUNS, TURNED, DOUBLED = [0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 0, 1, 3]


class Job:
    """A run of two ranks whose load balancer moves the experts of one layer, and a view of it."""

    def __init__(
        self, rooms: tuple[int, int] = (6, 6), num_experts: int = 4, **options: object
    ) -> None:
        self.ranks = [
            Served(
                rank,
                run="job",
                layers=1,
                num_experts=num_experts,
                top_k=1,
                world_size=2,
                placements=PlacementSpec(room, 3) if room else None,
            )
            for rank, room in enumerate(rooms)
        ]
        self.session = Session("job", **options)  # type: ignore[arg-type]
        self._now_s = 1000.0

    def look(self) -> Frame:
        self._now_s += 1
        return self.session.look(self._now_s)

    def place(self, slots: list[int], num_ranks: int = 2) -> None:
        for rank in self.ranks:
            if rank.recorder.placements is not None:
                rank.recorder.record_placement({0: slots}, num_ranks)

    def route(self, *experts: int) -> None:
        for rank, expert in enumerate(experts):
            self.ranks[rank % 2].route(0, [[expert]])


def test_loads_are_those_of_the_placement_they_were_counted_under() -> None:
    job = Job()
    job.place(RUNS)
    job.look()
    job.route(0, 0, 1, 3)
    frame = job.look()
    assert frame.rows[0].loads.tolist() == [[3, 1]]
    assert frame.cost.cost == cost_of([[3, 1]], 4, 1)
    assert "2 ranks, experts as placed" in frame.cost.scope
    assert frame.cost.text.startswith("Ranks wait >= ")
    job.route(0, 0)
    job.place(TURNED)
    job.route(0, 0, 0)
    frame = job.look()
    assert frame.rows[0].loads.tolist() == [[5, 4]]
    assert frame.cost.cost.hottest == 3 + 3, "two looks are two steps: 3 : 1 and 2 : 3"
    assert any(
        "Received by rank (experts as placed)" in x for x in detail_lines(frame, frame.rows[0], 100)
    )
    job.session.whole_run = True
    assert job.look().rows[0].loads.tolist() == [[5, 4]]


@pytest.mark.parametrize("read", ["snapshot", "placements"])
def test_passes_counted_during_a_look_are_not_those_of_the_placement_before(
    read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job()
    job.place(RUNS)
    job.look()
    job.route(0)
    real, late = getattr(Reader, read), [TURNED]

    def reads(reader: Reader, *known: object) -> object:
        if late:
            job.place(late.pop())
            job.route(0, 0)
        return real(reader, *known)

    monkeypatch.setattr(Reader, read, reads)
    job.look()
    assert not late, "the map changed in the middle of a look"
    assert job.look().rows[0].loads.tolist() == [[1, 2]]


def test_replicas_share_evenly() -> None:
    job = Job()
    job.place(DOUBLED)
    job.look()
    job.route(0, 0, 1, 1, 2, 3)
    assert job.look().rows[0].loads.tolist() == [[3, 3]]


def test_a_first_placement_is_seen_when_it_is_there() -> None:
    job = Job()
    job.look()
    job.place(TURNED)
    job.route(0, 0)
    assert job.look().rows[0].loads.tolist() == [[0, 2]]


@pytest.mark.parametrize("why", ["a rank without", "other ranks asked for", "a rank alone"])
def test_otherwise_they_are_assumed_to_be_contiguous(why: str) -> None:
    options: dict[str, object] = {"num_ranks": 4} if "other" in why else {}
    job = Job((6, 0 if "without" in why else 6), **options)
    if "alone" in why:
        job.session = Session(str(job.ranks[0].path))
    job.place(TURNED)
    job.look()
    job.route(0, 0, 1)
    frame = job.look()
    loads = {
        "a rank without": [[3, 0]],
        "other ranks asked for": [[2, 1, 0, 0]],
        "a rank alone": [[2]],
    }
    assert frame.rows[0].loads.tolist() == loads[why]
    assert "as placed" not in frame.cost.scope


def test_experts_that_ranks_do_not_divide_are_placed_too() -> None:
    job = Job(num_experts=5)
    job.place([0, 1, 2, 3, 4, 0])
    job.look()
    job.route(2, 2, 0, 0, 4)
    frame = job.look()
    assert frame.rows[0].loads.tolist() == [[3, 2]]
    assert "2 ranks, experts as placed" in frame.cost.scope
    assert "chance ?" in frame.cost.text, "nothing is known of chance"
