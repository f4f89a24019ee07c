"""What capturing AlltoAlls adds: one push, one call, other operators, and a job over gloo."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import dodoco_ext as dodoco
from dodoco_ext.capture import DISPATCH, Capture
from dodoco_ext.recorder import GroupSpec, LayerSpec, Recorder
from dodoco_ext.settings import SHARED_MEMORY

from .figures import TOLERANCE, Figures, in_us, with_interval
from .interleave import Contestant, Summary, interleave

PUSH_LIMIT_S = 2e-6  # 8 ranks
JOB_LIMIT = 0.01


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [8, 64])
def test_one_push(figures: Figures, recordings: object, ranks: int) -> None:
    layers = [LayerSpec("layer", 1, 0, routed=False)]
    recorder = Recorder(layers, group=GroupSpec(tuple(range(ranks)), 0))
    capture = Capture(recorder, advances=True)
    rows, stamp = [1000 + rank for rank in range(ranks)], time.monotonic_ns()

    def push() -> None:
        capture.push(0, DISPATCH, rows, rows, stamp, stamp, bytes_per_row=4096)

    timings = interleave({"push": Contestant(push)}, num_blocks=figures.blocks(300))
    cost = timings.time("push")
    table = figures.table("Recording one transfer, us of CPU time", ("ranks", "p20/p50/p80"))
    table.rows.append((str(ranks), " / ".join(map(in_us, (cost.p20, cost.p50, cost.p80)))))
    if ranks == 8:
        figures.judge("push/8 ranks", cost, PUSH_LIMIT_S, PUSH_LIMIT_S * (1 + TOLERANCE))
    else:
        figures.add(f"push/{ranks} ranks", cost)
    recorder.close()


class _EmptyMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_calls_inside_and_outside(figures: Figures, recordings: object, group: None) -> None:
    """An AlltoAll, an allreduce and an addition: outside, inside, and in a dispatch mode instead."""
    rows = torch.ones(64, 64)
    out, one = torch.empty_like(rows), torch.ones(8)
    open_now: list[Any] = []

    def outside() -> None:
        while open_now:
            open_now.pop().__exit__(None, None, None)

    def enter(make: Callable[[], Any]) -> Callable[[], None]:
        def prepare() -> None:
            outside()
            open_now.append(make().__enter__())

        return prepare

    states = {
        "outside": outside,
        "inside": enter(lambda: dodoco.capture_alltoall(layers=1)),
        "dispatch mode": enter(_EmptyMode),
    }
    operators: dict[str, Callable[[], object]] = {
        "all_to_all_single": lambda: dist.all_to_all_single(out, rows),
        "all_reduce": lambda: dist.all_reduce(one),
        "add": lambda: torch.add(one, one),
    }
    table = figures.table(
        "Operators in one rank outside and inside of a capture, us of CPU time",
        ("operator", "outside", "inside, over outside", "an empty dispatch mode, over outside"),
    )
    for name, run in operators.items():
        timings = interleave(
            {state: Contestant(run, prepare) for state, prepare in states.items()},
            num_blocks=figures.blocks(60),
        )
        outside()
        cells = [in_us(figures.add(f"{name}/outside", timings.time("outside")).p50)]
        for state in ("inside", "dispatch mode"):
            over = figures.add(f"{name}/{state} over outside", timings.difference(state, "outside"))
            cells.append(f"{in_us(over.p50)} [{in_us(over.low)}, {in_us(over.high)}]")
        table.rows.append((name, *cells))


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Recordings where they are by default: written back to no disk."""
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        monkeypatch.setenv("DODOCO_DIR", f"{folder}/recordings")
        yield


# glibc gives freed tensors of megabytes back to the kernel, or not, by what lies above them: between blocks of one
# and the same program, page faults differ by thousands. So memory once taken stays.
STEADY_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


@pytest.fixture(params=["steady", "default"])
def allocator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in STEADY_MEMORY.items() if request.param == "steady" else ():
        monkeypatch.setenv(name, value)
    return str(request.param)


def test_a_job_over_gloo(figures: Figures, tmp_path: Path, in_memory: None, allocator: str) -> None:
    """Wall time of blocks of iterations in four ranks, bare and captured in turn, in one job."""
    tests = Path(__file__).parents[1] / "tests"
    sys.path.insert(0, str(tests))
    from alltoall_job import Job, run

    job = Job(
        str(tmp_path), ranks=4, layers=2, tokens=2048, hidden=512, iterations=1,
        paired_blocks=figures.blocks(25),
    )  # fmt: skip
    results = run(job, timeout_s=500)
    table = figures.table(
        "4 ranks over gloo, 2 layers of 2048 tokens, hidden 512, forward and backward",
        (
            "allocator",
            "clock",
            "an iteration, ms",
            "captured, slower by",
            "the same code, slower by",
        ),
    )
    # Wall time as one rank sees it, since all wait for each other; CPU time of all of them.
    seconds = {
        name: np.array([result[name] for result in results])
        for name in ("bare", "again", "captured")
    }
    for clock, index in (("wall", 0), ("CPU", 1)):
        taken = {name: of_ranks[..., index].sum(0) for name, of_ranks in seconds.items()}
        slowdown, control = (
            Summary.of(taken[name] / taken["bare"] - 1) for name in ("captured", "again")
        )
        per_iteration = statistics.median(taken["bare"]) / job.iterations / job.ranks
        table.rows.append(
            (
                allocator,
                clock,
                f"{per_iteration * 1e3:.1f}",
                with_interval(slowdown, 100, " %"),
                with_interval(control, 100, " %"),
            )
        )
        name = f"gloo job/{allocator} allocator/{clock}"
        figures.add(f"{name}/slowdown of the same code", control)
        if allocator == "steady":
            figures.judge(f"{name}/slowdown", slowdown, JOB_LIMIT, JOB_LIMIT + TOLERANCE)
        else:
            figures.add(f"{name}/slowdown", slowdown)
