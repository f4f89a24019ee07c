"""Rows that each rank received, dispatch by dispatch, as they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.errors import RecordingError
from dodoco_ext.fleet import Fleet
from dodoco_ext.groups import RankGroup
from dodoco_ext.recording import Cursor, Reader
from dodoco_ext.transfer_alignment import AlignedTransfers, Member, align_transfers
from dodoco_ext.transfers import DISPATCH, UNITS, Transfers

Words = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Loads:
    """The loads of some dispatches of one layer.

    Attributes:
        layer: Its index in the run.
        rows: What each rank received, uint64 [n, R].
        assignments: Whether that is assignments; otherwise tokens.
    """

    layer: int
    rows: Words
    assignments: bool


class Dispatches:
    """Matches the dispatches of a run's groups, those read at the last look with the new ones."""

    def __init__(self) -> None:
        self._cursors: dict[str, Cursor] = {}
        self._old: dict[str, Transfers] = {}

    def look(self, fleet: Fleet) -> Iterator[Loads]:
        """Yields the loads of dispatches of which the last rank's record has come since the last look."""
        for group in fleet.groups:
            if not group.absent:
                yield from self._of(fleet, group)

    def _of(self, fleet: Fleet, group: RankGroup) -> Iterator[Loads]:
        members: dict[int, Member] = {}
        seen = np.zeros(len(group.ranks), np.int64)
        for column, rank in enumerate(group.ranks):
            reader = group.readers[rank]
            try:
                new = reader.transfers(self._cursors.get(reader.uuid))
            except (RecordingError, ValueError):  # truncated meanwhile
                return
            old = self._old.get(reader.uuid)
            seen[column] = len(old) if old is not None else 0
            self._cursors[reader.uuid], self._old[reader.uuid] = new.next_cursor, new
            members[rank] = _member(fleet, rank, reader, new if old is None else _joined(old, new))
        aligned = align_transfers(group.name, group.ranks, members, fleet.layers)
        fresh = (aligned.rows >= seen).any(axis=1)
        chosen = aligned.sound & fresh & aligned.of(DISPATCH)
        for layer in np.unique(aligned.keys["layer"][chosen]):
            which = chosen & (aligned.keys["layer"] == layer)
            yield _loads(aligned, which, int(layer))


def _loads(aligned: AlignedTransfers, which: NDArray[np.bool_], layer: int) -> Loads:
    rows = aligned.received_rows(which)
    counted = np.zeros(rows.shape, np.uint64)
    known = True
    for column, member in enumerate(aligned.members):
        assert member is not None, "every rank of the group was read"
        at = aligned.rows[which, column]
        known = known and bool((member.transfers.records["num_experts"][at] > 0).all())
        counted[:, column] = member.transfers.experts[at].sum(axis=1, dtype=np.uint64)
    if known:  # what its experts compute, also where rows are tokens
        return Loads(layer, counted, assignments=True)
    units = aligned.field("unit")[which]
    return Loads(layer, rows, assignments=bool((units == UNITS.index("assignment")).all()))


def _member(fleet: Fleet, rank: int, reader: Reader, transfers: Transfers) -> Member:
    places = [fleet.place_of(rank, layer) for layer in range(fleet.num_layers(rank))]
    host = str(reader.metadata.get("host") or "")
    return Member(transfers, np.array(places, np.int64), int(reader.header["num_lanes"]), host)


def _joined(old: Transfers, new: Transfers) -> Transfers:
    width = max(old.experts.shape[1], new.experts.shape[1])
    experts = [np.pad(t.experts, ((0, 0), (0, width - t.experts.shape[1]))) for t in (old, new)]
    return Transfers(
        np.concatenate([old.records, new.records]),
        np.concatenate([old.sent, new.sent]),
        np.concatenate([old.received, new.received]),
        np.concatenate(experts),
        new.next_cursor,
        new.lost,
    )
