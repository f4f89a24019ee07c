"""The two arms of a scan over batch sizes: histograms of every size, and what chance does to them.

Growing: whole passes, whose tokens grow with the batch, so that their null falls. Equal: each pass's
assignments are dealt at random into as many histograms as it has sequences, so that every histogram
holds as many assignments as one sequence makes, but of all sequences of the pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import metrics, nulls
from dodoco_ext.observatory.grid.passes import Counts, FloatArray, passes_of
from dodoco_ext.sampling import fit_selection, sample

NUM_TWINS = 8
"""Cells of independent tokens that every scan is compared with."""

ARMS = ("growing", "equal")


class Floors:
    """What uniform routing gives, and what chance adds under a cell's own loads, at every size.

    Args:
        used: int32 [draws, sequences, layers, experts], the sequences of the scan.
        top_k: k of each layer.
        tokens: Of a sequence.
        sizes: Sequences a pass.

    Attributes:
        null: Null Gini and its band, mean over layers, of both arms [2, sizes, 3].
        noise: Of both arms [2, sizes, layers].
    """

    def __init__(
        self, used: NDArray[np.int32], top_k: list[int], tokens: int, sizes: list[int]
    ) -> None:
        self.top_k, self.tokens, self.sizes = top_k, tokens, sizes
        self.loads: Counts = used.sum(axis=(0, 1), dtype=np.int64)
        grown = [self._at([tokens * size] * len(top_k), top_k) for size in sizes]
        # A histogram that is dealt out of `size` sequences varies less than independent assignments
        # would, and more than tokens that choose k distinct experts: by the factor 1 - k / (E size)
        # instead of 1 - 1 / E and 1 - k / E. Noise, which follows the variance, is read off the line
        # through the two.
        distinct, single = grown[0], self._at([tokens * k for k in top_k], [1] * len(top_k))
        ks, equal = np.array(top_k), []
        for size in sizes:
            weight = np.where(ks > 1, (ks / size - 1) / np.maximum(ks - 1, 1), 0.0)
            noise = single[0] + weight * (distinct[0] - single[0])
            equal.append((noise, single[1] + weight.mean() * (distinct[1] - single[1])))
        self.noise = np.array([[noise for noise, _ in arm] for arm in (grown, equal)])
        self.null = np.array([[null for _, null in arm] for arm in (grown, equal)])

    def tokens_of(self, arm: str) -> list[int]:
        """Tokens in a histogram of each size."""
        return [self.tokens * (size if arm == "growing" else 1) for size in self.sizes]

    def _at(self, tokens: list[int], top_k: list[int]) -> tuple[FloatArray, FloatArray]:
        """Noise under the loads [layers]; null Gini and its band, mean over layers [3]."""
        num_experts, passes = self.loads.shape[-1], list(zip(tokens, top_k, strict=True))
        noise = [
            nulls.gini_noise(t, num_experts, k, self.loads[n]) for n, (t, k) in enumerate(passes)
        ]
        found = [nulls.null(t, num_experts, k) for t, k in passes]
        null = np.mean([(x.gini_mean, x.gini_low, x.gini_high) for x in found], axis=0)
        return np.array(noise), null


def arms_of(
    used: NDArray[np.int32], floors: Floors, num_blocks: int, rng: np.random.Generator
) -> FloatArray:
    """Gini, and its square without noise, mean over the histograms of a block.

    Args:
        used: [draws, sequences, layers, experts].
        floors: Of the cell.
        num_blocks: Blocks of as many sequences as the largest batch has.
        rng: Deals.

    Returns:
        [2 arms, blocks, sizes, 2, layers].
    """
    found: list[list[FloatArray]] = [[], []]
    for index, size in enumerate(floors.sizes):
        passes = passes_of(used, size)
        for arm, histograms in enumerate((passes, deal(passes, size, rng))):
            gini = np.asarray(metrics.gini(histograms))
            columns = np.stack([gini, gini**2 - floors.noise[arm, index]], axis=1)
            found[arm].append(columns.reshape(num_blocks, -1, *columns.shape[1:]).mean(axis=1))
    return np.array([np.stack(points, axis=1) for points in found])


def deal(passes: Counts, parts: int, rng: np.random.Generator) -> Counts:
    """Deals the assignments of each pass at random into `parts` equal histograms.

    Args:
        passes: [passes, layers, experts]; all of a layer have one total, which `parts` divides.
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
    for layer in range(num_layers):
        each = int(passes[0, layer].sum()) // parts
        rows = np.repeat(np.arange(num_passes * parts) * num_experts, each)
        assigned = np.stack([np.repeat(experts, counts) for counts in passes[:, layer]])
        flat = rng.permuted(assigned, axis=1).reshape(-1) + rows
        found = np.bincount(flat, minlength=num_passes * parts * num_experts)
        dealt[:, layer] = found.reshape(-1, num_experts)
    return dealt


def twins_of(
    used: NDArray[np.int32], floors: Floors, rng: np.random.Generator
) -> Iterator[NDArray[np.int32]]:
    """Cells of the same size and loads whose tokens are routed without regard to each other.

    Through the same computation they show what it makes of chance alone: the trend of the raw Gini, and
    what the correction leaves.
    """
    draws, sequences, layers, experts = used.shape
    selections = []
    for layer, top_k in enumerate(floors.top_k):
        loads = floors.loads[layer] * (top_k / floors.loads[layer].sum())
        selections.append(fit_selection(tuple(loads.tolist()), top_k)[0])
    for _ in range(NUM_TWINS):
        drawn = [sample(rng, floors.tokens, s, draws * sequences) for s in selections]
        twin = np.stack(drawn, axis=1).astype(np.int32)
        yield twin.reshape(draws, sequences, layers, experts)
