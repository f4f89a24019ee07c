"""Imbalance of the rows that ranks receive: Gini and max/mean beside what chance gives.

The null: every token of all ranks picks k distinct of E experts, every set of k equally likely, and
experts lie on R ranks in equal contiguous runs. That placement is an assumption. Rows are assignments,
k a token; or tokens, where a token sent to several experts of one rank is one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import comb, nan, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dodoco_ext import metrics, nulls
from dodoco_ext.errors import InputError

FloatArray = NDArray[np.float64]

UNKNOWN = nulls.Null(*[nan] * 8)

_MAX_NODES = 8
"""Sizes at which a null is simulated at most, about 0.1 s each; between them it is interpolated."""

_DRAWS = 4000
_MIN_DRAWS = 500
_MAX_DIRECT = 1 << 24
"""Numbers drawn at most where tokens are simulated one by one; longer passes are taken as normal."""


@dataclass(frozen=True)
class RankNull:
    """What uniform routing gives for rows received per rank.

    Args:
        num_experts: E.
        top_k: k.
        num_ranks: R, a divisor of E.
        by_token: A row is a token, not an assignment.

    Raises:
        InputError: R does not divide E, or k is not in 1 .. E.
    """

    num_experts: int
    top_k: int
    num_ranks: int
    by_token: bool = False

    def __post_init__(self) -> None:
        metrics.contiguous_placement(self.num_experts, self.num_ranks)
        if not 1 <= self.top_k <= self.num_experts:
            raise InputError(
                f"top_k={self.top_k} of num_experts={self.num_experts}: nothing is known of the null"
            )

    @cached_property
    def rows_per_token(self) -> float:
        """Rows that a token makes, on average under the null."""
        if not self.by_token:
            return self.top_k
        return self.num_ranks * _hit(self.num_experts, self.top_k, self.num_ranks, 1)

    def tokens(self, rows: ArrayLike) -> NDArray[np.int64]:
        """Tokens that make as many rows."""
        return np.rint(np.asarray(rows, np.float64) / self.rows_per_token).astype(np.int64)

    def at(self, rows: int) -> nulls.Null:
        """The null of one pass, or one run, of this many rows over all ranks; nan for none."""
        tokens = int(self.tokens(rows))
        if tokens == 0:
            return UNKNOWN
        if not self.by_token:
            placement = metrics.contiguous_placement(self.num_experts, self.num_ranks)
            return nulls.null(tokens, self.num_experts, self.top_k, placement)
        return _by_token(tokens, self.num_experts, self.top_k, self.num_ranks)

    def over(self, rows: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Expected Gini, Gini squared, its standard deviation, and max/mean at many sizes, [n] each.

        Exact to the simulation where the sizes are few, else interpolated: within 6 % (max/mean above 1
        within 12 %). Sizes of no token give nan.
        """
        tokens = self.tokens(rows).reshape(-1)
        result = np.full((4, len(tokens)), nan)
        known = tokens > 0
        if not known.any():
            return tuple(result)  # type: ignore[return-value]
        nodes = np.unique(tokens[known])
        if len(nodes) > _MAX_NODES:
            nodes = np.unique(np.rint(np.geomspace(nodes[0], nodes[-1], _MAX_NODES)))
        found = [self.at(round(node * self.rows_per_token)) for node in nodes]
        # All fall with the root of the number of tokens or with the number; what is left is smooth.
        root = np.sqrt(nodes)
        scaled = (
            np.array([null.gini_mean for null in found]) * root,
            np.array([null.gini_second_moment for null in found]) * nodes,
            np.array([null.gini_square_sd for null in found]) * nodes,
            np.array([null.max_over_mean_mean - 1 for null in found]) * root,
        )
        sizes = tokens[known].astype(np.float64)
        powers = (sizes**-0.5, 1 / sizes, 1 / sizes, sizes**-0.5)
        for index, (values, power) in enumerate(zip(scaled, powers, strict=True)):
            result[index, known] = np.interp(np.log(sizes), np.log(nodes), values) * power
        result[3] += 1
        return result[0], result[1], result[2], result[3]


@dataclass(frozen=True)
class PerDispatch:
    """Means over dispatches, every one of equal weight; nan where there are none or k is unknown.

    Attributes:
        dispatches: Those with rows.
        gini, max_over_mean: Of the rows per rank.
        gini_null, max_over_mean_null: Expected under uniform routing of as many rows.
        gini_corrected: Root mean squared Gini without what chance adds; 0 where the mean square is
            within `nulls.DETECTION_SE` standard errors of the null's.
    """

    dispatches: int
    gini: float
    gini_null: float
    gini_corrected: float
    max_over_mean: float
    max_over_mean_null: float


