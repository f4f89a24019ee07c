"""Routers to draw from: k distinct of E experts a token, uniform or weighted, exactly.

A token visits the experts in order and picks each with a probability that depends on the picks it has
left, so counts are drawn by one binomial per expert and picks left: the cost does not depend on the number
of tokens, and the inclusion probabilities (hence the true Gini) are known exactly.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dodoco_ext.errors import InputError

FloatArray = NDArray[np.float64]


def check_top_k(num_experts: int, top_k: int) -> None:
    """Raises InputError unless 1 <= top_k <= num_experts."""
    if num_experts < 1:
        raise InputError(f"num_experts is {num_experts}; it must be at least 1")
    if top_k == 0:
        raise InputError("top_k is 0 (unknown); give the experts per token: the null depends on it")
    if not 1 <= top_k <= num_experts:
        raise InputError(f"top_k is {top_k}; it must be from 1 to num_experts ({num_experts})")


def check_tokens(num_tokens: ArrayLike) -> NDArray[np.int64]:
    """Numbers of tokens as int64; raises InputError for negative or fractional ones."""
    tokens = np.asarray(num_tokens)
    if tokens.dtype.kind not in "iu":
        raise InputError(f"num_tokens is {tokens.dtype}; give whole numbers of tokens")
    if tokens.size and int(tokens.min()) < 0:
        raise InputError(f"num_tokens holds {int(tokens.min())}; it cannot be negative")
    return tokens.astype(np.int64)


def selection_of(log_weights: FloatArray, top_k: int) -> FloatArray:
    """Selection probabilities [..., E, k + 1] that visit experts in order, of log weights [..., E].

    Entry (e, r) is the probability that a token with r picks left among experts e .. E-1 takes
    expert e, when a set of k experts has probability proportional to the product of its weights:
    ``w_e S_{r-1}(e+1) / S_r(e)``, S_r(e) the elementary symmetric polynomial of w_e .. w_{E-1}
    (Chen, Dempster and Liu, Biometrika 81, 1994).
    """
    num_experts = log_weights.shape[-1]
    tails = np.full((*log_weights.shape[:-1], num_experts + 1, top_k + 1), -np.inf)
    tails[..., 0] = 0.0
    for expert in range(num_experts - 1, -1, -1):
        taken = log_weights[..., expert, None] + tails[..., expert + 1, :-1]
        tails[..., expert, 1:] = np.logaddexp(tails[..., expert + 1, 1:], taken)
    selection = np.zeros((*log_weights.shape, top_k + 1))
    with np.errstate(invalid="ignore"):  # -inf minus -inf: a state that cannot occur
        selection[..., 1:] = np.exp(
            log_weights[..., None] + tails[..., 1:, :-1] - tails[..., :-1, 1:]
        )
    probabilities: FloatArray = np.clip(np.nan_to_num(selection), 0.0, 1.0)
    return probabilities


def uniform_selection(num_experts: int, top_k: int) -> FloatArray:
    """Probability of picking the expert at hand [num_experts, picks left], uniform routing."""
    left = np.arange(num_experts, 0, -1)[:, None]
    return np.minimum(np.arange(top_k + 1) / left, 1.0)


def inclusion_of(selection: FloatArray) -> FloatArray:
    """Probability [..., E] that a token picks each expert; sums to k."""
    state = np.zeros((*selection.shape[:-2], selection.shape[-1]))
    state[..., -1] = 1.0
    inclusion = np.empty(selection.shape[:-1])
    for expert in range(selection.shape[-2]):
        taken = state * selection[..., expert, :]
        inclusion[..., expert] = taken.sum(axis=-1)
        state -= taken
        state[..., :-1] += taken[..., 1:]
    return inclusion


def sample(
    rng: np.random.Generator, num_tokens: int, selection: FloatArray, num_draws: int
) -> NDArray[np.int64]:
    """Counts [num_draws, num_experts] of passes of num_tokens tokens each."""
    # Tokens with equally many picks left are exchangeable, so one binomial moves them all: exact,
    # and its cost does not depend on the number of tokens.
    num_experts, num_states = selection.shape
    waiting = np.zeros((num_states, num_draws), dtype=np.int64)
    waiting[-1] = num_tokens
    counts = np.empty((num_experts, num_draws), dtype=np.int64)
    for expert in range(num_experts):
        taken = rng.binomial(waiting[1:], selection[expert, 1:, None])
        counts[expert] = taken.sum(axis=0)
        waiting[1:] -= taken
        waiting[:-1] += taken
    return counts.T


def sample_counts(
    rng: np.random.Generator,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    num_draws: int,
    log_weights: ArrayLike | None = None,
) -> NDArray[np.int64]:
    """Draw expert counts of passes whose tokens pick k distinct experts independently; exact.

    Args:
        rng: source of randomness.
        num_tokens: T, tokens a pass.
        num_experts: E.
        top_k: k.
        num_draws: passes to draw.
        log_weights: [E] log weight of each expert; a set of k has probability proportional to the
            product of its weights. None: uniform.

    Returns:
        int64 [num_draws, E]; each row sums to T * k and no count exceeds T.

    Raises:
        InputError: bad sizes, or weights of the wrong shape.
    """
    check_top_k(num_experts, top_k)
    check_tokens(num_tokens)
    selection = (
        uniform_selection(num_experts, top_k)
        if log_weights is None
        else selection_of(_checked_weights(log_weights, num_experts), top_k)
    )
    return sample(rng, num_tokens, selection, num_draws)


def inclusion_probabilities(log_weights: ArrayLike, top_k: int) -> FloatArray:
    """Probability [E] that a token picks each expert, under the weights of :func:`sample_counts`.

    The Gini of these is the true Gini, that of infinitely many tokens.
    """
    weights = _checked_weights(log_weights, np.size(log_weights))
    check_top_k(len(weights), top_k)
    return inclusion_of(selection_of(weights, top_k))


def _checked_weights(log_weights: ArrayLike, num_experts: int) -> FloatArray:
    weights = np.asarray(log_weights, dtype=np.float64)
    if weights.shape != (num_experts,) or not np.isfinite(weights).all():
        raise InputError(
            f"log_weights have shape {weights.shape}; give one finite number for each of "
            f"{num_experts} experts"
        )
    return weights


@lru_cache(maxsize=256)
def fit_selection(inclusion: tuple[float, ...], top_k: int) -> tuple[FloatArray, FloatArray]:
    """Selection probabilities whose inclusion probabilities are those given, and those reached."""
    # An expert that every token (or none) picks has an infinite weight; stop short of it.
    target = np.clip(np.array(inclusion), 1e-9, 1 - 1e-6)
    log_weights = np.log(target / (1 - target))
    for _ in range(100):
        selection = selection_of(log_weights, top_k)
        reached = inclusion_of(selection)
        if np.abs(reached - target).max() < 1e-4 * target.max():
            break
        log_weights += np.log(target / np.maximum(reached, 1e-12))
    return selection, reached
