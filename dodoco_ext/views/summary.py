"""The summary of one recording, as data: what `dodoco show SOURCE` says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import _C, metrics
from dodoco_ext.counters import LayerSnapshot, Snapshot
from dodoco_ext.fleet import unrouted
from dodoco_ext.recording import ROUTE, Reader
from dodoco_ext.snapshots import difference
from dodoco_ext.sources import Listed
from dodoco_ext.transfers import Group
from dodoco_ext.views.balances import (
    Balance,
    RankBalance,
    balances,
    curve_over,
    effective,
    families,
    mean,
)
from dodoco_ext.views.listing import RecordingInfo, describe, texts
from dodoco_ext.views.null_curve import NullCurve
from dodoco_ext.views.placed import PlacementInfo, placement_info, received_by_rank

# Simulations at the layers' own loads that a summary may cost: about a tenth of a second each.
MAX_LOAD_SIMULATIONS = 24

# In the order of the fields of MeanOfLayers.
_PASS_FIGURES = ("gini", "gini_null", "gini_corrected", "max_over_mean", "max_over_mean_null")

SCOPE = {
    "whole_run": "this rank only, exact counters of all passes since the recording began (board)",
    "per_pass": "this rank only, mean over the passes still in the ring, every pass of equal weight",
    "ranks": "whole run of this rank, experts placed as recorded where `recorded` is true (replicas "
    "share evenly: an estimate), else in equal contiguous runs (an assumption)",
    "mean_of_layers": "mean of the layers' figures, every layer of equal weight; none where one is",
    "null": "uniform routing of every token to top_k distinct experts",
}

WINDOW_SCOPE = {
    **SCOPE,
    "whole_run": "this rank only, exact counters (board) of all passes between the saved snapshot and "
    "now",
    "per_pass": "this rank only, mean over the passes later than the saved snapshot that are still in "
    "the ring, every pass of equal weight; by time stamp, so that a pass at the very moment of the "
    "snapshot may count in one scope and not in the other",
    "ranks": "between the saved snapshot and now, this rank, experts placed as recorded where "
    "`recorded` is true (replicas share evenly: an estimate), else in equal contiguous runs (an "
    "assumption)",
}

FAULTS = {
    "UNSUPPORTED_DTYPE": "ids or a routing map of a dtype that is not recorded; that probe is off",
    "BAD_SHAPE": "ids or a routing map of an impossible shape; that probe is off",
    "TOO_LARGE": "a pass too large to count; that probe is off",
    "UNSUPPORTED_DEVICE": "a router on a device that this build does not record; that probe is off",
    "COPIED_SITE": "the model was copied after attach(); passes of the copy are not recorded",
    "INTERNAL": "an error inside a probe; that probe is off",
    "NO_DEVICE": "a device could not be set up; nothing on it is recorded, and its layers show zeros",
    "NO_LANE": "more streams at the same time than lanes; some passes are not recorded",
    "DEVICE_ERROR": "a device refused a launch; that probe is off",
    "UNATTRIBUTED": "AlltoAlls that fit no layer or no forward one; those are not recorded",
}


@dataclass(frozen=True)
class PerPass:
    """Means over the passes of one layer that the ring still holds; nan where there are none.

    Attributes:
        gini_null: Expected mean Gini of passes of these sizes under uniform routing: the floor.
        gini_corrected: Root mean squared Gini without what chance adds.
    """

    passes: int
    tokens_min: int
    tokens_max: int
    gini: float
    gini_null: float
    gini_corrected: float
    max_over_mean: float
    max_over_mean_null: float


@dataclass(frozen=True)
class LayerSummary:
    """One layer: exact counters and figures of its scopes."""

    counters: LayerSnapshot
    whole_run: Balance
    per_pass: PerPass
    ranks: RankBalance | None


@dataclass(frozen=True)
class MeanOfLayers:
    """Means of the layers' figures; nan where a layer has none, rather than a mean of the rest."""

    gini: float
    max_over_mean: float
    pass_gini: float
    pass_gini_null: float
    pass_gini_corrected: float
    pass_max_over_mean: float
    pass_max_over_mean_null: float


