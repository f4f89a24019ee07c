"""A run second by second, before its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.recording import RECORD_DTYPE
from dodoco_ext.traffic.standing import row_times
from dodoco_ext.traffic.waiting import waiting
from dodoco_ext.transfer_alignment import AlignedTransfers, Mask
from dodoco_ext.transfers import DISPATCH


@dataclass(frozen=True)
class Step:
    """One line of the table over time, all ranks read.

    Attributes:
        from_s: Its begin, seconds before the end.
        first, last: Iterations; -1 where there are none.
        passes: ROUTE records, and `tokens` in them.
        transfers: Records of transfers, of all ranks, all kinds.
        rows: Rows received in forward dispatches.
        max_over_mean: Those of the busiest rank over the mean of the ranks; `busiest` is that rank.
        waited_s: All ranks, all transfers; an estimate.
    """

    from_s: float
    first: int
    last: int
    passes: int
    tokens: int
    transfers: int
    rows: int
    max_over_mean: float
    busiest: int | None
    waited_s: float


def counted(group: AlignedTransfers) -> Mask:
    """Forward dispatches of which nothing speaks against what single ranks recorded."""
    return group.of(DISPATCH) & group.agree & ~group.apart


def steps_of(
    routes: Mapping[int, NDArray[np.void]],
    groups: Sequence[AlignedTransfers],
    end_ns: int,
    step_s: int,
    number: int,
) -> tuple[Step, ...]:
    """The steps before the end of a run, the earliest first; `number` of `step_s` seconds."""
    passes = np.concatenate([*routes.values()]) if routes else np.empty(0, RECORD_DTYPE)
    pass_step = _step_of(passes["time_ns"], end_ns, step_s)
    group_steps = [_step_of(row_times(group), end_ns, step_s) for group in groups]
    return tuple(
        _step(
            passes[pass_step == step],
            groups,
            [steps == step for steps in group_steps],
            float(step_s * (step + 1)),
        )
        for step in range(number - 1, -1, -1)
    )


def _step_of(times: NDArray[np.integer[Any]], end_ns: int, step_s: int) -> NDArray[np.int64]:
    return (end_ns - times.astype(np.int64)) // np.int64(step_s * 1_000_000_000)


def _step(
    passes: NDArray[np.void],
    groups: Sequence[AlignedTransfers],
    chosen: Sequence[Mask],
    from_s: float,
) -> Step:
    received: dict[int, int] = {}
    waited, transfers = 0.0, 0
    iterations = [passes["iteration"]]
    for group, mask in zip(groups, chosen, strict=True):
        rows = group.received_rows(counted(group) & mask).sum(axis=0)
        received.update(
            (rank, int(n))
            for rank, n, member in zip(group.ranks, rows, group.members, strict=True)
            if member is not None
        )
        waited += float(waiting(group, mask).waited_ns.sum()) / 1e9
        transfers += int(group.present[mask].sum())
        iterations.append(group.keys["iteration"][mask])
    every = np.concatenate(iterations)
    total = sum(received.values())
    busiest = max(received, key=lambda rank: received[rank]) if total else None
    peak = nan if busiest is None else received[busiest] * len(received) / total
    return Step(
        from_s=from_s,
        first=int(every.min()) if len(every) else -1,
        last=int(every.max()) if len(every) else -1,
        passes=len(passes),
        tokens=int(passes["tokens"].sum(dtype=np.uint64)),
        transfers=transfers,
        rows=total,
        max_over_mean=peak,
        busiest=busiest,
        waited_s=waited,
    )
