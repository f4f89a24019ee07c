"""Trends over batch sizes, and whether they are more than what chance does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dodoco_ext.intervals import expanded_interval, student_t
from dodoco_ext.observatory.grid.passes import FloatArray, signed_root, signed_root_mean
from dodoco_ext.observatory.grid.results import Slope

SMALLEST = 0.0005
"""Gini a doubling below which a trend is not told from the correction's own error on routers whose loads
are known (benchmarks/batch_trend.py)."""


@dataclass(frozen=True, eq=False)
class Slopes:
    """Slopes of one arm, from means [..., sizes, 2, layers].

    Attributes:
        raw, corrected: Of the mean over layers [...].
        layers: Corrected, of each layer [..., layers].
    """

    raw: FloatArray
    corrected: FloatArray
    layers: FloatArray

    @classmethod
    def of(cls, means: FloatArray, sizes: list[int]) -> Slopes:
        """Of means over blocks."""
        gini, excess = means[..., 0, :], means[..., 1, :]
        return cls(
            slope_of(gini.mean(axis=-1), sizes),
            slope_of(signed_root_mean(excess), sizes),
            slope_of(np.moveaxis(signed_root(excess), -2, -1), sizes),
        )


def slope_of(values: FloatArray, sizes: list[int]) -> FloatArray:
    """Least squares slope of values [..., sizes] on log2 of the sizes."""
    x = np.log2(sizes) - np.log2(sizes).mean()
    slope: FloatArray = (np.asarray(values) * x).sum(axis=-1) / (x**2).sum()
    return slope


def raw_trend(value: float, resampled: FloatArray, twins: FloatArray, num_blocks: int) -> Slope:
    """A trend of what was measured, whatever its cause.

    Args:
        value: The slope.
        resampled: Its resamples.
        twins: Slopes of cells of independent tokens.
        num_blocks: Blocks that were resampled.
    """
    return _trend(value, expanded_interval(resampled, num_blocks), float(twins.mean()))


def trend_beyond_chance(
    value: float, resampled: FloatArray, twins: FloatArray, num_blocks: int
) -> Slope:
    """A trend beyond that of independent tokens, which is taken off. Arguments: as `raw_trend`.

    The interval is that of the difference: both samples are finite.
    """
    chance = float(twins.mean())
    low, high = expanded_interval(resampled, num_blocks)
    half = student_t(0.95, len(twins) - 1) * twins.std(ddof=1) / len(twins) ** 0.5
    beyond = value - chance
    ends = np.array([beyond - np.hypot(value - low, half), beyond + np.hypot(high - value, half)])
    return _trend(beyond, ends, chance)


def _trend(value: float, ends: FloatArray, chance: float) -> Slope:
    low, high = float(ends[0]), float(ends[1])
    verdict = "rises" if low > SMALLEST else "falls" if high < -SMALLEST else "none"
    return Slope(float(value), (low, high), chance, verdict)
