"""Starts the ranks of a Megatron job in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HOME = os.environ.get("MEGATRON_HOME", "")
TIMEOUT_S = 240

needs_megatron = pytest.mark.skipif(
    not HOME, reason="MEGATRON_HOME names no folder with megatron-core: run make engines"
)


def run_ranks(script: Path, ranks: int, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Runs a script with (rank, ranks, folder, *arguments) in every rank; returns what each saved.

    Raises:
        AssertionError: A rank failed, or they took too long; with the end of what it printed.
    """
    recordings = folder / "recordings"
    recordings.mkdir(mode=0o700)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), HOME])),
        "DODOCO_DIR": str(recordings),
        "DODOCO_RUN": "megatron",
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    running = []
    try:
        for rank in range(ranks):
            with (folder / f"{rank}.log").open("w") as log:
                command = [sys.executable, str(script), str(rank), str(ranks), str(folder)]
                running.append(
                    subprocess.Popen(
                        [*command, *arguments],
                        env={**environment, "RANK": str(rank)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        statuses = [process.wait(TIMEOUT_S) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    logs = [(folder / f"{rank}.log").read_text()[-4000:] for rank in range(ranks)]
    assert statuses == [0] * ranks, "\n".join(logs)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
