"""Compiles the observing kernel for a device: every variant that its layers can need, at attach.

Nothing here needs a GPU: Triton is given the target by name, and what comes back are binaries for
the driver to load.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from dodoco_ext.triton_kernels import route_stats
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

UNKNOWN_TOP_K = 16
"""Slots that are counted with where a layer's top_k is unknown."""

ID_BYTES = (2, 4, 8)
"""Widths of ids: int16, int32, int64."""

_WARP = 32
_MAX_REGISTERS = 128
_MAX_PROGRAMS = 128
_SHARED_WARPS = 4
_SMALL_PASS = 1024
_THREADS = 8


@dataclass(frozen=True)
class Variant:
    """One kernel to compile.

    Attributes:
        form: `route_stats.IDS`, `MAP` or `BITS`.
        id_bytes: Width of an id; 0 for maps.
        shared: Launched as several programs, which meet in the lane's scratch; else as one.
        num_experts: Experts E.
        block_k: Slots a row, at most, a power of two; 1 for maps.
        block_rows: Rows of a tile, a power of two.
        num_warps: Warps a program.
        max_rows: Rows up to which one program is meant; 0 where shared.
        max_programs: Programs of a launch, at most.
    """

    form: int
    id_bytes: int
    shared: bool
    num_experts: int
    block_k: int
    block_rows: int
    num_warps: int
    max_rows: int
    max_programs: int


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel, as the driver loads and launches it.

    Attributes:
        form: `route_stats.IDS`, `MAP` or `BITS`.
        id_bytes: Width of an id; 0 for maps.
        shared: Launched as several programs; else as one.
        num_experts: Experts E.
        block_k: Slots a row, at most; 1 for maps.
        rows_per_program: Rows that are worth a program of their own.
        max_programs: Programs of a launch, at most.
        max_rows: Rows up to which one program is meant; 0 where shared.
        name: Name of the function in the module.
        num_warps: Warps a program, of 32 threads.
        shared_bytes: Dynamic shared memory a program.
        code: The module (cubin).
    """

    form: int
    id_bytes: int
    shared: bool
    num_experts: int
    block_k: int
    rows_per_program: int
    max_programs: int
    max_rows: int
    name: str
    num_warps: int
    shared_bytes: int
    code: bytes


def block_k_of(top_k: int) -> int:
    """The `block_k` of kernels that count a layer's ids; `top_k` 0: unknown."""
    return int(triton.next_power_of_2(top_k or UNKNOWN_TOP_K))


