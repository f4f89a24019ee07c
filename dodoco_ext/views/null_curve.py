"""The null of many pass sizes at the price of a few: simulated at some, interpolated between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dodoco_ext import nulls

FloatArray: TypeAlias = NDArray[np.float64]
Sizes: TypeAlias = NDArray[np.int64]

MAX_SIMULATED = 6
"""Sizes a curve simulates at most: each costs up to 0.2 s of CPU."""

_MAX_SUMMED = 32
"""Sizes at which the expected Gini is summed exactly, about a millisecond each."""

_SMOOTH_FROM = 16  # assignments per expert; with fewer, the ends of a band move in steps

_TINY = 1e-12  # where routing leaves no choice, floors are 0 and have no logarithm


@dataclass(frozen=True)
class Band:
    """Expected value under uniform routing, and the band that holds 95 % of passes."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class NullCurve:
    """Gini and max/mean under uniform routing as functions of the number of tokens.

    Attributes:
        simulated: Token counts at which `nulls.null()` is asked, ascending, [S <= MAX_SIMULATED].
        summed: Token counts at which the expected Gini is summed exactly, ascending.
        num_experts: E.
        top_k: k.
        placement: Rank of each expert, [E], where the figures are per rank.
    """

    simulated: Sizes
    summed: Sizes
    num_experts: int
    top_k: int
    placement: NDArray[np.int64] | None = None

    @classmethod
    def over(
        cls,
        sizes: ArrayLike,
        num_experts: int,
        top_k: int,
        placement: NDArray[np.int64] | None = None,
    ) -> NullCurve:
        """A curve for some sizes: exact if they are few, else simulated at a geometric grid.

        Args:
            sizes: Token counts above 0, at least one.
            num_experts: E.
            top_k: k, known.
            placement: Rank of each expert, [E]; None: per expert.
        """
        tokens = np.asarray(sizes)
        simulated = _spread(tokens, MAX_SIMULATED)
        summed = np.union1d(simulated, _spread(tokens, _MAX_SUMMED))
        return cls(simulated, summed, num_experts, top_k, placement)

    def gini_mean(self, sizes: ArrayLike) -> FloatArray:
        """Expected Gini at each size, [P]; exact where the sizes are few, else within 1 %."""
        floor = nulls.null_gini_mean(self.summed, self.num_experts, self.top_k, self.placement)
        return _interpolated(np.asarray(sizes), self.summed, floor)

    def max_over_mean_mean(self, sizes: ArrayLike) -> FloatArray:
        """Expected max/mean at each size, [P]."""
        excess = self._nulls("max_over_mean_mean") - 1.0
        return _interpolated(np.asarray(sizes), self.simulated, excess) + 1.0

    def gini_band(self, size: int) -> Band:
        """Null of the Gini of one histogram of `size` tokens; the band is nan where unknown."""
        mean = float(self.gini_mean([size])[0])
        simulated = np.maximum(self._nulls("gini_mean"), _TINY)
        scale = [self._nulls(name) / simulated for name in ("gini_low", "gini_high")]
        return Band(mean, *(mean * self._end(size, ratio) for ratio in scale))

    def max_over_mean_band(self, size: int) -> Band:
        """Null of the max/mean of one histogram of `size` tokens; the band is nan where unknown."""
        mean = float(self.max_over_mean_mean([size])[0])
        ends = (self._nulls("max_over_mean_low"), self._nulls("max_over_mean_high"))
        scale = [
            (end - 1.0) / np.maximum(self._nulls("max_over_mean_mean") - 1.0, _TINY) for end in ends
        ]
        return Band(mean, *(1.0 + (mean - 1.0) * self._end(size, ratio) for ratio in scale))

    def corrected_gini(
        self, gini: ArrayLike, sizes: ArrayLike, counts: ArrayLike | None = None
    ) -> float:
        """`nulls.corrected_gini` over passes of any number of sizes.

        That would simulate every size. Where they are many, each pass is therefore entered as two of
        the simulated sizes next to its own, weighted so that its expected squared Gini stays what it
        is. The noise removed is the same to a few percent; only the test whether there is anything
        above the noise gets up to a third more lenient.

        Args:
            gini: Raw Gini of each pass, [P].
            sizes: Tokens of each pass, [P].
            counts: Loads of the experts, [E], which the noise depends on; None: smooth loads.
        """
        raw, tokens, nodes = np.asarray(gini), np.asarray(sizes), self.simulated
        if np.isin(tokens, nodes).all():
            return nulls.corrected_gini(raw, tokens, self.num_experts, self.top_k, counts=counts)
        upper = np.clip(np.searchsorted(nodes, tokens), 1, len(nodes) - 1)
        floor, at_nodes = self.gini_mean(tokens) ** 2, self.gini_mean(nodes) ** 2
        drop = at_nodes[upper - 1] - at_nodes[upper]
        weight = np.clip((at_nodes[upper - 1] - floor) / np.maximum(drop, _TINY), 0.0, 1.0)
        return nulls.corrected_gini(
            np.concatenate([raw, raw]),
            np.concatenate([nodes[upper], nodes[upper - 1]]),
            self.num_experts,
            self.top_k,
            weights=np.concatenate([weight, 1.0 - weight]),
            counts=counts,
        )

    def _end(self, size: int, at_nodes: FloatArray) -> float:
        """One end of a band relative to the mean, interpolated where it is smooth, else nan."""
        below = self.simulated[max(int(np.searchsorted(self.simulated, size, "right")) - 1, 0)]
        smooth = below * self.top_k >= _SMOOTH_FROM * self.num_experts
        if size not in self.simulated and not smooth:
            return float("nan")
        return float(np.interp(np.log(size), np.log(self.simulated), at_nodes))

    def _nulls(self, name: str) -> FloatArray:
        sizes = (int(size) for size in self.simulated)
        return np.array(
            [
                getattr(nulls.null(size, self.num_experts, self.top_k, self.placement), name)
                for size in sizes
            ]
        )


def _spread(sizes: NDArray[np.generic], most: int) -> Sizes:
    """The distinct sizes if they are few, else whole numbers in geometric steps over their range.

    Steps of less than a factor of 2 are not worth their price.
    """
    distinct = np.unique(sizes).astype(np.int64)
    if len(distinct) <= most:
        return distinct
    number = min(most, 2 + int(np.log2(distinct[-1] / distinct[0])))
    return np.unique(np.rint(np.geomspace(distinct[0], distinct[-1], number)).astype(np.int64))


def _interpolated(sizes: NDArray[np.generic], nodes: Sizes, values: FloatArray) -> FloatArray:
    """A positive, falling power law between its nodes; equal to the values at the nodes."""
    logs = np.log(np.maximum(values, _TINY))
    result = np.exp(np.interp(np.log(sizes), np.log(nodes), logs))
    return np.where(result <= 2 * _TINY, 0.0, result)
