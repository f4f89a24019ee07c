"""Every variant of the observing kernel compiles without a GPU, at attach and from a cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

from dodoco_ext.triton_kernels import build, route_stats

SHAPES = [(1, 1), (8, 2), (60, 4), (64, 6), (72, 0), (128, 8), (384, 8), (512, 10), (1024, 16)]
FORMS = (route_stats.IDS, route_stats.MAP, route_stats.BITS)

# Compilers get a process of their own: other tests may have chosen the interpreter.
COMPILED = """
import os, sys
from dodoco_ext.triton_kernels import build
capability = int(sys.argv[1])
kernels = build.compile_kernels({(60, 4), (60, 3)}, {0, 1}, capability)
keys = [(k.form, k.id_bytes, k.shared, k.num_experts, k.block_k) for k in kernels]
ids = [(0, size, shared, 60, 4) for shared in (False, True) for size in (2, 4, 8)]
assert sorted(keys) == sorted(ids + [(1, 0, False, 60, 1), (1, 0, True, 60, 1)]), keys
for kernel in kernels:
    assert kernel.code.startswith(b"\\x7fELF"), kernel
    assert kernel.name.encode() in kernel.code, kernel
    assert 0 <= kernel.shared_bytes <= 48 << 10, kernel
    assert (kernel.max_programs > 1) == kernel.shared == (kernel.max_rows == 0), kernel
name, code = build.compile_clock(capability)
assert code.startswith(b"\\x7fELF") and name.encode() in code
print("compiled", len({kernel.code for kernel in kernels}))
"""
IN_PIECES = """
from dodoco_ext.triton_kernels import build
try:
    build.compile_kernels({(60, 4)}, {0}, 90)
except RuntimeError as error:
    print(error)
"""


def run(program: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def key_of(variant: build.Variant) -> tuple[Any, ...]:
    return variant.form, variant.id_bytes, variant.shared, variant.num_experts, variant.block_k


@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_every_form_and_width_has_a_kernel_for_small_and_for_large_passes(
    num_experts: int, top_k: int
) -> None:
    made = build.variants(num_experts, top_k, FORMS)
    kinds = [(0, 2), (0, 4), (0, 8), (1, 0), (2, 0)]
    assert sorted((v.form, v.id_bytes, v.shared) for v in made) == sorted(
        (*kind, shared) for kind in kinds for shared in (False, True)
    )
    for v in made:
        assert v.num_experts == num_experts
        for size in (v.block_k, v.block_rows, v.num_warps):
            assert size.bit_count() == 1
        if v.form == route_stats.IDS:
            assert v.block_k >= (top_k or 16)
        if v.shared:
            assert v.max_programs > 1
        else:
            # A pass that is too large for one program is worth several.
            assert v.max_rows >= v.block_rows
            assert v.max_programs == 1


def test_layers_that_count_alike_share_kernels() -> None:
    assert build.variants(60, 3, (0,)) == build.variants(60, 4, (0,))
    assert build.block_k_of(0) == build.block_k_of(9) == 16
    assert len({key_of(v) for v in build.variants(60, 4, FORMS)}) == 10


@pytest.mark.parametrize("num_experts", [0, 1025, 65536])
def test_experts_that_no_kernel_counts_are_refused(num_experts: int) -> None:
    with pytest.raises(RuntimeError, match=rf"num_experts={num_experts} .*1 to 1024"):
        build.variants(num_experts, 1, FORMS)


def test_kernels_are_compiled_once_and_then_taken_from_the_cache(tmp_path: Path) -> None:
    cache = {"TRITON_CACHE_DIR": str(tmp_path)}
    assert run(COMPILED, "90", **cache) == "compiled 8\n"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert len(before) == 9
    assert run(COMPILED, "90", **cache) == "compiled 8\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == before


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    # No folder can be made there, whoever asks.
    (tmp_path / "file").touch()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "file" / "cache"), "TMPDIR": str(temporary)}
    program = "from dodoco_ext.triton_kernels import build; print(build.compile_clock(80)[0])"
    assert run(program, **cache) == "read_clock\n"
    assert list(temporary.iterdir()) == []


def test_a_compiler_that_fails_is_told_with_what_it_was_asked(tmp_path: Path) -> None:
    assembler = tmp_path / "ptxas"
    assembler.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 'Cuda compilation tools, release 12.9, V12.9.86'\n"
    )
    assembler.chmod(0o700)
    told = run(IN_PIECES, TRITON_CACHE_DIR=str(tmp_path / "c"), TRITON_PTXAS_PATH=str(assembler))
    for part in ("num_experts=60", "compute capability 90", "could not compile"):
        assert part in told


def test_a_process_that_interprets_is_told_so() -> None:
    assert "unset TRITON_INTERPRET" in run(IN_PIECES, TRITON_INTERPRET="1")
