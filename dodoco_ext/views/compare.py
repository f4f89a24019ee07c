"""`dodoco show A --against B`: two recordings side by side, layer by layer."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.counters import LayerSnapshot, Snapshot
from dodoco_ext.errors import InputError
from dodoco_ext.snapshots import load_snapshot, looks_saved, shape
from dodoco_ext.sources import open_recording
from dodoco_ext.views import tables
from dodoco_ext.views.balances import NO_BAND, mean
from dodoco_ext.views.null_curve import Band
from dodoco_ext.views.show import print_names
from dodoco_ext.views.tables import duration, figure, plain, quantity

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "dodoco.comparison/1"

SCOPE = {
    "a, b": "one recording each, its rank only: exact counters (board) of all passes counted when it was "
    "read, or when the snapshot was saved",
    "difference": "A - B",
    "distance": "total variation between the shares of the experts, half the sum of absolute "
    "differences: 0 the same, 1 no expert in common",
    "distance_null": "the distance that two recordings of as many tokens would have if both came from "
    "one router with the loads of A and B together, tokens independent",
    "mean_of_layers": "mean of the layers' figures, every layer of equal weight; none where one is",
}

# Pairs drawn for the null of a distance: fewer of many experts, whose distance scatters less.
_DRAWN_COUNTS = 100_000
_MIN_DRAWS, _MAX_DRAWS = 100, 4000


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        source: What was asked for, or the recording's file.
        recording: Unique id of the recording.
        from_unix_ns: Since when it counts.
        to_unix_ns: Until when.
        saved: It was a saved snapshot.
    """

    source: str
    recording: str
    from_unix_ns: int
    to_unix_ns: int
    saved: bool


@dataclass(frozen=True)
class Counted:
    """A layer of one side."""

    name: str
    passes: int
    tokens: int
    assignments: int
    in_flight: bool
    gini: float
    max_over_mean: float


@dataclass(frozen=True)
class LayerComparison:
    """One layer in both; figures that a side has nothing for are nan."""

    index: int
    num_experts: int
    top_k: int | None
    a: Counted
    b: Counted
    gini_difference: float
    max_over_mean_difference: float
    distance: float
    distance_null: Band


@dataclass(frozen=True)
class Comparison:
    """Two recordings of models of one shape."""

    a: Side
    b: Side
    layers: tuple[LayerComparison, ...]

    @property
    def mean_of_layers(self) -> dict[str, float]:
        """The layers' figures, averaged."""
        names = ("gini_difference", "max_over_mean_difference", "distance")
        found = {name: mean(getattr(layer, name) for layer in self.layers) for name in names}
        for side in ("a", "b"):
            for name in ("gini", "max_over_mean"):
                each = (getattr(getattr(layer, side), name) for layer in self.layers)
                found[f"{side}_{name}"] = mean(each)
        found["distance_null"] = mean(layer.distance_null.mean for layer in self.layers)
        return found


def compare(source: str | os.PathLike[str] | None, against: str | os.PathLike[str]) -> Comparison:
    """Compares two recordings, or saved snapshots of recordings.

    Layers are matched by their place in execution order, so that one model can be compared between
    two engines, which name its layers differently.

    Args:
        source: A: what `dodoco_ext.open()` takes, or a saved snapshot.
        against: B: the same.

    Raises:
        InputError: The two differ in the number of layers, or in experts or top_k of one.
    """
    first, a = _side(source)
    second, b = _side(against)
    shapes = [[(e, k) for _, e, k in shape(snapshot)] for snapshot in (a, b)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{first.source} has {_in_words(shapes[0])} and {second.source} {_in_words(shapes[1])}: "
            "only models of one shape can be compared"
        )
    layers = tuple(_compared(x, y) for x, y in zip(a.layers, b.layers, strict=True))
    return Comparison(first, second, layers)


