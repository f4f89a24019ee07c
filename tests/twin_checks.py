"""Holds an interpreted observing kernel to the C++ writer; raises AssertionError where they differ.

Run by test_triton_route_stats.py and test_kernel_mutants.py in processes of their own: Triton
decides when it is imported whether it interprets. `twin_checks.py NAME [KERNEL]` runs `check_NAME`,
with the kernel of the package or the one in the file KERNEL.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dodoco_ext.triton_kernels import route_stats

import cases
from covering import Row
from twins import Launch, Twins

MAX_EPOCH = (1 << 32) - 1
kernel: Any = route_stats.observe


@contextmanager
def twins(*layers: tuple[int, int]) -> Iterator[Twins]:
    made = Twins(kernel, layers)
    yield made
    made.check()
    made.close()


def launches_for(index: int, rows: int, columns: int) -> list[Launch]:
    """One program and several, with tiles that fill with few steps of a slow interpreter."""
    tile = 1 << max(min(rows, (1 << 19) // max(columns, 1)) // 3, 1).bit_length()
    return [Launch(tile), Launch(max(tile // 4, 1), programs=(1, 2, 5)[index % 3])]


def check_ids() -> None:
    for index, row in enumerate(cases.id_rows()):
        ids, num_valid = cases.make_ids(row)
        with twins((row["E"], row["k"])) as t:
            t.set(num_valid=-1 if num_valid is None else num_valid)
            for launch in launches_for(index, row["T"], row["k"]):
                t.record_ids(ids, launch)


def check_maps() -> None:
    for index, row in enumerate(cases.map_rows()):
        if row["T"] * row["E"] > 1 << 22:
            row = {**row, "T": (1 << 22) // row["E"]}
        _check_map(index, row)


def _check_map(index: int, row: Row) -> None:
    routing_map, num_valid = cases.make_map(row)
    with twins((row["E"], row["k"])) as t:
        t.set(num_valid=-1 if num_valid is None else num_valid)
        for launch in launches_for(index, row["T"], row["E"]):
            t.record_map(routing_map, launch, packed=row["form"] == "bits")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        spec = importlib.util.spec_from_file_location("planted_kernel", sys.argv[2])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        kernel = module.observe
    globals()[f"check_{sys.argv[1]}"]()
    print("checked", sys.argv[1])
