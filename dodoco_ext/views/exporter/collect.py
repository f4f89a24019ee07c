"""The recordings as metric families of prometheus_client."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from dodoco_ext.counters import MAX_OVER_MEAN_BOUNDS, Counts
from dodoco_ext.transfer_alignment import OPS
from dodoco_ext.transfers import TrafficTotals
from dodoco_ext.views.exporter.identity import Key
from dodoco_ext.views.exporter.observe import Observed
from dodoco_ext.views.exporter.state import State
from dodoco_ext.views.exporter.table import BUCKETS, BY_NAME, METRICS, PASS_SIZES

_EDGES = [MAX_OVER_MEAN_BOUNDS.index(bound) for bound in BUCKETS]
_WINDOW = {
    "window_gini": "gini",
    "window_gini_corrected": "gini_corrected",
    "window_gini_floor": "gini_floor",
    "window_expert_max_over_mean": "max_over_mean",
    "window_unused_experts": "unused_experts",
}


def registry_of(state: State, options: Collection[str] = ()) -> CollectorRegistry:
    """A registry that exposes a state, and nothing else.

    Args:
        state: What to expose; looked at anew at every scrape.
        options: Options of `dodoco metrics` whose metrics are wanted; see `table.OPTIONS`.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RecordingCollector(state, options))
    return registry


class RecordingCollector(Collector):
    """Collects from all recordings, at the moment of the scrape."""

    def __init__(self, state: State, options: Collection[str] = ()) -> None:
        self.state = state
        self.options = frozenset(options)

    def collect(self) -> Iterable[Metric]:
        """The families that have a sample."""
        with self.state.lock:
            self.state.update()
            families = _Families(self.options)
            for each in self.state.look.shown:
                _rank(families, self.state, each)
            _groups(families, self.state)
            for name, number in self.state.look.states.items():
                families.add("exporter_recordings", (name,), number)
        return families.filled()


class _Families:
    """The families of the table, filled sample by sample."""

    def __init__(self, options: frozenset[str]) -> None:
        self._families: dict[str, Any] = {
            metric.name: _family(metric.name)
            for metric in METRICS
            if not metric.option or metric.option in options
        }

    def wants(self, name: str) -> bool:
        return name in self._families

    def add(self, name: str, labels: tuple[str, ...], value: float) -> None:
        if math.isfinite(value):  # what was not measured is absent, never zero
            self._families[name].add_metric(labels, value)

    def info(self, name: str, labels: tuple[str, ...]) -> None:
        names = BY_NAME[name].labels
        self._families[name].add_metric((), dict(zip(names, labels, strict=True)))

    def histogram(self, name: str, labels: tuple[str, ...], bins: Counts) -> None:
        """A histogram of the board's bins of max/mean; its sum is not known."""
        family = self._families[name]
        total, below = int(bins.sum()), np.cumsum(bins)
        named = dict(zip(BY_NAME[name].labels, labels, strict=True))
        for bound, edge in zip(BUCKETS, _EDGES, strict=True):
            le = {**named, "le": str(bound)}
            family.add_sample(f"{family.name}_bucket", le, float(below[edge - 1]))
        family.add_sample(f"{family.name}_bucket", {**named, "le": "+Inf"}, float(total))
        family.add_sample(f"{family.name}_count", named, float(total))

    def filled(self) -> Iterator[Metric]:
        return (family for family in self._families.values() if family.samples)


def _family(name: str) -> Metric:
    metric = BY_NAME[name]
    full = metric.full_name
    if metric.kind == "info":
        return InfoMetricFamily(full.removesuffix("_info"), metric.help)
    if metric.kind == "histogram":
        return HistogramMetricFamily(full, metric.help, labels=metric.labels)
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(full, metric.help, labels=metric.labels)


