"""What imbalance costs: the share of expert compute time that ranks wait for the hottest one.

A *step* is what all ranks finish together before any goes on: one execution of one layer. With loads
n_1 .. n_R (assignments that each rank computes) and time proportional to them, the step lasts as long
as the hottest rank and R ranks spend R max(n) of time, of which sum(n) is work. Over several steps

    waiting = 1 - sum(mean(n)) / sum(max(n))

which is 1 - mean/max of the steps, weighted by the time they take. Perfect balance would make expert
compute `1 / (1 - waiting)` times as fast. Where a "step" is the sum of several executions, loads that
take turns cancel, so that the figure is a lower bound (max of sums <= sum of maxima).

Uniform routing waits too, the more the fewer tokens a step has. `chance` is what it is expected to.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import ArrayLike

from dodoco_ext.errors import InputError
from dodoco_ext.null_grid import floors


@dataclass(frozen=True)
class Cost:
    """Loads of some steps, summed; costs of other steps may be added to it.

    Attributes:
        steps: Steps with any load.
        mean: Their mean loads, summed: the time with perfect balance, in assignments.
        hottest: Their largest loads, summed: the time as it is.
        chance: The largest loads expected of uniform routing of as many assignments, summed; nan
            where top_k is unknown.
    """

    steps: int = 0
    mean: float = 0.0
    hottest: float = 0.0
    chance: float = 0.0

    @property
    def waiting(self) -> float:
        """Share of the ranks' time spent waiting for the hottest, 0 .. 1 - 1/R; nan for no steps."""
        return 1.0 - self.mean / self.hottest if self.hottest else nan

    @property
    def waiting_by_chance(self) -> float:
        """The same for uniform routing of the same numbers of assignments."""
        return 1.0 - self.mean / self.chance if self.chance else nan

    @property
    def speedup(self) -> float:
        """How many times as fast expert compute would be with perfect balance, from 1."""
        return self.hottest / self.mean if self.mean else nan

    @property
    def beyond_chance(self) -> float:
        """Share of the present time that would be saved if only chance were left, from 0."""
        return max(0.0, 1.0 - self.chance / self.hottest) if self.hottest else nan

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.steps + other.steps,
            self.mean + other.mean,
            self.hottest + other.hottest,
            self.chance + other.chance,
        )


def cost_of(loads: ArrayLike, num_experts: int, top_k: int, *, assignments: bool = True) -> Cost:
    """The cost of some steps of layers that have E and k in common.

    Args:
        loads: Assignments that each of R ranks computes in each step, [n, R]. With R = E, experts.
        num_experts: E.
        top_k: k; 0 where unknown.
        assignments: Whether loads count assignments; otherwise nothing is known of chance.

    Raises:
        InputError: Loads have another shape.
    """
    array = np.asarray(loads, np.float64)
    if array.ndim != 2 or not array.shape[1]:
        raise InputError(f"loads have shape {array.shape}: give [steps, ranks]")
    return cost_of_peaks(
        array.sum(axis=1),
        array.max(axis=1),
        array.shape[1],
        num_experts,
        top_k if assignments else 0,
    )


def cost_of_peaks(
    totals: ArrayLike, peaks: ArrayLike, num_ranks: int, num_experts: int, top_k: int
) -> Cost:
    """`cost_of` where only the total and the largest load of each step are known, [n] each.

    That is what a record of a pass holds of its experts. Contiguous placement is assumed of chance; it
    is unknown where R does not divide E.
    """
    total, peak = np.asarray(totals, np.float64), np.asarray(peaks, np.float64)
    total, peak = total[total > 0], peak[total > 0]
    if not len(total):
        return Cost()
    known = top_k > 0 and num_experts % num_ranks == 0
    mean = total / num_ranks
    chance = nan
    if known:
        ranks = None if num_ranks == num_experts else num_ranks
        chance = float((mean * floors(total, num_experts, top_k, ranks).peak).sum())
    return Cost(len(total), float(mean.sum()), float(peak.sum()), chance)
