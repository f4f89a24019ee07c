"""What each rank of a run had finished last, and which transfer the job stood at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.errors import RecordingError
from dodoco_ext.fleet import Fleet
from dodoco_ext.transfer_alignment import OPS, AlignedTransfers


@dataclass(frozen=True)
class Position:
    """The last thing a rank is known to have finished.

    Attributes:
        iteration: By the count of the lane.
        layer: Name of the layer.
        op: `route`, `dispatch` or `combine`.
        backward, recompute: Which pass of it.
        lane: The lane.
        time_ns: When, Unix ns by the rank's host.
    """

    iteration: int
    layer: str
    op: str
    backward: bool
    recompute: bool
    lane: int
    time_ns: int


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended.

    Attributes:
        rank: The rank.
        state: `dead`, `closed`, `live`, or why it cannot be read.
        last: What it finished last; None where its ring holds nothing.
        before_end_s: How long before the end of the run that was.
        behind: Transfers that another rank of its group had finished and it had not; None where that
            is not known.
        history_s: How much of the window its ring still holds.
    """

    rank: int
    state: str
    last: Position | None
    before_end_s: float
    behind: int | None
    history_s: float


@dataclass(frozen=True)
class Stood:
    """Where a group of ranks stood: the transfer that not all had finished.

    Attributes:
        group: Name of the group.
        ranks: Its ranks.
        at: The first transfer that a rank had not finished and another had; None: all had finished
            the same, `after`.
        after: The last transfer that all had finished, of those that the rings hold.
        lacking: Ranks that had not finished `at`.
        finished: Ranks that had.
        unknown: Ranks without a transfer that could be compared.
    """

    group: str
    ranks: tuple[int, ...]
    at: Position | None
    after: Position | None
    lacking: tuple[int, ...]
    finished: tuple[int, ...]
    unknown: tuple[int, ...]


def member_of(groups: Sequence[AlignedTransfers], rank: int) -> tuple[AlignedTransfers, int] | None:
    """The group that a rank was read as a member of, and its column there."""
    for group in groups:
        if rank in group.ranks and group.members[group.ranks.index(rank)] is not None:
            return group, group.ranks.index(rank)
    return None


def times_held(
    rank: int, routes: NDArray[np.void] | None, groups: Sequence[AlignedTransfers]
) -> NDArray[np.int64]:
    """Times of all that a rank's rings hold."""
    times = [] if routes is None else [routes["time_ns"].astype(np.int64)]
    if (found := member_of(groups, rank)) is not None:
        member = found[0].members[found[1]]
        assert member is not None
        times.append(member.transfers.records["end_ns"].astype(np.int64))
    return np.concatenate(times) if times else np.empty(0, np.int64)


def row_times(group: AlignedTransfers) -> NDArray[np.int64]:
    """When each transfer ended at its last rank, [n]."""
    ends = group.field("end_ns").astype(np.int64)
    return ends.max(axis=1) if len(group) else np.empty(0, np.int64)


def position_of(fleet: Fleet, group: AlignedTransfers, row: int) -> Position:
    """A transfer of a group as the last thing finished; its time is that of its last rank."""
    key = group.keys[row]
    return Position(
        iteration=int(key["iteration"]),
        layer=fleet.layers[key["layer"]].name,
        op=OPS[int(key["type"])],
        backward=bool(key["direction"]),
        recompute=bool(key["recompute"]),
        lane=int(key["lane"]),
        time_ns=int(group.field("end_ns")[row].max()),
    )


def rank_ends(
    fleet: Fleet,
    routes: Mapping[int, NDArray[np.void]],
    groups: Sequence[AlignedTransfers],
    held: Mapping[int, NDArray[np.int64]],
    end_ns: int,
    begin_ns: int,
) -> tuple[RankEnd, ...]:
    """How every rank of the run ended, those without a recording included."""
    found = [
        RankEnd(part.rank, part.state, None, nan, None, 0.0)
        for part in fleet.missing
        if part.rank is not None
    ]
    behind = {rank: n for group in groups for rank, n in _behind(group).items()}
    for rank, reader in fleet.ranks.items():
        try:
            state = reader.state
        except RecordingError as error:
            state = error.state
        last = _last(fleet, rank, routes.get(rank), groups)
        times = held[rank]
        oldest = max(int(times.min()), begin_ns) if len(times) else end_ns
        before = nan if last is None else (end_ns - last.time_ns) / 1e9
        history = (end_ns - oldest) / 1e9
        found.append(RankEnd(rank, state, last, before, behind.get(rank), history))
    return tuple(sorted(found, key=lambda each: each.rank))


