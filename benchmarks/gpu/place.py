"""Where a step runs: a GPU with `torch.cuda`, or the CPU with its stand-in."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .results import Results


@dataclass(frozen=True)
class Place:
    """A device and how to speak to it.

    Attributes:
        device: `cuda:0`, or `cpu` when dry.
        cuda: `torch.cuda`, or its stand-in.
    """

    device: str
    cuda: Any

    @property
    def dry(self) -> bool:
        """Whether this is the CPU."""
        return self.device == "cpu"


def find_place(dry: bool, results: Results) -> Place | None:
    """The place to measure on; None, and a reason among the results, where there is no GPU."""
    results.forget("not there")
    if dry:
        from . import stand_in

        torch.set_num_threads(1)  # as in the other benchmarks: time of barriers is nobody's
        return Place("cpu", stand_in)
    if not torch.cuda.is_available():
        results.put("not there", "torch finds no GPU")
        return None
    torch.cuda.set_device(0)
    return Place("cuda:0", torch.cuda)


@contextmanager
def recordings_in_memory() -> Iterator[Path]:
    """A folder in shared memory for recordings: the driver pins no file of a disk."""
    before = os.environ.get("DODOCO_DIR")
    with tempfile.TemporaryDirectory(prefix="dodoco-gpu-", dir="/dev/shm") as folder:
        os.environ["DODOCO_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["DODOCO_DIR"]
            else:
                os.environ["DODOCO_DIR"] = before
