"""`setup.py`: CUDA code where nvcc is, none where it is not wanted, and what it refuses.

The module built here is `module.cpp` alone, with a kernel and no bindings: it is there in seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA = "/usr/local/cuda/bin"
HAS_NVCC = shutil.which("nvcc", path=f"{os.environ.get('PATH')}:{CUDA}") is not None
needs_nvcc = pytest.mark.skipif(not HAS_NVCC, reason="nvcc is not installed")

KERNEL = """
extern "C" __global__ void probe(int* out) { out[threadIdx.x] = threadIdx.x; }
"""
BINDINGS = """
#include "bindings.h"
#if DODOCO_HAS_CUDA
extern "C" const char dodoco_fatbin_probe[], dodoco_fatbin_probe_end[];
#endif
namespace dodoco {
void register_writer(pybind11::module_&) {}
void register_reader(pybind11::module_&) {}
void register_device(pybind11::module_&) {}
void register_capture(pybind11::module_&) {}
void register_ops(pybind11::module_& m) {
#if DODOCO_HAS_CUDA
  const auto bytes = static_cast<std::size_t>(dodoco_fatbin_probe_end - dodoco_fatbin_probe);
  m.attr("fatbin") = pybind11::bytes(dodoco_fatbin_probe, bytes);
#else
  m.attr("fatbin") = pybind11::bytes();
#endif
}
}
"""
REPORT = """
import sys
from dodoco_ext import _C
print(_C.has_cuda, _C.cuda_archs or "-", _C.fatbin[:4].hex() or "-", len(_C.fatbin))
sys.exit("a CUDA library is loaded" if "libcuda" in open("/proc/self/maps").read() else 0)
"""
# The first word of a fat binary: 0xBA55ED50.
MAGIC = "50ed55ba"


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds the module in a copy of the sources."""
    env = {k: v for k, v in os.environ.items() if k not in ("DODOCO_CUDA", "TORCH_CUDA_ARCH_LIST")}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**env, "DODOCO_CXXFLAGS": "-O0", **environment},
        capture_output=True,
        text=True,
    )


def report(folder: Path) -> list[str]:
    """What the built module says of itself: has_cuda, cuda_archs, magic and bytes of the kernel."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    run = [sys.executable, "-c", REPORT]
    out = subprocess.run(run, cwd=folder, env=env, check=True, capture_output=True, text=True)
    return out.stdout.split()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("dodoco_ext", "triton_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "csrc").mkdir()
    for name in ("module.cpp", "bindings.h", "format.h"):
        shutil.copy(ROOT / "csrc" / name, tmp_path / "csrc")
    (tmp_path / "csrc" / "bindings.cpp").write_text(BINDINGS)
    return tmp_path


def add_kernel(sources: Path) -> None:
    (sources / "csrc" / "probe.cu").write_text(KERNEL)


@needs_nvcc
def test_cuda_code_is_built_in_where_nvcc_is_and_left_out_where_it_is_not_wanted(
    sources: Path,
) -> None:
    add_kernel(sources)
    done = build(sources)
    assert done.returncode == 0, done.stdout + done.stderr
    has_cuda, archs, magic, num_bytes = report(sources)
    assert (has_cuda, magic) == ("True", MAGIC)
    assert int(num_bytes) > 1000
    # As many of the usual three as this compiler knows, and PTX for whatever comes later.
    assert archs.endswith("+PTX")
    assert set(archs.removesuffix("+PTX").split(";")) <= {"8.0", "9.0", "10.0"}
    assert f"CUDA code: {archs}" in done.stdout

    done = build(sources, DODOCO_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(sources) == ["False", "-", "-", "0"]

    done = build(sources, DODOCO_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(sources)[:3] == ["True", "9.0", MAGIC]


@needs_nvcc
def test_a_kernel_that_does_not_compile_fails_the_build(sources: Path) -> None:
    (sources / "csrc" / "probe.cu").write_text(
        "__global__ void probe(int* out) { out = nonsense; }"
    )
    done = build(sources, TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode != 0
    assert "nonsense" in done.stdout + done.stderr
    assert "dodoco_ext._C could not be built" in done.stderr


@pytest.mark.parametrize(
    ("environment", "kernel", "message"),
    [
        ({"DODOCO_CUDA": "yes"}, True, "DODOCO_CUDA='yes' is not one of auto, 1, 0"),
        ({"DODOCO_CUDA": "1"}, False, "csrc/ has no .cu file: build with DODOCO_CUDA=auto"),
        pytest.param(
            {"TORCH_CUDA_ARCH_LIST": "hopper"},
            True,
            "no GPU architecture ['hopper'] for nvcc: set TORCH_CUDA_ARCH_LIST",
            marks=needs_nvcc,
        ),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(
    environment: dict[str, str], kernel: bool, message: str, sources: Path
) -> None:
    if kernel:
        add_kernel(sources)
    done = build(sources, **environment)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]


def test_without_nvcc_cuda_code_is_left_out_or_refused(sources: Path) -> None:
    add_kernel(sources)
    program = (
        "import runpy, shutil, sys\n"
        "which = shutil.which\n"
        "shutil.which = lambda name, **how: None if name == 'nvcc' else which(name, **how)\n"
        "sys.argv = ['setup.py', 'build_ext', '--inplace']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )

    def run(setting: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "DODOCO_CUDA": setting, "DODOCO_CXXFLAGS": "-O0"}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=sources, env=env, capture_output=True, text=True)

    refused = run("1")
    assert refused.returncode == 1
    assert "nvcc was not found: set CUDA_HOME or use DODOCO_CUDA=0" in refused.stderr
    built = run("auto")
    assert built.returncode == 0, built.stdout + built.stderr
    assert report(sources)[0] == "False"
