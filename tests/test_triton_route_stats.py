"""The Triton kernel without a GPU: interpreted against the reference, and compiled for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

# The interpreter is chosen when triton is imported, so it gets a process of its own.
INTERPRETED = """
import itertools, torch
from dodoco_ext import reference
from dodoco_ext.triton_kernels import route_stats as kernel

generator = torch.Generator().manual_seed(0)
sizes = [(0, 8, 2), (1, 1, 1), (1, 60, 4), (7, 72, 3), (300, 128, 8), (64, 512, 10), (33, 1024, 16)]
dtypes = [torch.int16, torch.int32, torch.int64]
checked = 0
for (rows, experts, k), dtype in itertools.product(sizes, dtypes):
    for num_valid in (None, rows // 2):
        ids = torch.randint(-1, experts + 1, (rows, k), generator=generator).to(dtype)
        if dtype == torch.int64 and rows:
            ids[0, 0] = 2**32 + 3
        if rows % 2:
            ids = ids.t().contiguous().t()
        expected = reference.route_ids(ids.numpy(), experts, num_valid)
        got = kernel.route_stats(ids, experts, num_valid)
        words = [int(word) for word in got.words[1:8]]
        assert words == [
            expected.tokens, expected.assignments, expected.padded, expected.invalid,
            expected.max_count, expected.unused_experts, expected.gini_numerator,
        ], (rows, experts, k, dtype, num_valid, words, expected)
        assert got.counts.tolist() == [int(c) for c in expected.counts]
        checked += 1
print("checked", checked)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dodoco_ext.triton_kernels import route_stats as kernel

signature = {"ids": "*i32", "words": "*i64", "num_rows": "i32", "num_valid": "i32",
             "row_stride": "i64", "slot_stride": "i64"}
sizes = {"E": 128, "K": 8, "BLOCK_E": 128, "BLOCK_K": 8, "BLOCK_ROWS": 128}
signature.update({name: "constexpr" for name in sizes})
for arch in (80, 90, 100):
    source = ASTSource(kernel._route_stats, signature, constexprs=sizes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    assert len(made.asm["cubin"]) > 0
    print("compiled", arch)
"""


def run(program: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_interpreted_kernel_equals_the_reference() -> None:
    assert "checked 42" in run(INTERPRETED, TRITON_INTERPRET="1")


def test_kernel_compiles_for_gpus_that_are_not_here(tmp_path: os.PathLike[str]) -> None:
    printed = run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    assert printed.split() == ["compiled", "80", "compiled", "90", "compiled", "100"]
