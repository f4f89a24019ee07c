"""What only records of single transfers say: waiting, and assignments where rows are tokens.

Rings are read as they fill, from the moment a recording is first seen (a new one: from its beginning), so
these counters begin when the exporter does, and lack what a ring lost between two looks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.errors import RecordingError
from dodoco_ext.recording import Cursor, Reader
from dodoco_ext.traffic.waiting import waiting
from dodoco_ext.transfer_alignment import OPS, Member, align_transfers
from dodoco_ext.transfers import DISPATCH, UNITS, Transfers
from dodoco_ext.views.exporter.identity import Identity, Key
from dodoco_ext.views.exporter.observe import Observed

log = logging.getLogger("dodoco")

PATIENCE_NS = 30_000_000_000
"""For how long the record of a transfer waits for those of the other ranks."""

_UNIT_SLOTS = 1024  # slots at the end of a ring in which the unit of rows is looked up at first


class Waits:
    """Reads new transfers of all live recordings, and adds them up.

    Attributes:
        waited_ns: By rank and operation (`dispatch`, `combine`); only where every rank of a group was read.
        assignments: By rank and layer, from counts per expert; see `units`.
        units: What rows of dispatches are, by recording: `assignment`, `token`, or both.
        lost: Slots of rings overwritten before they were read, by rank.
    """

    def __init__(self) -> None:
        self.waited_ns: dict[tuple[Identity, str], int] = {}
        self.assignments: Counter[tuple[Identity, str]] = Counter()
        self.units: dict[str, set[str]] = {}
        self.lost: Counter[Identity] = Counter()
        self._cursors: dict[str, Cursor] = {}
        self._pending: dict[Key, dict[str, Transfers]] = {}
        self._looked_ns = 0

    def update(self, time_ns: int, observed: Sequence[Observed]) -> None:
        """Reads on.

        Args:
            time_ns: When the recordings were looked for, Unix ns.
            observed: Those that are exposed.
        """
        groups: dict[tuple[Key, tuple[int, ...]], list[tuple[Observed, Transfers]]] = {}
        for each in observed:
            # The end of one that has ended is read once.
            if each.group is None or not (each.up or each.uuid in self._cursors):
                continue
            try:
                transfers = self._new(each)
            except RecordingError as error:
                log.warning("%s", error)
                continue
            self._count(each, transfers)
            whole = (each.identity.key, each.group.ranks)
            groups.setdefault(whole, []).append((each, transfers))
        for (key, ranks), members in groups.items():
            if {each.identity.rank for each, _ in members} == set(ranks):
                self._wait(key, ranks, members)
        there = {each.uuid for each in observed}
        self._cursors = {
            uuid: cursor
            for uuid, cursor in self._cursors.items()
            if uuid in there and any(e.uuid == uuid and e.up for e in observed)
        }
        self.units = {uuid: units for uuid, units in self.units.items() if uuid in there}
        identities = {each.identity for each in observed}
        self.waited_ns = {k: v for k, v in self.waited_ns.items() if k[0] in identities}
        self.assignments = Counter(
            {k: v for k, v in self.assignments.items() if k[0] in identities}
        )
        self._pending = {k: v for k, v in self._pending.items() if any(u in there for u in v)}
        self._looked_ns = time_ns

    def look_up_units(self, observed: Sequence[Observed]) -> None:
        """What rows are, without reading on: from the latest transfers of recordings not asked before."""
        for each in observed:
            if each.group is not None and each.uuid not in self.units:
                try:
                    self._see_latest_units(each)
                except RecordingError as error:
                    log.warning("%s", error)
        there = {each.uuid for each in observed}
        self.units = {uuid: units for uuid, units in self.units.items() if uuid in there and units}

    def _see_latest_units(self, each: Observed) -> None:
        behind = tuple(max(position - _UNIT_SLOTS, 0) for position in each.reader.cursor())
        self._see_units(each, each.reader.transfers(behind))

    def _new(self, each: Observed) -> Transfers:
        cursor = self._cursors.get(each.uuid)
        first = cursor is None
        if cursor is None:
            end = each.reader.cursor()
            # One that has begun since the look before is new: all of it counts.
            began = self._looked_ns and each.created_ns >= self._looked_ns
            cursor = tuple(0 for _ in end) if began else end
            if not began:
                self._see_latest_units(each)
        transfers = each.reader.transfers(cursor)
        self._cursors[each.uuid] = transfers.next_cursor
        if not first:
            self.lost[each.identity] += transfers.lost
        return transfers

    def _see_units(self, each: Observed, transfers: Transfers) -> None:
        records = transfers.records
        seen = np.unique(records["unit"][records["type"] == DISPATCH])
        self.units.setdefault(each.uuid, set()).update(
            UNITS[unit] if unit < len(UNITS) else "unknown" for unit in seen
        )

    def _count(self, each: Observed, transfers: Transfers) -> None:
        self._see_units(each, transfers)
        records = transfers.records
        counted = (records["type"] == DISPATCH) & (records["direction"] == 0)
        counted &= ~records["recompute"] & (records["num_experts"] > 0)
        rows = transfers.experts[counted].sum(axis=1, dtype=np.uint64)
        where = records["layer"][counted]
        for layer in np.unique(where[where < len(each.layers)]).tolist():
            place = (each.identity, each.layers[layer])
            self.assignments[place] += int(rows[where == layer].sum())

    def _wait(
        self, key: Key, ranks: tuple[int, ...], members: list[tuple[Observed, Transfers]]
    ) -> None:
        names = list(dict.fromkeys(name for each, _ in members for name in each.layers))
        place = {name: index for index, name in enumerate(names)}
        pending = self._pending.get(key, {})
        held: dict[int, Member] = {}
        for each, transfers in members:
            mine = _joined(pending[each.uuid], transfers) if each.uuid in pending else transfers
            places = np.array([place[name] for name in each.layers], np.int64)
            held[each.identity.rank] = Member(mine, places, _lanes(each.reader), each.about[2])
        aligned = align_transfers(key.ep_group, ranks, held)
        for op, name in OPS.items():
            spent = waiting(aligned, aligned.keys["type"] == op)
            for each, _ in members:
                slot = (each.identity, name)
                ns = int(spent.waited_ns[ranks.index(each.identity.rank)])
                if spent.transfers or slot in self.waited_ns:
                    self.waited_ns[slot] = self.waited_ns.get(slot, 0) + ns
        latest = max(
            (int(m.transfers.records["end_ns"].max()) for m in held.values() if len(m.transfers)),
            default=0,
        )
        self._pending[key] = {}
        for each, _ in members:
            column = ranks.index(each.identity.rank)
            mine = held[each.identity.rank].transfers
            rest = aligned.rows[~aligned.complete, column]
            rest = np.sort(rest[rest >= 0])
            young = mine.records["end_ns"][rest].astype(np.int64) > latest - PATIENCE_NS
            self._pending[key][each.uuid] = _chosen(mine, rest[young])


def _lanes(reader: Reader) -> int:
    return int(reader.header["num_lanes"])


def _chosen(of: Transfers, rows: NDArray[np.int64]) -> Transfers:
    """Some of the transfers, without their counts per expert."""
    empty = np.empty((len(rows), 0), np.uint32)
    return Transfers(of.records[rows], of.sent[rows], of.received[rows], empty, of.next_cursor, 0)


def _joined(before: Transfers, after: Transfers) -> Transfers:
    both = (before, after)
    return Transfers(
        records=np.concatenate([each.records for each in both]),
        sent=np.concatenate([each.sent for each in both]),
        received=np.concatenate([each.received for each in both]),
        experts=np.empty((len(before) + len(after), 0), np.uint32),
        next_cursor=after.next_cursor,
        lost=after.lost,
    )