def _last(
    fleet: Fleet,
    rank: int,
    routes: NDArray[np.void] | None,
    groups: Sequence[AlignedTransfers],
) -> Position | None:
    """The later of a rank's last pass and its last transfer."""
    found = []
    if routes is not None and len(routes):
        record = routes[int(routes["time_ns"].argmax())]
        found.append(
            Position(
                int(record["iteration"]),
                fleet.layers[fleet.place_of(rank, int(record["layer"]))].name,
                "route",
                bool(record["direction"]),
                bool(record["recompute"]),
                int(record["lane"]),
                int(record["time_ns"]),
            )
        )
    if (mine := member_of(groups, rank)) is not None:
        group, column = mine
        there = np.flatnonzero(group.rows[:, column] >= 0)
        if len(there):
            ends = group.field("end_ns")[there, column]
            at = int(ends.argmax())
            position = position_of(fleet, group, int(there[at]))
            found.append(replace(position, time_ns=int(ends[at])))
    return max(found, key=lambda position: position.time_ns, default=None)


def _progress(group: AlignedTransfers) -> tuple[int, NDArray[np.int64]]:
    """The lane that ended last, and how far each rank had come in it, [R].

    Counted in transfers from the lane's first row held; -1 for ranks without any. Ranks that share no
    row with another one cannot be compared, unless there is no other.
    """
    lane = int(group.keys["lane"][int(row_times(group).argmax())])
    there = (group.rows >= 0) & (group.keys["lane"] == lane)[:, None]
    mine = np.flatnonzero(there.any(axis=1))
    # Modulo 2^32, from the first: rings hold far less than half of that.
    offset = group.keys["sequence"][mine] - group.keys["sequence"][mine[0]]
    number = offset.view(np.int32).astype(np.int64)
    number -= number.min()
    reached = np.where(there[mine], number[:, None], -1).max(axis=0)
    shared = (there & (there.sum(axis=1) > 1)[:, None] & group.agree[:, None]).any(axis=0)
    if there.any(axis=0).sum() > 1:
        reached[~shared] = -1
    return lane, reached


def _behind(group: AlignedTransfers) -> dict[int, int]:
    if not len(group):
        return {}
    _, reached = _progress(group)
    most = int(reached.max())
    return {rank: most - int(n) for rank, n in zip(group.ranks, reached, strict=True) if n >= 0}


def stood_of(fleet: Fleet, group: AlignedTransfers) -> Stood:
    """Where a group stood; see `Stood`."""
    lane, reached = _progress(group)
    known = reached >= 0
    in_lane = group.keys["lane"] == lane
    ends = row_times(group)
    after = at = None
    lacking = known & (reached < reached.max())
    if known.any():
        least = int(reached[known].min())
        column = int(np.flatnonzero(reached == least)[0])
        last = np.flatnonzero(in_lane & (group.rows[:, column] >= 0))
        sequence = group.keys["sequence"][last]
        newest = int(last[(sequence - sequence[0]).view(np.int32).argmax()])
        after = position_of(fleet, group, newest)
        following = group.keys["sequence"][newest] + np.uint32(1)
        nexts = np.flatnonzero(in_lane & (group.keys["sequence"] == following))
        if lacking.any() and len(nexts):
            row = int(nexts[ends[nexts].argmax()])
            at = position_of(fleet, group, row)
            lacking = known & (group.rows[row] < 0)
    names = np.array(group.ranks)
    return Stood(
        group=group.name,
        ranks=group.ranks,
        at=at,
        after=after,
        lacking=tuple(map(int, names[lacking])),
        finished=tuple(map(int, names[known & ~lacking])),
        unknown=tuple(map(int, names[~known])),
    )
