"""What expert parallelism changes: imbalance of experts and of ranks at EP 4 to 32, from counts alone.

A rank's load is the sum of its experts' counts, so one set of counts holds every EP size. Two arms answer
two questions. With a fixed number of tokens a pass, EP only cuts the same experts into more groups: max/mean
over experts cannot change, and that is so by construction. With a fixed number of tokens a rank, a larger EP
brings more tokens into a pass. Max/mean of ranks stands beside what uniform routing of as many tokens gives and
beside placements at random.

Unit: assignments, as everywhere; a token with two experts on one rank counts twice. Aggregation: pass, then
layer, then model, all equally weighted. Intervals resample passes of whole sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, lcm, nan

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dodoco_ext import metrics, nulls
from dodoco_ext.errors import InputError
from dodoco_ext.intervals import bootstrap_interval
from dodoco_ext.observatory.ep_placements import placed_peaks, random_orders
from dodoco_ext.observatory.ep_results import (
    FIXED_GLOBAL,
    FIXED_PER_RANK,
    Change,
    EpArm,
    EpPoint,
    EpScan,
    Peak,
    RandomPlacements,
)
from dodoco_ext.observatory.result import Interval

EP_SIZES = (4, 8, 16, 32)

FloatArray = NDArray[np.float64]
_UNKNOWN: Interval = (nan, nan)


def ep_scan(
    counts: ArrayLike,
    top_k: int | Sequence[int],
    *,
    model: str = "",
    condition: str = "",
    sequences_per_pass: int = 8,
    sequences_per_rank: int = 1,
    ep_sizes: Sequence[int] = EP_SIZES,
    num_placements: int = 1000,
    seed: int = 0,
) -> EpScan:
    """Scans EP sizes over counts of sequences; no device, no process.

    Args:
        counts: [..., S, L, E] assignments of each sequence, layer and expert; leading axes (data seeds) are
            laid end to end. Neighbouring sequences form a pass.
        top_k: k, of all layers or of each [L].
        model: Name to carry along.
        condition: Name to carry along.
        sequences_per_pass: In a pass of the first arm, at every EP size.
        sequences_per_rank: In the second arm, a pass at EP R has R times as many.
        ep_sizes: Numbers of ranks, rising.
        num_placements: Placements at random.
        seed: Of the placements and of the resampling.

    Raises:
        InputError: Counts are not [..., S, L, E], tokens are no multiple of k, or a size is below 1.
    """
    sequences, per_layer = _checked(counts, top_k)
    sizes = sorted({*ep_sizes})
    if not sizes or sizes[0] < 1 or min(sequences_per_pass, sequences_per_rank, num_placements) < 1:
        raise InputError(
            f"ep_sizes {[*ep_sizes]}, sequences_per_pass {sequences_per_pass}, sequences_per_rank "
            f"{sequences_per_rank}, num_placements {num_placements}: give whole numbers above 0"
        )
    _, num_layers, num_experts = sequences.shape
    scanner = _Scanner(
        sequences, per_layer, random_orders(num_placements, num_layers, num_experts, seed), seed
    )
    arms = (
        scanner.arm(FIXED_GLOBAL, dict.fromkeys(sizes, sequences_per_pass)),
        scanner.arm(FIXED_PER_RANK, {size: size * sequences_per_rank for size in sizes}),
    )
    return EpScan(model, condition, num_experts, num_placements, seed, arms)


def rank_loads(counts: ArrayLike, num_ranks: int) -> NDArray[np.int64]:
    """Assignments that each rank receives when experts lie on them in equal contiguous runs.

    Args:
        counts: [..., E] of experts.
        num_ranks: R, a divisor of E.

    Returns:
        [..., R] int64.

    Raises:
        InputError: R does not divide E.
    """
    array = np.asarray(counts, dtype=np.int64)
    metrics.contiguous_placement(array.shape[-1], num_ranks)
    loads: NDArray[np.int64] = array.reshape(*array.shape[:-1], num_ranks, -1).sum(axis=-1)
    return loads


def _checked(
    counts: ArrayLike, top_k: int | Sequence[int]
) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    array = np.asarray(counts)
    if array.ndim < 3 or array.dtype.kind not in "iu" or 0 in array.shape:
        raise InputError(
            f"counts are {array.dtype} of shape {array.shape}; give whole numbers [sequences, layers, experts]"
        )
    num_layers = array.shape[-2]
    per_layer = (top_k,) * num_layers if isinstance(top_k, int) else tuple(top_k)
    if len(per_layer) != num_layers or min(per_layer) < 1:
        raise InputError(
            f"top_k is {top_k} for {num_layers} layers; give one above 0, or one a layer"
        )
    sequences = array.reshape(-1, num_layers, array.shape[-1]).astype(np.int64)
    if sequences.min() < 0 or (sequences.sum(axis=-1) == 0).any():
        raise InputError(
            "counts hold a sequence without assignments, or a negative one; leave it out"
        )
    return sequences, per_layer


class _Scanner:
    """The counts, and what all arms share."""

    def __init__(
        self,
        sequences: NDArray[np.int64],
        top_k: tuple[int, ...],
        orders: NDArray[np.int64],
        seed: int,
    ) -> None:
        self._sequences, self._top_k, self._orders, self._seed = sequences, top_k, orders, seed
        self._num_experts = sequences.shape[-1]

    def arm(self, name: str, per_pass: dict[int, int]) -> EpArm:
        """One arm; `per_pass` is the number of sequences in a pass at each EP size."""
        reasons = {size: self._reason(size, many) for size, many in per_pass.items()}
        measured = [size for size, reason in reasons.items() if not reason]
        # All sizes are judged on the same sequences: whole blocks that hold passes of every kind.
        block = lcm(*(per_pass[size] for size in measured))
        if block > len(self._sequences):
            raise InputError(
                f"passes of {[per_pass[s] for s in measured]} sequences share a block of {block}, and there are "
                f"{len(self._sequences)}: give ep_sizes that divide the largest"
            )
        kept = self._sequences[: len(self._sequences) // block * block]
        points: list[EpPoint] = []
        base: tuple[FloatArray, FloatArray] | None = None
        first: tuple[Peak, Peak] | None = None
        for size, many in per_pass.items():
            if reasons[size]:
                points.append(EpPoint(size, reasons[size]))
                continue
            passes = kept.reshape(-1, many, *kept.shape[1:]).sum(axis=1)
            values = (
                np.asarray(metrics.max_over_mean(passes)).mean(axis=1),
                np.asarray(metrics.max_over_mean(rank_loads(passes, size))).mean(axis=1),
            )
            # One row a block, so that sizes with shorter passes are resampled along.
            rows = tuple(v.reshape(len(kept) // block, -1).mean(axis=1) for v in values)
            base = base or (rows[0], rows[1])
            point = self._point(size, passes, values, first, (base, (rows[0], rows[1])))
            assert point.expert is not None
            assert point.rank is not None
            first = first or (point.expert, point.rank)
            points.append(point)
        same = len({per_pass[size] for size in measured}) == 1
        return EpArm(name, name == FIXED_GLOBAL and same, tuple(points))

    def _reason(self, num_ranks: int, sequences: int) -> str:
        if self._num_experts % num_ranks:
            return f"{num_ranks} ranks do not divide {self._num_experts} experts"
        if sequences > len(self._sequences):
            return f"a pass needs {sequences} sequences, of which there are {len(self._sequences)}"
        return ""

    def _point(
        self,
        size: int,
        passes: NDArray[np.int64],
        values: tuple[FloatArray, FloatArray],
        first: tuple[Peak, Peak] | None,
        rows: tuple[tuple[FloatArray, FloatArray], tuple[FloatArray, FloatArray]],
    ) -> EpPoint:
        placement = metrics.contiguous_placement(self._num_experts, size)
        experts = self._peak(values[0], passes, None)
        ranks = self._peak(values[1], passes, placement)
        base, here = rows
        first = first or (experts, ranks)
        random = placed_peaks(passes, self._orders, size)
        by_layer = np.asarray(metrics.max_over_mean(rank_loads(passes, size))).mean(axis=0)
        return EpPoint(
            num_ranks=size,
            reason="",
            passes=len(passes),
            tokens_per_pass=round(float(self._tokens(passes).mean())),
            expert=experts,
            rank=ranks,
            expert_change=self._change(base[0], here[0], first[0], experts),
            rank_change=self._change(base[1], here[1], first[1], ranks),
            random=_spread(random.mean(axis=1), ranks.value),
            rank_layers=tuple(float(value) for value in by_layer),
            random_layers=tuple(float(value) for value in random.mean(axis=0)),
        )

    def _tokens(self, passes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each pass and layer [P, L]."""
        tokens: NDArray[np.int64] = np.rint(passes.sum(axis=-1) / np.array(self._top_k)).astype(
            np.int64
        )
        return tokens

    def _peak(
        self, values: FloatArray, passes: NDArray[np.int64], placement: NDArray[np.int64] | None
    ) -> Peak:
        sizes: dict[tuple[int, int], int] = {}
        for row in self._tokens(passes):
            for tokens, top_k in zip(row.tolist(), self._top_k, strict=True):
                sizes[tokens, top_k] = sizes.get((tokens, top_k), 0) + 1
        found = [
            (nulls.null(tokens, self._num_experts, top_k, placement), many)
            for (tokens, top_k), many in sizes.items()
        ]
        weights = np.array([many for _, many in found], dtype=np.float64)
        columns = np.array(
            [(n.max_over_mean_mean, n.max_over_mean_low, n.max_over_mean_high) for n, _ in found]
        )
        mean, low, high = (
            float(x) for x in (weights[:, None] * columns).sum(axis=0) / weights.sum()
        )
        return Peak(float(values.mean()), self._interval(values), mean, (low, high))

    def _interval(self, values: FloatArray) -> Interval:
        return bootstrap_interval(values, seed=self._seed) if len(values) > 1 else _UNKNOWN

    def _change(self, base: FloatArray, here: FloatArray, first: Peak, peak: Peak) -> Change:
        null = peak.null / first.null - 1
        if np.array_equal(base, here):
            return Change(0.0, (0.0, 0.0), null)
        relative = float(here.mean() / base.mean() - 1)
        if len(base) < 2:
            return Change(relative, _UNKNOWN, null)
        pairs = np.stack([base, here], axis=1)
        return Change(relative, bootstrap_interval(pairs, _relative, seed=self._seed), null)


def _relative(pairs: FloatArray) -> float:
    base, here = pairs.mean(axis=0)
    return float(here / base - 1)


def _spread(peaks: FloatArray, contiguous: float) -> RandomPlacements:
    assert isfinite(contiguous)
    equal = np.isclose(peaks, contiguous, rtol=1e-12, atol=0)
    below = float(((peaks < contiguous) & ~equal).mean() + equal.mean() / 2)
    low, high = (float(q) for q in np.quantile(peaks, [0.025, 0.975]))
    return RandomPlacements(float(peaks.mean()), (low, high), float(peaks.min()), below)
