"""Transfers of several ranks side by side: one execution of an AlltoAll, as each of its ranks saw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.errors import InputError
from dodoco_ext.fleet_snapshot import Unread
from dodoco_ext.transfers import COMBINE, DISPATCH, TRANSFER_DTYPE

if TYPE_CHECKING:
    from dodoco_ext.fleet import FleetLayer
    from dodoco_ext.transfers import Transfers

Mask: TypeAlias = NDArray[np.bool_]
Rows: TypeAlias = NDArray[np.uint32]

KEY_DTYPE = np.dtype(
    [
        ("iteration", "<u8"),
        ("lane", "<u4"),
        ("sequence", "<u4"),
        ("microbatch", "<u4"),
        ("layer", "<u4"),
        ("occurrence", "<u4"),
        ("type", "u1"),
        ("direction", "u1"),
        ("recompute", "?"),
    ]
)
"""What names a transfer. `occurrence`: the nth with all else but `sequence` equal, of those held."""

OPS = {DISPATCH: "dispatch", COMBINE: "combine"}

HOST_SKEW_NS = 1_000_000_000
"""By how much clocks of one host may differ: a rank's clock is read once, and the host's may be set."""

NODE_SKEW_NS = 60_000_000_000
"""The same between hosts, and where stamps are not those of the transfer but of its launch: a minute
is no error of a clock any more, nor a launch so long ahead."""

_ORDER = ("recompute", "direction", "type", "layer", "microbatch", "sequence", "iteration", "lane")


@dataclass(frozen=True)
class Member:
    """What one rank of a group brings.

    Attributes:
        transfers: Its transfers, in order.
        places: Where each of its layers is among the layers of the run, [layers].
        lanes: Lanes that its recording has.
        host: The machine it ran on; clocks of one host are compared more strictly.
    """

    transfers: Transfers
    places: NDArray[np.int64]
    lanes: int = 1
    host: str = ""


@dataclass(frozen=True, eq=False)
class AlignedTransfers:
    """The transfers of one group of ranks, matched by lane, iteration, place and sequence number.

    A row is one execution of an AlltoAll, a column one rank of the group. Ranks of a group execute the
    same collectives in the same order, so that all of them give a transfer the same number
    (`sequence`); records that agree in all else are not put together where that differs. What is put
    together is checked: `agree`, `apart`. Only `sound` rows are a matrix; sums take no others.

    Attributes:
        name: Name of the group, such as `ep`.
        ranks: Its global ranks, one a column, those without a recording included.
        layers: The layers of the run.
        keys: One a row, dtype `KEY_DTYPE`, in the order of lane, iteration and execution; `layer` is
            the index in `layers`.
        members: What was read of each column; None where nothing was.
        absent: The ranks of which nothing was, each with its reason.
        rows: Where each rank's record of a row is in its transfers, [n, R]; -1: nowhere.
        agree: Whether all that is recorded of a row twice, by its sender and by its receiver, is the
            same, [n].
        apart: Whether by the clocks a rank had received something before another sent it: records of
            different transfers, such as those of a rank that joined late, [n].
        disputes: Rows in which source and destination, both recorded, say different things, [R, R].
        lost: Ring slots of each rank that were overwritten before they were read.
        left_out: Records of each rank in no row: of an unknown type, layer or lane, or of a row that
            another record of the rank has taken (a damaged file).
    """

    name: str
    ranks: tuple[int, ...]
    layers: tuple[FleetLayer, ...]
    keys: NDArray[np.void]
    members: tuple[Member | None, ...]
    absent: tuple[Unread, ...]
    rows: NDArray[np.int64]
    agree: Mask
    apart: Mask
    disputes: NDArray[np.int64]
    lost: Mapping[int, int]
    left_out: Mapping[int, int]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def present(self) -> Mask:
        """Whether a rank has a record of a row, [n, R]."""
        return self.rows >= 0

    @cached_property
    def complete(self) -> Mask:
        """Whether every rank of the group has, [n]. Never where one is absent."""
        everywhere: Mask = np.all(self.present, axis=1)
        return everywhere

    @property
    def sound(self) -> Mask:
        """Whether a row is complete and nothing speaks against it, [n]."""
        return self.complete & self.agree & ~self.apart

    @cached_property
    def out_of_step(self) -> Mask:
        """Rows that lack ranks and would match another such row but for the sequence number, [n]."""
        names = [name for name in _ORDER if name != "sequence"]
        partial = np.flatnonzero(~self.complete)
        _, inverse, counts = np.unique(
            self.keys[partial][names], return_inverse=True, return_counts=True
        )
        found = np.zeros(len(self), bool)
        found[partial] = counts[inverse.reshape(-1)] > 1
        return found

    def field(self, name: str, fill: int = 0) -> NDArray[Any]:
        """One field of the records side by side.

        Args:
            name: A field of `TRANSFER_DTYPE`.
            fill: The value where a rank has no record of the row; see `present`.

        Returns:
            [n, R], of the field's dtype.
        """
        if name not in (TRANSFER_DTYPE.names or ()):
            raise InputError(
                f"transfers have no field {name!r}: it is one of {TRANSFER_DTYPE.names}"
            )
        side_by_side = np.full(self.rows.shape, fill, TRANSFER_DTYPE[name])
        for column, there, row in self._held(slice(None)):
            side_by_side[there, column] = self._of(column).records[name][row]
        return side_by_side

    def sent(self, which: Mask | slice = slice(None)) -> Rows:
        """Rows of the messages as their senders recorded them, uint32 [m, R source, R destination].

        Args:
            which: The rows wanted, [n] or a slice: R x R numbers each. All by default.

        Returns:
            The matrices; 0 in the rows of ranks without a record (see `present`).
        """
        matrices = self._empty(which)
        for column, there, row in self._held(which):
            matrices[there, column, :] = self._of(column).sent[row]
        return matrices

    def received(self, which: Mask | slice = slice(None)) -> Rows:
        """The same as their receivers recorded them; 0 in the columns of ranks without a record."""
        matrices = self._empty(which)
        for column, there, row in self._held(which):
            matrices[there, :, column] = self._of(column).received[row]
        return matrices

    def total(self, which: Mask | None = None) -> NDArray[np.uint64]:
        """The sum of the matrices of the sound rows, uint64 [R source, R destination].

        Args:
            which: Only of these, [n]; all by default.
        """
        chosen = self.sound if which is None else self.sound & which
        sums = np.zeros((len(self.ranks),) * 2, np.uint64)
        for column, _, row in self._held(chosen):
            sums[column] = self._of(column).sent[row].sum(axis=0, dtype=np.uint64)
        return sums

    def received_rows(self, which: Mask | slice = slice(None)) -> NDArray[np.uint64]:
        """Rows that each rank received from all, uint64 [m, R]; 0 for ranks without a record."""
        sums = np.zeros(self.rows[which].shape, np.uint64)
        for column, there, row in self._held(which):
            sums[there, column] = self._of(column).received[row].sum(axis=1, dtype=np.uint64)
        return sums

    def of(self, type: int, *, backward: bool = False, layer: int | None = None) -> Mask:  # noqa: A002
        """The rows of one operation that is no recomputation, and of one layer, [n]."""
        kind: Mask = (self.keys["type"] == type) & ~self.keys["recompute"]
        kind &= self.keys["direction"] == int(backward)
        return kind if layer is None else kind & (self.keys["layer"] == layer)

    def _of(self, column: int) -> Transfers:
        member = self.members[column]
        assert member is not None, "an absent rank has no rows"
        return member.transfers

    def _empty(self, which: Mask | slice) -> Rows:
        num_ranks = len(self.ranks)
        return np.zeros((len(self.rows[which]), num_ranks, num_ranks), np.uint32)

    def _held(self, which: Mask | slice) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """For each column with any: where among the chosen rows it has a record, and which one."""
        chosen = self.rows[which]
        each = []
        for column in range(chosen.shape[1]):
            there = np.flatnonzero(chosen[:, column] >= 0)
            if len(there):
                each.append((column, there, chosen[there, column]))
        return each


def align_transfers(
    name: str,
    ranks: Sequence[int],
    members: Mapping[int, Member],
    layers: tuple[FleetLayer, ...] = (),
    absent: Sequence[Unread] = (),
) -> AlignedTransfers:
    """Puts the transfers of one group side by side; `Fleet.transfers` is the way to call it.

    Args:
        name: Name of the group.
        ranks: Its global ranks, in its order.
        members: What was read of them.
        layers: The layers of the run.
        absent: The others, with their reasons.
    """
    columns = [members.get(rank) for rank in ranks]
    keyed = [_keyed(member, len(ranks)) for member in columns]
    keys = np.concatenate([keys for keys, _ in keyed] or [np.empty(0, KEY_DTYPE)])
    row = np.concatenate([row for _, row in keyed] or [np.empty(0, np.int64)])
    column = np.repeat(np.arange(len(keyed)), [len(row) for _, row in keyed])
    # Stable, so that of a damaged ring's records of one key the later is taken.
    order = np.lexsort([keys[field] for field in _ORDER])
    keys, column, row = keys[order], column[order], row[order]
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    rows = np.full((int(first.sum()), len(ranks)), -1, np.int64)
    rows[np.cumsum(first) - 1, column] = row
    keys = keys[first]
    keys["occurrence"] = _occurrences(keys)
    agree, disputes = _compared(columns, rows)
    return AlignedTransfers(
        name=name,
        ranks=tuple(ranks),
        layers=layers,
        keys=keys,
        members=tuple(columns),
        absent=tuple(absent),
        rows=rows,
        agree=agree,
        apart=_apart(columns, rows),
        disputes=disputes,
        lost={rank: members[rank].transfers.lost for rank in ranks if rank in members},
        left_out={
            rank: len(member.transfers.records) - int((rows[:, index] >= 0).sum())
            for index, rank in enumerate(ranks)
            if (member := members.get(rank)) is not None
        },
    )


def _keyed(member: Member | None, num_ranks: int) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """Keys and rows of the records that can be aligned."""
    if member is None or member.transfers.sent.shape[1:] != (num_ranks,):
        return np.empty(0, KEY_DTYPE), np.empty(0, np.int64)
    records = member.transfers.records
    usable = np.isin(records["type"], list(OPS)) & (records["direction"] <= 1)
    usable &= (records["layer"] < len(member.places)) & (records["lane"] < member.lanes)
    row = np.flatnonzero(usable)
    keys = np.zeros(len(row), KEY_DTYPE)
    for name in _ORDER:
        keys[name] = records[name][row]
    keys["layer"] = member.places[records["layer"][row]]
    return keys, row


def _occurrences(keys: NDArray[np.void]) -> NDArray[np.int64]:
    """For each key, how many before it differ from it in `sequence` only."""
    if not len(keys):
        return np.empty(0, np.int64)
    names = [name for name in _ORDER if name != "sequence"]
    _, inverse = np.unique(keys[names], return_inverse=True)
    kind = inverse.reshape(-1)
    order = np.argsort(kind, kind="stable")
    starts = np.searchsorted(kind[order], kind[order])
    found = np.empty(len(keys), np.int64)
    found[order] = np.arange(len(keys)) - starts
    return found


def _pairs(
    rows: NDArray[np.int64],
) -> list[tuple[int, int, NDArray[np.int64]]]:
    """Each sender and receiver with the rows that both have a record of."""
    there = rows >= 0
    held = np.flatnonzero(there.any(axis=0)).tolist()
    pairs = ((i, j, np.flatnonzero(there[:, i] & there[:, j])) for i in held for j in held)
    return [(i, j, both) for i, j, both in pairs if len(both)]


def _compared(
    columns: Sequence[Member | None], rows: NDArray[np.int64]
) -> tuple[Mask, NDArray[np.int64]]:
    """Which rows hold no contradiction, and in how many each pair contradicts itself."""
    agree = np.ones(len(rows), bool)
    disputes = np.zeros((len(columns),) * 2, np.int64)
    for i, j, both in _pairs(rows):
        source, destination = columns[i], columns[j]
        assert source is not None
        assert destination is not None
        said, heard = source.transfers, destination.transfers
        at_source, at_destination = rows[both, i], rows[both, j]
        differ = said.sent[at_source, j] != heard.received[at_destination, i]
        differ |= said.records["unit"][at_source] != heard.records["unit"][at_destination]
        agree[both[differ]] = False
        disputes[i, j] = int(differ.sum())
    return agree, disputes


def _apart(columns: Sequence[Member | None], rows: NDArray[np.int64]) -> Mask:
    """Which rows have been received by a rank before another sent."""
    apart = np.zeros(len(rows), bool)
    for i, j, both in _pairs(rows):
        source, destination = columns[i], columns[j]
        assert source is not None
        assert destination is not None
        at_source, at_destination = rows[both, i], rows[both, j]
        sent = source.transfers.records[at_source]
        received = destination.transfers.records[at_destination]
        strict = sent["timed"] & received["timed"] & (source.host == destination.host)
        skew = np.where(strict, HOST_SKEW_NS, NODE_SKEW_NS)
        late = sent["begin_ns"].astype(np.float64) - received["end_ns"].astype(np.float64)
        something = source.transfers.sent[at_source, j] > 0
        apart[both[something & (late > skew)]] = True
    return apart