def variants(num_experts: int, top_k: int, forms: Collection[int]) -> list[Variant]:
    """The kernels that a layer can need.

    Args:
        num_experts: Experts E.
        top_k: Experts a token; 0: unknown.
        forms: Forms its choice can arrive in.

    Raises:
        RuntimeError: There is no kernel for so many experts.
    """
    if not 1 <= num_experts <= route_stats.MAX_EXPERTS:
        raise RuntimeError(
            f"num_experts={num_experts} of a layer: kernels count 1 to {route_stats.MAX_EXPERTS}"
        )
    block_e = max(int(triton.next_power_of_2(num_experts)), _WARP)
    alone_warps = 1 if block_e <= 128 else 2 if block_e <= 256 else 4
    made = []
    for form in sorted(forms):
        for shared in (False, True):
            warps = _SHARED_WARPS if shared else alone_warps
            if form == route_stats.IDS:
                block_k = block_k_of(top_k)
                # Two to four ids a thread at a time; the next tile is on its way meanwhile.
                block_rows = max(warps * _WARP * (4 if shared else 2) // block_k, 1)
                small = min(_SMALL_PASS // block_k, max(block_e, 128))
            else:
                block_k = 1
                # Sixteen bytes or bits a thread: more would not fit the registers.
                block_rows = min(max(16 * warps * _WARP // block_e, 1), 8 * warps)
                small = 64
            made += [
                Variant(
                    form=form,
                    id_bytes=id_bytes,
                    shared=shared,
                    num_experts=num_experts,
                    block_k=block_k,
                    block_rows=block_rows,
                    num_warps=warps,
                    max_rows=0 if shared else small,
                    max_programs=_MAX_PROGRAMS if shared else 1,
                )
                for id_bytes in (ID_BYTES if form == route_stats.IDS else (0,))
            ]
    return made


def compile_variant(variant: Variant, target: GPUTarget) -> Any:
    """Compiles one kernel for a target, which need not be here.

    Returns:
        Triton's compiled kernel.
    """
    data = {0: "*u8", 2: "*i16", 4: "*i32", 8: "*i64"}[variant.id_bytes]
    constants = {
        "FORM": variant.form,
        "E": variant.num_experts,
        "BLOCK_K": variant.block_k,
        "BLOCK_ROWS": variant.block_rows,
        "SHARED": int(variant.shared),
        "CLOCK": int(target.backend == "cuda"),
    }
    signature = {
        "data": data,
        "control": "*i64",
        "totals": "*i64",
        "board": "*i64",
        "layer": "i32",
        "top_k": "i32",
        "num_rows": "i32",
        "num_columns": "i32",
        "row_stride": "i64",
        "column_stride": "i64",
        "recomputed": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    options: dict[str, int] = {"num_warps": variant.num_warps}
    if target.backend == "cuda":
        options["maxnreg"] = _MAX_REGISTERS
    source = ASTSource(_compilable(route_stats.observe), signature, constexprs=constants)
    return triton.compile(source, target=target, options=options)


def compile_kernels(
    shapes: Collection[tuple[int, int]], forms: Collection[int], capability: int
) -> list[Kernel]:
    """Compiles all kernels that layers of these shapes can need, or takes them from Triton's cache.

    Args:
        shapes: `(num_experts, top_k)` of the layers.
        forms: Forms in which a choice can arrive.
        capability: Compute capability of the device; 90 for 9.0.

    Raises:
        RuntimeError: A kernel could not be compiled, or there is none for a shape.
    """
    # Layers of one shape, and top_k that count alike, share kernels.
    wanted = list(
        dict.fromkeys(v for shape in sorted(shapes) for v in variants(*shape, sorted(forms)))
    )
    _compilable(route_stats.observe)
    with _writable_cache(), ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda variant: _kernel(variant, capability), wanted))


def compile_clock(capability: int) -> tuple[str, bytes]:
    """Compiles the kernel that reads a device's clock.

    Returns:
        The name of the function, and the module (cubin).

    Raises:
        RuntimeError: It could not be compiled.
    """
    source = ASTSource(_compilable(route_stats.read_clock), {"out": "*i64"})
    with _writable_cache(), _told("the clock kernel", capability):
        made = triton.compile(source, target=_target(capability), options={"num_warps": 1})
        return made.metadata.name, made.asm["cubin"]
    raise AssertionError


def _kernel(variant: Variant, capability: int) -> Kernel:
    with _told(f"the kernel {variant}", capability):
        made = compile_variant(variant, _target(capability))
        metadata = made.metadata
        for scratch in ("global_scratch_size", "profile_scratch_size"):
            if getattr(metadata, scratch, 0):
                raise RuntimeError(f"it wants {scratch}, which launches do not give")
        return Kernel(
            form=variant.form,
            id_bytes=variant.id_bytes,
            shared=variant.shared,
            num_experts=variant.num_experts,
            block_k=variant.block_k,
            rows_per_program=variant.block_rows,
            max_programs=variant.max_programs,
            max_rows=variant.max_rows,
            name=metadata.name,
            num_warps=metadata.num_warps,
            shared_bytes=metadata.shared,
            code=made.asm["cubin"],
        )
    raise AssertionError


def _target(capability: int) -> GPUTarget:
    return GPUTarget("cuda", capability, _WARP)


def _compilable(function: Any) -> Any:
    if not isinstance(function, triton.JITFunction):
        raise RuntimeError("Triton only interprets here: unset TRITON_INTERPRET")
    return function


@contextlib.contextmanager
def _told(what: str, capability: int) -> Iterator[None]:
    """Says what was compiled for what when it fails, whatever the compiler raised."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"Triton {triton.__version__} could not compile {what} for compute capability "
            f"{capability}: {type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def _writable_cache() -> Iterator[None]:
    """Triton's cache folder where it can be written, else one that goes when the work is done."""
    try:
        Path(knobs.cache.dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=knobs.cache.dir):
            pass
    except OSError:
        with tempfile.TemporaryDirectory(prefix="dodoco-triton-") as folder, knobs.cache.scope():
            knobs.cache.dir = folder
            yield
    else:
        yield
