"""Expert-parallel ranks at random: the busiest rank when experts are dealt out blindly.

A random placement is a random order of a layer's experts, cut into equal runs. One order serves every
number of ranks, so that placements at EP 4 and EP 32 are nested as contiguous ones are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_MAX_CELLS = 1 << 23
"""Numbers held at once; more placements are taken in turn."""


def random_orders(
    num_placements: int, num_layers: int, num_experts: int, seed: int
) -> NDArray[np.int64]:
    """Position of each expert in random orders of each layer [num_placements, num_layers, num_experts]."""
    rng = np.random.default_rng([seed, num_experts])
    shape = (num_placements, num_layers, num_experts)
    orders: NDArray[np.int64] = rng.permuted(
        np.broadcast_to(np.arange(num_experts), shape).copy(), axis=-1
    )
    return orders


def placed_peaks(
    passes: NDArray[np.int64], orders: NDArray[np.int64], num_ranks: int
) -> FloatArray:
    """Busiest rank over mean rank of passes under given placements, mean over the passes.

    Args:
        passes: [P, L, E] assignments a pass.
        orders: [D, L, E] position of each expert; expert e lies on rank ``position // (E / R)``.
        num_ranks: R, a divisor of E.

    Returns:
        [D, L] max/mean over ranks.
    """
    num_passes, num_layers, num_experts = passes.shape
    ranks = orders // (num_experts // num_ranks)
    means = passes.sum(axis=-1) / num_ranks
    step = max(1, _MAX_CELLS // (num_ranks * max(num_experts, num_passes)))
    peaks = np.empty((len(orders), num_layers))
    for layer in range(num_layers):
        # Sums of whole numbers are exact in float64, in whatever order a library adds them.
        counts = passes[:, layer].astype(np.float64)
        for start in range(0, len(orders), step):
            chosen = ranks[start : start + step, layer]
            holds = np.equal(chosen.T[:, :, None], np.arange(num_ranks)).astype(np.float64)
            loads = (counts @ holds.reshape(num_experts, -1)).reshape(num_passes, -1, num_ranks)
            peaks[start : start + step, layer] = (loads.max(axis=-1) / means[:, layer, None]).mean(
                axis=0
            )
    return peaks
