"""Gini and max/mean of counts, per expert and per rank, each beside its null."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import metrics
from dodoco_ext.counters import LayerSnapshot
from dodoco_ext.placements import Received
from dodoco_ext.views.null_curve import Band, NullCurve

NO_BAND = Band(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Balance:
    """Gini and max/mean of one histogram, each beside its null (nan where top_k is unknown)."""

    gini: float
    gini_null: Band
    max_over_mean: float
    max_over_mean_null: Band


@dataclass(frozen=True)
class RankBalance:
    """The whole run per expert-parallel rank; `balance` is None where it is not measurable.

    Attributes:
        counts: Assignments of each rank.
        recorded: Whether experts are placed as recorded; otherwise in equal contiguous runs.
        estimated: Assignments in `counts` that are an even split over replicas.
        unplaced: Assignments in no rank's count, as the placements they were counted under are gone.
    """

    num_ranks: int
    counts: list[int] | None = None
    busiest: int | None = None
    balance: Balance | None = None
    problem: str | None = None
    recorded: bool = False
    estimated: int = 0
    unplaced: int = 0


def balances(
    layers: Sequence[LayerSnapshot],
    num_ranks: int | None = None,
    received: Sequence[Received | None] = (),
) -> list[tuple[Balance, RankBalance | None]]:
    """Gini and max/mean of each layer's counts beside their nulls, per expert and per rank.

    Args:
        layers: Counters of any one scope.
        num_ranks: Expert-parallel ranks to fold the counts into; None: none.
        received: What each rank received of each layer, by recorded placements. Comes before contiguous
            runs where it is of as many ranks, or `num_ranks` is None.
    """
    placed = dict(zip((layer.index for layer in layers), received, strict=False))
    found: dict[int, tuple[Balance, RankBalance | None]] = {}
    for members in families(layers):
        top_k = members[0].top_k
        whole = curve_over([effective(m.assignments, top_k) for m in members], members[0])
        folded = _Folding(members, num_ranks) if num_ranks else None
        for m in members:
            balance = _balance(m.counts, effective(m.assignments, top_k), whole)
            recorded = placed.get(m.index)
            if recorded is not None and num_ranks in (None, len(recorded.loads)):
                found[m.index] = balance, _recorded(recorded)
            else:
                found[m.index] = balance, folded.of(m) if folded else None
    return [found[layer.index] for layer in layers]


def families(layers: Sequence[LayerSnapshot]) -> list[list[LayerSnapshot]]:
    """The layers with equal E and k together: they share nulls."""
    found: dict[tuple[int, int], list[LayerSnapshot]] = {}
    for layer in layers:
        found.setdefault((layer.num_experts, layer.top_k), []).append(layer)
    return list(found.values())


class _Folding:
    """Folds the counts of layers with equal E and k into expert-parallel ranks."""

    def __init__(self, members: list[LayerSnapshot], num_ranks: int) -> None:
        self.num_ranks = num_ranks
        num_experts = members[0].num_experts
        self.placement = None
        self.problem = f"{num_ranks} ranks do not divide {num_experts} experts"
        if num_experts % num_ranks == 0:
            self.placement = metrics.contiguous_placement(num_experts, num_ranks)
            sizes = [effective(m.assignments, m.top_k) for m in members]
            self.curve = curve_over(sizes, members[0], self.placement)

    def of(self, layer: LayerSnapshot) -> RankBalance:
        if self.placement is None:
            return RankBalance(self.num_ranks, problem=self.problem)
        counts = metrics.rank_counts(layer.counts, self.placement)
        return RankBalance(
            self.num_ranks,
            counts=[int(count) for count in counts],
            busiest=int(counts.argmax()) if counts.any() else None,
            balance=_balance(counts, effective(layer.assignments, layer.top_k), self.curve),
        )


def _recorded(received: Received) -> RankBalance:
    loads = received.loads
    return RankBalance(
        len(loads),
        counts=[round(load) for load in loads.tolist()],
        busiest=int(loads.argmax()) if loads.any() else None,
        balance=_balance(loads, 0, None),
        recorded=True,
        estimated=received.estimated,
        unplaced=received.unplaced,
    )


def effective(assignments: Any, top_k: int) -> Any:
    """Tokens that the null must assume so that its assignments are those counted.

    Rows may have lost some of their k to padding or capacity. 0 where k is unknown: nothing is known
    of the null then.
    """
    return np.rint(np.asarray(assignments) / top_k).astype(np.int64) if top_k else 0


def curve_over(
    sizes: Iterable[Any], layer: LayerSnapshot, placement: NDArray[np.int64] | None = None
) -> NullCurve | None:
    """The null over passes of some sizes (see `effective`) of one layer; None without tokens."""
    flat = np.concatenate([np.atleast_1d(size) for size in sizes])
    flat = flat[flat > 0]
    if not flat.size:
        return None
    return NullCurve.over(flat, layer.num_experts, layer.top_k, placement)


def _balance(counts: NDArray[Any], tokens: Any, curve: NullCurve | None) -> Balance:
    known = curve is not None and tokens > 0
    return Balance(
        float(metrics.gini(counts)),
        curve.gini_band(int(tokens)) if curve is not None and known else NO_BAND,
        float(metrics.max_over_mean(counts)),
        curve.max_over_mean_band(int(tokens)) if curve is not None and known else NO_BAND,
    )


def mean(values: Iterable[float]) -> float:
    """The mean; nan where one of the values is."""
    return float(np.mean(np.fromiter(values, np.float64)))
