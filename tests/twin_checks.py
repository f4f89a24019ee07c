"""Holds an interpreted observing kernel to the C++ writer; raises AssertionError where they differ.

Run by test_triton_route_stats.py and test_kernel_mutants.py in processes of their own: Triton
decides when it is imported whether it interprets. `twin_checks.py NAME ...` runs `check_NAME` for each.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from dodoco_ext.triton_kernels import route_stats

import cases
from covering import covering_array
from twin_trace import assert_apart, assert_published_in_order, assert_released, tracing
from twins import (
    BOARD_SECTION,
    CONTROL_MAGIC,
    EVERY,
    HEAD,
    ITERATION,
    LAST_LAYER,
    MAGIC,
    RING,
    SCRATCH,
    Launch,
    Twins,
)

EPOCHS = (1 << 32) - 1
ALONE, SHARED = Launch(16), Launch(16, programs=3)
# 0: the form for one program.
PROGRAMS = (0, 1, 2, 5)
LEAST_BYTES = 48 << 10

kernel: Any = route_stats.observe


@contextmanager
def twins(*layers: tuple[int, int], max_bytes: int = 1 << 19) -> Iterator[Twins]:
    """Twins that must hold the same bytes in the end."""
    made = Twins(kernel, layers, max_bytes=max_bytes)
    yield made
    made.check()
    made.close()


def launch_for(programs: int, rows: int, columns: int) -> Launch:
    """Tiles that several steps fill, but not too many for a slow interpreter."""
    tile = max(min(rows, (1 << 19) // max(columns, 1)) // (3 * max(programs, 1)), 1)
    return Launch(1 << tile.bit_length(), programs)


def check_few_passes() -> None:
    """Every kind of id and pass, once by each path: the shortest check that sees most faults."""
    ids = np.array(
        [[1, 2, 3, 59], [-1, -1, -1, -1], [5, -1, 60, -2], [(1 << 32) + 3, 1 << 63 - 1, 0, 63]]
    )
    with twins((60, 4), (60, 4)) as t:
        for launch in (Launch(2), Launch(1, programs=3)):
            t.record_ids(ids, launch, 0)
            t.record_ids(ids, launch, 1)
            t.record_ids(ids, launch, 1, recomputed=True)
            t.set(enabled=0)
            t.record_ids(ids, launch, 1)
            t.set(enabled=1)
            t.record_ids(ids, launch, 1)
            t.set(num_valid=1)
            t.record_ids(ids, launch, 0)
            routing_map = np.zeros((3, 60), np.uint8)
            routing_map[0, :3] = 1, 2, 255
            routing_map[1, :] = 1
            t.record_map(routing_map, launch, 1)
            t.set(num_valid=-1)
            t.record_map(routing_map, launch, 0)
            t.record_map(np.full((2, 8), 0xFF, np.uint8), launch, 1, packed=True)
            t.record_ids(np.repeat(ids[:1], 200, axis=0), Launch(64, launch.programs), 0)
            t.record_ids(ids[:0], launch, 0)


def check_ids() -> None:
    for row in covering_array({**cases.ID_FACTORS, "programs": PROGRAMS}, cases._possible_ids):
        ids, num_valid = cases.make_ids(row)
        with twins((row["E"], row["k"])) as t:
            t.set(num_valid=-1 if num_valid is None else num_valid)
            t.record_ids(ids, launch_for(row["programs"], row["T"], row["k"]))


def check_maps() -> None:
    for row in covering_array({**cases.MAP_FACTORS, "programs": PROGRAMS}, cases._possible_map):
        routing_map, num_valid = cases.make_map(row)
        with twins((row["E"], row["k"])) as t:
            t.set(num_valid=-1 if num_valid is None else num_valid)
            launch = launch_for(row["programs"], row["T"], row["E"])
            t.record_map(routing_map, launch, packed=row["form"] == "bits")


def check_sequences() -> None:
    """What one pass leaves behind would show in the next; settings change in between."""
    rng = np.random.default_rng(0)
    layers = [(8, 2), (60, 4), (60, 4), (256, 8)]
    with twins(*layers) as t:
        for every in (1, 0, 3, 6):
            t.set(every=every)
            for _ in range(10):
                t.set(enabled=int(rng.random() < 0.8), microbatch=int(rng.integers(1 << 16)))
                for layer, (E, k) in enumerate(layers):
                    if rng.random() < 0.3:
                        continue
                    launch = Launch(8, int(rng.integers(4)))
                    rows = int(rng.integers(40))
                    ids = rng.integers(-1, E + 1, (rows, k)).astype(f"i{rng.choice([2, 4, 8])}")
                    recomputed = rng.random() < 0.1
                    t.record_ids(ids, launch, layer, recomputed=recomputed)
                    if rng.random() < 0.2:
                        t.record_map(rng.random((rows, E)) < k / E, launch, layer)
        t.check()
        passes = t.host_board(0)[0]
        assert 10 < passes < 40
        assert 0 < t.host_board(0)[7] < passes


def check_laps() -> None:
    """Heads around the ends of laps, and around the one after which epochs start again at 1."""
    ids = np.array([[3, 1]])
    with twins((8, 2), max_bytes=LEAST_BYTES) as t:
        assert t.num_slots == 64
        for lap in (0, 1, 5, EPOCHS - 1, EPOCHS, EPOCHS + 1, 2 * EPOCHS, (1 << 32) + 7, 1 << 57):
            t.set_head(lap * 64 + 62)
            for launch in (ALONE, SHARED, ALONE, SHARED):
                t.record_ids(ids, launch)
            t.check()
        assert t.control.view(np.uint64)[HEAD] == (1 << 63) + 66
        epochs = t.slots(1)[:2, 0, 1]
        assert epochs.tolist() == [(1 << 57) % EPOCHS + 2] * 2


def check_sampling() -> None:
    """Iterations that the C++ writer would not reach in a test, against Python's division."""
    rng = np.random.default_rng(1)
    for every in (0, 1, 2, 3, 7, 10, 1000, 3 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1):
        made = Twins(kernel, [(8, 1)])
        made.set(every=every)
        starts = [
            0,
            max(every, 1) - 1,
            every,
            *(every * rng.integers(1, 1 << 31, 2)).tolist(),
            1 << 62,
        ]
        recorded = 0
        for start in starts:
            # Two passes: the first goes on from `start`.
            made.control[ITERATION], made.control[LAST_LAYER] = start, -1
            if every <= 1:
                # Those are told by themselves, whatever the words of the divisor.
                made.control[EVERY] = -1, 0, 0
            for iteration in (start, start + 1):
                made.launch_ids(np.array([[1]]), ALONE)
                recorded += iteration % max(every, 1) == 0
        assert made.control[HEAD] == recorded, every
        assert made.control[ITERATION] == starts[-1] + 1
        made.close()


