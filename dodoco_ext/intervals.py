"""Bootstrap intervals that resample whole sequences: tokens of one text are not independent."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dodoco_ext.errors import InputError

Statistic = Callable[[NDArray[Any]], Any]
Interval = tuple[float, float]


def student_t(level: float, degrees: int) -> float:
    """Two-sided quantile of Student's t, by its expansion (Abramowitz and Stegun 26.7.5)."""
    z, nu = NormalDist().inv_cdf((1 + level) / 2), degrees
    return (
        z
        + (z**3 + z) / (4 * nu)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3)
    )


def _widened_tail(level: float, num_blocks: int) -> float:
    """Tail probability that gives the percentile interval the width of a t interval.

    Percentile intervals of few blocks are too narrow: they use z and the divisor n. Hesterberg,
    "What teachers should know about the bootstrap", The American Statistician 69 (2015), section
    3.4 ("expanded percentile").
    """
    t = student_t(level, num_blocks - 1)
    return NormalDist().cdf(-t * (num_blocks / (num_blocks - 1)) ** 0.5)


def _members(name: str, values: NDArray[Any], blocks: ArrayLike | None) -> list[NDArray[np.int64]]:
    """Row indices of each block, in order of the block's label."""
    if values.ndim == 0:
        raise InputError(f"{name} is a single number; give one value a pass (or a sequence)")
    num_values = len(values)
    labels = np.arange(num_values) if blocks is None else np.asarray(blocks)
    if labels.shape != (num_values,):
        raise InputError(
            f"blocks of {name} have shape {labels.shape} for {num_values} values; "
            "give one label a value"
        )
    _, inverse = np.unique(labels, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.flatnonzero(np.diff(inverse[order])) + 1
    members = np.split(order, starts) if num_values else []
    if len(members) < 2:
        raise InputError(
            f"{name} holds {len(members)} independent block(s); an interval needs at least 2: "
            "observe more sequences"
        )
    return members


def _resampled(
    rng: np.random.Generator,
    values: NDArray[Any],
    members: list[NDArray[np.int64]],
    statistic: Statistic,
    num_resamples: int,
) -> NDArray[np.float64]:
    """The statistic of each resample [num_resamples]."""
    num_blocks = len(members)
    result = np.empty(num_resamples)
    # The default statistic needs only each block's sum and length, which spares gathering its rows.
    only_mean = statistic is np.mean and values.ndim == 1
    if only_mean:
        lengths = np.array([len(rows) for rows in members], dtype=np.float64)
        sums = np.array([values[rows].sum(dtype=np.float64) for rows in members])
    for index in range(num_resamples):
        chosen = rng.integers(num_blocks, size=num_blocks)
        if only_mean:
            result[index] = sums[chosen].sum() / lengths[chosen].sum()
        else:
            rows = np.concatenate([members[block] for block in chosen])
            result[index] = float(statistic(values[rows]))
    return result


def _check(level: float, num_resamples: int) -> None:
    if not 0 < level < 1:
        raise InputError(f"level is {level}; give a confidence level between 0 and 1, such as 0.95")
    if num_resamples < 100:
        raise InputError(f"num_resamples is {num_resamples}; give at least 100")


def resampled_means(
    values: ArrayLike, rng: np.random.Generator, num_resamples: int = 2000
) -> NDArray[np.float64]:
    """Means of resamples of whole blocks, for statistics that are functions of means.

    Args:
        values: [blocks, ...] one entry a block; all columns are resampled together.
        rng: Source of randomness.
        num_resamples: Resamples.

    Returns:
        [num_resamples, ...] float64; summed without BLAS, so that bytes do not depend on the machine's
        number of cores.

    Raises:
        InputError: Fewer than two blocks.
    """
    array = np.asarray(values, dtype=np.float64)
    num_blocks = len(_members("values", array, None))
    _check(0.95, num_resamples)
    drawn = rng.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), size=num_resamples)
    flat = array.reshape(num_blocks, -1)
    means: NDArray[np.float64] = np.einsum("rb,bm->rm", drawn / num_blocks, flat, optimize=False)
    return means.reshape(num_resamples, *array.shape[1:])


def expanded_interval(
    resampled: ArrayLike, num_blocks: int, level: float = 0.95
) -> NDArray[np.float64]:
    """The expanded percentile interval of a statistic, from its resamples.

    Args:
        resampled: [num_resamples, ...]; infinities are allowed.
        num_blocks: Blocks that were resampled; of two samples, the smaller number.
        level: Confidence level.

    Returns:
        [2, ...] lower and upper ends.
    """
    tail, values = _widened_tail(level, num_blocks), np.asarray(resampled, dtype=np.float64)
    # Order statistics, not interpolation: between two infinities interpolation would give nan.
    low = np.quantile(values, tail, axis=0, method="lower")
    high = np.quantile(values, 1 - tail, axis=0, method="higher")
    return np.array([low, high])


def bootstrap_interval(
    values: ArrayLike,
    statistic: Statistic = np.mean,
    blocks: ArrayLike | None = None,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Confidence interval of a statistic by resampling whole blocks with replacement.

    Args:
        values: [P, ...] one row a pass; rows are resampled along axis 0, so several columns stay
            together.
        statistic: takes the resampled rows [P', ...] and returns one number. P' varies where blocks
            are of unequal size.
        blocks: [P] label of the independent unit (sequence, text) each row comes from; None: each
            row is one.
        level: confidence level.
        num_resamples: bootstrap resamples.
        seed: seed of the resampling; the same seed gives the same interval.

    Returns:
        (low, high), the expanded percentile interval.

    Raises:
        InputError: fewer than two blocks, or arguments out of range.
    """
    _check(level, num_resamples)
    array = np.asarray(values)
    members = _members("values", array, blocks)
    rng = np.random.default_rng(seed)
    resampled = _resampled(rng, array, members, statistic, num_resamples)
    tail = _widened_tail(level, len(members))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_ratio_interval(
    numerator: ArrayLike,
    denominator: ArrayLike,
    statistic: Statistic = np.mean,
    numerator_blocks: ArrayLike | None = None,
    denominator_blocks: ArrayLike | None = None,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of ``statistic(numerator) / statistic(denominator)``, such as mock over real.

    The two samples are independent and resampled apart. Arguments and errors: as
    :func:`bootstrap_interval`. A resample whose denominator is 0 counts as infinity, so the upper
    end may be infinite.
    """
    _check(level, num_resamples)
    top, bottom = np.asarray(numerator), np.asarray(denominator)
    top_members = _members("numerator", top, numerator_blocks)
    bottom_members = _members("denominator", bottom, denominator_blocks)
    rng = np.random.default_rng(seed)
    above = _resampled(rng, top, top_members, statistic, num_resamples)
    below = _resampled(rng, bottom, bottom_members, statistic, num_resamples)
    ratios = np.full(num_resamples, np.inf)
    np.divide(above, below, out=ratios, where=below != 0)
    num_blocks = min(len(top_members), len(bottom_members))
    low, high = expanded_interval(ratios, num_blocks, level)
    return float(low), float(high)
