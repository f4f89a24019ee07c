"""Records of several ranks side by side: matched by lane, iteration, micro-batch and layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.errors import InputError
from dodoco_ext.recording import RECORD_DTYPE, ROUTE

if TYPE_CHECKING:
    from dodoco_ext.fleet import FleetLayer
    from dodoco_ext.fleet_snapshot import Unread

KEY_DTYPE = np.dtype(
    [("lane", "<u4"), ("iteration", "<u8"), ("microbatch", "<u4"), ("layer", "<u4")]
)


@dataclass(frozen=True, eq=False)
class Aligned:
    """The ROUTE records of several ranks, matched by lane, iteration, micro-batch and layer.

    A group is one such combination. Groups are ordered by lane, iteration, micro-batch and layer.
    Iterations are counted by each lane for itself, so that equal numbers in different lanes are
    different passes; lane i of one rank is matched with lane i of another.

    Attributes:
        keys: The groups, dtype `KEY_DTYPE`; `layer` is the index in `layers`.
        layers: The layers of the run.
        ranks: The ranks read, one a column.
        records: The records of each rank, one array of `RECORD_DTYPE` a column, as they were read.
        complete: For each group, whether all ranks read that have its layer and its lane have a record
            of it. Groups at both ends of the rings of a running job are often not complete.
        lost: Records of each rank that were overwritten before they could be read.
        left_out: Records of each rank that are in no group: of a type other than a forward ROUTE, of a
            layer that does not exist, or of a group that another record of the rank has taken.
        missing: Ranks of the run that are not in it, and why; `complete` does not wait for them.
    """

    keys: NDArray[np.void]
    layers: tuple[FleetLayer, ...]
    ranks: tuple[int, ...]
    records: tuple[NDArray[np.void], ...]
    complete: NDArray[np.bool_]
    lost: Mapping[int, int]
    left_out: Mapping[int, int]
    missing: tuple[Unread, ...]
    _group: NDArray[np.int64]
    _column: NDArray[np.int64]
    _row: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Where each rank's record of a group is in its `records`, [groups, ranks]; -1: nowhere."""
        rows = np.full((len(self.keys), len(self.ranks)), -1, np.int64)
        rows[self._group, self._column] = self._row
        return rows

    @property
    def present(self) -> NDArray[np.bool_]:
        """Whether a rank has a record of a group, [groups, ranks]."""
        return self.rows >= 0

    def field(self, name: str, fill: int = 0) -> NDArray[Any]:
        """One field of the records side by side.

        Args:
            name: A field of `RECORD_DTYPE`.
            fill: The value where a rank has no record of the group; see `present`.

        Returns:
            [groups, ranks], of the field's dtype. Scope of each number: one pass of one rank.
        """
        if name not in (RECORD_DTYPE.names or ()):
            raise InputError(f"records have no field {name!r}: it is one of {RECORD_DTYPE.names}")
        side_by_side = np.full(self.rows.shape, fill, RECORD_DTYPE[name])
        for column, records in enumerate(self.records):
            mine = self._column == column
            side_by_side[self._group[mine], column] = records[name][self._row[mine]]
        return side_by_side


@dataclass(frozen=True, eq=False)
class Part:
    """What one rank brings.

    Attributes:
        lanes: Lanes that its recording has.
        places: Where each of its layers is among the layers of the run, [layers].
        records: Its records, in order, dtype `RECORD_DTYPE`.
    """

    lanes: int
    places: NDArray[np.int64]
    records: NDArray[np.void]

    def keyed(self) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """Keys and rows of the records that can be aligned."""
        records = self.records
        usable = (records["type"] == ROUTE) & (records["direction"] == 0) & ~records["recompute"]
        usable &= (records["layer"] < len(self.places)) & (records["lane"] < self.lanes)
        row = np.flatnonzero(usable)
        keys = np.empty(len(row), KEY_DTYPE)
        for name in ("lane", "iteration", "microbatch"):
            keys[name] = records[name][row]
        keys["layer"] = self.places[records["layer"][row]]
        return keys, row


def align(
    parts: Mapping[int, Part],
    layers: tuple[FleetLayer, ...],
    lost: Mapping[int, int],
    missing: tuple[Unread, ...],
) -> Aligned:
    """Puts the records of some ranks side by side; `Fleet.align` is the way to call it.

    Args:
        parts: What each rank brings, by ascending rank.
        layers: The layers of the run.
        lost: Records of each rank known to be lost; for the result.
        missing: Ranks left out, and why; for the result.
    """
    keyed = [part.keyed() for part in parts.values()]
    keys = np.concatenate([keys for keys, _ in keyed] or [np.empty(0, KEY_DTYPE)])
    row = np.concatenate([row for _, row in keyed] or [np.empty(0, np.int64)])
    column = np.repeat(np.arange(len(keyed)), [len(row) for _, row in keyed])
    # Stable, so that within a group the ranks keep their order, and a rank its records theirs.
    minor = keys["microbatch"].astype(np.uint64) << np.uint64(32) | keys["layer"]
    order = np.lexsort((minor, keys["iteration"], keys["lane"]))
    keys, column, row = keys[order], column[order], row[order]
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    group = np.cumsum(first) - 1
    # A sound writer makes no key twice; of a damaged ring's, the later record is taken.
    last = np.ones(len(keys), bool)
    last[:-1] = (group[1:] != group[:-1]) | (column[1:] != column[:-1])
    keys, group, column, row = keys[first], group[last], column[last], row[last]
    there = np.bincount(group, minlength=len(keys))
    counted = np.bincount(column, minlength=len(parts))
    return Aligned(
        keys=keys,
        layers=layers,
        ranks=tuple(parts),
        records=tuple(part.records for part in parts.values()),
        complete=there == _expected(parts, len(layers))[keys["lane"], keys["layer"]],
        lost=lost,
        left_out={
            rank: len(part.records) - int(n)
            for (rank, part), n in zip(parts.items(), counted, strict=True)
        },
        missing=missing,
        _group=group,
        _column=column,
        _row=row,
    )


def _expected(parts: Mapping[int, Part], num_layers: int) -> NDArray[np.int64]:
    """How many ranks have each lane and layer, [lanes, layers]."""
    expected = np.zeros((max((p.lanes for p in parts.values()), default=1), num_layers), np.int64)
    for part in parts.values():
        expected[: part.lanes, part.places] += 1
    return expected
