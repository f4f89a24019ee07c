"""Gini and max/mean under perfectly uniform routing, and Gini with that floor removed.

The null: each of T tokens picks k distinct experts of E, every set of k equally likely, tokens
independent. Few tokens then already give a Gini above 0 and a max/mean above 1. Expected Gini is
computed exactly; the rest is a seeded simulation with an exact sampler, so equal arguments always
give equal results.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import comb, isqrt, pi, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.linalg import norm
from numpy.typing import ArrayLike, NDArray

from dodoco_ext.errors import InputError
from dodoco_ext.metrics import checked_placement, gini, max_over_mean, rank_counts
from dodoco_ext.sampling import check_tokens, check_top_k, fit_selection, sample, uniform_selection

FloatArray = NDArray[np.float64]
Labels = tuple[int, ...] | None
"""A placement as a hashable tuple [E], or None for experts taken one by one."""

DETECTION_SE = 2.5
"""Standard errors (one-sided 0.6 %) by which mean squared Gini must exceed the null's."""

_MAX_EXACT_STEPS = 2**18
"""Longest walk whose mean distance is summed exactly; beyond it a series is as good."""

_LARGE_VARIANCE = 1024
"""Count variance from which deviations are normal enough to scale as 1 / sqrt(T)."""


@dataclass(frozen=True)
class Null:
    """Gini and max/mean of one pass under uniform routing; all nan where there are no tokens.

    Attributes:
        gini_mean: expected Gini.
        gini_low, gini_high: 95 % band of the Gini.
        gini_second_moment: expected squared Gini.
        gini_square_sd: standard deviation of the squared Gini.
        max_over_mean_mean: expected max/mean.
        max_over_mean_low, max_over_mean_high: 95 % band of max/mean.
    """

    gini_mean: float
    gini_low: float
    gini_high: float
    gini_second_moment: float
    gini_square_sd: float
    max_over_mean_mean: float
    max_over_mean_low: float
    max_over_mean_high: float


def _labels(placement: ArrayLike | None, num_experts: int) -> Labels:
    if placement is None:
        return None
    return tuple(int(rank) for rank in checked_placement(placement, num_experts))


@lru_cache(maxsize=4096)
def _mean_distance(num_tokens: int, num_experts: int, top_k: int, left: int, right: int) -> float:
    """``E|a - b|`` for the counts of two disjoint groups of ``left`` and ``right`` experts.

    a - b is a walk of T independent steps in -k .. k, each the difference of two entries of a
    multivariate hypergeometric. Since ``|n| = (1/pi) integral_0^pi (1 - cos n t) / (1 - cos t) dt``
    and the integrand is a trigonometric polynomial of degree |n| - 1, the midpoint rule with more
    than T * k points is exact.
    """
    rest = num_experts - left - right
    pmf = np.zeros(2 * top_k + 1)
    for a in range(min(left, top_k) + 1):
        for b in range(min(right, top_k - a) + 1):
            ways = comb(left, a) * comb(right, b) * comb(rest, top_k - a - b)
            pmf[top_k + a - b] += ways / comb(num_experts, top_k)
    steps = np.arange(-top_k, top_k + 1)
    reach = int(np.abs(steps[pmf > 0]).max())
    if num_tokens * reach <= _MAX_EXACT_STEPS:
        num_points = num_tokens * reach // 2 + 1  # the integrand is even in t about pi
        angles = (np.arange(num_points) + 0.5) * pi / num_points
        walk = _characteristic(pmf, angles, left == right) ** num_tokens
        return float(np.mean((1.0 - walk.real) / (1.0 - np.cos(angles))))
    mean = num_tokens * float(pmf @ steps)
    variance = num_tokens * float(pmf @ steps**2) - mean**2 / num_tokens
    if variance == 0:
        return abs(mean)
    ratio = mean / sqrt(variance)
    folded = sqrt(2 * variance / pi) * np.exp(-(ratio**2) / 2)
    folded += mean * (2 * NormalDist().cdf(ratio) - 1)
    # Edgeworth and lattice terms of next order, for steps -1, 0, +1 (p each way): 1 - (1 - 2p) / (8
    # variance).
    correction = (1 - 2 * pmf[top_k + 1]) / (8 * variance) if reach == 1 else 0.0
    return float(folded * (1 - correction))


