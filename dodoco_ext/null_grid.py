"""Floors of uniform routing for a view that asks again and again, at ever other numbers of tokens.

`nulls.null()` costs up to 0.2 s for a size it has not seen. Here it is asked only at powers of two,
once each in the life of a process, and what lies between is interpolated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dodoco_ext import metrics, nulls

FloatArray = NDArray[np.float64]

_TINY = 1e-12  # where routing leaves no choice, floors are 0 and have no logarithm


@dataclass(frozen=True, eq=False)
class Floors:
    """What uniform routing gives at some numbers of tokens, [n] each; nan where nothing is known.

    Attributes:
        gini: Expected Gini.
        gini_high: 97.5 % quantile of the Gini.
        gini_square: Expected squared Gini.
        gini_square_sd: Its standard deviation.
        peak: Expected max/mean.
        peak_high: 97.5 % quantile of max/mean.
    """

    gini: FloatArray
    gini_high: FloatArray
    gini_square: FloatArray
    gini_square_sd: FloatArray
    peak: FloatArray
    peak_high: FloatArray

    def corrected(self, gini: ArrayLike) -> FloatArray:
        """Gini of single histograms without what chance adds, [n].

        `nulls.corrected_gini` of one histogram each, at smooth loads: 0 where the square is within
        `nulls.DETECTION_SE` standard deviations of the floor's.
        """
        raw = np.asarray(gini, np.float64)
        excess = raw**2 - self.gini_square
        root = np.sqrt(np.clip(excess, 0.0, 1.0))
        corrected = np.where(excess > nulls.DETECTION_SE * self.gini_square_sd + _TINY, root, 0.0)
        return np.where(np.isfinite(excess), corrected, np.nan)


def floors(
    assignments: ArrayLike, num_experts: int, top_k: int, num_ranks: int | None = None
) -> Floors:
    """Floors at many sizes, within 2 % of `nulls.null()` (max/mean above 1 within 6 %).

    Args:
        assignments: (token, expert) pairs counted, [n]; of as many as k make one token.
        num_experts: E.
        top_k: k; 0 where unknown: nothing is known then.
        num_ranks: R ranks that hold the experts in equal contiguous runs; None: expert by expert.

    Raises:
        InputError: R does not divide E.
    """
    pairs = np.asarray(assignments, np.float64).reshape(-1)
    result = np.full((6, len(pairs)), np.nan)
    known = pairs >= max(top_k, 1) / 2 if top_k else np.zeros(len(pairs), bool)
    if known.any():
        sizes = np.maximum(pairs[known] / top_k, 1.0)
        exponents = np.unique([np.floor(np.log2(sizes)), np.ceil(np.log2(sizes))]).astype(int)
        table = np.array([_at(int(e), num_experts, top_k, num_ranks) for e in exponents]).T
        for row, values in enumerate(table):
            result[row, known] = np.exp(np.interp(np.log2(sizes), exponents, values))
        result[4:] += 1.0
    return Floors(*result)


@lru_cache(maxsize=4096)
def _at(exponent: int, num_experts: int, top_k: int, num_ranks: int | None) -> FloatArray:
    """Logarithms of the floors at a power of two of tokens, max/mean above 1, [6]."""
    placement = None if num_ranks is None else metrics.contiguous_placement(num_experts, num_ranks)
    null = nulls.null(1 << exponent, num_experts, top_k, placement)
    values = (
        null.gini_mean,
        null.gini_high,
        null.gini_second_moment,
        null.gini_square_sd,
        null.max_over_mean_mean - 1.0,
        null.max_over_mean_high - 1.0,
    )
    logs: FloatArray = np.log(np.maximum(values, _TINY))
    return logs
