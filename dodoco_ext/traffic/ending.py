"""The end of a run: what each rank had finished, where the job stood, and the time before that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.fleet import Fleet
from dodoco_ext.recording import ROUTE
from dodoco_ext.traffic.experts import expert_rows
from dodoco_ext.traffic.standing import RankEnd, Stood, rank_ends, row_times, stood_of, times_held
from dodoco_ext.traffic.steps import Step, counted, steps_of
from dodoco_ext.traffic.waiting import waiting
from dodoco_ext.transfer_alignment import AlignedTransfers, Mask

MAX_STEPS = 30
"""Lines of the table over time; longer windows have longer steps, of whole seconds."""

SCOPE = {
    "window": "records with a time stamp in the window before the last record of any rank; time stamps "
    "are those of each rank's host",
    "experts": "rows that transfers say experts received, in the window; where transfers carry no counts "
    "per expert, assignments of the whole run (board)",
    "waited": "an estimate: own duration minus the shortest of the group in each transfer, summed",
}


@dataclass(frozen=True)
class HotExpert:
    """The busiest expert of a layer.

    Attributes:
        layer: Name of the layer.
        expert: Its number, or its number on its rank where placement is unknown.
        rank: The rank that received its rows; None where counts are of routers.
        count: Rows in the window, or assignments of the whole run.
        over_mean: That over the mean of the layer's experts.
        scope: `window` or `run`.
    """

    layer: str
    expert: str
    rank: int | None
    count: int
    over_mean: float
    scope: str


@dataclass(frozen=True)
class Ending:
    """The end of a run.

    Attributes:
        end_ns: The last record of any rank, Unix ns.
        window_s: Length of the window before it.
        step_s: Length of a step.
        received: Rows that each rank received in forward dispatches of the window; empty where the run
            has no transfers.
        waited_s: What each rank waited in the window, estimated; empty likewise.
    """

    end_ns: int
    window_s: float
    step_s: int
    ranks: tuple[RankEnd, ...]
    stood: tuple[Stood, ...]
    hottest: tuple[HotExpert, ...]
    steps: tuple[Step, ...]
    received: Mapping[int, int]
    waited_s: Mapping[int, float]


def ending_of(fleet: Fleet, window_s: float) -> Ending:
    """Looks at the end of a run, as its recordings hold it.

    Args:
        fleet: The run.
        window_s: How long before the last record to look.

    Raises:
        InputError: The window is not positive.
        RecordingError: No rank has a record.
    """
    if not window_s > 0:
        raise InputError(f"--last {window_s} s: give a time above 0, such as 30s")
    routes = _routes(fleet)
    groups = fleet.transfers()
    held = {rank: times_held(rank, routes.get(rank), groups) for rank in fleet.ranks}
    ends = [int(times.max()) for times in held.values() if len(times)]
    if not ends:
        raise RecordingError(
            f"run {fleet.run} has no record in its rings: `dodoco show` a recording for its counters"
        )
    end_ns, begin_ns = max(ends), max(ends) - round(window_s * 1e9)
    step_s = max(ceil(window_s / MAX_STEPS), 1)
    inside = [row_times(g) > begin_ns for g in groups]
    received: dict[int, int] = {}
    waited: dict[int, float] = {}
    for group, chosen in zip(groups, inside, strict=True):
        rows = group.received_rows(counted(group) & chosen).sum(axis=0)
        spent = waiting(group, chosen).waited_ns
        for rank, count, ns in zip(group.ranks, rows, spent, strict=True):
            received[rank], waited[rank] = int(count), float(ns) / 1e9
    return Ending(
        end_ns=end_ns,
        window_s=window_s,
        step_s=step_s,
        ranks=rank_ends(fleet, routes, groups, held, end_ns, begin_ns),
        stood=tuple(stood_of(fleet, group) for group in groups if len(group)),
        hottest=_hottest(fleet, groups, inside),
        steps=steps_of(routes, groups, end_ns, step_s, ceil(window_s / step_s)),
        received=received,
        waited_s=waited,
    )


def _routes(fleet: Fleet) -> dict[int, NDArray[np.void]]:
    found = {}
    for rank, reader in fleet.ranks.items():
        try:
            records = reader.records()
        except RecordingError:  # named by the fleet's other views, and by its state here
            continue
        known = (records["type"] == ROUTE) & (records["layer"] < fleet.num_layers(rank))
        found[rank] = records[known]
    return found


def _hottest(
    fleet: Fleet, groups: Sequence[AlignedTransfers], inside: Sequence[Mask]
) -> tuple[HotExpert, ...]:
    """The busiest expert of each layer, the most uneven layer first."""
    found: dict[str, HotExpert] = {}
    for group, chosen in zip(groups, inside, strict=True):
        for each in expert_rows(group, chosen):
            total = int(each.counts.sum())
            if not total:
                continue
            place, local = np.unravel_index(int(each.counts.argmax()), each.counts.shape)
            count = int(each.counts[place, local])
            layer = fleet.layers[each.layer].name
            over = count * each.counts.size / total
            expert = each.name(int(place), int(local))
            hot = HotExpert(layer, expert, group.ranks[int(place)], count, over, "window")
            if layer not in found or found[layer].over_mean < over:
                found[layer] = hot
    for board in fleet.snapshot().layers:
        if board.name not in found and board.assignments:
            busiest, over = int(board.counts.argmax()), float(board.max_over_mean)
            count = int(board.counts[busiest])
            found[board.name] = HotExpert(board.name, str(busiest), None, count, over, "run")
    return tuple(sorted(found.values(), key=lambda hot: (hot.scope != "window", -hot.over_mean)))
