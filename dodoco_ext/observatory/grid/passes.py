"""Passes out of sequences: histograms of batches, and what resampling their means gives."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.grid.cells import Cell

FloatArray = NDArray[np.float64]
Counts = NDArray[np.int64]

NUM_RESAMPLES = 2000


def passes_of(counts: NDArray[np.int32], batch: int) -> Counts:
    """Counts of passes of `batch` consecutive sequences of one draw; what is left over is not used.

    Args:
        counts: [draws, sequences, layers, experts].
        batch: Sequences a pass.

    Returns:
        int64 [passes, layers, experts], draw by draw.

    Raises:
        InputError: A draw has fewer sequences than one pass.
    """
    draws, sequences, layers, experts = counts.shape
    each = sequences // batch
    if not each:
        raise InputError(
            f"a draw of {sequences} sequences holds no pass of {batch}: observe more sequences"
        )
    grouped = counts[:, : each * batch].reshape(draws * each, batch, layers, experts)
    passes: Counts = grouped.sum(axis=1, dtype=np.int64)
    return passes


def tokens_of(cell: Cell) -> int:
    """Tokens of one sequence, the same for all."""
    return int(cell.counts[0, 0, 0].sum()) // cell.top_k[0]


def stream(seed: int, *names: str) -> np.random.Generator:
    """Randomness of its own for each purpose."""
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


def root_mean(excess: FloatArray) -> FloatArray:
    """Corrected Gini of a model from mean squared Gini minus noise [..., layers]: mean of the layers' roots."""
    roots: FloatArray = np.sqrt(np.maximum(excess, 0.0)).mean(axis=-1)
    return roots


def signed_root(excess: FloatArray) -> FloatArray:
    """The root with the sign kept, so that what is 0 on average stays 0 on average."""
    root: FloatArray = np.sign(excess) * np.sqrt(np.abs(excess))
    return root


def signed_root_mean(excess: FloatArray) -> FloatArray:
    """Mean of the layers' signed roots [..., layers]."""
    mean: FloatArray = signed_root(excess).mean(axis=-1)
    return mean