def check_bins() -> None:
    """Statistics of few and of many tokens, level and skewed, on and beside every border."""
    rng = np.random.default_rng(2)
    designed = [[0], [7], [5, 3], [9, 1, 0], [2, 2, 2, 2], [40, 1, 0, 7], [1] * 64, [64] + [0] * 63]
    # Around the width of the histogram of counts, and where lower bounds are reached exactly.
    designed += [[count, 5] + [1] * 38 for count in (127, 128, 129, 200)]
    designed += [[count] + [128 - 3] * 128 for count in (255, 256, 257)]
    designed += [[8 + up, 8 - up, *[8] * 6] for up in range(9)]
    designed += [[1 << size] for size in range(21)] + [[(1 << size) - 1] for size in range(2, 21)]
    designed += [rng.integers(0, high, E).tolist() for E in (3, 8, 33) for high in (2, 9, 300)]
    by_experts: dict[int, list[list[int]]] = {}
    for counts in designed:
        by_experts.setdefault(len(counts), []).append(counts)
    for E, passes in by_experts.items():
        with twins((E, 1)) as t:
            for index, counts in enumerate(passes):
                ids = np.repeat(np.arange(E, dtype=np.int16), counts).reshape(-1, 1)
                t.record_ids(ids, launch_for((0, 2)[index % 2], len(ids), 1))
                t.check()


def check_switched_off() -> None:
    """After a detach nothing is stored, by whatever path."""
    ids = np.array([[3, 1]] * 40)
    for value in (0, 1, CONTROL_MAGIC + 1):
        with twins((8, 2)) as t:
            t.control[MAGIC] = value
            # First what was there, then addresses that must not be followed.
            for ring, scratch in ((t.control[RING], t.control[SCRATCH]), (8, 8)):
                t.control[RING], t.control[SCRATCH] = ring, scratch
                before = t.control.copy()
                for launch in (ALONE, SHARED):
                    t.launch_ids(ids, launch)
                    t.launch_ids(ids, launch, recomputed=True)
                np.testing.assert_array_equal(t.control, before)
                t.check()


def check_marks() -> None:
    """The map version and the microbatch reach the record, at full width."""
    made = Twins(kernel, [(8, 2)])
    made.set(map_version=0xFEDCBA98, microbatch=0xABCD)
    for launch in (ALONE, SHARED):
        made.launch_ids(np.array([[3, 1]]), launch)
    slots = made.slots(1)
    assert slots[:2, 15, 0].tolist() == [0xFEDCBA98] * 2
    assert slots[:2, 1, 0].tolist() == [0xABCD << 16] * 2
    made.close()


def check_nothing_beyond_the_tensor() -> None:
    """Slots past k and rows past the end are not read: there is no memory. Real rows alone count."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
    for launch in (ALONE, SHARED, Launch(4, 7)):
        for rows, k, num_valid in ((5, 3, -1), (50, 3, 5), (50, 5, 50), (7, 8, 0)):
            ids = np.ndarray((rows, k), np.int32, memory, page - rows * k * 4)
            ids[:] = np.arange(rows * k).reshape(rows, k) % 60
            with twins((60, k)) as t:
                t.set(num_valid=num_valid)
                t.record_ids(ids, launch)
        for packed, columns in ((False, 60), (True, 8)):
            rows, real = 9, 4
            routing_map = np.ndarray((rows, columns), np.uint8, memory, page - rows * columns)
            routing_map[:] = np.arange(columns) % 3
            with twins((60, 2)) as t:
                t.set(num_valid=real)
                t.record_map(routing_map, launch, packed=packed)


def check_order() -> None:
    """What the threads of a program do in parallel is kept apart by barriers."""
    with tracing() as trace, twins((60, 4)) as t:
        ids = np.arange(-4, 68).reshape(18, 4)
        board = t.section(BOARD_SECTION, 1).ctypes.data
        for launch in (ALONE, SHARED):
            for enabled, recomputed in ((1, False), (0, False), (1, True)):
                t.set(enabled=enabled)
                trace.clear()
                t.record_ids(ids, launch, recomputed=recomputed)
                assert any(event.kind == "store" for event in trace)
                assert_apart(trace)
                if enabled and not recomputed:
                    assert_published_in_order(trace, board)
                    assert_released(trace, t.scratch.ctypes.data, launch.programs)


def run(name: str) -> None:
    """Runs `check_NAME`."""
    globals()[f"check_{name}"]()


if __name__ == "__main__":
    for each in sys.argv[1:]:
        run(each)
        print(each, flush=True)
