"""What csrc/cuda_driver declares of the driver is what NVIDIA's header declares."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
CONSTANTS = {
    "kSuccess": "CUDA_SUCCESS",
    "kDeinitialized": "CUDA_ERROR_DEINITIALIZED",
    "kInvalidContext": "CUDA_ERROR_INVALID_CONTEXT",
    "kCaptureImplicit": "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
    "kComputeCapabilityMajor": "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
    "kComputeCapabilityMinor": "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR",
    "kHostRegisterPortable": "CU_MEMHOSTREGISTER_PORTABLE",
    "kHostRegisterDeviceMap": "CU_MEMHOSTREGISTER_DEVICEMAP",
    "kNumRegisters": "CU_FUNC_ATTRIBUTE_NUM_REGS",
    "kMaxDynamicSharedBytes": "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES",
    "kStreamNonBlocking": "CU_STREAM_NON_BLOCKING",
    "kCaptureModeRelaxed": "CU_STREAM_CAPTURE_MODE_RELAXED",
}
CHECK = """
#include <cuda.h>
#include <type_traits>
#include "cuda_driver.h"

// Whether two types are passed alike: opaque handles and enumerations have names of their own.
template <typename A, typename B> constexpr bool alike() {
  if constexpr (std::is_pointer_v<A> && std::is_pointer_v<B>) {
    using PA = std::remove_pointer_t<A>;
    using PB = std::remove_pointer_t<B>;
    if constexpr (std::is_class_v<PA> && std::is_class_v<PB>) return true;
    else if constexpr (std::is_void_v<PA> || std::is_void_v<PB>)
      return std::is_void_v<PA> && std::is_void_v<PB>;
    else return std::is_const_v<PA> == std::is_const_v<PB> && alike<PA, PB>();
  } else {
    constexpr bool numbers = (std::is_integral_v<A> || std::is_enum_v<A>) &&
                             (std::is_integral_v<B> || std::is_enum_v<B>);
    return sizeof(A) == sizeof(B) && (numbers || std::is_same_v<A, B>);
  }
}
template <typename F, typename G> struct Same;
template <typename R, typename... A, typename S, typename... B>
struct Same<R(A...), S (*)(B...)> {
  template <bool fits> static constexpr bool all() {
    if constexpr (fits) return alike<R, S>() && (alike<A, B>() && ...);
    else return false;
  }
  static constexpr bool value = all<sizeof...(A) == sizeof...(B)>();
};
using dodoco::cuda::Driver;
"""


def functions() -> list[tuple[str, str]]:
    """Each symbol that is looked up, and the member that it goes to."""
    found = re.findall(
        r'find\(library, "(\w+)", &d\.(\w+)\);', (CSRC / "cuda_driver.cpp").read_text()
    )
    members = re.findall(r"Result \(\*(\w+)\)", (CSRC / "cuda_driver.h").read_text())
    assert sorted(member for _, member in found) == sorted(members), "each member has its symbol"
    return found


def compile_check(folder: Path, lines: list[str]) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("triton is not installed, whose CUDA header this reads")
    include = Path(spec.origin).parent / "backends" / "nvidia" / "include"
    source = folder / "check.cpp"
    source.write_text(CHECK + "\n".join(lines))
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{CSRC}", str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def signature(symbol: str, member: str) -> str:
    return (
        f'static_assert(Same<decltype({symbol}), decltype(Driver::{member})>::value, "{symbol}");'
    )


def test_signatures_and_constants_are_those_of_the_header(tmp_path: Path) -> None:
    lines = [signature(*pair) for pair in functions()]
    lines += [
        f'static_assert(int(dodoco::cuda::{ours}) == int({theirs}), "{ours}");'
        for ours, theirs in CONSTANTS.items()
    ]
    declared = re.findall(r"\b(k[A-Z]\w+) = ", (CSRC / "cuda_driver.h").read_text())
    assert sorted(declared) == sorted(CONSTANTS)
    done = compile_check(tmp_path, lines)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("symbol", "member"),
    [
        ("cuMemAlloc_v2", "free"),
        ("cuMemHostRegister_v2", "host_device_pointer"),
        ("cuMemcpyHtoDAsync_v2", "copy_to_host"),
        ("cuMemsetD8Async", "memset_words"),
        ("cuStreamGetFlags", "stream_destroy"),
    ],
)
def test_another_signature_is_noticed(tmp_path: Path, symbol: str, member: str) -> None:
    done = compile_check(tmp_path, [signature(symbol, member)])
    assert "static assertion failed" in done.stderr
