"""Counters summed over ranks that never go back, though the recordings they are summed over come and go."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import metrics
from dodoco_ext.counters import Counts
from dodoco_ext.errors import InputError
from dodoco_ext.placements import LayerPlacements
from dodoco_ext.views.exporter.identity import Key
from dodoco_ext.views.exporter.observe import Look, Observed

log = logging.getLogger("dodoco")


@dataclass(eq=False)
class LayerSum:
    """One layer of a group, summed over its ranks.

    Attributes:
        counts: Assignments per expert, uint64 [E].
        top_k: Experts a token is sent to; 0: unknown.
        passes: Histogram of max/mean per pass, uint64 [size classes, bins].
        before: The part of `counts` that was there when a recording was first seen although it had begun
            earlier; no window counts it.
        moved: Whether the physical map changed in any of the recordings.
        placed: Assignments received by each rank of the group, by recorded placements, [R].
        unplaced: Assignments of recordings that say nothing of placements.
    """

    counts: Counts
    top_k: int
    passes: Counts
    before: Counts
    moved: bool = False
    placed: NDArray[np.float64] | None = None
    unplaced: int = 0

    def place(self, placements: LayerPlacements | None, now: Counts, before: Counts | None) -> None:
        """Adds to `placed` what a recording counted between two moments."""
        if placements is None or placements.current is None:
            self.unplaced += int(_more(now, before).sum())
            return
        loads = placements.received(now, before).loads
        if self.placed is None or len(self.placed) < len(loads):
            old = self.placed if self.placed is not None else np.zeros(0)
            self.placed = np.pad(old, (0, len(loads) - len(old)))
        self.placed[: len(loads)] += loads


@dataclass(eq=False)
class GroupSum:
    """A group of ranks: its layers in the order of first appearance, and the ranks ever seen."""

    layers: dict[str, LayerSum] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    ranks: tuple[int, ...] | None = None


class Sums:
    """Sums over ranks since the exporter started.

    What a recording counted is added once, and stays when it goes: Prometheus would take a sum that falls
    for a restart, and count the rest of it again.
    """

    def __init__(self) -> None:
        self.groups: dict[Key, GroupSum] = {}
        self._last: dict[str, tuple[str, list[tuple[Counts, Counts]]]] = {}
        self._looked_ns = 0
        self._refused: set[tuple[str, str]] = set()

    def update(self, look: Look) -> None:
        """Adds what was counted since the look before."""
        observed = (*look.shown, *look.ended)
        for each in observed:
            self._add(each)
        # For as long as the file is there it may be seen again, as after a moment without permission.
        self._last = {u: (path, c) for u, (path, c) in self._last.items() if os.path.exists(path)}  # noqa: PTH110
        current = {each.identity.key for each in look.shown}
        self.groups = {key: group for key, group in self.groups.items() if key in current}
        self._looked_ns = look.time_ns

    def received(self, key: Key, layer: str) -> dict[int, float]:
        """Assignments that each rank of a group received.

        Experts are placed as recorded: replicas share evenly, and what was counted under placements that are
        gone is left out. Where no placement is recorded, they are placed in equal contiguous runs.

        Empty where nothing was counted, or that cannot be known: no group is named (or, by placements, their
        ranks are not those of the run), a rank of it was never seen, only some recordings hold
        placements, or none does and the ranks do not divide the experts or the physical map has changed.
        """
        group = self.groups[key]
        if group.ranks is None or not group.seen.issuperset(group.ranks):
            return {}
        summed = group.layers[layer]
        if not summed.counts.any():
            return {}
        if summed.placed is not None:
            known = not summed.unplaced and len(summed.placed) == len(group.ranks)
            loads = summed.placed.tolist() if known else []
            return dict(zip(group.ranks, loads, strict=False))
        if summed.moved:
            return {}
        try:
            placement = metrics.contiguous_placement(len(summed.counts), len(group.ranks))
        except InputError:
            return {}
        counts = metrics.rank_counts(summed.counts, placement)
        return dict(zip(group.ranks, map(float, counts), strict=True))

    def _add(self, each: Observed) -> None:
        group = self.groups.setdefault(each.identity.key, GroupSum())
        group.seen.add(each.identity.rank)
        group.ranks = each.group.ranks if each.group else _ranks_by_placement(each)
        last = self._last[each.uuid][1] if each.uuid in self._last else None
        old = each.created_ns < self._looked_ns or not self._looked_ns
        now: list[tuple[Counts, Counts]] = []
        for index, layer in enumerate(each.snapshot.layers):
            counts, passes = layer.counts, layer.max_over_mean_histogram
            now.append((counts, passes))
            name = each.layers[index]
            summed = group.layers.get(name)
            if summed is None:
                zeros = np.zeros_like(counts)
                summed = LayerSum(zeros, layer.top_k, np.zeros_like(passes), zeros.copy())
                group.layers[name] = summed
            elif len(summed.counts) != len(counts) or summed.top_k != layer.top_k:
                self._refuse(each, name)
                continue
            more = _more(counts, last[index][0] if last else None)
            summed.counts = summed.counts + more
            summed.passes = summed.passes + _more(passes, last[index][1] if last else None)
            summed.moved = summed.moved or bool(each.map_version)
            placements = each.placements.layers[index] if each.placements else None
            summed.place(placements, counts, last[index][0] if last else None)
            if last is None and old:
                summed.before = summed.before + more
        self._last[each.uuid] = (str(each.reader.path), now)

    def _refuse(self, each: Observed, name: str) -> None:
        if (each.uuid, name) not in self._refused:
            self._refused.add((each.uuid, name))
            log.warning(
                "%s: layer %s has other experts than another recording of model_name=%s: not summed; "
                "give different models different labels",
                each.reader.path,
                name,
                each.identity.key.model_name,
            )


def _ranks_by_placement(each: Observed) -> tuple[int, ...] | None:
    """All ranks of a run, where experts lie on as many; which other ranks they lie on is not known."""
    found = [layer.current for layer in each.placements.layers] if each.placements else []
    sizes = {placement.num_ranks for placement in found if placement}
    return tuple(range(each.world_size)) if sizes == {each.world_size} else None


def _more(now: Counts, before: Counts | None) -> Counts:
    """What was added; never below zero, whatever a damaged file says."""
    if before is None:
        return now
    grown: Counts = np.where(now > before, now - before, 0).astype(np.uint64)
    return grown
