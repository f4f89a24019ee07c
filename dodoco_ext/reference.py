"""What one routing pass must count, in a few lines of numpy: the yardstick of every kernel.

Slow on purpose and by definition rather than by trick, so that it can be checked by reading. It shares
no code with `csrc/` or `triton_kernels/`; tests and benchmarks compare those with it, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dodoco_ext.errors import InputError

PADDING_ID = -1


@dataclass(frozen=True, eq=False)
class ReferencePass:
    """One pass of one layer: counters in (token, slot) pairs, statistics as exact integers.

    Attributes:
        counts: Assignments per expert, int64 [E].
        tokens: Rows that had something to route.
        assignments: (token, expert) pairs; the sum of `counts`.
        padded: (token, slot) pairs that were padding.
        invalid: Ids outside [0, E) other than the padding id -1, or map bits past the last expert.
        capacity_dropped: Assignments missing from rows of a map that have fewer than top_k.
        max_count: Largest count.
        unused_experts: Experts with a count of 0.
        gini_numerator: Sum over pairs i < j of |c_i - c_j|; Gini is this over E * assignments.
    """

    counts: NDArray[np.int64]
    tokens: int
    assignments: int
    padded: int
    invalid: int
    capacity_dropped: int
    max_count: int
    unused_experts: int
    gini_numerator: int


def route_ids(ids: ArrayLike, num_experts: int, num_valid: int | None = None) -> ReferencePass:
    """Counts a pass given as expert ids.

    Args:
        ids: Integers [T, k]; -1 is padding.
        num_experts: E.
        num_valid: Rows that are real, the first ones; the rest is padding. None: all.

    Returns:
        The pass; `capacity_dropped` is 0.

    Raises:
        InputError: The ids are not integers of shape [T, k] with k <= E.
    """
    array = np.asarray(ids)
    if array.ndim != 2 or array.dtype.kind not in "iu" or array.shape[1] > num_experts:
        raise InputError(
            f"ids of shape {list(array.shape)}, {array.dtype}, for {num_experts} experts: "
            "give integers [T, k] with k <= num_experts"
        )
    wide = array.astype(np.int64)
    real = wide[:num_valid]
    is_padding = real == PADDING_ID
    is_valid = (real >= 0) & (real < num_experts)
    return _pass(
        counts=np.bincount(real[is_valid], minlength=num_experts),
        tokens=int((~is_padding).any(axis=1).sum()),
        padded=int(is_padding.sum()) + wide.size - real.size,
        invalid=int((~is_padding & ~is_valid).sum()),
    )


def route_map(
    routing_map: ArrayLike,
    num_experts: int,
    top_k: int = 0,
    num_valid: int | None = None,
    *,
    packed: bool = False,
) -> ReferencePass:
    """Counts a pass given as a routing map.

    Args:
        routing_map: [T, E], non-zero where a token goes to an expert; or, packed, uint8
            [T, ceil(E / 8)] with expert e in bit e % 8 (little-endian) of byte e // 8.
        num_experts: E.
        top_k: Experts each token should have; 0: not fixed, so nothing counts as dropped.
        num_valid: Rows that are real, the first ones; the rest is padding. None: all.
        packed: Whether the map is packed.

    Returns:
        The pass; `invalid` counts bits past the last expert.

    Raises:
        InputError: The map's shape does not fit the number of experts.
    """
    array = np.asarray(routing_map)
    columns = (num_experts + 7) // 8 if packed else num_experts
    if array.ndim != 2 or array.shape[1] != columns:
        raise InputError(
            f"routing map of shape {list(array.shape)} for {num_experts} experts: "
            f"give [T, {columns}]"
        )
    bits = np.unpackbits(array, axis=1, bitorder="little") if packed else array != 0
    real = bits[:num_valid].astype(bool)
    chosen = real[:, :num_experts]
    per_token = chosen.sum(axis=1, dtype=np.int64)
    return _pass(
        counts=chosen.sum(axis=0, dtype=np.int64),
        tokens=len(real),
        padded=(len(bits) - len(real)) * top_k,
        invalid=int(real[:, num_experts:].sum()),
        capacity_dropped=int(np.maximum(top_k - per_token, 0).sum()),
    )


def gini_numerator(counts: ArrayLike) -> int:
    """Sum over pairs i < j of |c_i - c_j|, by that definition: O(E^2) time, O(E) memory.

    Args:
        counts: Non-negative integers [E].
    """
    array = np.asarray(counts, dtype=np.int64)
    return sum(int(np.abs(array - count).sum()) for count in array) // 2


def _pass(counts: NDArray[Any], **counters: int) -> ReferencePass:
    counters.setdefault("capacity_dropped", 0)
    return ReferencePass(
        counts=counts.astype(np.int64),
        assignments=int(counts.sum()),
        max_count=int(counts.max()),
        unused_experts=int((counts == 0).sum()),
        gini_numerator=gini_numerator(counts),
        **counters,
    )