def _characteristic(pmf: FloatArray, angles: FloatArray, symmetric: bool) -> NDArray[np.inexact]:
    top_k = len(pmf) // 2
    total: NDArray[np.inexact] = np.full(len(angles), pmf[top_k])
    if symmetric:  # stays real, which halves the cost
        for step in range(1, top_k + 1):
            total = total + 2 * pmf[top_k + step] * np.cos(step * angles)
        return total
    for step in range(1, top_k + 1):
        wave = np.exp(1j * step * angles)
        total = total + pmf[top_k + step] * wave + pmf[top_k - step] * wave.conj()
    return total


@lru_cache(maxsize=4096)
def _gini_mean(num_tokens: int, num_experts: int, top_k: int, labels: Labels) -> float:
    if num_tokens == 0:
        return float("nan")
    group_sizes = np.ones(num_experts, np.int64) if labels is None else np.bincount(labels)
    sizes, how_many = np.unique(group_sizes, return_counts=True)
    total = 0.0
    for i, left in enumerate(sizes):
        for j in range(i, len(sizes)):
            pairs = how_many[i] * (how_many[j] - (i == j)) / (2 if i == j else 1)
            if pairs:
                walk = (num_tokens, num_experts, top_k, int(left), int(sizes[j]))
                total += pairs * _mean_distance(*walk)
    return float(total / (len(group_sizes) * num_tokens * top_k))


def null_gini_mean(
    num_tokens: ArrayLike, num_experts: int, top_k: int, placement: ArrayLike | None = None
) -> FloatArray:
    """Expected Gini under uniform routing, for many pass sizes at once; exact, no simulation.

    Args:
        num_tokens: [...] tokens a pass.
        num_experts: E.
        top_k: k.
        placement: as for :func:`null`.

    Returns:
        [...] float64, nan where there are no tokens.

    Raises:
        InputError: as :func:`null`.
    """
    check_top_k(num_experts, top_k)
    tokens, labels = check_tokens(num_tokens), _labels(placement, num_experts)
    sizes, inverse = np.unique(tokens, return_inverse=True)
    means = np.array([_gini_mean(int(size), num_experts, top_k, labels) for size in sizes])
    result: FloatArray = means[inverse].reshape(tokens.shape)
    return result


