"""Interleaved timing: contestants take turns, and every statement is about neighbouring blocks.

Each round runs them all in a random order: a drift of the machine hits all alike, and none has a
place of its own. Time is CPU time. On a quiet machine with one thread it is also wall time; on a
shared one it leaves out the time that other processes took.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.intervals import bootstrap_interval

FloatArray = NDArray[np.float64]


def nothing() -> None:
    """The default of `Contestant.prepare`."""


@dataclass(frozen=True)
class Contestant:
    """One way of doing the same work.

    Attributes:
        run: What is timed.
        prepare: Called before each block, outside the clock.
    """

    run: Callable[[], object]
    prepare: Callable[[], None] = nothing


@dataclass(frozen=True)
class Summary:
    """Quantiles over blocks, and the bootstrap interval (95 %) of the median."""

    p20: float
    p50: float
    p80: float
    low: float
    high: float
    num_blocks: int

    @classmethod
    def of(cls, values: FloatArray, together: NDArray[np.int64] | None = None) -> Summary:
        """Summarises one value a block [blocks].

        Args:
            values: One a block.
            together: Blocks of equal number are resampled together; by default 40 stretches.
        """
        p20, p50, p80 = (float(value) for value in np.quantile(values, (0.2, 0.5, 0.8)))
        # Neighbouring rounds share the machine's mood: stretches of them are what is resampled.
        if together is None:
            together = np.arange(len(values)) * min(len(values), 40) // len(values)
        low, high = bootstrap_interval(values, np.median, together, num_resamples=500)
        return cls(p20, p50, p80, low, high, len(values))


@dataclass(frozen=True)
class Timings:
    """Seconds a call of each contestant, [blocks] each; equal index, same round."""

    seconds: Mapping[str, FloatArray]

    def time(self, name: str) -> Summary:
        """Seconds a call."""
        return Summary.of(self.seconds[name])

    def ratio(self, name: str, base: str) -> Summary:
        """Time of `name` in units of `base`, round by round."""
        return Summary.of(self.seconds[name] / self.seconds[base])

    def slowdown(self, name: str, base: str) -> Summary:
        """Relative extra time of `name`: 0.01 is one per cent."""
        return Summary.of(self.seconds[name] / self.seconds[base] - 1)

    def difference(self, name: str, base: str) -> Summary:
        """Extra seconds a call of `name`, round by round."""
        return Summary.of(self.seconds[name] - self.seconds[base])


def calls_for(run: Callable[[], object], block_s: float) -> int:
    """How many calls last about `block_s` seconds, after warming up."""
    calls = 1
    while True:
        # The fastest of three: one hiccup must not pass for the length of a call.
        elapsed = min(_time_block(run, calls) for _ in range(3))
        if elapsed >= block_s / 2:
            return max(1, round(calls * block_s / elapsed))
        calls *= 2


def interleave(
    contestants: Mapping[str, Contestant],
    *,
    num_blocks: int,
    block_s: float = 1e-3,
    calls: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Timings:
    """Times the contestants in turn.

    Args:
        contestants: By name.
        num_blocks: Rounds.
        block_s: About how long one block lasts, in CPU seconds; it sets the calls in a block.
        calls: Calls in a block, instead of `block_s`. A block of a single call is not preceded by
            an untimed one: what is that long finds its caches as its own work left them.
        seed: Seed of the order.
    """
    names = list(contestants)
    if calls is None:
        calls = {}
        for name in names:
            contestants[name].prepare()
            calls[name] = calls_for(contestants[name].run, block_s)
    seconds = {name: np.empty(num_blocks) for name in names}
    order = np.random.default_rng(seed)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for block in range(num_blocks):
            for name in order.permutation(names):
                contestant = contestants[name]
                contestant.prepare()
                if calls[name] > 1:
                    contestant.run()  # the previous contestant's caches are not this one's cost
                elapsed = _time_block(contestant.run, calls[name])
                seconds[name][block] = elapsed / calls[name]
    finally:
        if was_enabled:
            gc.enable()
    return Timings(seconds)


def _time_block(run: Callable[[], object], calls: int) -> float:
    rounds = range(calls)
    start = time.process_time_ns()
    for _ in rounds:
        run()
    return (time.process_time_ns() - start) / 1e9