def total_variation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Half the sum of absolute differences of two histograms' shares; nan where one is empty."""
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not first.sum() or not second.sum():
        return math.nan
    return float(np.abs(first / first.sum() - second / second.sum()).sum() / 2)


def total_variation_null(a: NDArray[Any], b: NDArray[Any], top_k: int) -> Band:
    """Total variation between two histograms of these sizes if one router had made both.

    That router picks every expert with the share of tokens that it has in A and B together. Whether
    one token picks an expert is then a coin of that probability, so the count of an expert is
    binomial, exactly; that a token picks k distinct ones correlates the counts, which is taken from
    the large-sample form for such designs (Hajek, Annals of Mathematical Statistics 35, 1964).

    Args:
        a: [E] counts of A, as whole numbers.
        b: [E] counts of B.
        top_k: k, known.

    Returns:
        Expected value (within 4 %) and the band that holds 95 % (88 to 99.5 % in the cases tried); nan
        where a side is empty. A seeded simulation: equal arguments give equal results.
    """
    totals = [float(np.asarray(counts, np.float64).sum()) for counts in (a, b)]
    tokens = [min(round(total / top_k), 1 << 53) for total in totals]
    if not all(tokens):
        return NO_BAND
    pooled = np.asarray(a, np.float64) + np.asarray(b, np.float64)
    chosen = np.minimum(pooled * top_k / sum(totals), 1.0)
    spread = chosen * (1.0 - chosen)
    if not spread.sum() > 0:  # every token picks the same experts
        return Band(0.0, 0.0, 0.0)
    rng = np.random.default_rng([*tokens, len(pooled), top_k])
    draws = int(np.clip(_DRAWN_COUNTS // len(pooled), _MIN_DRAWS, _MAX_DRAWS))
    apart = np.zeros((len(pooled), draws))
    for number, sign in zip(tokens, (1.0, -1.0), strict=True):
        apart += sign * rng.binomial(number, chosen[:, None], apart.shape) / (number * top_k)
    # The differences of all experts sum to 0: take the sum out where the spread is, and give each
    # expert its own spread back.
    share = spread / spread.sum()
    apart -= share[:, None] * apart.sum(axis=0)
    apart /= np.sqrt(np.maximum(1.0 - share, 0.5))[:, None]
    distances = np.abs(apart).sum(axis=0) / 2
    low, high = np.quantile(distances, [0.025, 0.975])
    return Band(float(distances.mean()), float(low), float(high))


def comparison_json(comparison: Comparison) -> str:
    """The comparison as JSON."""
    return tables.to_json(
        {
            "schema": SCHEMA,
            "scope": SCOPE,
            "a": comparison.a,
            "b": comparison.b,
            "mean_of_layers": comparison.mean_of_layers,
            "layers": list(comparison.layers),
        }
    )


def print_comparison(comparison: Comparison) -> None:
    """Prints the comparison, one line a layer."""
    console = tables.console()
    for label, side in (("A", comparison.a), ("B", comparison.b)):
        taken = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(side.to_unix_ns / 1e9))
        span = duration(max(side.to_unix_ns - side.from_unix_ns, 0) / 1e9)
        kind = "snapshot" if side.saved else "recording"
        console.print(f"{label}  {kind} {plain(side.source)}", soft_wrap=True)
        console.print(f"   {span} until {taken}, one rank only")
    layers = comparison.layers
    in_flight = [layer.a.in_flight or layer.b.in_flight for layer in layers]
    names = print_names(console, [layer.a.name for layer in layers], in_flight)
    console.print("Whole run, exact counts (board); difference: A - B", style="bold")
    columns = (
        "layer",
        "Gini A",
        "B",
        "diff.",
        "max/mean A",
        "B ",
        "diff. ",
        "distance",
        "null 95 %",
    )
    table = tables.make_table(console, columns, left=("layer",))
    for name, layer in zip(names, layers, strict=True):
        null = layer.distance_null
        band = f"{figure(null.low)}-{figure(null.high)}" if math.isfinite(null.low) else "-"
        table.add_row(
            name,
            *(figure(layer.a.gini), figure(layer.b.gini), _signed(layer.gini_difference, 3)),
            *(figure(layer.a.max_over_mean, 2), figure(layer.b.max_over_mean, 2)),
            *(_signed(layer.max_over_mean_difference, 2), figure(layer.distance), band),
        )
    if len(layers) > 1:
        m = comparison.mean_of_layers
        table.add_section()
        table.add_row(
            "mean",
            *(figure(m["a_gini"]), figure(m["b_gini"]), _signed(m["gini_difference"], 3)),
            *(figure(m["a_max_over_mean"], 2), figure(m["b_max_over_mean"], 2)),
            *(_signed(m["max_over_mean_difference"], 2), figure(m["distance"]), ""),
        )
    console.print(table)
    console.print()
    _print_notes(console, comparison)


def _print_notes(console: Console, comparison: Comparison) -> None:
    layers = comparison.layers
    tokens = [[getattr(layer, side).tokens for layer in layers] for side in ("a", "b")]
    counted = " and ".join(
        f"{quantity(min(each))} to {quantity(max(each))}"
        if min(each) < max(each)
        else quantity(each[0])
        for each in tokens
    )
    notes = [
        f"tokens a layer: {counted}",
        "distance: total variation of the experts' shares, 0 the same, 1 no expert in common",
        "null: the distance if one router had made both, tokens independent; those of one text are not",
    ]
    if any(layer.top_k is None for layer in layers):
        notes.append("'-' where top-k is unknown")
    if any(layer.a.name != layer.b.name for layer in layers):
        notes.append("layers have other names in B: matched by their place in execution order")
    if comparison.a.recording == comparison.b.recording:
        notes.append("A and B are of one recording: what A counted before B was read is in both")
    if any(layer.a.in_flight or layer.b.in_flight for layer in layers):
        notes.append("* in flight: read in the middle of a pass; counters may disagree by that one")
    for note in notes:
        console.print(plain(note), style="dim")


def _side(source: str | os.PathLike[str] | None) -> tuple[Side, Snapshot]:
    if source is not None and looks_saved(source):
        name, snapshot, saved = os.fspath(source), load_snapshot(source), True
        until_ns = snapshot.time_ns
    else:
        reader = open_recording(source)
        name, snapshot, saved = str(reader.path), reader.snapshot(), False
        until_ns = int(reader.header["closed_unix_ns"]) or snapshot.time_ns
    return Side(name, snapshot.recording, snapshot.start_ns, until_ns, saved), snapshot


def _compared(a: LayerSnapshot, b: LayerSnapshot) -> LayerComparison:
    sides = [_counted(layer) for layer in (a, b)]
    first, second = sides
    null = total_variation_null(a.counts, b.counts, a.top_k) if a.top_k else NO_BAND
    return LayerComparison(
        index=a.index,
        num_experts=a.num_experts,
        top_k=a.top_k or None,
        a=first,
        b=second,
        gini_difference=first.gini - second.gini,
        max_over_mean_difference=first.max_over_mean - second.max_over_mean,
        distance=total_variation(a.counts, b.counts),
        distance_null=null,
    )


def _counted(layer: LayerSnapshot) -> Counted:
    counters = (layer.passes, layer.tokens, layer.assignments, layer.in_flight)
    return Counted(layer.name, *counters, layer.gini, layer.max_over_mean)


def _in_words(shapes: Sequence[tuple[int, int]]) -> str:
    distinct = ", ".join(f"top {k or '?'} of {e}" for e, k in sorted(set(shapes))[:4])
    more = ", ..." if len(set(shapes)) > 4 else ""
    return f"{len(shapes)} layer{'' if len(shapes) == 1 else 's'} ({distinct}{more})"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}" if math.isfinite(value) else "-"