def _num_draws(num_experts: int, top_k: int, profile: tuple[float, ...] | None) -> int:
    """Passes to simulate: more for few experts, whose Gini scatters more and costs less."""
    most = 2000 if profile is not None else max(2000, 300_000 // num_experts)
    return int(np.clip(4_000_000 // (num_experts * top_k), 500, min(most, 20_000)))


@lru_cache(maxsize=4096)
def _simulate(
    num_tokens: int, num_experts: int, top_k: int, labels: Labels, profile: tuple[float, ...] | None
) -> tuple[FloatArray, FloatArray]:
    """Gini (mean, low, high, sd, mean square, sd of square), max/mean (mean, low, high)."""
    selection = (
        uniform_selection(num_experts, top_k)
        if profile is None
        else fit_selection(profile, top_k)[0]
    )
    rng = np.random.default_rng([num_tokens, num_experts, top_k])
    counts = sample(rng, num_tokens, selection, _num_draws(num_experts, top_k, profile))
    if labels is not None:
        counts = rank_counts(counts, labels)
    ginis, peaks = np.asarray(gini(counts)), np.asarray(max_over_mean(counts))
    squares = ginis**2
    # The outer order statistics, so that a band of few possible values covers at least 95 %.
    bands = [
        (np.quantile(x, 0.025, method="lower"), np.quantile(x, 0.975, method="higher"))
        for x in (ginis, peaks)
    ]
    return (
        np.array([ginis.mean(), *bands[0], ginis.std(), squares.mean(), squares.std()]),
        np.array([peaks.mean(), *bands[1]]),
    )


@lru_cache(maxsize=4096)
def _null(num_tokens: int, num_experts: int, top_k: int, labels: Labels) -> Null:
    if num_tokens == 0:
        return Null(*[float("nan")] * 8)
    simulated, shrink = num_tokens, 1.0
    variance_per_token = top_k * (num_experts - top_k) / num_experts**2
    equal_groups = labels is None or len(set(np.bincount(labels))) == 1
    if equal_groups and num_tokens * variance_per_token > 2 * _LARGE_VARIANCE:
        # One simulation serves all long passes: reuse it, with deviations scaled.
        simulated = int(_LARGE_VARIANCE / variance_per_token) if variance_per_token else 1
        shrink = sqrt(simulated / num_tokens)
    ginis, peaks = _simulate(simulated, num_experts, top_k, labels, None)
    _, low, high, sd, _, square_sd = (float(x) for x in ginis)
    mean = _gini_mean(num_tokens, num_experts, top_k, labels)
    return Null(
        mean,
        low * shrink,
        high * shrink,
        mean**2 + (sd * shrink) ** 2,
        square_sd * shrink**2,
        *(float(1 + (peak - 1) * shrink) for peak in peaks),
    )


def null(num_tokens: int, num_experts: int, top_k: int, placement: ArrayLike | None = None) -> Null:
    """Null of Gini and max/mean for one pass, per expert or, with a placement, per rank; cached.

    Args:
        num_tokens: T, tokens counted; every one made k assignments.
        num_experts: E.
        top_k: k, distinct experts a token.
        placement: [E] rank of each expert; None: per expert. Ranks that hold unequal numbers of
            experts are unequally loaded under the null too.

    Returns:
        The null; nan throughout for 0 tokens.

    Raises:
        InputError: top_k is unknown (0) or not in 1 .. E, tokens are negative, or the placement is
        bad.
    """
    check_top_k(num_experts, top_k)
    tokens = int(check_tokens(num_tokens))
    return _null(tokens, num_experts, top_k, _labels(placement, num_experts))


def _nodes(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pass sizes to simulate: those given if few, else a grid of ratio sqrt(2) around them."""
    if len(sizes) <= 8:
        return sizes
    grid = np.array(sorted({isqrt(2**half) for half in range(126)}), dtype=np.int64)
    first = max(int(np.searchsorted(grid, sizes[0], "right")) - 1, 0)
    return grid[first : int(np.searchsorted(grid, sizes[-1])) + 1]


def corrected_gini(
    gini: ArrayLike,
    num_tokens: ArrayLike,
    num_experts: int,
    top_k: int,
    weights: ArrayLike | None = None,
    counts: ArrayLike | None = None,
    placement: ArrayLike | None = None,
) -> float:
    """Root mean square over passes of the Gini that infinitely many tokens would show.

    ``sqrt(mean(gini^2) - noise)``, and 0 where the mean square is within DETECTION_SE standard
    errors of uniform routing's. Without counts, noise is the second moment of Gini under uniform
    routing: right where the loads are spread smoothly (bell-shaped), too small where many experts
    share one load and a few stand out (see docs/metrics.md). With counts, noise is simulated under
    their loads as ``E[gini^2] - (Gini of the loads)^2``: right for loads of any shape, as long as
    the passes are routed alike.

    Args:
        gini: [P] raw Gini of each pass.
        num_tokens: int or [P], tokens of each pass; passes of 0 tokens are left out.
        num_experts: E.
        top_k: k.
        weights: [P] non-negative weight of each pass; None: equal.
        counts: [E] expert counts summed over these passes (a window's or a run's), if known.
        placement: [E] rank of each expert, where gini is per rank; counts stay per expert.

    Returns:
        The corrected Gini, in [0, 1]; nan if no pass has tokens and weight.

    Raises:
        InputError: top_k is unknown, shapes differ, or a Gini, weight or count is out of range.
    """
    check_top_k(num_experts, top_k)
    labels = _labels(placement, num_experts)
    raw = np.asarray(gini, dtype=np.float64).reshape(-1)
    tokens = _spread("num_tokens", check_tokens(num_tokens), raw.shape)
    share = _spread("weights", np.asarray(1.0 if weights is None else weights), raw.shape)
    if not (np.isfinite(share).all() and (share >= 0).all()):
        raise InputError("weights hold a negative or non-finite value; give weights of 0 or more")
    kept = (tokens > 0) & (share > 0)
    if not kept.any():
        return float("nan")
    raw, tokens, share = raw[kept], tokens[kept], share[kept] / share[kept].sum()
    if not ((raw >= 0) & (raw <= 1)).all():
        worst = raw[~((raw >= 0) & (raw <= 1))][0]
        raise InputError(f"gini holds {worst} for a pass with tokens; Gini lies in [0, 1]")
    profile = None if counts is None else _profile(counts, num_experts, top_k)
    sizes, inverse = np.unique(tokens, return_inverse=True)
    noise, square_sd, noise_error = _noise(sizes, num_experts, top_k, labels, profile)
    excess = float(share @ (raw**2 - noise[inverse]))
    standard_error = float(np.hypot(share @ noise_error[inverse], norm(share * square_sd[inverse])))
    # 1e-12: where every uniform pass has the same Gini, only rounding is left.
    return sqrt(min(excess, 1.0)) if excess > DETECTION_SE * standard_error + 1e-12 else 0.0


def gini_noise(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    counts: ArrayLike | None = None,
    placement: ArrayLike | None = None,
) -> float:
    """What chance adds to the mean squared Gini of passes of one size: `noise` of `corrected_gini`.

    Arguments and errors: as :func:`corrected_gini`. ``gini^2 - noise`` is what may be averaged,
    resampled and compared before a root is taken.
    """
    check_top_k(num_experts, top_k)
    labels = _labels(placement, num_experts)
    profile = None if counts is None else _profile(counts, num_experts, top_k)
    sizes = check_tokens(num_tokens).reshape(1)
    return float(_noise(sizes, num_experts, top_k, labels, profile)[0][0])


def _noise(
    sizes: NDArray[np.int64],
    num_experts: int,
    top_k: int,
    labels: Labels,
    profile: tuple[float, ...] | None,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Per pass size [S]: noise in mean squared Gini, its sd under the null, error of noise."""
    true_gini = 0.0
    if profile is not None:
        loads = fit_selection(profile, top_k)[1]
        true_gini = float(gini(loads if labels is None else rank_counts(loads, labels)))
    nodes = _nodes(sizes)
    at_nodes = []
    for node in nodes:
        uniform = null(int(node), num_experts, top_k, labels)
        noise, error = uniform.gini_second_moment, 0.0
        if profile is not None:
            simulated, _ = _simulate(int(node), num_experts, top_k, labels, profile)
            noise = max(float(simulated[4]) - true_gini**2, 0.0)
            error = float(simulated[5]) / sqrt(_num_draws(num_experts, top_k, profile))
        at_nodes.append((noise, uniform.gini_square_sd, error))
    # All fall like the squared mean of the null, whose exact value is cheap: only the ratios are
    # interpolated.
    floor = np.maximum(null_gini_mean(nodes, num_experts, top_k, labels) ** 2, 1e-300)
    ratios = np.array(at_nodes).T / floor
    floor = null_gini_mean(sizes, num_experts, top_k, labels) ** 2
    at = np.log(sizes), np.log(nodes)
    noise_at, sd_at, error_at = (np.interp(*at, ratio) * floor for ratio in ratios)
    return noise_at, sd_at, error_at


def _profile(counts: ArrayLike, num_experts: int, top_k: int) -> tuple[float, ...]:
    loads = np.asarray(counts)
    if loads.shape != (num_experts,) or loads.dtype.kind not in "iuf" or loads.min() < 0:
        raise InputError(
            f"counts are {loads.dtype} of shape {loads.shape}; give {num_experts} non-negative "
            "expert counts, summed over the passes"
        )
    total = float(loads.sum(dtype=np.float64))
    if not total > 0 or np.count_nonzero(loads) < top_k:
        raise InputError(
            f"counts use {np.count_nonzero(loads)} experts, fewer than top_k {top_k}; "
            "give the counts of the same passes as gini"
        )
    return tuple((loads.astype(np.float64) * top_k / total).tolist())


def _spread(name: str, values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if values.shape not in ((), shape):
        raise InputError(
            f"{name} has shape {values.shape} for {shape[0]} passes; give one number or one a pass"
        )
    return np.broadcast_to(values, shape)
