"""Real processes over gloo that train a small MoE model with captured AlltoAlls.

As a program it forks the ranks, so that torch is imported once: `alltoall_job.py JSON`, the fields of `Job`. Each
rank writes `rank-N.json`: its recording, and what it sent, layer by layer, by its own routing maps.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What the ranks do.

    Attributes:
        folder: Where results go, and the file through which the ranks meet.
        ranks: Processes.
        placed: How calls are placed: "modules", "model", "explicit" scopes or "order".
        style: Of sending; see `moe_layer.STYLES`.
        recompute: "", "reentrant" or "saved": activation checkpointing of each layer.
        idle: A rank that has no tokens at all; -1: none.
        captured: Whether anything is captured.
        paired_blocks: Rounds of timed blocks of `iterations`: bare, bare again and captured, in each of
            their six orders equally often; a multiple of 6. 0: nothing is timed.
        seed: Of the order of those orders.
    """

    folder: str
    ranks: int
    layers: int = 2
    iterations: int = 3
    tokens: int = 24
    hidden: int = 8
    experts: int = 16
    top_k: int = 2
    placed: str = "modules"
    style: str = "function"
    recompute: str = ""
    idle: int = -1
    captured: bool = True
    paired_blocks: int = 0
    seed: int = 0


def run(job: Job, timeout_s: float = 240) -> list[dict[str, Any]]:
    """Runs a job; returns what each rank says."""
    program = subprocess.run(
        [sys.executable, str(Path(__file__)), json.dumps(asdict(job))],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert program.returncode == 0, program.stderr[-4000:]
    return [
        json.loads((Path(job.folder) / f"rank-{rank}.json").read_text())
        for rank in range(job.ranks)
    ]


def train(job: Job, rank: int) -> dict[str, Any]:
    """What one rank does."""
    import torch
    import torch.distributed as dist
    from torch.utils.checkpoint import checkpoint

    import dodoco_ext as dodoco
    from moe_layer import MoELayer

    meeting = f"file://{job.folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=job.ranks)
    torch.manual_seed(rank)
    model = torch.nn.ModuleList(
        MoELayer(job.hidden, job.experts, job.top_k, dist.group.WORLD, job.style)
        for _ in range(job.layers)
    )
    where: dict[str, Any] = {"layers": job.layers}
    if job.placed == "modules":
        where = {"modules": [*model]}

    def start() -> Any:
        return dodoco.capture_alltoall(**where, num_experts=job.experts)

    if job.paired_blocks:
        timed = _paired(job, model, start)
        dist.destroy_process_group()
        return timed
    capture = start() if job.captured else None

    def layer(index: int, tokens: torch.Tensor) -> torch.Tensor:
        if capture is not None and job.placed == "explicit":
            with capture.layer(index):
                return model[index](tokens)
        return model[index](tokens)

    began = time.perf_counter()
    outputs = []
    for _ in range(job.iterations):
        num_tokens = 0 if rank == job.idle else job.tokens + rank
        hidden = torch.randn(num_tokens, job.hidden, requires_grad=True)
        tokens = hidden
        for index in range(job.layers):
            if job.recompute:
                done = checkpoint(layer, index, tokens, use_reentrant=job.recompute == "reentrant")
            else:
                done = layer(index, tokens)
            tokens = tokens + done
        tokens.square().sum().backward()
        outputs.append(float(tokens.sum()))
        outputs.append(float(hidden.grad.sum()) if hidden.grad is not None else 0.0)
    elapsed = time.perf_counter() - began
    result = {
        # A checkpointed layer routes twice, the second time during backward.
        "sent": [module.sent for module in model],
        "outputs": outputs,
        "seconds": elapsed,
        "path": str(capture.path) if capture else "",
        "passed_over": dict(capture.passed_over) if capture else {},
    }
    if capture is not None:
        capture.close()
    dist.barrier()
    dist.destroy_process_group()
    return result


def _paired(job: Job, model: Any, start: Any) -> dict[str, Any]:
    """Seconds of blocks with and without a capture, side by side: of the clock and of the CPU."""
    import gc
    import itertools
    import random

    import torch
    import torch.distributed as dist

    from dodoco_ext.integrations import collectives

    tokens = torch.randn(job.tokens, job.hidden)

    def block() -> tuple[float, float]:
        dist.barrier()
        began, began_cpu = time.perf_counter(), time.process_time()
        for _ in range(job.iterations):
            hidden = tokens.clone().requires_grad_()
            for module in model:
                hidden = hidden + module(hidden)
            hidden.square().sum().backward()
        dist.barrier()
        return time.perf_counter() - began, time.process_time() - began_cpu

    seconds: dict[str, list[tuple[float, float]]] = {"bare": [], "again": [], "captured": []}
    if job.paired_blocks % 6:
        raise ValueError(f"{job.paired_blocks} paired blocks: give a multiple of 6")
    orders = [*itertools.permutations(seconds)] * (job.paired_blocks // 6)
    random.Random(job.seed).shuffle(orders)  # the same in all ranks
    capture = start()  # once: a run opens its recording once
    collectives.stop_listening(capture)
    block()
    gc.collect()
    gc.disable()
    for order in orders:
        for name in order:
            # Registering allocates a little in any case, so that memory looks alike in all of them.
            assert collectives.listen(capture.group, capture)
            if name != "captured":
                collectives.stop_listening(capture)
            block()  # the first call after a change of torch's tables is not the run's
            seconds[name].append(block())
            collectives.stop_listening(capture)
    assert len(capture.reader.transfers().records) > 0
    capture.close()
    return {**seconds}


def main() -> int:
    job = Job(**json.loads(sys.argv[1]))
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    import dodoco_ext.integrations.distributed  # noqa: F401 - imported once, for all ranks
    import moe_layer  # noqa: F401
    from forked_ranks import run_ranks

    torch.set_num_threads(1)
    return run_ranks(job.ranks, Path(job.folder), lambda rank: train(job, rank))


if __name__ == "__main__":
    sys.exit(main())
