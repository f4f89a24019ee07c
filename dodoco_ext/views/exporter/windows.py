"""Imbalance of the last whole window of the exporter's clock: every scraper sees the same figures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dodoco_ext import metrics
from dodoco_ext.counters import Counts
from dodoco_ext.views.balances import effective
from dodoco_ext.views.exporter.identity import Key
from dodoco_ext.views.exporter.sums import Sums
from dodoco_ext.views.null_curve import NullCurve

_MOST = 1 << 48
"""Assignments that no window has."""


@dataclass(frozen=True)
class Figures:
    """One layer in one window; nan where top_k is not known."""

    gini: float
    gini_corrected: float
    gini_floor: float
    max_over_mean: float
    unused_experts: int


class Windows:
    """Windows of equal length that begin at multiples of it, by Unix time, one after another.

    Args:
        length_s: Their length.

    Attributes:
        figures: Those of the last whole window, for each group and layer that had assignments.
    """

    def __init__(self, length_s: float) -> None:
        self.length_s = length_s
        self.figures: dict[tuple[Key, str], Figures] = {}
        self._window: int | None = None
        self._whole = False
        self._begin: dict[tuple[Key, str], tuple[Counts, Counts]] = {}

    def is_due(self, time_ns: int) -> bool:
        """Whether a window has ended since the last call of `end()`."""
        return self._number(time_ns) != self._window

    def end(self, time_ns: int, sums: Sums) -> None:
        """Ends the present window, and begins the next.

        One that did not last its whole length, such as the first, gives no figures.

        Args:
            time_ns: When `sums` was updated, Unix ns.
            sums: What has been counted until then.
        """
        number = self._number(time_ns)
        now = {
            (key, name): (layer.counts, layer.before, layer.top_k)
            for key, group in sums.groups.items()
            for name, layer in group.layers.items()
        }
        if self._whole and self._window is not None and number == self._window + 1:
            counted = []
            for place, (counts, before, top_k) in now.items():
                zeros = np.zeros_like(counts)
                begin, begin_before = self._begin.get(place, (zeros, zeros))
                if (counts < begin).any():  # the group went, and came anew
                    begin = begin_before = zeros
                # Both differences only grow, and what is new before the window is part of what is new.
                counted.append((place, (counts - begin) - (before - begin_before), top_k))
            self.figures = dict(_figures(counted))
        else:
            self.figures = {}
        # A window is whole if the one before ended at its beginning, and no clock has jumped.
        self._whole = self._window is not None
        self._window = number
        self._begin = {place: (counts, before) for place, (counts, before, _) in now.items()}

    def _number(self, time_ns: int) -> int:
        return int(time_ns // round(self.length_s * 1e9))


def _figures(
    counted: Iterable[tuple[tuple[Key, str], Counts, int]],
) -> list[tuple[tuple[Key, str], Figures]]:
    families: dict[tuple[int, int], list[tuple[tuple[Key, str], Counts]]] = {}
    for place, counts, top_k in counted:
        if counts.any():
            families.setdefault((len(counts), top_k), []).append((place, counts))
    found = []
    for (num_experts, top_k), members in families.items():
        tokens = [_tokens(counts, top_k) for _, counts in members]
        curve = _curve([size for size in tokens if size > 0], num_experts, top_k)
        for (place, counts), size in zip(members, tokens, strict=True):
            gini, corrected, floor = float(metrics.gini(counts)), math.nan, math.nan
            if curve is not None and size > 0:
                floor = float(curve.gini_mean([size])[0])
                corrected = curve.corrected_gini([gini], [size])
            peak, unused = metrics.max_over_mean(counts), metrics.unused_experts(counts)
            figures = Figures(gini, corrected, floor, float(peak), int(unused))
            found.append((place, figures))
    return found


def _tokens(counts: Counts, top_k: int) -> int:
    """Tokens that the null must assume; 0 where it is not known, or a damaged file says nonsense."""
    total = int(counts.sum())
    return int(effective(total, top_k)) if total < _MOST else 0


def _curve(tokens: list[int], num_experts: int, top_k: int) -> NullCurve | None:
    """The null at powers of two around the sizes: always the same ones, so that simulations are kept.

    From a variance of a count of 2048 up, all sizes share one simulation anyway.
    """
    if not tokens or not top_k:
        return None
    first, last = min(tokens).bit_length() - 1, max(tokens).bit_length()
    nodes = np.array([1 << power for power in range(first, last + 1)], np.int64)
    return NullCurve(nodes, nodes, num_experts, top_k)
