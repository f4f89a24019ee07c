"""Gini against batch size, on the very same sequences.

Two arms. Growing: whole passes, whose tokens grow with the batch, so that their null falls. Equal: each
pass's assignments are dealt at random into as many histograms as it has sequences, so that every
histogram holds as many assignments as one sequence makes, but of all sequences of the pass. What is
left of a trend there is that the tokens of one sequence resemble each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import metrics, nulls
from dodoco_ext.errors import InputError
from dodoco_ext.intervals import expanded_interval, resampled_means
from dodoco_ext.observatory.grid.cells import Cell
from dodoco_ext.observatory.grid.passes import (
    NUM_RESAMPLES,
    Counts,
    FloatArray,
    passes_of,
    signed_root,
    signed_root_mean,
    stream,
    tokens_of,
)
from dodoco_ext.observatory.grid.results import BatchScan, Curve, Slope

BATCH_SIZES = (1, 2, 4, 8, 16, 32)

_FEWEST_BLOCKS = 4


def batch_sizes(num_draws: int, num_sequences: int) -> list[int]:
    """Those of `BATCH_SIZES` of which at least four passes exist, the largest dividing a draw or not.

    Raises:
        InputError: There are too few sequences for two sizes.
    """
    sizes = [b for b in BATCH_SIZES if num_draws * (num_sequences // b) >= _FEWEST_BLOCKS]
    if len(sizes) < 2:
        raise InputError(
            f"{num_draws} draws of {num_sequences} sequences are too few for a scan over batch sizes: "
            "give more --num-batches"
        )
    return sizes


def batch_scan(cell: Cell, seed: int) -> BatchScan:
    """Scans a cell over `BATCH_SIZES`.

    Args:
        cell: What was acquired.
        seed: Of dealing and resampling.

    Raises:
        InputError: Too few sequences.
    """
    sizes = batch_sizes(*cell.counts.shape[:2])
    whole = passes_of(cell.counts, sizes[-1]).sum(axis=0)  # what every size is made of
    blocks = cell.counts.shape[0] * (cell.counts.shape[1] // sizes[-1])
    used = cell.counts[:, : cell.counts.shape[1] // sizes[-1] * sizes[-1]]
    length = tokens_of(cell)
    growing, equal = [], []
    for size in sizes:
        passes = passes_of(used, size)
        growing.append(_Point.of(passes, length * size, cell.top_k, whole, blocks))
        rng = stream(seed, "deal", cell.model, cell.name, str(size))
        dealt = deal(passes, size, rng)
        equal.append(_Point.dealt(dealt, length, size, cell.top_k, whole, blocks))
    names = ("batches", cell.model, cell.name)
    curves = [
        _curve(points, sizes, blocks, stream(seed, *names, arm))
        for arm, points in (("growing", growing), ("equal", equal))
    ]
    raw, corrected = (curves[0].raw_slope.verdict, curves[0].corrected_slope.verdict)
    of_layers = np.stack(
        [point.blocks[:, 1] for point in growing], axis=-1
    )  # [blocks, layers, sizes]
    resampled = resampled_means(of_layers, stream(seed, *names, "layers"), NUM_RESAMPLES)
    roots, root = signed_root(resampled), signed_root(of_layers.mean(axis=0))
    slopes = [_slope(root[n], roots[:, n], sizes, blocks) for n in range(len(root))]
    dispersion, ends = _dispersion(used, cell.top_k, blocks, stream(seed, *names, "dispersion"))
    verdict = "survives" if corrected != "none" else "vanishes" if raw != "none" else "none"
    return BatchScan(
        model=cell.model,
        condition=cell.name,
        kind=cell.kind,
        batch_sizes=sizes,
        growing=curves[0],
        equal=curves[1],
        verdict=verdict,
        dispersion=dispersion,
        dispersion_interval=ends,
        layer_slope=slopes,
    )


def deal(passes: Counts, parts: int, rng: np.random.Generator) -> Counts:
    """Deals the assignments of each pass at random into `parts` equal histograms.

    Args:
        passes: [passes, layers, experts], of totals that `parts` divides.
        parts: Histograms a pass.
        rng: Source of randomness.

    Returns:
        [passes * parts, layers, experts], which sum to the passes.
    """
    if parts == 1:
        return passes
    num_passes, num_layers, num_experts = passes.shape
    dealt = np.empty((num_passes * parts, num_layers, num_experts), dtype=np.int64)
    experts = np.arange(num_experts)
    rows = np.repeat(np.arange(num_passes * parts) * num_experts, passes[0, 0].sum() // parts)
    for layer in range(num_layers):
        assigned = np.stack([np.repeat(experts, counts) for counts in passes[:, layer]])
        flat = rng.permuted(assigned, axis=1).reshape(-1) + rows
        dealt[:, layer] = np.bincount(flat, minlength=num_passes * parts * num_experts).reshape(
            -1, num_experts
        )
    return dealt


class _Point:
    """One batch size: figures of its histograms, a mean a block, and their null, mean over layers."""

    def __init__(
        self,
        histograms: Counts,
        noise: FloatArray,
        null: FloatArray,
        tokens: int,
        blocks: int,
    ) -> None:
        gini = np.asarray(metrics.gini(histograms))
        columns = np.stack([gini, gini**2 - noise], axis=1)  # [histograms, 2, layers]
        self.blocks = columns.reshape(blocks, -1, *columns.shape[1:]).mean(axis=1)
        self.null, self.low, self.high = (float(x) for x in null)
        self.tokens = tokens

    @classmethod
    def of(
        cls, passes: Counts, tokens: int, top_k: list[int], loads: Counts, blocks: int
    ) -> _Point:
        """Of whole passes."""
        noise, null = _floors(passes.shape[-1], [tokens] * len(top_k), top_k, loads)
        return cls(passes, noise, null, tokens, blocks)

    @classmethod
    def dealt(
        cls, dealt: Counts, tokens: int, size: int, top_k: list[int], loads: Counts, blocks: int
    ) -> _Point:
        """Of equal histograms.

        One that is dealt out of `size` sequences varies less than independent assignments would, and
        more than tokens that choose k distinct experts: by the factor 1 - k / (E size) instead of 1 -
        1 / E and 1 - k / E. Noise, which follows the variance, is read off the line through the two.
        """
        num_experts, ks = dealt.shape[-1], np.array(top_k)
        distinct = _floors(num_experts, [tokens] * len(top_k), top_k, loads)
        single = _floors(num_experts, [tokens * k for k in top_k], [1] * len(top_k), loads)
        weight = np.where(ks > 1, (ks / size - 1) / np.maximum(ks - 1, 1), 0.0)
        noise = single[0] + weight * (distinct[0] - single[0])
        null = single[1] + weight.mean() * (distinct[1] - single[1])
        return cls(dealt, noise, null, tokens, blocks)


def _dispersion(
    used: NDArray[np.int32], top_k: list[int], num_blocks: int, rng: np.random.Generator
) -> tuple[list[float], list[tuple[float, float]]]:
    """Variance over sequences, relative to independent tokens: each layer's, and its interval.

    A token that is routed without regard to the others takes an expert of load p with variance p (1 - p),
    whatever the other experts do: pooled over experts, this does not ask how experts go together.
    """
    sequences = used.reshape(-1, *used.shape[2:]).astype(np.float64)
    tokens = sequences[0].sum(axis=-1) / np.array(top_k)
    loads = sequences.mean(axis=0) / tokens[:, None]
    expected = (tokens[:, None] * loads * (1 - loads)).sum(axis=-1)
    squares = ((sequences - sequences.mean(axis=0)) ** 2).sum(axis=-1)  # [sequences, layers]
    free = len(sequences) / (len(sequences) - 1)
    ratio = free * np.divide(squares, expected, out=np.ones_like(squares), where=expected > 0)
    by_block = ratio.reshape(num_blocks, -1, ratio.shape[-1]).mean(axis=1)
    resampled = resampled_means(by_block, rng, NUM_RESAMPLES)
    return ratio.mean(axis=0).tolist(), _pairs(expanded_interval(resampled, num_blocks))


def _floors(
    num_experts: int, tokens: list[int], top_k: list[int], loads: Counts
) -> tuple[FloatArray, FloatArray]:
    """Noise under the loads [layers]; null Gini and its band, mean over layers [3]."""
    sizes = list(zip(tokens, top_k, strict=True))
    noise = [nulls.gini_noise(t, num_experts, k, loads[n]) for n, (t, k) in enumerate(sizes)]
    found = [nulls.null(t, num_experts, k) for t, k in sizes]
    null = np.mean([(x.gini_mean, x.gini_low, x.gini_high) for x in found], axis=0)
    return np.array(noise), null


def _curve(
    points: list[_Point], sizes: list[int], num_blocks: int, rng: np.random.Generator
) -> Curve:
    columns = np.stack([point.blocks for point in points], axis=1)  # [blocks, sizes, 2, layers]
    means = columns.mean(axis=0)
    resampled = resampled_means(columns, rng, NUM_RESAMPLES)
    gini, corrected = means[:, 0].mean(axis=-1), signed_root_mean(means[:, 1])
    gini_r, corrected_r = resampled[:, :, 0].mean(axis=-1), signed_root_mean(resampled[:, :, 1])
    null = [point.null for point in points]
    return Curve(
        tokens=[point.tokens for point in points],
        gini=gini.tolist(),
        gini_interval=_pairs(expanded_interval(gini_r, num_blocks)),
        null_gini=null,
        null_gini_band=[(point.low, point.high) for point in points],
        corrected_gini=corrected.tolist(),
        corrected_gini_interval=_pairs(expanded_interval(corrected_r, num_blocks)),
        raw_slope=_slope(gini, gini_r, sizes, num_blocks),
        corrected_slope=_slope(corrected, corrected_r, sizes, num_blocks),
        null_slope=float(slope_of(np.array(null), sizes)),
    )


def slope_of(values: FloatArray, sizes: list[int]) -> FloatArray:
    """Least squares slope of values [..., sizes] on log2 of the sizes."""
    x = np.log2(sizes) - np.log2(sizes).mean()
    slope: FloatArray = (np.asarray(values) * x).sum(axis=-1) / (x**2).sum()
    return slope


def _slope(values: FloatArray, resampled: FloatArray, sizes: list[int], num_blocks: int) -> Slope:
    low, high = expanded_interval(slope_of(resampled, sizes), num_blocks)
    verdict = "rises" if low > 0 else "falls" if high < 0 else "none"
    return Slope(float(slope_of(values, sizes)), (float(low), float(high)), verdict)


def _pairs(ends: FloatArray) -> list[tuple[float, float]]:
    return [(float(low), float(high)) for low, high in ends.T]
