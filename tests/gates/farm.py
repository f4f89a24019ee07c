"""Compiles the kernel under every supported Triton, each in processes of its own, two at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import dodoco_ext
from listing import Listing, parse

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "gates"
TRITONS = ("3.6.0", "3.8.0", "3.9.0")
CUDA_TARGETS = ("sm_80", "sm_90", "sm_100")
AMD_TARGET = "gfx942"
PROCESSES = 2

BOTH = ("alone", "shared")
# (experts, top_k): sizes of real models and powers of two; 60 and 384 are not.
SIZES = ((8, 2), (60, 4), (64, 6), (128, 8), (256, 8), (384, 8), (512, 10), (1024, 16))

EVERYWHERE = ((8, 2), (64, 6), (128, 8), (384, 8), (1024, 16))


@dataclass(frozen=True)
class Wanted:
    """What to compile: the variants of one shape that are of these kinds and paths."""

    num_experts: int
    top_k: int
    kinds: tuple[str, ...] = ("ids32",)
    paths: tuple[str, ...] = BOTH
    targets: tuple[str, ...] = CUDA_TARGETS


@dataclass(frozen=True)
class Compiled:
    """One variant of the kernel, compiled for one target by one Triton.

    Attributes:
        triton: Version of Triton.
        target: `sm_90` or `gfx942`.
        kind: What is read: `ids16`, `ids32`, `ids64`, `map` (bytes) or `bits`.
        path: `alone` (one program) or `shared` (several, which meet at a ticket).
        num_experts: Experts E.
        top_k: Slots k of the tensor it is compiled for.
        kernel: Name of the function.
        num_warps: Warps of a program.
        shared_bytes: Shared memory of a program.
        code: The listing: SASS, or AMD's assembly.
        resources: What `cuobjdump -res-usage` prints; empty for AMD.
        ptx: The PTX; empty for AMD.
        source: The kernel's source, `route_stats.py`.
    """

    triton: str
    target: str
    kind: str
    path: str
    num_experts: int
    top_k: int
    kernel: str
    num_warps: int
    shared_bytes: int
    code: str = field(repr=False)
    resources: dict[str, int] = field(repr=False)
    ptx: str = field(repr=False)
    source: str = field(repr=False)

    @property
    def variant(self) -> str:
        return f"{self.kind}-{self.path}-E{self.num_experts}-k{self.top_k}"

    @property
    def is_cuda(self) -> bool:
        return self.target.startswith("sm_")

    @cached_property
    def listing(self) -> Listing:
        return parse(self.code, self.kernel)

    def __str__(self) -> str:
        return f"{self.variant} on {self.target}, Triton {self.triton}"


@dataclass(frozen=True)
class Task:
    """What one process compiles: `package` is the folder that holds `dodoco_ext`."""

    triton: str
    package: Path
    wanted: tuple[Wanted, ...]


def supported() -> list[Wanted]:
    """The variants that the gates hold: every size, every input, every target."""
    wanted = [
        Wanted(*size, targets=CUDA_TARGETS if size in EVERYWHERE else ("sm_90",)) for size in SIZES
    ]
    wanted.append(Wanted(128, 8, kinds=("ids16", "ids64", "map", "bits")))
    wanted.append(Wanted(1024, 16, kinds=("map", "bits"), targets=("sm_90",)))
    wanted += [Wanted(*size, paths=("alone",), targets=(AMD_TARGET,)) for size in SIZES[::3]]
    wanted.append(Wanted(128, 8, kinds=("map", "bits"), paths=("alone",), targets=(AMD_TARGET,)))
    return wanted


def site_of(version: str) -> Path:
    """A folder with this Triton and nothing else, installed once."""
    site = BUILD / f"triton-{version}"
    if not site.exists():
        unfinished = BUILD / f"triton-{version}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
        command += ["--no-deps", "--no-compile", "--only-binary", ":all:"]
        run([*command, "--target", str(unfinished), f"triton=={version}"], dict(os.environ))
        unfinished.rename(site)
    return site


def copy_package(folder: Path) -> Path:
    """A copy of the installed package, whose kernel may be changed."""
    shutil.rmtree(folder, ignore_errors=True)
    source = Path(dodoco_ext.__file__).parent
    shutil.copytree(source, folder / "dodoco_ext", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr[-6000:]}")


def compile_task(task: Task, folder: Path) -> list[Compiled]:
    site = site_of(task.triton)
    folder.mkdir(parents=True, exist_ok=True)
    jobs, out = folder / "jobs.json", folder / "compiled.json"
    wanted = [asdict(want) for want in task.wanted]
    jobs.write_text(
        json.dumps({"triton": task.triton, "package": str(task.package), "wanted": wanted})
    )
    # Triton's own variables change what it compiles: none of the caller's may leak in.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(site), str(task.package)])
    environment["TRITON_CACHE_DIR"] = str(BUILD / "cache" / task.triton)
    run([sys.executable, str(HERE / "compile_variants.py"), str(jobs), str(out)], environment)
    return [Compiled(**entry) for entry in json.loads(out.read_text())]


def compile_tasks(tasks: Iterable[Task], folder: Path) -> list[Compiled]:
    """Runs the tasks, `PROCESSES` at a time.

    Raises:
        RuntimeError: A process failed; the message holds what it printed.
    """
    tasks = list(tasks)
    for version in sorted({task.triton for task in tasks}):
        site_of(version)
    with ThreadPoolExecutor(PROCESSES) as pool:
        done = [
            pool.submit(compile_task, task, folder / str(number))
            for number, task in enumerate(tasks)
        ]
        return [compiled for future in done for compiled in future.result()]


def compile_supported(folder: Path) -> list[Compiled]:
    """Every variant that the gates hold, under every supported Triton."""
    package = copy_package(folder / "package")
    wanted = supported()
    # Wide shapes take longest: dealt out in turns, and the widest first.
    parts = (tuple(wanted[0::2][::-1]), tuple(wanted[1::2][::-1]))
    return compile_tasks(
        [Task(version, package, part) for version in TRITONS for part in parts], folder
    )
