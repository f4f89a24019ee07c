"""What a held-out token costs without a model: from how often it occurs, and from the token before it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.observatory.conditions import Ids

_DISCOUNT = 0.75


class Baselines:
    """Token frequencies of training streams, alone and after each token.

    The bigram model discounts absolutely and falls back to the unigram model (Ney, Essen and
    Kneser, 1994, equation for the backing-off distribution, with the usual discount of 0.75).

    Args:
        streams: Ids of each training text, int64 [N]; all are counted as they are.
        vocab_size: Number of ids.
    """

    def __init__(self, streams: Sequence[Ids], vocab_size: int) -> None:
        self._size = vocab_size
        self._streams = streams

    @cached_property
    def unigram(self) -> NDArray[np.float64]:
        """Probability of each token, add-one smoothed [V]."""
        counts = sum(np.bincount(stream, minlength=self._size) for stream in self._streams)
        smoothed = np.asarray(counts, np.float64) + 1
        return np.asarray(smoothed / smoothed.sum())

    @cached_property
    def bigram(self) -> NDArray[np.float64]:
        """Probability of each token after each [V before, V]."""
        pairs = np.zeros(self._size**2)
        for stream in self._streams:
            pairs += np.bincount(stream[:-1] * self._size + stream[1:], minlength=self._size**2)
        counts = pairs.reshape(self._size, self._size)
        before = counts.sum(axis=1, keepdims=True)
        kinds = (counts > 0).sum(axis=1, keepdims=True)
        left_over = np.where(before > 0, _DISCOUNT * kinds / np.maximum(before, 1), 1.0)
        kept = np.maximum(counts - _DISCOUNT, 0) / np.maximum(before, 1)
        return np.asarray(kept + left_over * self.unigram)

    def losses(self, windows: Ids) -> tuple[float, float]:
        """Mean cost of the tokens of each window but its first, in nats.

        Args:
            windows: Ids [N, T].

        Returns:
            Cost under the unigram and under the bigram model.
        """
        targets = windows[:, 1:]
        unigram = -np.log(self.unigram[targets]).mean()
        return float(unigram), float(-np.log(self.bigram[windows[:, :-1], targets]).mean())