def per_dispatch(received: ArrayLike, null: RankNull | None) -> PerDispatch:
    """Imbalance of single dispatches.

    Args:
        received: Rows that each rank received, [n, R].
        null: What chance gives; None where nothing is known of it.
    """
    rows = np.asarray(received)
    totals = rows.sum(axis=1, dtype=np.float64)
    rows, totals = rows[totals > 0], totals[totals > 0]
    if not len(rows):
        return PerDispatch(0, nan, nan, nan, nan, nan)
    gini, peak = np.asarray(metrics.gini(rows)), np.asarray(metrics.max_over_mean(rows))
    means = float(gini.mean()), float(peak.mean())
    if null is None:
        return PerDispatch(len(rows), means[0], nan, nan, means[1], nan)
    floor, square, deviation, floor_peak = null.over(totals)
    known = np.isfinite(floor)
    if not known.any():
        return PerDispatch(len(rows), means[0], nan, nan, means[1], nan)
    excess = float((gini[known] ** 2 - square[known]).mean())
    error = float(np.linalg.norm(deviation[known])) / int(known.sum())
    significant = excess > nulls.DETECTION_SE * error + 1e-12
    return PerDispatch(
        dispatches=len(rows),
        gini=means[0],
        gini_null=float(floor[known].mean()),
        gini_corrected=sqrt(min(excess, 1.0)) if significant else 0.0,
        max_over_mean=means[1],
        max_over_mean_null=float(floor_peak[known].mean()),
    )


def _hit(num_experts: int, top_k: int, num_ranks: int, ranks: int) -> float:
    """Probability that a token goes to at least one expert of each of 1 or 2 given ranks."""
    each = num_experts // num_ranks
    missed = [comb(num_experts - n * each, top_k) / comb(num_experts, top_k) for n in (1, 2)]
    return 1 - missed[0] if ranks == 1 else 1 - 2 * missed[0] + missed[1]


@lru_cache(maxsize=1024)
def _by_token(num_tokens: int, num_experts: int, top_k: int, num_ranks: int) -> nulls.Null:
    """The null where rows are tokens, simulated, seeded.

    Short passes token by token. In long ones the rows of the ranks are normal with equal variances
    and covariances, so that they are a common number plus independent ones.
    """
    rng = np.random.default_rng([num_tokens, num_experts, top_k, num_ranks])
    hit = _hit(num_experts, top_k, num_ranks, 1)
    draws = min(_MAX_DIRECT // (num_tokens * num_experts), _DRAWS)
    if draws >= _MIN_DRAWS:
        rows = np.array(
            [_routed(rng, num_tokens, num_experts, top_k, num_ranks) for _ in range(draws)]
        )
    else:
        draws = _DRAWS
        own = hit * (1 - hit)
        shared = (_hit(num_experts, top_k, num_ranks, 2) if num_ranks > 1 else hit) - hit**2
        total = np.sqrt(max(own + (num_ranks - 1) * shared, 0.0) * num_tokens / num_ranks)
        apart = np.sqrt(max(own - shared, 0.0) * num_tokens)
        noise = rng.standard_normal((draws, num_ranks)) * apart
        noise += total * rng.standard_normal((draws, 1)) - noise.mean(axis=1, keepdims=True)
        rows = np.maximum(num_tokens * hit + noise, 0.0)
    ginis, peaks = np.asarray(metrics.gini(rows)), np.asarray(metrics.max_over_mean(rows))
    squares = ginis**2
    low, high = (np.quantile(ginis, q) for q in (0.025, 0.975))
    peak_low, peak_high = (np.quantile(peaks, q) for q in (0.025, 0.975))
    return nulls.Null(
        float(ginis.mean()),
        float(low),
        float(high),
        float(squares.mean()),
        float(squares.std()),
        float(peaks.mean()),
        float(peak_low),
        float(peak_high),
    )


def _routed(
    rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int, num_ranks: int
) -> NDArray[np.int64]:
    """Tokens that each rank receives of a uniformly routed pass, [R]."""
    scores = rng.random((num_tokens, num_experts))
    experts = np.argpartition(scores, top_k - 1, axis=1)[:, :top_k]
    hit = np.zeros((num_tokens, num_ranks), bool)
    np.put_along_axis(hit, experts // (num_experts // num_ranks), True, axis=1)
    rows: NDArray[np.int64] = hit.sum(axis=0, dtype=np.int64)
    return rows
