"""Transfers, the executions of an AlltoAll, as arrays; and their exact totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import _C
from dodoco_ext.errors import InputError

# Mirrors TransferRecord in csrc/recording_reader.h.
TRANSFER_DTYPE = np.dtype(
    [
        ("iteration", "<u8"),
        ("begin_ns", "<u8"),
        ("end_ns", "<u8"),
        ("layer", "<u4"),
        ("microbatch", "<u4"),
        ("bytes_per_row", "<u4"),
        ("sequence", "<u4"),
        ("num_experts", "<u4"),
        ("map_version", "<u4"),
        ("type", "u1"),
        ("lane", "u1"),
        ("direction", "u1"),
        ("recompute", "?"),
        ("timed", "?"),
        ("unit", "u1"),
        ("reserved", "<u2"),
    ]
)
DISPATCH, COMBINE = 2, 3
UNITS = ("assignment", "token")
"""What a row of a message is, by `unit`."""

_Rows: TypeAlias = NDArray[np.uint32]
_SCALARS = (
    "executions",
    "backward",
    "recomputed",
    "untimed",
    "sent_bytes",
    "received_bytes",
    "duration_ns",
)
# Words of a traffic block: kForward, kBackward, kRecomputedTransfers, kUntimed, ...
_FIRST_SCALAR = 1


@dataclass(frozen=True)
class Group:
    """The ranks that transfers are between.

    Attributes:
        ranks: Their global ranks, in the order of the counts.
        index: Place of the recording's own rank among them.
        name: What the group is called, such as `ep`.
    """

    ranks: tuple[int, ...]
    index: int
    name: str


@dataclass(frozen=True, eq=False)
class Transfers:
    """Transfers that a ring held, ordered by their end.

    Attributes:
        records: [n], dtype `TRANSFER_DTYPE`. `begin_ns` and `end_ns` are Unix nanoseconds by the clock
            of the recording's machine; where `timed` is false they are not those of the transfer.
        sent: Rows sent to each rank of the group, uint32 [n, ranks].
        received: Rows received from each rank of the group, uint32 [n, ranks].
        experts: Rows received for each local expert, uint32 [n, most num_experts]; zeros past a record's
            own `num_experts`.
        next_cursor: To read on from.
        lost: Slots of the rings that were overwritten before they could be read.
    """

    records: NDArray[np.void]
    sent: _Rows
    received: _Rows
    experts: _Rows
    next_cursor: tuple[int, ...]
    lost: int

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True, eq=False)
class TrafficTotals:
    """All transfers of one layer and type so far, of all lanes; or those of a window.

    Attributes:
        layer: Index of the layer.
        op: `DISPATCH` or `COMBINE`.
        executions: Forward ones that are no recomputation; `sent` and `received` count these.
        backward: Those in the backward pass.
        recomputed: Those of a recomputed forward pass.
        untimed: Those of any kind without a duration.
        sent_bytes: Bytes of all kinds, to the own rank too.
        received_bytes: Likewise.
        duration_ns: Sum over all timed ones, from begin to end as recorded.
        sent: Rows to each rank, uint64 [ranks].
        received: Rows from each rank, uint64 [ranks].
        in_flight: The writer was in the middle of a transfer: totals may disagree by that one.
    """

    layer: int
    op: int
    executions: int
    backward: int
    recomputed: int
    untimed: int
    sent_bytes: int
    received_bytes: int
    duration_ns: int
    sent: NDArray[np.uint64]
    received: NDArray[np.uint64]
    in_flight: bool

    def __sub__(self, earlier: TrafficTotals) -> TrafficTotals:
        """What happened between two readings of one recording.

        Raises:
            InputError: They are of two layers or types, or in the wrong order.
        """
        if not isinstance(earlier, TrafficTotals):
            return NotImplemented
        if (self.layer, self.op) != (earlier.layer, earlier.op):
            raise InputError(
                f"totals of layer {self.layer}, type {self.op}, and of layer {earlier.layer}, type "
                f"{earlier.op}, cannot be subtracted: take both of one"
            )
        changed: dict[str, Any] = {
            name: getattr(self, name) - getattr(earlier, name) for name in _SCALARS
        }
        if min(changed.values()) < 0:
            raise InputError("later totals were subtracted from earlier ones: swap them")
        return replace(
            self,
            **changed,
            sent=self.sent - earlier.sent,
            received=self.received - earlier.received,
            in_flight=self.in_flight or earlier.in_flight,
        )


def group_of(metadata: dict[str, Any], size: int, index: int) -> Group | None:
    """The group that a recording's metadata names.

    Args:
        metadata: The recording's metadata.
        size: Ranks of the group by the traffic sections; 0: there are none.
        index: The own rank's place by the traffic sections.

    Raises:
        ValueError: The two disagree.
    """
    if size == 0:
        return None
    named = metadata["group"]
    group = Group(tuple(int(rank) for rank in named["ranks"]), index, str(named["name"]))
    if len(group.ranks) != size or min(group.ranks) < 0 or len(set(group.ranks)) != size:
        raise ValueError(f"a group of {size} ranks is named as {list(group.ranks)[:16]}")
    return group


def read_transfers(
    file: _C.RecordingReader, starts: Sequence[int], group: Group | None
) -> Transfers:
    """Reads the transfers of every lane from its position in `starts` on."""
    size = len(group.ranks) if group else 0
    parts = [file.transfers(lane, start) for lane, start in enumerate(starts)]
    records = np.concatenate([data.view(TRANSFER_DTYPE) for data, *_ in parts])
    flat = np.concatenate([counts for _, counts, *_ in parts])
    own = records["num_experts"].astype(np.int64)
    first = np.zeros(len(records) + 1, np.int64)
    np.cumsum(2 * size + own, out=first[1:])
    rows = flat[first[:-1, None] + np.arange(2 * size)] if len(records) else np.empty((0, 2 * size))
    experts = np.zeros((len(records), int(own.max(initial=0))), np.uint32)
    there = np.arange(experts.shape[1]) < own[:, None]
    places = first[:-1, None] + 2 * size + np.arange(experts.shape[1])
    experts[there] = flat[places[there]]
    order = np.argsort(np.ascontiguousarray(records["end_ns"]), kind="stable")
    return Transfers(
        records=records[order],
        sent=rows[order, :size].astype(np.uint32),
        received=rows[order, size:].astype(np.uint32),
        experts=experts[order],
        next_cursor=tuple(following for _, _, following, _ in parts),
        lost=sum(lost for *_, lost in parts),
    )


def read_traffic(
    file: _C.RecordingReader, num_layers: int, group: Group | None
) -> tuple[TrafficTotals, ...]:
    """Adds up the traffic blocks of all lanes: one entry for every layer and type."""
    if group is None:
        return ()
    totals = []
    for block in range(2 * num_layers):
        parts = [file.traffic(lane, block) for lane in range(file.num_lanes)]
        words = parts[0][0]
        for more, _ in parts[1:]:
            words = words + more
        rows, scalars = words[_C.TRAFFIC_WORDS :], words[: _C.TRAFFIC_WORDS].tolist()
        size = len(group.ranks)
        totals.append(
            TrafficTotals(
                layer=block // 2,
                op=DISPATCH + block % 2,
                **{name: scalars[_FIRST_SCALAR + i] for i, name in enumerate(_SCALARS)},
                sent=rows[:size].copy(),
                received=rows[size : 2 * size].copy(),
                in_flight=not all(consistent for _, consistent in parts),
            )
        )
    return tuple(totals)
