"""The figures of every layer over a span: what a row of the table says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import metrics
from dodoco_ext.fleet import FleetLayer
from dodoco_ext.null_grid import floors
from dodoco_ext.views.top.placing import Placing
from dodoco_ext.views.top.tally import Tally

MOST_HOT = 3
"""Hottest experts named."""


@dataclass(frozen=True, eq=False)
class Row:
    """One layer.

    Attributes:
        index: Place in the run.
        name: Its full name.
        short: The part of its name that others do not share.
        num_experts, top_k: E and k.
        passes, tokens: Counted over the span, all ranks looked at summed.
        gini, gini_floor, gini_high: Gini of the span's counts; expected, and its 97.5 % quantile, under
            uniform routing.
        gini_corrected: Without what chance adds.
        peak, peak_floor, peak_high: The same of max/mean.
        hottest: The busiest experts, each with its share of the assignments.
        tokens_per_s: nan where nobody knows how long the span is.
        gini_line, tokens_line: Gini and tokens a second of each part of the window, oldest first; nan
            where nothing was counted.
        counts: Assignments by expert, [E].
        ranks: Ranks that share the experts; 1: taken expert by expert.
        loads: What those ranks compute, by block, [B, R]; as recorded in dispatches, else by placement.
        measured: Whether loads are recorded.
        placed: Whether they are, if not measured, by recorded placements.
        in_flight: Read in the middle of a pass.
    """

    index: int
    name: str
    short: str
    num_experts: int
    top_k: int
    passes: int
    tokens: int
    gini: float
    gini_floor: float
    gini_high: float
    gini_corrected: float
    peak: float
    peak_floor: float
    peak_high: float
    hottest: tuple[tuple[int, float], ...]
    tokens_per_s: float
    gini_line: NDArray[np.float64]
    tokens_line: NDArray[np.float64]
    counts: NDArray[np.uint64]
    ranks: int
    loads: NDArray[np.uint64]
    measured: bool
    placed: bool
    in_flight: bool


def rows_of(
    layers: Sequence[FleetLayer],
    span: Tally,
    parts: Sequence[Tally],
    placing: Placing,
    in_flight: set[int],
) -> tuple[Row, ...]:
    """The rows of a span.

    Args:
        layers: The layers of the run.
        span: What was counted over it.
        parts: The parts of the window, for the lines.
        placing: How experts lie on ranks.
        in_flight: Layers read in the middle of a pass.
    """
    shorts = short_names([layer.name for layer in layers])
    by_kind: dict[tuple[int, int], list[int]] = {}
    for index, layer in enumerate(layers):
        by_kind.setdefault((layer.num_experts, layer.top_k), []).append(index)
    found: dict[int, Row] = {}
    for (num_experts, top_k), members in by_kind.items():
        counts = span.counts[:, members, :num_experts].sum(axis=0)
        totals = counts.sum(axis=1)
        gini = np.asarray(metrics.gini(counts))
        peak = np.asarray(metrics.max_over_mean(counts))
        null = floors(totals, num_experts, top_k)
        corrected = null.corrected(gini)
        ginis, tokens = _lines(parts, members, num_experts)
        order = np.argsort(counts.astype(np.float64), axis=1, kind="stable")[:, ::-1][:, :MOST_HOT]
        for i, index in enumerate(members):
            loads = _loads(span, index, num_experts, placing)
            recorded = span.rank_loads.get(index)
            found[index] = Row(
                index=index,
                name=layers[index].name,
                short=shorts[index],
                num_experts=num_experts,
                top_k=top_k,
                passes=int(span.passes[index]),
                tokens=int(span.tokens[index]),
                gini=float(gini[i]),
                gini_floor=float(null.gini[i]),
                gini_high=float(null.gini_high[i]),
                gini_corrected=float(corrected[i]),
                peak=float(peak[i]),
                peak_floor=float(null.peak[i]),
                peak_high=float(null.peak_high[i]),
                hottest=tuple(
                    (int(e), int(counts[i, e]) / int(totals[i])) for e in order[i] if counts[i, e]
                ),
                tokens_per_s=_rate(int(span.tokens[index]), span.seconds),
                gini_line=ginis[:, i],
                tokens_line=tokens[:, i],
                counts=counts[i],
                ranks=placing.sizes[index],
                loads=loads if recorded is None else recorded[None, :],
                measured=recorded is not None,
                placed=placing.recorded[index],
                in_flight=index in in_flight,
            )
    return tuple(found[index] for index in range(len(layers)))


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the dotted parts at both ends that all of them share."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2 or len({tuple(p) for p in parts}) < len(parts):
        return list(names)
    head, tail, least = 0, 0, min(map(len, parts))
    while head < least - 1 and len({p[head] for p in parts}) == 1:
        head += 1
    while tail < least - 1 - head and len({p[-1 - tail] for p in parts}) == 1:
        tail += 1
    return [".".join(p[head : len(p) - tail]) for p in parts]


def _lines(
    parts: Sequence[Tally], members: list[int], num_experts: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gini and tokens a second of each part and layer, [P, n] each."""
    if not parts:
        nothing = np.empty((0, len(members)))
        return nothing, nothing
    ginis = [part.gini_of(members, num_experts) for part in parts]
    tokens = [part.tokens[members] / max(part.seconds, 1e-9) for part in parts]
    return np.array(ginis), np.array(tokens, np.float64)


def _loads(span: Tally, index: int, num_experts: int, placing: Placing) -> NDArray[np.uint64]:
    size = placing.sizes[index]
    if placing.recorded[index]:
        blocks = [x for (_, i), x in sorted(span.placed.items()) if i == index and len(x) == size]
        return np.rint(np.array(blocks or [np.zeros(size)])).astype(np.uint64)
    counts = span.counts[:, index, :num_experts]
    counts = counts[counts.any(axis=1)] if counts.any() else counts[:1]
    if size == 1:
        sums: NDArray[np.uint64] = counts.sum(axis=1, keepdims=True)
        return sums
    return metrics.rank_counts(counts, metrics.contiguous_placement(num_experts, size))


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else float("nan")