@dataclass(frozen=True)
class Ring:
    """What the ring covers.

    Attributes:
        records: Records held (all layers).
        slots: Records it can hold.
        lost: Records overwritten before now; in a window, those of the window.
        iterations: Distinct iterations among the records held.
        seconds: From the first to the last record held.
        record_every: Iterations between records, as the recording began.
        implausible: Records that cannot be true and were left out (a damaged file).
        null_sizes: Distinct pass sizes, and at how many of them the null was simulated.
        loads_known: Whether the corrected Gini takes the noise at each layer's own loads; where that
            would be too many simulations, at smooth loads.
    """

    records: int
    slots: int
    lost: int
    iterations: int
    seconds: float
    record_every: int | None
    implausible: int
    null_sizes: tuple[int, int]
    loads_known: bool


@dataclass(frozen=True)
class Window:
    """What a summary covers where it does not begin with the recording.

    Attributes:
        snapshot: The saved snapshot's file.
        from_unix_ns: When it was taken.
        to_unix_ns: When the counters were read for the summary.
        seconds: Between the two.
    """

    snapshot: str
    from_unix_ns: int
    to_unix_ns: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """One recording, summarised.

    Attributes:
        snapshot: The counters since the recording began, which the summary was made from.
        faults: Telemetry faults by reason, as `faults_by_reason`, of those that there are.
        window: None where the summary covers all of them.
        unrouted: Names of layers whose router is not observed.
        group: The ranks that transfers were recorded between; None where none were.
        placements: Where experts lie; None where that is not recorded.
    """

    recording: RecordingInfo
    snapshot: Snapshot
    window: Window | None
    layers: tuple[LayerSummary, ...]
    ring: Ring
    uncovered: list[dict[str, str]]
    num_faults: int
    last_fault: str | None
    faults: dict[str, int]
    unrouted: frozenset[str]
    group: Group | None
    placements: PlacementInfo | None

    @property
    def mean_of_layers(self) -> MeanOfLayers:
        """The layers' figures, averaged."""
        whole = [layer.whole_run for layer in self.layers]
        each = [layer.per_pass for layer in self.layers]
        return MeanOfLayers(
            *(mean(getattr(b, name) for b in whole) for name in ("gini", "max_over_mean")),
            *(mean(getattr(p, name) for p in each) for name in _PASS_FIGURES),
        )


def summarise(
    reader: Reader,
    *,
    num_ranks: int | None = None,
    since: Snapshot | None = None,
    since_name: str = "the saved snapshot",
) -> Summary:
    """Summarises one recording.

    Args:
        reader: The recording.
        num_ranks: Expert-parallel ranks to fold the whole-run counts into; None: those that placements
            are recorded of.
        since: An earlier snapshot of it: only what happened after that. None: all.
        since_name: How messages name that snapshot.

    Raises:
        InputError: The earlier snapshot is not one of this recording.
    """
    now = reader.snapshot()
    counted = now if since is None else difference(now, since, since_name)
    layers = counted.layers
    held, _, lost = reader.read()
    window = None
    if since is not None:
        window = Window(since_name, since.time_ns, now.time_ns, (now.time_ns - since.time_ns) / 1e9)
        held = held[held["time_ns"] > since.time_ns]
        lost = max(sum(layer.recorded_passes for layer in layers) - len(held), 0)
    records, implausible = _plausible(held, layers)
    sizes = [0, 0]
    loads_known = True
    each_pass: dict[int, PerPass] = {}
    for members in families(layers):
        top_k = members[0].top_k
        passes = {m.index: records[records["layer"] == m.index] for m in members}
        each = curve_over([effective(p["assignments"], top_k) for p in passes.values()], members[0])
        if each is not None:
            every = np.concatenate(list(passes.values()))["assignments"]
            sizes[0] += len(np.unique(effective(every, top_k)))
            sizes[1] += len(each.simulated)
        loads = each is not None and len(layers) * len(each.simulated) <= MAX_LOAD_SIMULATIONS
        loads_known &= loads or each is None
        for m in members:
            each_pass[m.index] = _per_pass(passes[m.index], m, each, loads)
    fault = reader.header["last_fault"]
    placements = reader.placements()
    received = received_by_rank(placements, now.layers, since.layers if since else None)
    each_balance = balances(layers, num_ranks, received)
    return Summary(
        recording=describe(Listed(reader.path, reader, state=reader.state)),
        snapshot=now,
        window=window,
        layers=tuple(
            LayerSummary(layer, balance, each_pass[layer.index], ranks)
            for layer, (balance, ranks) in zip(layers, each_balance, strict=True)
        ),
        ring=Ring(
            records=len(held),
            slots=reader.num_slots,
            lost=lost,
            iterations=len(np.unique(held["iteration"])),
            seconds=_span_s(held),
            record_every=_whole_number(reader.metadata.get("record_every")),
            implausible=implausible,
            null_sizes=(sizes[0], sizes[1]),
            loads_known=loads_known,
        ),
        uncovered=uncovered_of(reader),
        num_faults=reader.header["num_faults"],
        last_fault=fault_name(fault) if fault else None,
        faults={name: number for name, number in faults_by_reason(reader.header).items() if number},
        unrouted=unrouted([reader]),
        group=reader.group,
        placements=placement_info(placements),
    )


