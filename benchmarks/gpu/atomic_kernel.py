"""Kernels to compare with: one that does nothing, and one with a global atomic for each id."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nothing(words):
    """An empty node of a graph."""


@triton.jit
def count_with_atomics(ids, counts, num_ids, num_experts, BLOCK: tl.constexpr):
    """Adds 1 to the count [num_experts] of each id [num_ids], out of range or not routed aside."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + at, mask=at < num_ids, other=-1)
    valid = (expert >= 0) & (expert < num_experts)
    tl.atomic_add(counts + expert, 1, mask=valid, sem="relaxed")
