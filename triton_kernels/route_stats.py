"""The observing kernel: a router's choice -> tokens per expert, statistics, board and ring.

One launch does what `Lane::record` of `csrc/lane.cpp` does, and leaves the same bytes in the
recording. What differs by layer and lane is an argument. What may change while a captured graph lives
(whether it records, which rows are real) is in the lane's control block, and all of it is asked for
at once, before anything is decided: in a pass of a few tokens, trips to memory are what costs. Small
passes run in one program; large ones in several, which meet in the lane's scratch, and the last of
them finishes the pass.

All arithmetic is on integers, without one division: statistics are numerators and bins follow from
comparisons, so that the interpreter, a GPU and the C++ writer agree to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from dodoco_ext.triton_kernels.counting import count_ids, count_map, gini_numerator
from triton.language.extra.cuda import globaltimer

IDS = 0
"""Form of the data: expert ids [rows, k], int16, int32 or int64."""
MAP = 1
"""Form of the data: a byte for each row and expert [rows, E]; not 0: routed."""
BITS = 2
"""Form of the data: a bit for each row and expert [rows, ceil(E / 8)], lowest first."""

MAX_EXPERTS = 1024
"""Most experts of a layer."""

# csrc/format.h, restated: tests/test_kernel_layout.py compares.
_CONTROL_MAGIC = tl.constexpr(0x4C525443434F4444)
_BOARD_WORDS = tl.constexpr(16)
_RECOMPUTED = tl.constexpr(6)
_SIZE_CLASSES = tl.constexpr(20)
_BINS = tl.constexpr(32)
_RING_HEADER_BYTES = tl.constexpr(128)
_SLOT_WORDS = tl.constexpr(16)
_SCRATCH_COUNTS = tl.constexpr(8)
# A DeviceLane, in int64 words: its ControlBlock, then its LaneState, then the bounds of bins.
_STATE = tl.constexpr(16)
_BOUNDS = tl.constexpr(32)

_IDS = tl.constexpr(IDS)
_BITS = tl.constexpr(BITS)


@triton.jit
def _words(address):
    """int64 words at an address that is a multiple of 16."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def _narrow_words(address):
    """int32 words at an address that is a multiple of 16."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def _pick16(at, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15):
    """Value `at` of sixteen, by the bits of `at`: as many selections, and four comparisons."""
    b0 = (at & 1) != 0
    b1 = (at & 2) != 0
    b2 = (at & 4) != 0
    low = tl.where(
        b2,
        tl.where(b1, tl.where(b0, v7, v6), tl.where(b0, v5, v4)),
        tl.where(b1, tl.where(b0, v3, v2), tl.where(b0, v1, v0)),
    )
    high = tl.where(
        b2,
        tl.where(b1, tl.where(b0, v15, v14), tl.where(b0, v13, v12)),
        tl.where(b1, tl.where(b0, v11, v10), tl.where(b0, v9, v8)),
    )
    return tl.where((at & 8) != 0, high, low)


@triton.jit
def _add_max_add(a0, a1, a2, b0, b1, b2):
    return a0 + b0, tl.maximum(a1, b1), a2 + b2


@triton.jit
def _finish(
    control,
    state,
    totals,
    board,
    layer,
    iteration,
    last_layer,
    head,
    switches,
    old_words,
    old_counts,
    counts,
    assignments,
    largest,
    unused,
    tokens,
    padded,
    invalid,
    dropped,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SORT: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Advances the iteration; if enabled, adds the pass to the board and perhaps to the ring."""
    expert = tl.arange(0, BLOCK_E)
    word = tl.arange(0, _BOARD_WORDS)
    lane = tl.arange(0, _BINS)
    # Which bins a pass adds to depends on its size first: tokens >= 2^n for n from 1 on.
    sizes = ((tokens >> lane) != 0) & (lane > 0) & (lane < _SIZE_CLASSES)
    gini_row = _BOARD_WORDS + (E + 7) // 8 * 8 + tl.sum(sizes.to(tl.int32)) * _BINS + lane
    max_mean_row = gini_row + _SIZE_CLASSES * _BINS
    old_gini = tl.load(totals + gini_row)
    old_max_mean = tl.load(totals + max_mean_row)
    bound = tl.load((control + _BOUNDS).to(tl.pointer_type(tl.int32)) + lane)
    marks = tl.load(control + 4)
    ring = tl.load(control + 5)
    log2_slots = tl.load(control + 6)
    every = tl.load(control + 9).to(tl.uint64)
    inverse = tl.load(control + 10).to(tl.uint64)
    limit = tl.load(control + 11).to(tl.uint64)
    # What follows stores: no warp may still have to load.
    tl.debug_barrier()
    iteration += (layer <= last_layer).to(tl.int64)
    tl.store(state, iteration)
    tl.store(state + 1, layer.to(tl.int64))
    if switches.to(tl.int32) != 0:
        count = iteration.to(tl.uint64)
        divisible = ((count & every) == 0) & (count * inverse <= limit)
        recorded = divisible | ((switches.to(tl.uint64) >> 33) == 0)
        now = globaltimer() + tl.load(control + 7) if CLOCK else tl.full([], 0, tl.int64)
        # Passes started first, passes last: where they are equal, no pass lay in between.
        added = _pick16(
            word, 1, tokens, assignments, padded, invalid, dropped, 0, recorded.to(tl.int32),
            0, 1, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        new_words = tl.where(word == 8, now, old_words + added.to(tl.int64))
        new_counts = old_counts + counts.to(tl.int64)
        tl.store(board + word, new_words, mask=word == 9)
        tl.store(totals + word, new_words)
        tl.store(totals + _BOARD_WORDS + expert, new_counts, mask=expert < E)
        tl.debug_barrier()
        tl.store(board + _BOARD_WORDS + expert, new_counts, mask=expert < E)
        if recorded:
            numerator = gini_numerator(counts, largest, E, BLOCK_E, SORT)
            if assignments != 0:
                # The bin is the number of lower bounds, but the first, that are reached.
                mass = assignments.to(tl.int64)
                gini = numerator * _BINS >= lane.to(tl.int64) * (mass * E)
                max_mean = largest.to(tl.int64) * (8 * E) >= bound.to(tl.int64) * mass
                reached = gini.to(tl.int32) + (max_mean.to(tl.int32) << 16)
                reached = tl.sum(tl.where(lane > 0, reached, 0))
                in_gini = lane == (reached & 0xFFFF)
                in_max_mean = lane == (reached >> 16)
                tl.store(totals + gini_row, old_gini + 1, mask=in_gini)
                tl.store(board + gini_row, old_gini + 1, mask=in_gini)
                tl.store(totals + max_mean_row, old_max_mean + 1, mask=in_max_mean)
                tl.store(board + max_mean_row, old_max_mean + 1, mask=in_max_mean)

            lap = head.to(tl.uint64) >> log2_slots.to(tl.uint64)
            # lap mod (2^32 - 1), plus 1: 2^32 is 1 there, so the halves are added.
            folded = (lap & 0xFFFFFFFF) + (lap >> 32)
            folded = (folded & 0xFFFFFFFF) + (folded >> 32) + 1
            epoch = tl.where(folded == 0x100000000, 1, folded)
            index = head & ((tl.full([], 1, tl.int64) << log2_slots) - 1)
            values = _pick16(
                word,
                1 | 1 << 8,
                layer | ((marks >> 32).to(tl.int32) << 16),
                iteration.to(tl.int32),
                (iteration >> 32).to(tl.int32),
                now.to(tl.int32),
                (now >> 32).to(tl.int32),
                tokens,
                assignments,
                largest,
                numerator.to(tl.int32),
                (numerator >> 32).to(tl.int32),
                padded,
                invalid,
                dropped,
                unused,
                marks.to(tl.int32),
            )
            slot = _words(ring + _RING_HEADER_BYTES + index * (_SLOT_WORDS * 8))
            stored = values.to(tl.uint32, bitcast=True).to(tl.uint64) | (epoch << 32)
            tl.store(slot + word, stored.to(tl.int64))
            tl.store(state + 2, head + 1)
            tl.store(_words(ring), head + 1)
        tl.store(board + word, new_words, mask=(word != 0) & (word != 9))
        tl.debug_barrier()
        tl.store(board + word, new_words, mask=word == 0)


# Nothing may compile while a model serves, so nothing is specialised on.
_PLAIN = [
    *("data", "control", "totals", "board", "layer", "top_k"),
    *("num_rows", "num_columns", "row_stride", "column_stride", "recomputed"),
]


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_PLAIN)
def observe(
    data,
    control,
    totals,
    board,
    layer,
    top_k,
    num_rows,
    num_columns,
    row_stride,
    column_stride,
    recomputed,
    FORM: tl.constexpr,
    E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SHARED: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Records one pass of one layer.

    Args:
        data: Ids [rows, k] int16, int32 or int64, or a map of bytes or bits; see FORM.
        control: The lane's DeviceLane (csrc/format.h), int64 words.
        totals: The layer's board block in the device's own memory, int64 words.
        board: The same block in the recording, int64 words.
        layer: Index of the layer, i32.
        top_k: Experts a token, i32; 0: unknown. For maps, to tell what capacity dropped.
        num_rows: Rows, i32.
        num_columns: Columns, i32; k of ids, at most BLOCK_K.
        row_stride: Elements from row to row, i64.
        column_stride: Elements from column to column, i64.
        recomputed: Whether this execution is a recomputation, i32: seen and not counted.
        FORM: IDS, MAP or BITS.
        E: Experts, at most MAX_EXPERTS.
        BLOCK_K: A power of two, at least k.
        BLOCK_ROWS: Rows of a tile, a power of two.
        SHARED: 0: launched as one program; 1: as any number of programs.
        CLOCK: 1: passes are stamped by the device's clock; 0: with 0.
    """
    BLOCK_E: tl.constexpr = max(32, triton.next_power_of_2(E))
    # One warp, whose sums are single instructions; as `build.variants()` launches it.
    SOLO: tl.constexpr = not SHARED and BLOCK_E <= 128
    program = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    word = tl.arange(0, _BOARD_WORDS)
    magic = tl.load(control)
    switches = tl.load(control + 2)
    num_valid = tl.load(control + 3).to(tl.uint64)
    state = control + _STATE
    iteration = tl.load(state)
    last_layer = tl.load(state + 1)
    head = tl.load(state + 2)
    old_words = tl.load(totals + word)
    # Where it costs no spills: maps hold more.
    EARLY: tl.constexpr = FORM == _IDS and not SHARED
    old_counts = tl.zeros([BLOCK_E], dtype=tl.int64)
    if EARLY:
        old_counts = tl.load(totals + _BOARD_WORDS + expert, mask=expert < E, other=0)

    # Negative: all rows are real; as an unsigned number it is the larger one.
    real_rows = tl.minimum(num_valid, num_rows.to(tl.uint64)).to(tl.int32)
    first_row = program * BLOCK_ROWS
    row_step = tl.num_programs(0) * BLOCK_ROWS
    if FORM == _IDS:
        counts, tokens, paddings = count_ids(
            data, first_row, num_rows, real_rows, row_step, num_columns, row_stride,
            column_stride, E, BLOCK_E, BLOCK_K, BLOCK_ROWS,
        )  # fmt: skip
        invalid = 0
        dropped = 0
    else:
        counts, invalid, dropped = count_map(
            data, first_row, num_rows, real_rows, row_step, top_k, row_stride,
            column_stride, FORM == _BITS, E, BLOCK_E, BLOCK_ROWS,
        )  # fmt: skip
        tokens = real_rows
        paddings = 0

    # Cleared once detached: a graph that is replayed later must not touch what is gone.
    if magic == _CONTROL_MAGIC:
        if recomputed != 0:
            # By one program: its word has no other writer.
            if program == 0:
                passes = old_words + 1
                tl.debug_barrier()
                tl.store(totals + word, passes, mask=word == _RECOMPUTED)
                tl.store(board + word, passes, mask=word == _RECOMPUTED)
        else:
            last = True
            if SHARED:
                scratch = _narrow_words(tl.load(control + 8))
                met = tl.arange(0, _SCRATCH_COUNTS)
                if FORM == _IDS:
                    found = tl.where(met == 1, tokens, tl.where(met == 2, paddings, 0))
                else:
                    found = tl.where(met == 3, invalid, tl.where(met == 4, dropped, 0))
                tl.atomic_add(scratch + met, found, mask=found != 0, sem="relaxed")
                tl.atomic_add(
                    scratch + _SCRATCH_COUNTS + expert,
                    counts,
                    mask=(expert < E) & (counts != 0),
                    sem="relaxed",
                )
                # All warps have added before one thread draws the ticket that releases it.
                tl.debug_barrier()
                ticket = tl.atomic_add(scratch, 1, sem="acq_rel", scope="gpu")
                last = ticket == tl.num_programs(0) - 1
                if last:
                    counts = tl.load(scratch + _SCRATCH_COUNTS + expert, mask=expert < E, other=0)
                    if FORM == _IDS:
                        tokens = tl.load(scratch + 1)
                        paddings = tl.load(scratch + 2)
                    else:
                        invalid = tl.load(scratch + 3)
                        dropped = tl.load(scratch + 4)
                    tl.debug_barrier()
                    tl.store(scratch + met, 0)
                    tl.store(scratch + _SCRATCH_COUNTS + expert, 0, mask=expert < E)
            if last:
                if not EARLY:
                    old_counts = tl.load(totals + _BOARD_WORDS + expert, mask=expert < E, other=0)
                idle = ((counts == 0) & (expert < E)).to(tl.int32)
                if SOLO:
                    assignments = tl.sum(counts)
                    largest = tl.max(counts)
                    unused = tl.sum(idle)
                else:
                    assignments, largest, unused = tl.reduce(
                        (counts, counts, idle), 0, _add_max_add
                    )
                beyond = num_rows - real_rows
                if FORM == _IDS:
                    padded = beyond * num_columns + paddings
                    invalid = num_rows * num_columns - padded - assignments
                else:
                    padded = beyond * top_k
                _finish(
                    control, state, totals, board, layer, iteration, last_layer, head, switches,
                    old_words, old_counts, counts, assignments, largest, unused, tokens, padded, invalid, dropped,
                    E, BLOCK_E, SHARED, CLOCK,
                )  # fmt: skip


@triton.jit
def read_clock(out):
    """Stores the device's clock, in nanoseconds, as one int64."""
    tl.store(out, globaltimer())
