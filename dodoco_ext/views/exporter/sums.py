"""Counters summed over ranks that never go back, though the recordings they are summed over come and go."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

import numpy as np

from dodoco_ext import metrics
from dodoco_ext.counters import Counts
from dodoco_ext.errors import InputError
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
    """

    counts: Counts
    top_k: int
    passes: Counts
    before: Counts
    moved: bool = False


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

    def received(self, key: Key, layer: str) -> dict[int, int]:
        """Assignments that each rank of a group received, experts placed in equal contiguous runs.

        Empty where nothing was counted, or that cannot be known: no group is named, a rank of it was
        never seen, the ranks do not divide the experts, or the physical map has changed.
        """
        group = self.groups[key]
        if group.ranks is None or not group.seen.issuperset(group.ranks):
            return {}
        summed = group.layers[layer]
        if summed.moved or not summed.counts.any():
            return {}
        try:
            placement = metrics.contiguous_placement(len(summed.counts), len(group.ranks))
        except InputError:
            return {}
        counts = metrics.rank_counts(summed.counts, placement)
        return dict(zip(group.ranks, map(int, counts), strict=True))

    def _add(self, each: Observed) -> None:
        group = self.groups.setdefault(each.identity.key, GroupSum())
        group.seen.add(each.identity.rank)
        group.ranks = each.group.ranks if each.group else None
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


def _more(now: Counts, before: Counts | None) -> Counts:
    """What was added; never below zero, whatever a damaged file says."""
    if before is None:
        return now
    grown: Counts = np.where(now > before, now - before, 0).astype(np.uint64)
    return grown
