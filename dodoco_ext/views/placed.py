"""What recordings say of where experts lie, for a summary: the state of it, and each rank's load."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dodoco_ext.counters import LayerSnapshot
from dodoco_ext.placements import Placements, Received
from dodoco_ext.views.tables import duration


@dataclass(frozen=True)
class PlacementInfo:
    """Where the experts of a recording lie now, and how often that changed.

    Attributes:
        changes: Since the recording began.
        last_unix_ns: When a placement was last recorded.
        num_ranks: Expert-parallel ranks, of the layer with most.
        num_slots: Physical experts of a layer, of the layer with most.
        experts: Logical experts, all layers with a placement.
        replicated: Those of them in more than one slot.
        split: Those of them on more than one rank.
    """

    changes: int
    last_unix_ns: int
    num_ranks: int
    num_slots: int
    experts: int
    replicated: int
    split: int

    @property
    def text(self) -> str:
        """It all in one line."""
        times = f"{self.changes} change" + "s" * (self.changes != 1)
        ago = duration((time.time_ns() - self.last_unix_ns) / 1e9)
        return (
            f"{self.num_slots} slots a layer on {self.num_ranks} ranks, {times}, recorded {ago} ago; "
            f"{self.replicated} of {self.experts} experts have replicas"
        )


def placement_info(placements: Placements | None) -> PlacementInfo | None:
    """Of a recording; None where it holds no placement."""
    layers = placements.layers if placements else ()
    current = [found for layer in layers if (found := layer.current) is not None]
    if not current or placements is None:
        return None
    return PlacementInfo(
        placements.changes,
        placements.last_ns,
        max(placement.num_ranks for placement in current),
        max(len(placement.experts) for placement in current),
        sum(len(placement.replicas) for placement in current),
        sum(int((placement.replicas > 1).sum()) for placement in current),
        sum(int(placement.split.sum()) for placement in current),
    )


def received_by_rank(
    placements: Placements | None,
    now: Sequence[LayerSnapshot],
    before: Sequence[LayerSnapshot] | None = None,
) -> list[Received | None]:
    """What each rank received of a recording's counts, a layer each; None without a placement."""
    if placements is None:
        return [None] * len(now)
    starts = [None] * len(now) if before is None else [layer.counts for layer in before]
    return [
        layer.received(counted.counts, start) if layer.current is not None else None
        for layer, counted, start in zip(placements.layers, now, starts, strict=True)
    ]


def summed(parts: Iterable[Received | None]) -> Received | None:
    """What each rank received of all of these; None where one of them is not known."""
    known = []
    for part in parts:
        if part is None:
            return None
        known.append(part)
    if not known:
        return None
    loads = np.zeros(max(len(part.loads) for part in known))
    for part in known:
        loads[: len(part.loads)] += part.loads
    return Received(
        loads, sum(part.estimated for part in known), sum(part.unplaced for part in known)
    )
