"""Load-balance metrics of expert counts: one definition each, used by every view and report.

Notation: ``c_1 .. c_E`` are the counts of one layer (assignments per expert, or tokens per rank
after :func:`rank_counts`) in one stated scope (a pass, a window, a run), ``N = sum c`` and ``mean =
N / E``. Nothing here aggregates over passes or layers: the caller does, and says in which order.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dodoco_ext.errors import InputError

FloatOrArray: TypeAlias = np.float64 | NDArray[np.float64]
IntOrArray: TypeAlias = np.int64 | NDArray[np.int64]


def _checked(counts: ArrayLike, axis: int = -1) -> NDArray[Any]:
    """Return counts as an array with the expert axis last, or raise InputError."""
    array = np.asarray(counts)
    if array.ndim == 0 or array.dtype.kind not in "iufb":
        raise InputError(
            f"counts must be an array of numbers with an expert axis, got {array.dtype} of shape "
            f"{array.shape}; pass integers of shape [..., num_experts]"
        )
    if not -array.ndim <= axis < array.ndim:
        raise InputError(
            f"axis {axis} does not exist in counts of shape {array.shape}; "
            "pass the axis that holds the experts"
        )
    array = np.moveaxis(array, axis, -1)
    if array.shape[-1] == 0:
        raise InputError("counts have 0 experts on the given axis; pass at least one expert")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError("counts hold a value that is not finite; pass counts of tokens")
    if array.dtype.kind in "if" and array.size and array.min() < 0:
        raise InputError(f"counts hold {array.min()}; counts cannot be negative")
    return array.astype(np.uint8) if array.dtype.kind == "b" else array


def _ratio(numerator: Any, denominator: Any) -> FloatOrArray:
    """Divide, with nan where the denominator is 0 (nothing was counted)."""
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    result = np.full(np.broadcast_shapes(top.shape, bottom.shape), np.nan)
    np.divide(top, bottom, out=result, where=bottom != 0)
    quotient: FloatOrArray = result[()]  # a scalar where there are no leading axes
    return quotient


def gini(counts: ArrayLike, axis: int = -1) -> FloatOrArray:
    """Gini coefficient: ``sum_ij |c_i - c_j| / (2 E N)``, in [0, 1 - 1/E]; 0 is balanced.

    Computed in O(E log E) from the sorted counts as ``sum_i (2 i - E - 1) c_(i) / (E N)`` (Dixon et
    al., "Bootstrapping the Gini coefficient of inequality", Ecology 68, 1987).

    Args:
        counts: [..., E] non-negative counts, experts on ``axis``.
        axis: the expert axis.

    Returns:
        [...] float64, nan where the total is 0.

    Raises:
        InputError: counts are negative, not finite, not numbers, or have no experts.
    """
    ordered = np.sort(_checked(counts, axis), axis=-1)
    num_experts = ordered.shape[-1]
    # Gini's numerator does not change under a shift; subtracting the minimum in integers first
    # keeps all digits of small differences between large counts.
    shifted = (ordered - ordered[..., :1]).astype(np.float64)
    ranks = 2.0 * np.arange(1, num_experts + 1) - num_experts - 1.0
    return _ratio(shifted @ ranks, num_experts * ordered.sum(axis=-1, dtype=np.float64))


def gini_from_numerator(
    numerator: ArrayLike, assignments: ArrayLike, num_experts: ArrayLike
) -> FloatOrArray:
    """Gini from a recorded integer numerator: ``numerator / (E * assignments)``.

    Args:
        numerator: [...] sum over unordered pairs i < j of ``|c_i - c_j|``.
        assignments: [...] N, in (token, expert) slots.
        num_experts: E, one number or [...].

    Returns:
        [...] float64, nan where assignments is 0; equal to :func:`gini` of the counts.

    Raises:
        InputError: num_experts is below 1.
    """
    experts = np.asarray(num_experts)
    if experts.size and experts.min() < 1:
        raise InputError(f"num_experts is {experts.min()}; it must be at least 1")
    return _ratio(numerator, np.asarray(assignments, np.float64) * experts)


def max_over_mean(counts: ArrayLike, axis: int = -1) -> FloatOrArray:
    """Busiest expert over the mean: ``E max(c) / N``, in [1, E]; nan where the total is 0.

    Args and errors: as :func:`gini`. It is the factor by which the busiest expert (or rank)
    stretches a step that waits for all of them.
    """
    array = _checked(counts, axis)
    return _ratio(
        array.max(axis=-1).astype(np.float64) * array.shape[-1],
        array.sum(axis=-1, dtype=np.float64),
    )


def balancedness(counts: ArrayLike, axis: int = -1) -> FloatOrArray:
    """Mean over the busiest expert: ``N / (E max(c))``, in [1/E, 1]; nan where the total is 0.

    The inverse of :func:`max_over_mean`, and what vLLM and SGLang log. Args and errors: as
    :func:`gini`.
    """
    array = _checked(counts, axis)
    return _ratio(
        array.sum(axis=-1, dtype=np.float64),
        array.max(axis=-1).astype(np.float64) * array.shape[-1],
    )


def cv(counts: ArrayLike, axis: int = -1) -> FloatOrArray:
    """Coefficient of variation: population standard deviation over the mean, in [0, sqrt(E - 1)].

    Args and errors: as :func:`gini`. Its square is the load term of Shazeer et al., "Outrageously
    large neural networks" (2017), section 4. nan where the total is 0.
    """
    array = _checked(counts, axis).astype(np.float64)
    return _ratio(array.std(axis=-1), array.mean(axis=-1))


def normalized_entropy(counts: ArrayLike, axis: int = -1) -> FloatOrArray:
    """Shannon entropy over its maximum: ``-sum p log p / log E``, in [0, 1]; 1 is balanced.

    Args and errors: as :func:`gini`. One expert alone is balanced, hence 1. nan where the total is
    0.
    """
    array = _checked(counts, axis).astype(np.float64)
    num_experts = array.shape[-1]
    share = np.asarray(_ratio(array, array.sum(axis=-1, keepdims=True)))
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    entropy = -(share * logs).sum(axis=-1)
    if num_experts == 1:
        return _ratio(entropy + 1.0, 1.0)
    return _ratio(np.clip(entropy, 0.0, np.log(num_experts)), np.log(num_experts))


def unused_experts(counts: ArrayLike, axis: int = -1) -> IntOrArray:
    """Number of experts that received nothing, in [0, E]; E where the total is 0.

    Args and errors: as :func:`gini`.
    """
    unused: IntOrArray = (_checked(counts, axis) == 0).sum(axis=-1, dtype=np.int64)
    return unused


def checked_placement(placement: ArrayLike, num_experts: int) -> NDArray[np.int64]:
    """Return a placement as int64 [E], or raise InputError.

    Args:
        placement: [E] rank of each expert; every rank 0 .. R-1 must hold at least one expert.
        num_experts: E.
    """
    array = np.asarray(placement)
    if array.shape != (num_experts,) or array.dtype.kind not in "iu":
        raise InputError(
            f"placement is {array.dtype} of shape {array.shape}; "
            f"give one integer rank for each of the {num_experts} experts"
        )
    ranks = array.astype(np.int64)
    held = np.unique(ranks)
    if held[0] < 0 or held[-1] != len(held) - 1:
        raise InputError(
            f"placement names ranks {held[0]} to {held[-1]} but {len(held)} of them hold experts; "
            "number the ranks 0 .. R-1, each with at least one expert"
        )
    return ranks


def contiguous_placement(num_experts: int, num_ranks: int) -> NDArray[np.int64]:
    """Placement of E experts on R ranks in equal runs: expert e is on rank ``e // (E / R)``.

    Returns:
        int64 [E], the rank of each expert.

    Raises:
        InputError: num_ranks is below 1 or does not divide num_experts.
    """
    if num_experts < 1 or num_ranks < 1 or num_experts % num_ranks:
        raise InputError(
            f"{num_ranks} ranks do not divide {num_experts} experts evenly; "
            "choose a divisor or give a placement"
        )
    return np.arange(num_experts, dtype=np.int64) // (num_experts // num_ranks)


def rank_counts(counts: ArrayLike, placement: ArrayLike) -> NDArray[Any]:
    """Sum expert counts per expert-parallel rank; totals are preserved exactly.

    The unit stays assignments: a token sent to two experts on one rank counts twice, as it is
    computed twice.

    Args:
        counts: [..., E] non-negative counts.
        placement: [E] rank of each expert.

    Returns:
        [..., R] uint64, int64 or float64, as the counts are unsigned, signed or real.

    Raises:
        InputError: bad counts, or a placement of another length or with an empty rank.
    """
    array = _checked(counts)
    ranks = checked_placement(placement, array.shape[-1])
    wide = {"u": np.uint64, "i": np.int64, "f": np.float64}[array.dtype.kind]
    result = np.zeros((*array.shape[:-1], int(ranks.max()) + 1), dtype=wide)
    for expert, rank in enumerate(ranks):
        result[..., rank] += array[..., expert]
    return result
