"""What capturing AlltoAlls adds: one push, one call, other operators, and a job over gloo."""

from __future__ import annotations

import math
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


BLOCKS_IN_A_JOB = 6


def test_a_job_over_gloo(figures: Figures, tmp_path: Path, in_memory: None) -> None:
    """Wall and CPU time of iterations in four ranks, bare and captured in turn, in several jobs.

    What glibc gives back to the kernel, and so how many pages fault, is another matter in each job and block.
    """
    tests = Path(__file__).parents[1] / "tests"
    sys.path.insert(0, str(tests))
    from alltoall_job import Job, run

    names = ("bare", "again", "captured")
    jobs = []
    for number in range(math.ceil(figures.blocks(24) / BLOCKS_IN_A_JOB)):
        folder = tmp_path / f"job-{number}"
        folder.mkdir()
        job = Job(
            str(folder), ranks=4, layers=2, tokens=2048, hidden=512, iterations=1,
            paired_blocks=BLOCKS_IN_A_JOB, seed=number,
        )  # fmt: skip
        results = run(job, timeout_s=240)
        # Wall time summed over ranks that wait for each other, CPU time of all of them: [clock, blocks].
        jobs.append(
            {name: np.array([result[name] for result in results]).sum(0).T for name in names}
        )
    table = figures.table(
        "4 ranks over gloo, 2 layers of 2048 tokens, hidden 512, forward and backward",
        ("clock", "an iteration, ms", "captured, slower by", "the same code, slower by"),
    )
    for index, clock in enumerate(("wall", "CPU")):
        bare, again, captured = (
            np.concatenate([taken[name][index] for taken in jobs]) for name in names
        )
        job_of = np.repeat(np.arange(len(jobs)), BLOCKS_IN_A_JOB)
        slowdown = Summary.of(captured / ((bare + again) / 2) - 1, job_of)
        control = Summary.of(again / bare - 1, job_of)
        table.rows.append(
            (
                clock,
                f"{statistics.median(bare) / job.ranks * 1e3:.0f}",
                with_interval(slowdown, 100, " %"),
                with_interval(control, 100, " %"),
            )
        )
        figures.add(f"gloo job/{clock}/slowdown of the same code", control)
        figures.judge(f"gloo job/{clock}/slowdown", slowdown, JOB_LIMIT, JOB_LIMIT + TOLERANCE)
