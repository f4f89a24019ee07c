"""Transfers of several ranks with known content, made without a recorder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.fleet import FleetLayer
from dodoco_ext.transfer_alignment import AlignedTransfers, Member, align_transfers
from dodoco_ext.transfers import COMBINE, DISPATCH, TRANSFER_DTYPE, Transfers

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND


@dataclass(frozen=True, eq=False)
class Exchange:
    """What really happened: one execution of an AlltoAll by all ranks.

    `number` is its place in the run; it is stored as `bytes_per_row`, so that a test can tell which
    transfer a record is of whatever the record says.
    """

    number: int
    iteration: int
    layer: int
    type: int
    matrix: NDArray[np.int64]
    backward: bool = False
    recompute: bool = False


def exchanges(
    matrices: Sequence[NDArray[np.int64]], layers: int = 2, repeats: int = 1
) -> list[Exchange]:
    """Dispatch and combine of each layer in turn, each `repeats` times, for as long as there are
    matrices; a combine sends back what came."""
    found: list[Exchange] = []
    for number, matrix in enumerate(matrices):
        place, _ = divmod(number, repeats)
        iteration, within = divmod(place, 2 * layers)
        kind = (DISPATCH, COMBINE)[within % 2]
        found.append(Exchange(number, iteration, within // 2, kind, np.asarray(matrix)))
    return found


def transfers(
    run: Sequence[Exchange],
    rank: int,
    *,
    late: int = 0,
    spacing_ns: int = 2 * SECOND,
    durations_ns: Sequence[int] | None = None,
    timed: bool = True,
    experts: int = 0,
) -> Transfers:
    """What one rank recorded of a run.

    Args:
        run: What happened.
        rank: Its place in the group.
        late: Iterations that it missed; it counts from 0 then, transfers too.
        spacing_ns: From the end of one transfer to that of the next.
        durations_ns: One a transfer.
        timed: Whether the stamps are those of the transfer.
        experts: Local experts, which share the received rows as evenly as can be.
    """
    mine = [each for each in run if each.iteration >= late]
    records = np.zeros(len(mine), TRANSFER_DTYPE)
    num_ranks = len(run[0].matrix) if run else 1
    sent = np.zeros((len(mine), num_ranks), np.uint32)
    received = np.zeros_like(sent)
    for index, each in enumerate(mine):
        end = START + (each.number + 1) * spacing_ns
        lasted = 1_000_000 if durations_ns is None else durations_ns[each.number]
        record = records[index]
        record["iteration"], record["layer"], record["type"] = (
            each.iteration - late,
            each.layer,
            each.type,
        )
        record["begin_ns"], record["end_ns"] = end - lasted, end
        record["sequence"], record["bytes_per_row"] = index, each.number
        record["direction"], record["recompute"] = each.backward, each.recompute
        record["timed"], record["num_experts"] = timed, experts
        sent[index], received[index] = each.matrix[rank, :], each.matrix[:, rank]
    counts = np.zeros((len(mine), experts), np.uint32)
    for expert in range(experts):
        counts[:, expert] = (received.sum(axis=1) + experts - 1 - expert) // experts
    return Transfers(records, sent, received, counts, (len(mine),), 0)


def kept(of: Transfers, mask: Sequence[bool] | NDArray[np.bool_]) -> Transfers:
    """Only some of the records: the others were lost."""
    chosen = np.asarray(mask, bool)
    return replace(
        of,
        records=of.records[chosen],
        sent=of.sent[chosen],
        received=of.received[chosen],
        experts=of.experts[chosen],
        lost=int((~chosen).sum()),
    )


def aligned(
    each: dict[int, Transfers], num_ranks: int, layers: int = 2, num_experts: int = 8
) -> AlignedTransfers:
    """The transfers of the members of a group, aligned."""
    ranks = tuple(range(num_ranks))
    named = tuple(FleetLayer(f"layers.{i}", num_experts, 2, ranks) for i in range(layers))
    places = np.arange(layers)
    members = {rank: Member(of, places, 1, "host") for rank, of in each.items()}
    return align_transfers("ep", ranks, members, named)
