"""Torch on one thread, so that results depend on the seed alone; and the versions they depend on."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from importlib.metadata import version

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread, and restores the number of threads.

    With several, the backward of an index is a race whose sums differ from run to run, and the
    result depends on the number of cores. At this size a second thread gains little, and where
    something else uses the cores, threads that wait for each other lose a great deal.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def software_versions() -> dict[str, str]:
    """Versions that can change weights."""
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
