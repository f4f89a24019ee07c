"""Where experts lie, as a recording knows it, and what each rank received under it.

A load balancer puts replicas of logical experts (*physical* experts) into the slots of ranks, and moves
them. A recording holds the latest placements of each layer, each with what had been counted by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import _C
from dodoco_ext.counters import Counts

Loads = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the experts of one layer lay from one moment on.

    Attributes:
        version: Changes of placements before it: 0 is how the recording began. Records carry it.
        time_ns: When it was recorded, Unix nanoseconds.
        iteration: Of the latest record in the ring at that moment.
        num_ranks: Expert-parallel ranks R.
        experts: Logical expert in each slot, int32 [P]; -1: empty.
        ranks: Rank that holds each slot, int16 [P]; -1: empty.
        counts: Assignments of each logical expert that the recording had counted by then, uint64 [E].
    """

    version: int
    time_ns: int
    iteration: int
    num_ranks: int
    experts: NDArray[np.int32]
    ranks: NDArray[np.int16]
    counts: Counts

    @cached_property
    def replicas(self) -> NDArray[np.int64]:
        """Slots that hold each expert, int64 [E]."""
        experts = self.experts[self.experts >= 0]
        replicas: NDArray[np.int64] = np.bincount(experts, minlength=len(self.counts))
        return replicas

    @cached_property
    def split(self) -> NDArray[np.bool_]:
        """Experts that lie on several ranks, [E]: which of them computed what is not recorded."""
        used = self.experts >= 0
        places = np.unique(self.experts[used].astype(np.int64) * self.num_ranks + self.ranks[used])
        split: NDArray[np.bool_] = (
            np.bincount(places // self.num_ranks, minlength=len(self.counts)) > 1
        )
        return split

    def receive(self, counts: Counts) -> Received:
        """What each rank computes of so many assignments of each expert, [E]; replicas share evenly."""
        each = counts / np.maximum(self.replicas, 1)
        experts, ranks = self.experts, self.ranks
        if self._has_empty_slots:
            experts, ranks = experts[experts >= 0], ranks[experts >= 0]
        loads = np.bincount(ranks, weights=each[experts], minlength=self.num_ranks)
        return Received(
            np.asarray(loads, np.float64),
            int(counts[self.split].sum()) if self._has_split else 0,
            int(counts[self.replicas == 0].sum()) if self._has_unplaced else 0,
        )

    @cached_property
    def _has_empty_slots(self) -> bool:
        return bool((self.experts < 0).any())

    @cached_property
    def _has_split(self) -> bool:
        return bool(self.split.any())

    @cached_property
    def _has_unplaced(self) -> bool:
        return bool((self.replicas == 0).any())


@dataclass(frozen=True, eq=False)
class Received:
    """Assignments that a rank's routing sent to each rank.

    Attributes:
        loads: By expert-parallel rank, [R].
        estimated: Those of experts on several ranks: assumed to be split evenly over the replicas.
        unplaced: Those that are in no load, as nobody knows where their experts lay.
    """

    loads: Loads
    estimated: int
    unplaced: int


@dataclass(frozen=True, eq=False)
class LayerPlacements:
    """The placements of a layer that the recording still holds.

    Attributes:
        kept: Oldest first.
        lost: Older ones that were overwritten, or that a killed writer left unfinished.
    """

    kept: tuple[Placement, ...]
    lost: int

    @property
    def current(self) -> Placement | None:
        """The latest."""
        return self.kept[-1] if self.kept else None

    def at(self, version: int) -> Placement | None:
        """The one in force for a record with a `map_version`; None where it is gone."""
        known = [placement for placement in self.kept if placement.version <= version]
        return known[-1] if known else None

    def received(self, now: Counts, before: Counts | None = None) -> Received:
        """What each rank received of assignments counted between two moments, change by change.

        Args:
            now: Counts of each expert at the later moment, [E].
            before: At the earlier; None: zero.
        """
        start = np.zeros_like(now) if before is None else np.minimum(before, now)
        spans = self._spans(start, now)
        earlier = int(((spans[0][1] if spans else now) - start).sum())
        parts = [placement.receive(end - begin) for placement, begin, end in spans]
        loads = np.zeros(max((placement.num_ranks for placement in self.kept), default=1))
        for part in parts:
            loads[: len(part.loads)] += part.loads
        return Received(
            loads, sum(p.estimated for p in parts), earlier + sum(p.unplaced for p in parts)
        )

    def _spans(self, start: Counts, now: Counts) -> list[tuple[Placement, Counts, Counts]]:
        """The placements in force between two moments, with the counts when each began and ended."""
        if not self.kept:
            return []
        if not (self.kept[-1].counts > start).any():  # nothing changed in between
            return [(self.kept[-1], start, now)]
        edges = [start]  # each at least the one before, whatever a file says
        for placement in self.kept:
            edges.append(np.clip(placement.counts, edges[-1], now))
        if self.kept[0].version == 0:  # it says where experts lay from the beginning
            edges[1] = start
        return list(zip(self.kept, edges[1:], [*edges[2:], now], strict=True))


@dataclass(frozen=True, eq=False)
class Placements:
    """Where experts lay, and how often that changed.

    Attributes:
        recorded: Times that placements were recorded; the first says how it began.
        layers: One a layer.
    """

    recorded: int
    layers: tuple[LayerPlacements, ...]

    @property
    def changes(self) -> int:
        """Changes since the recording began."""
        return max(self.recorded - 1, 0)

    @property
    def last_ns(self) -> int:
        """When a placement was last recorded, Unix nanoseconds; 0: never."""
        return max((layer.current.time_ns for layer in self.layers if layer.current), default=0)


def read_placements(
    file: _C.RecordingReader, num_layers: int, known: Placements | None
) -> Placements | None:
    """The placements of a recording; `known` itself where nothing was recorded since it was read."""
    if not file.placements_kept:
        return None
    recorded = file.placements_recorded()
    if known is not None and known.recorded == recorded:
        return known
    before = known.layers if known is not None else (None,) * num_layers
    return Placements(recorded, tuple(_layer(*file.placements(i), b) for i, b in enumerate(before)))


def _layer(
    entries: Sequence[tuple[int, int, int, int, Counts, NDArray[np.uint32]]],
    lost: int,
    before: LayerPlacements | None,
) -> LayerPlacements:
    found = []
    # What is derived from a placement is derived once.
    old = {placement.version: placement for placement in before.kept} if before else {}
    for version, num_ranks, time_ns, iteration, counts, slots in entries:
        if version in old:
            found.append(old[version])
            continue
        empty = slots == _C.EMPTY_SLOT
        experts = np.where(empty, -1, slots & 0xFFFF).astype(np.int32)
        ranks = np.where(empty, -1, slots >> 16).astype(np.int16)
        found.append(Placement(version, time_ns, iteration, num_ranks, experts, ranks, counts))
    return LayerPlacements(tuple(found), lost)
