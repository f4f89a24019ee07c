"""Gini against batch size, on the very same sequences: is there a trend, and is it more than chance?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.errors import InputError
from dodoco_ext.intervals import expanded_interval, resampled_means
from dodoco_ext.observatory.grid.batch_arms import ARMS, Floors, arms_of, twins_of
from dodoco_ext.observatory.grid.batch_slopes import Slopes, raw_trend, trend_beyond_chance
from dodoco_ext.observatory.grid.cells import Cell
from dodoco_ext.observatory.grid.passes import (
    NUM_RESAMPLES,
    FloatArray,
    signed_root_mean,
    stream,
    tokens_of,
)
from dodoco_ext.observatory.grid.results import BatchScan, Curve, Slope
from dodoco_ext.observatory.result import Interval

BATCH_SIZES = (1, 2, 4, 8, 16, 32)

_FEWEST_BLOCKS = 8


def batch_sizes(num_draws: int, num_sequences: int) -> list[int]:
    """Those of `BATCH_SIZES` of which eight passes exist, as intervals need.

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
        seed: Of dealing, resampling and twins.

    Raises:
        InputError: Too few sequences.
    """
    draws, sequences = cell.counts.shape[:2]
    sizes = batch_sizes(draws, sequences)
    each = sequences // sizes[-1]
    used, blocks = cell.counts[:, : each * sizes[-1]], draws * each
    floors = Floors(used, cell.top_k, tokens_of(cell), sizes)

    def randomness(*purpose: str) -> np.random.Generator:
        return stream(seed, "batches", cell.model, cell.name, *purpose)

    arms = arms_of(used, floors, blocks, randomness("deal"))
    dealing = randomness("twins dealt")
    twins = np.array(
        [
            arms_of(twin, floors, blocks, dealing).mean(axis=1)
            for twin in twins_of(used, floors, randomness("twins"))
        ]
    )  # [twins, arms, sizes, 2, layers]
    curves, layers = [], []
    for index, arm in enumerate(ARMS):
        chance = Slopes.of(twins[:, index], sizes)
        curve, of_layers = _curve(arms[index], floors, arm, chance, randomness(arm))
        curves.append(curve)
        layers.append(of_layers)
    dispersion, ends = _dispersion(used, cell.top_k, blocks, randomness("dispersion"))
    growing = curves[0]
    raw, corrected = growing.raw_slope.verdict, growing.corrected_slope.verdict
    return BatchScan(
        model=cell.model,
        condition=cell.name,
        kind=cell.kind,
        batch_sizes=sizes,
        growing=growing,
        equal=curves[1],
        verdict="survives" if corrected != "none" else "vanishes" if raw != "none" else "none",
        dispersion=dispersion,
        dispersion_interval=ends,
        layer_slope=layers[0],
    )


def _curve(
    arm: FloatArray, floors: Floors, name: str, chance: Slopes, rng: np.random.Generator
) -> tuple[Curve, list[Slope]]:
    """One arm [blocks, sizes, 2, layers], and the corrected slope of each layer."""
    blocks, means = len(arm), arm.mean(axis=0)
    resampled = resampled_means(arm, rng, NUM_RESAMPLES)
    found, spread = Slopes.of(means, floors.sizes), Slopes.of(resampled, floors.sizes)
    gini, gini_r = means[:, 0].mean(axis=-1), resampled[:, :, 0].mean(axis=-1)
    corrected, corrected_r = signed_root_mean(means[:, 1]), signed_root_mean(resampled[:, :, 1])
    null = floors.null[ARMS.index(name)]
    curve = Curve(
        tokens=floors.tokens_of(name),
        gini=gini.tolist(),
        gini_interval=_pairs(expanded_interval(gini_r, blocks)),
        null_gini=null[:, 0].tolist(),
        null_gini_band=_pairs(null[:, 1:].T),
        corrected_gini=corrected.tolist(),
        corrected_gini_interval=_pairs(expanded_interval(corrected_r, blocks)),
        raw_slope=raw_trend(float(found.raw), spread.raw, chance.raw, blocks),
        corrected_slope=trend_beyond_chance(
            float(found.corrected), spread.corrected, chance.corrected, blocks
        ),
    )
    layers = [
        trend_beyond_chance(float(value), spread.layers[:, n], chance.layers[:, n], blocks)
        for n, value in enumerate(found.layers)
    ]
    return curve, layers


def _dispersion(
    used: NDArray[np.int32], top_k: list[int], num_blocks: int, rng: np.random.Generator
) -> tuple[list[float], list[Interval]]:
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
    ratio = free * np.divide(squares, expected, out=np.ones_like(squares), where=expected > 1e-9)
    by_block = ratio.reshape(num_blocks, -1, ratio.shape[-1]).mean(axis=1)
    resampled = resampled_means(by_block, rng, NUM_RESAMPLES)
    return ratio.mean(axis=0).tolist(), _pairs(expanded_interval(resampled, num_blocks))


def _pairs(ends: FloatArray) -> list[Interval]:
    return [(float(low), float(high)) for low, high in ends.T]
