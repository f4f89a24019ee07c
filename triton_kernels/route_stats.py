"""Expert ids -> tokens per expert and integer statistics, in one launch.

The counting and the statistics of the observing kernel: one program, any number of ids, no host
sync. It writes a result tensor; recordings are written by the C++ ops (CPU) in this version.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Words of the result tensor in front of the counts.
PASSES, TOKENS, ASSIGNMENTS, PADDED, INVALID, MAX_COUNT, UNUSED, GINI_NUMERATOR = range(8)
NUM_WORDS = 8


@dataclass(frozen=True)
class RouteStats:
    """The result of one launch, on the device.

    Attributes:
        words: int64 [8 + num_experts]: passes (1), tokens, assignments, padded, invalid, max_count,
            unused_experts, gini_numerator, then the counts.
    """

    words: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """Assignments per expert, int64 [num_experts]."""
        return self.words[NUM_WORDS:]


# Sizes are not specialised on: nothing may compile while a model serves.
@triton.jit(do_not_specialize=["num_rows", "num_valid", "row_stride", "slot_stride"])
def _route_stats(
    ids,
    words,
    num_rows,
    num_valid,
    row_stride,
    slot_stride,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_K)
    counts = tl.zeros([BLOCK_E], dtype=tl.int32)
    tokens = tl.zeros([], dtype=tl.int64)
    minus_ones = tl.zeros([], dtype=tl.int64)
    real_rows = tl.minimum(num_rows, num_valid).to(tl.int64)
    for first in range(0, real_rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row < real_rows)[:, None] & (slot < K)[None, :]
        address = ids + row[:, None] * row_stride + slot[None, :].to(tl.int64) * slot_stride
        # Range-checked before narrowing: 2^32 + 3 is not expert 3.
        chosen = tl.load(address, mask=inside, other=-1).to(tl.int64)
        valid = inside & (chosen >= 0) & (chosen < E)
        real = inside & (chosen != -1)
        tokens += tl.sum((tl.sum(real.to(tl.int32), axis=1) > 0).to(tl.int64), axis=0)
        minus_ones += tl.sum((inside & (chosen == -1)).to(tl.int64))
        flat = tl.reshape(tl.where(valid, chosen, 0).to(tl.int32), [BLOCK_ROWS * BLOCK_K])
        # tl.histogram is undefined outside its range: what is not valid is masked out.
        counts += tl.histogram(flat, BLOCK_E, mask=tl.reshape(valid, [BLOCK_ROWS * BLOCK_K]))

    real_expert = expert < E
    assignments = tl.sum(counts.to(tl.int64), axis=0)
    padded = minus_ones + (num_rows.to(tl.int64) - real_rows) * K
    invalid = num_rows.to(tl.int64) * K - padded - assignments
    # sum_{i<j} |c_i - c_j| = sum_i (2 i - E + 1) c_(i), counts sorted; padding experts sort first.
    ordered = tl.sort(tl.where(real_expert, counts, -1))
    rank = expert - (BLOCK_E - E)
    weighted = tl.where(rank >= 0, (2 * rank - E + 1).to(tl.int64) * ordered.to(tl.int64), 0)

    tl.store(words + 0, 1)
    tl.store(words + 1, tokens)
    tl.store(words + 2, assignments)
    tl.store(words + 3, padded)
    tl.store(words + 4, invalid)
    tl.store(words + 5, tl.max(counts, axis=0).to(tl.int64))
    tl.store(words + 6, tl.sum((real_expert & (counts == 0)).to(tl.int64), axis=0))
    tl.store(words + 7, tl.sum(weighted, axis=0))
    tl.store(words + 8 + expert, counts.to(tl.int64), mask=real_expert)


def route_stats(ids: torch.Tensor, num_experts: int, num_valid: int | None = None) -> RouteStats:
    """Counts one pass.

    Args:
        ids: Expert ids [num_tokens, top_k], int16, int32 or int64, any strides; -1 is padding.
        num_experts: Experts E.
        num_valid: Rows that are real; the rest is padding and is not read. None: all.

    Returns:
        Counts and statistics, still on the device: nothing was synchronised.

    Raises:
        ValueError: The ids are not a matrix of integers, or hold more columns than experts.
    """
    if ids.dim() != 2 or ids.dtype not in (torch.int16, torch.int32, torch.int64):
        raise ValueError(
            f"ids are {ids.dtype} of shape {list(ids.shape)}; give int16, int32 or int64 "
            "[num_tokens, top_k]"
        )
    rows, top_k = ids.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} of num_experts={num_experts} is impossible")
    words = torch.empty(NUM_WORDS + num_experts, dtype=torch.int64, device=ids.device)
    block_k = triton.next_power_of_2(top_k)
    _route_stats[(1,)](
        ids,
        words,
        rows,
        rows if num_valid is None else max(num_valid, 0),
        ids.stride(0),
        ids.stride(1),
        E=num_experts,
        K=top_k,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_K=block_k,
        BLOCK_ROWS=max(1, 1024 // block_k),
    )
    return RouteStats(words)