def _per_pass(
    records: NDArray[np.void], layer: LayerSnapshot, curve: NullCurve | None, loads: bool
) -> PerPass:
    if not len(records):
        return PerPass(0, 0, 0, *[math.nan] * 5)
    gini = np.asarray(
        metrics.gini_from_numerator(
            records["gini_numerator"], records["assignments"], layer.num_experts
        )
    )
    peaks = layer.num_experts * records["max_count"] / records["assignments"].astype(np.float64)
    sizes = effective(records["assignments"], layer.top_k)
    if curve is None:
        floor, corrected, peak_floor = math.nan, math.nan, math.nan
    else:
        sizes = np.maximum(sizes, 1)
        floor = float(curve.gini_mean(sizes).mean())
        # Records may be newer than the counts: a layer may have some and no load yet.
        known = loads and np.count_nonzero(layer.counts) >= layer.top_k
        corrected = curve.corrected_gini(gini, sizes, layer.counts if known else None)
        peak_floor = float(curve.max_over_mean_mean(sizes).mean())
    return PerPass(
        passes=len(records),
        tokens_min=int(records["tokens"].min()),
        tokens_max=int(records["tokens"].max()),
        gini=float(gini.mean()),
        gini_null=floor,
        gini_corrected=corrected,
        max_over_mean=float(peaks.mean()),
        max_over_mean_null=peak_floor,
    )


def _plausible(
    records: NDArray[np.void], layers: tuple[LayerSnapshot, ...]
) -> tuple[NDArray[np.void], int]:
    """Forward passes with assignments, and how many records were left out as impossible."""
    known = records["layer"] < len(layers)
    experts = np.array([layer.num_experts for layer in layers], np.float64)
    largest = experts[np.where(known, records["layer"], 0)] * records["assignments"]
    sound = known & (records["gini_numerator"] <= largest)
    sound &= records["max_count"] <= records["assignments"]
    counted = (records["type"] == ROUTE) & (records["direction"] == 0) & ~records["recompute"]
    kept = sound & counted & (records["assignments"] > 0)
    return records[kept], int((~sound).sum())


def _span_s(records: NDArray[np.void]) -> float:
    times = records["time_ns"]
    return float(int(times.max()) - int(times.min())) / 1e9 if len(times) else 0.0


def fault_name(code: int) -> str:
    """The name of a telemetry fault, also where this version does not know it."""
    try:
        return _C.Fault(code).name
    except ValueError:
        return f"fault {code}"  # written by a later version


def faults_by_reason(header: dict[str, Any]) -> dict[str, int]:
    """Telemetry faults by the lower-case name of the reason, of every reason that this version knows.

    `other`: of a later version's reasons, or of a writer that only named its latest one.
    """
    counts: list[int] = list(header["faults"])
    known = {
        name.lower(): counts[int(fault.value)]
        for name, fault in _C.Fault.__members__.items()
        if fault.value
    }
    known["other"] = max(int(header["num_faults"]) - sum(known.values()), 0)
    return known


def _whole_number(value: object) -> int | None:
    return value if isinstance(value, int) else None


def uncovered_of(reader: Reader) -> list[dict[str, str]]:
    """Name and reason of what routes in a recording's model and is not observed."""
    value = reader.metadata.get("uncovered")
    parts = [texts(part) for part in value] if isinstance(value, list) else []
    return [{"name": p.get("name", ""), "reason": p.get("reason", "")} for p in parts]
