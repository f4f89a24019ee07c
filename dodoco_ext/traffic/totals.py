"""Who sent how much to whom in the whole run: exact rank x rank matrices of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.errors import RecordingError
from dodoco_ext.fleet import Fleet
from dodoco_ext.fleet_snapshot import Unread
from dodoco_ext.transfers import TrafficTotals

Sums = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class LayerTraffic:
    """One layer and operation in the whole run, as every rank of the group counted it.

    Attributes:
        layer: Name of the layer.
        op: `DISPATCH` or `COMBINE`.
        totals: The totals of each rank, by its column; ranks without a recording, or without this
            layer, are not in it.
        num_ranks: R, ranks of the group.
    """

    layer: str
    op: int
    totals: Mapping[int, TrafficTotals]
    num_ranks: int

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which ranks counted, [R]."""
        return np.isin(np.arange(self.num_ranks), list(self.totals))

    def each(self, name: str) -> NDArray[np.int64]:
        """A scalar of `TrafficTotals` rank by rank, int64 [R]; 0 for ranks that did not count."""
        values = np.zeros(self.num_ranks, np.int64)
        for column, totals in self.totals.items():
            values[column] = min(getattr(totals, name), np.iinfo(np.int64).max)
        return values

    @property
    def sent(self) -> Sums:
        """Rows sent in forward transfers, uint64 [R source, R destination], by their senders."""
        matrix = np.zeros((self.num_ranks, self.num_ranks), np.uint64)
        for column, totals in self.totals.items():
            matrix[column, :] = totals.sent
        return matrix

    @property
    def received(self) -> Sums:
        """The same by their receivers, uint64 [R source, R destination]."""
        matrix = np.zeros((self.num_ranks, self.num_ranks), np.uint64)
        for column, totals in self.totals.items():
            matrix[:, column] = totals.received
        return matrix

    @property
    def received_rows(self) -> Sums:
        """Rows that each rank received from all, uint64 [R]; 0 for ranks that did not count."""
        sums = np.zeros(self.num_ranks, np.uint64)
        for column, totals in self.totals.items():
            sums[column] = totals.received.sum(dtype=np.uint64)
        return sums

    @property
    def equal(self) -> bool:
        """Whether all ranks that counted have executed equally often, and none was in the middle.

        Otherwise the ranks' rows and columns are sums over different numbers of transfers, as where
        one died first, joined late, or the run goes on while it is read.
        """
        counts = {totals.executions for totals in self.totals.values()}
        return len(counts) <= 1 and not any(totals.in_flight for totals in self.totals.values())

    @property
    def complete(self) -> bool:
        """Whether every rank of the group counted, all equally often: the matrix is one of the run."""
        return len(self.totals) == self.num_ranks and self.equal

    @property
    def agree(self) -> bool:
        """Whether senders and receivers that both counted say the same."""
        both = np.outer(self.present, self.present)
        return bool((self.sent == self.received)[both].all())


@dataclass(frozen=True)
class GroupTraffic:
    """The traffic of one group of ranks.

    Attributes:
        name: Name of the group, such as `ep`.
        ranks: Its global ranks, one a column.
        layers: One entry for every layer and operation that a rank executed.
        absent: Ranks that are not in it, each with its reason.
    """

    name: str
    ranks: tuple[int, ...]
    layers: tuple[LayerTraffic, ...]
    absent: tuple[Unread, ...]

    def total(self, op: int) -> LayerTraffic:
        """All layers of an operation added up.

        Ranks that have not executed a layer count what they have; `equal` compares the sums.
        """
        sums: dict[int, TrafficTotals] = {}
        for each in self.layers:
            if each.op == op:
                for column, totals in each.totals.items():
                    sums[column] = _added(sums[column], totals) if column in sums else totals
        return LayerTraffic("all layers", op, sums, len(self.ranks))


def traffic_of(fleet: Fleet) -> tuple[GroupTraffic, ...]:
    """The exact traffic of a run since its recordings began, one entry a group of ranks.

    The ranks are read one after another: while they run, one may be some transfers ahead (`equal`).
    """
    found = []
    for group in fleet.groups:
        absent = list(group.absent)
        held: dict[tuple[int, int], dict[int, TrafficTotals]] = {}
        for rank, reader in group.readers.items():
            try:
                each = reader.traffic()
            except RecordingError as error:
                absent.append(Unread(rank, error.state, str(error), reader.path))
                continue
            for totals in each:
                place = fleet.place_of(rank, totals.layer)
                held.setdefault((place, totals.op), {})[group.ranks.index(rank)] = totals
        layers = tuple(
            LayerTraffic(fleet.layers[place].name, op, totals, len(group.ranks))
            for (place, op), totals in sorted(held.items())
            if any(_executed(each) for each in totals.values())
        )
        found.append(GroupTraffic(group.name, group.ranks, layers, tuple(absent)))
    return tuple(found)


def _executed(totals: TrafficTotals) -> bool:
    return bool(totals.executions or totals.backward or totals.recomputed)


def _added(a: TrafficTotals, b: TrafficTotals) -> TrafficTotals:
    return TrafficTotals(
        layer=a.layer,
        op=a.op,
        executions=a.executions + b.executions,
        backward=a.backward + b.backward,
        recomputed=a.recomputed + b.recomputed,
        untimed=a.untimed + b.untimed,
        sent_bytes=a.sent_bytes + b.sent_bytes,
        received_bytes=a.received_bytes + b.received_bytes,
        duration_ns=a.duration_ns + b.duration_ns,
        sent=a.sent + b.sent,
        received=a.received + b.received,
        in_flight=a.in_flight or b.in_flight,
    )