def _rank(families: _Families, state: State, each: Observed) -> None:
    """What one rank says of itself."""
    labels = each.identity.labels
    families.info("recorder_info", (*labels, *each.about))
    families.add("recorder_up", labels, int(each.up))
    for reason, number in each.faults.items():
        families.add("recorder_faults_total", (*labels, reason), number)
    families.add("layers", (*labels, "covered"), each.covered)
    families.add("layers", (*labels, "uncovered"), each.uncovered)
    if each.last_ns:
        families.add("last_pass_timestamp_seconds", labels, each.last_ns / 1e9)
    for name, layer in zip(each.layers, each.snapshot.layers, strict=True):
        if layer.passes:
            families.add("tokens_total", (*labels, name), layer.tokens)
    for reason, field in (("capacity", "capacity_dropped"), ("invalid", "invalid")):
        dropped = sum(getattr(layer, field) for layer in each.snapshot.layers)
        families.add("dropped_assignments_total", (*labels, reason), dropped)
    if each.map_version is not None:
        families.add("placement_changes_total", labels, each.map_version)
    _received(families, state, each)
    _alltoall(families, state, each)


def _received(families: _Families, state: State, each: Observed) -> None:
    """Received assignments: from exact rows, else from counts per expert, else by placement."""
    dispatched = {
        each.layers[t.layer]: t for t in each.traffic if t.op in OPS and OPS[t.op] == "dispatch"
    }
    units = state.waits.units.get(each.uuid, set())
    for name in each.layers:
        value: float = math.nan
        totals = dispatched.get(name)
        if totals is not None and _executed(totals):
            if units == {"assignment"}:
                value = int(totals.received.sum())
            else:
                value = state.waits.assignments.get((each.identity, name), math.nan)
        else:
            value = state.placed(each.identity.key, name).get(each.identity.rank, math.nan)
        families.add("received_assignments_total", (*each.identity.labels, name), value)


def _executed(totals: TrafficTotals) -> bool:
    return bool(totals.executions or totals.backward or totals.recomputed)


def _alltoall(families: _Families, state: State, each: Observed) -> None:
    labels = each.identity.labels
    for code, op in OPS.items():
        mine = [totals for totals in each.traffic if totals.op == code and _executed(totals)]
        if not mine:
            continue
        families.add(
            "alltoall_seconds_total", (*labels, op), sum(t.duration_ns for t in mine) / 1e9
        )
        waited = state.waits.waited_ns.get((each.identity, op))
        if waited is not None:
            families.add("alltoall_wait_seconds_total", (*labels, op), waited / 1e9)
        for direction in ("sent", "received"):
            number = sum(getattr(t, f"{direction}_bytes") for t in mine)
            families.add("alltoall_bytes_total", (*labels, op, direction), number)
        if families.wants("layer_alltoall_seconds_total"):
            for totals in mine:
                place = (*labels, each.layers[totals.layer], op)
                families.add("layer_alltoall_seconds_total", place, totals.duration_ns / 1e9)
                families.add("layer_alltoall_bytes_total", (*place, "sent"), totals.sent_bytes)
                families.add(
                    "layer_alltoall_bytes_total", (*place, "received"), totals.received_bytes
                )
        if families.wants("alltoall_rows_total") and each.group is not None:
            rows = sum((t.sent for t in mine), np.zeros(len(each.group.ranks), np.uint64))
            for destination, count in zip(each.group.ranks, rows.tolist(), strict=True):
                place = (*labels[:2], op, labels[2], str(destination))
                families.add("alltoall_rows_total", place, count)


def _groups(families: _Families, state: State) -> None:
    """What is summed over the ranks of a group."""
    sizes: dict[Key, int] = {}
    for each in state.look.shown:
        size = len(each.group.ranks) if each.group else each.world_size
        sizes[each.identity.key] = max(size, sizes.get(each.identity.key, 0))
    for key, size in sizes.items():
        families.add("ep_ranks", (key.model_name, key.ep_group), size)
    for key, group in state.sums.groups.items():
        for name, layer in group.layers.items():
            labels = (key.model_name, key.ep_group, name)
            for size_class, first, end in PASS_SIZES:
                bins = layer.passes[first:end].sum(axis=0)
                if bins.any():
                    families.histogram("pass_max_over_mean", (*labels, size_class), bins)
            if families.wants("expert_assignments_total"):
                for expert, count in enumerate(layer.counts.tolist()):
                    families.add("expert_assignments_total", (*labels, str(expert)), count)
    for (key, name), figures in state.windows.figures.items():
        for metric, field in _WINDOW.items():
            labels = (key.model_name, key.ep_group, name)
            families.add(metric, labels, getattr(figures, field))
