"""How long each rank waited in transfers for the slowest: an estimate, from durations alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.transfer_alignment import AlignedTransfers, Mask

SCOPE = (
    "an estimate: each rank's own duration minus the shortest of the group in that transfer, summed; "
    "whoever comes last has the shortest, and the others wait for it. Durations are compared and never "
    "clocks, which differ between nodes. Begin and end are where the recording says; without the "
    "transfers that a rank has no record or no duration of"
)


@dataclass(frozen=True, eq=False)
class Waiting:
    """What the ranks of a group waited, estimated.

    Attributes:
        ranks: The global ranks.
        waited_ns: Own duration minus the shortest of the group in the same transfer, summed, [R].
        duration_ns: Own durations, summed over the same transfers, [R].
        last: In how many of them the rank's duration was the shortest: those that waited for it, [R].
            Ranks that tie each count.
        transfers: Transfers counted: sound ones, timed by every rank.
        untimed: Sound ones left out because a rank has no duration of them.
        unsound: Others left out: of some rank there is no record, or records contradict each other.
    """

    ranks: tuple[int, ...]
    waited_ns: NDArray[np.int64]
    duration_ns: NDArray[np.int64]
    last: NDArray[np.int64]
    transfers: int
    untimed: int
    unsound: int


def durations(aligned: AlignedTransfers) -> NDArray[np.int64]:
    """Duration of each transfer at each rank, int64 [n, R] ns; -1 where there is none."""
    begin, end = (aligned.field(name).astype(np.int64) for name in ("begin_ns", "end_ns"))
    known = aligned.field("timed").astype(bool) & (end >= begin)
    return np.where(known, end - begin, -1)


def waiting(aligned: AlignedTransfers, which: Mask | None = None) -> Waiting:
    """Estimates the waiting of every rank.

    Args:
        aligned: The transfers of a group.
        which: Only of these, [n]; all by default. Forward, backward and recomputed ones count.
    """
    asked = np.ones(len(aligned), bool) if which is None else which
    sound = aligned.sound & asked
    each = durations(aligned)
    timed = sound & (each >= 0).all(axis=1)
    chosen = each[timed]
    shortest = chosen.min(axis=1, keepdims=True) if len(chosen) else chosen
    over = chosen - shortest
    return Waiting(
        ranks=aligned.ranks,
        waited_ns=over.sum(axis=0, dtype=np.int64),
        duration_ns=chosen.sum(axis=0, dtype=np.int64),
        last=(over == 0).sum(axis=0, dtype=np.int64),
        transfers=int(timed.sum()),
        untimed=int((sound & ~timed).sum()),
        unsound=int((asked & ~sound).sum()),
    )
