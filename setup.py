"""Builds `dodoco_ext._C` with ninja: no torch needed, CUDA code where nvcc is (`DODOCO_CUDA`)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CXXFLAGS = "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -Wall -Wextra -Werror"
NVCCFLAGS = "-std=c++17 -O3 -DNDEBUG -Werror all-warnings --expt-relaxed-constexpr"
DEFAULT_ARCHS = ("8.0", "9.0", "10.0")

# A fat binary as constant data. The driver loads it at run time, so no CUDA library is linked.
EMBED = """\
.section .rodata
.balign 16
.globl dodoco_fatbin_{stem}, dodoco_fatbin_{stem}_end
.hidden dodoco_fatbin_{stem}, dodoco_fatbin_{stem}_end
dodoco_fatbin_{stem}: .incbin "{fatbin}"
dodoco_fatbin_{stem}_end: .byte 0
.section .note.GNU-stack,"",%progbits
"""


def find_nvcc(kernels: list[Path]) -> str | None:
    """The CUDA compiler if there is something to compile, as `DODOCO_CUDA` says; no GPU is needed."""
    wanted = os.environ.get("DODOCO_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        sys.exit(f"DODOCO_CUDA={wanted!r} is not one of auto, 1, 0: unset it or choose one")
    home = [f"{os.environ['CUDA_HOME']}/bin"] if "CUDA_HOME" in os.environ else []
    places = [*home, os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if wanted == "1" and not kernels:
        sys.exit("DODOCO_CUDA=1, but csrc/ has no .cu file: build with DODOCO_CUDA=auto")
    if wanted == "1" and nvcc is None:
        sys.exit("DODOCO_CUDA=1, but nvcc was not found: set CUDA_HOME or use DODOCO_CUDA=0")
    return nvcc if wanted != "0" and kernels else None


def cuda_archs(nvcc: str) -> list[str]:
    """GPU architectures to compile for, such as `["9.0", "10.0+PTX"]`."""
    archs = re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not archs:
        known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
        archs = [arch for arch in DEFAULT_ARCHS if f"sm_{arch.replace('.', '')}" in known]
        archs[-1:] = [f"{archs[-1]}+PTX"] if archs else []
    wrong = [arch for arch in archs if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch)]
    if wrong or not archs:
        sys.exit(
            f"no GPU architecture {wrong} for nvcc: set TORCH_CUDA_ARCH_LIST, as in '8.0;9.0+PTX'"
        )
    return archs


def gencode(arch: str) -> str:
    """Options of nvcc: `9.0` -> machine code, `9.0+PTX` -> machine code and PTX."""
    number = arch.removesuffix("+PTX").replace(".", "")
    codes = [f"sm_{number}", f"compute_{number}"] if arch.endswith("+PTX") else [f"sm_{number}"]
    return " ".join(f"-gencode=arch=compute_{number},code={code}" for code in codes)


class NinjaBuild(build_ext):
    """Writes and runs `build.ninja` in the temporary build folder; what is kept there is reused."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles `csrc/*.cpp`, and `csrc/*.cu` when nvcc is there, into one module."""
        import pybind11
        from ninja import BIN_DIR, ninja_syntax

        cxx, headers = os.environ.get("CXX", "c++"), Path(sysconfig.get_path("include"))
        if shutil.which(shlex.split(cxx)[0]) is None:
            sys.exit(f"no C++ compiler {cxx!r}: install one (Debian, Ubuntu: g++) or set CXX")
        if not (headers / "Python.h").exists():
            sys.exit("no Python.h: install this Python's headers (Debian, Ubuntu: python3-dev)")
        kernels = sorted(Path("csrc").glob("*.cu"))
        nvcc = find_nvcc(kernels)
        archs = cuda_archs(nvcc) if nvcc else []
        print(f"dodoco: CUDA code: {';'.join(archs) or 'none'}")
        options = [
            f"-DDODOCO_HAS_CUDA={int(nvcc is not None)}",
            f'-DDODOCO_CUDA_ARCHS="{";".join(archs)}"',
            f'-DDODOCO_VERSION="{self.distribution.get_version()}"',
            f"-isystem{headers}",
            f"-isystem{pybind11.get_include()}",
        ]
        folder, target = Path(self.build_temp), Path(self.get_ext_fullpath(ext.name))
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        with (folder / "build.ninja").open("w") as file:
            ninja = ninja_syntax.Writer(file)
            ninja.variable("builddir", str(folder))
            ninja.variable("extra", os.environ.get("DODOCO_CXXFLAGS", "").replace("$", "$$"))
            ninja.variable("options", shlex.join(options).replace("$", "$$"))
            dependencies = {"deps": "gcc", "depfile": "$out.d"}
            write_them = "-MMD -MF $out.d"
            compile_cxx = f"{cxx} {CXXFLAGS} {write_them} $options $extra -c $in -o $out"
            ninja.rule("cxx", compile_cxx, "C++ $in", **dependencies)
            ninja.rule("link", f"{cxx} -shared -pthread $extra $in -ldl -o $out", "link $out")
            objects = []
            for source in map(Path, ext.sources):
                objects += ninja.build(f"{folder}/{source.stem}.o", "cxx", str(source))
            if nvcc:
                codes = " ".join(map(gencode, archs))
                fatbin = f"{nvcc} {NVCCFLAGS} {codes} {write_them} -fatbin $in -o $out"
                ninja.rule("fatbin", fatbin, "CUDA $in", **dependencies)
                ninja.rule("embed", f"{cxx} -c $in -o $out", "embed $in")
            for kernel in kernels if nvcc else []:
                stem = folder / kernel.stem
                stub = stem.with_suffix(".S")
                stub.write_text(EMBED.format(stem=kernel.stem, fatbin=f"{stem}.fatbin"))
                code = ninja.build(f"{stem}.fatbin", "fatbin", str(kernel))
                objects += ninja.build(f"{stem}.fatbin.o", "embed", str(stub), implicit=code)
            ninja.build(str(target), "link", objects)
        command = [str(Path(BIN_DIR, "ninja")), "-f", f"{folder}/build.ninja"]
        if subprocess.run(command, cwd=ROOT).returncode:
            sys.exit("dodoco_ext._C could not be built: the compiler's message is above")


class FreshBuildPy(build_py):
    """Collects into an empty folder: a module that the sources lost must not reach the wheel."""

    def run(self) -> None:
        """Copies the Python files of the package."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    packages=[*find_packages(include=["dodoco_ext", "dodoco_ext.*"]), "dodoco_ext.triton_kernels"],
    package_dir={"dodoco_ext.triton_kernels": "triton_kernels"},
    package_data={"": ["py.typed", "*.pyi", "templates/*", "weights/*/*"]},
    ext_modules=[Extension("dodoco_ext._C", sorted(map(str, Path("csrc").glob("*.cpp"))))],
    cmdclass={"build_ext": NinjaBuild, "build_py": FreshBuildPy},
)
