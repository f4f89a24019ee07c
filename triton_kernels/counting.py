"""What the observing kernel counts: tokens per expert, from ids or from maps, and their Gini numerator.

Device functions of one program. They store nothing; sums are over the tiles that the program takes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_ids(
    data,
    first_row,
    num_rows,
    real_rows,
    row_step,
    num_columns,
    row_stride,
    column_stride,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Counts [BLOCK_E], tokens and paddings of the tiles from `first_row` on, `row_step` apart."""
    slot = tl.arange(0, BLOCK_K)
    row_in_tile = tl.arange(0, BLOCK_ROWS)
    has_slot = (slot < num_columns)[None, :]
    tile = data + tl.cast(first_row, tl.int64) * row_stride
    places = (
        row_in_tile.to(tl.int64)[:, None] * row_stride + slot.to(tl.int64)[None, :] * column_stride
    )
    tile_step = tl.cast(row_step, tl.int64) * row_stride
    counts = tl.zeros([BLOCK_E], dtype=tl.int32)
    # A row's token is kept at its first slot: sums over all of a tile are cheaper than over rows.
    first_slot = (slot == 0)[None, :]
    tokens = tl.zeros([BLOCK_ROWS, BLOCK_K], dtype=tl.int32)
    paddings = tl.zeros([BLOCK_ROWS, BLOCK_K], dtype=tl.int32)
    # Loaded before it is known which rows are real, and the next tile while one is counted.
    loaded = (row_in_tile < num_rows - first_row)[:, None] & has_slot
    next_ids = tl.load(tile + places, mask=loaded, other=-1)
    for first in range(first_row, num_rows, row_step):
        ids = next_ids
        tile += tile_step
        loaded = (row_in_tile < num_rows - row_step - first)[:, None] & has_slot
        next_ids = tl.load(tile + places, mask=loaded, other=-1)
        has_row = row_in_tile < real_rows - first
        inside = has_row[:, None] & has_slot
        # Compared as they are, before they are narrowed: 2^32 + 3 is not expert 3.
        valid = inside & (ids >= 0) & (ids < E)
        padding = (inside & (ids == -1)).to(tl.int32)
        paddings += padding
        is_token = has_row & (tl.sum(padding, axis=1) < num_columns)
        tokens += (is_token[:, None] & first_slot).to(tl.int32)
        # The histogram is undefined outside its range: what is no expert is masked out.
        counts += tl.histogram(tl.ravel(ids.to(tl.int32)), BLOCK_E, mask=tl.ravel(valid))
    return counts, tl.sum(tl.ravel(tokens)), tl.sum(tl.ravel(paddings))


@triton.jit
def count_map(
    data,
    first_row,
    num_rows,
    real_rows,
    row_step,
    top_k,
    row_stride,
    column_stride,
    PACKED: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Counts [BLOCK_E], bits past the last expert, and assignments that are missing."""
    expert = tl.arange(0, BLOCK_E)
    row_in_tile = tl.arange(0, BLOCK_ROWS)
    column = expert >> 3 if PACKED else expert
    has_column = (expert < ((E + 7) // 8 * 8 if PACKED else E))[None, :]
    columns = column.to(tl.int64) * column_stride
    rows = data + (first_row + row_in_tile).to(tl.int64) * row_stride
    tile_step = tl.cast(row_step, tl.int64) * row_stride
    counts = tl.zeros([BLOCK_E], dtype=tl.int32)
    missing = tl.zeros([BLOCK_ROWS], dtype=tl.int32)
    for first in range(first_row, num_rows, row_step):
        loaded = (row_in_tile < num_rows - first)[:, None] & has_column
        values = tl.load(rows[:, None] + columns[None, :], mask=loaded, other=0).to(tl.int32)
        has_row = row_in_tile < real_rows - first
        values = tl.where(has_row[:, None], values, 0)
        if PACKED:
            here = (values >> (expert & 7)[None, :]) & 1
            routed = tl.sum(tl.where((expert < E)[None, :], here, 0), axis=1)
        else:
            here = (values != 0).to(tl.int32)
            routed = tl.sum(here, axis=1)
        counts += tl.sum(here, axis=0)
        missing += tl.where(has_row, tl.maximum(top_k - routed, 0), 0)
        rows += tile_step
    invalid = tl.sum(tl.where(expert < E, 0, counts))
    return tl.where(expert < E, counts, 0), invalid, tl.sum(missing)


@triton.jit
def gini_numerator(counts, largest, E: tl.constexpr, BLOCK_E: tl.constexpr, SORT: tl.constexpr):
    """Sum over pairs i < j of |c_i - c_j|, int64."""
    expert = tl.arange(0, BLOCK_E)
    real = expert < E
    BINS: tl.constexpr = max(BLOCK_E, 128)
    BINNED: tl.constexpr = BLOCK_E > 32 if SORT else BLOCK_E == 256 or BLOCK_E == 512
    if BINNED and largest <= BINS:
        # Sum over v of F(v) (E - F(v)), F(v) = experts with at most v tokens.
        bins = tl.histogram(counts, BINS, mask=real & (counts < BINS))
        at_most = tl.cumsum(bins, axis=0)
        numerator = tl.sum(at_most * (E - at_most)).to(tl.int64)
    elif SORT:
        # The i-th smallest is subtracted from by i experts and subtracted in E - 1 - i pairs.
        ordered = tl.sort(tl.where(real, counts, -1))
        rank = expert - (BLOCK_E - E)
        weighted = tl.where(rank >= 0, (2 * rank - E + 1).to(tl.int64) * ordered.to(tl.int64), 0)
        numerator = tl.sum(weighted)
    else:
        # From one count that occurs to the next one, F(v) stays: a step for each, and little code.
        numerator = tl.full([], 0, tl.int64)
        value = tl.full([], 0, tl.int32)
        while value < largest:
            above = counts > value
            num_above = tl.sum(above.to(tl.int32))
            following = tl.min(tl.where(above, counts, 0x7FFFFFFF))
            numerator += (num_above * (E - num_above)).to(tl.int64) * (following - value)
            value = following
    return numerator
