"""Python processes that record, are told to go on line by line, and are killed at the end."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import numpy as np

import cases

HERE = Path(__file__).parent
START = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(HERE)!r})
import numpy as np
import cases
IDS = np.array([[0, 1], [1, 2]])
probe = cases.Probe.open((4, 2))
probe.record_ids(IDS)
print(probe.path, flush=True)
"""


@contextlib.contextmanager
def process(code: str, start: str = START) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that records, says where, and runs `code`.

    Args:
        code: What follows.
        start: What comes first: prints the path of a recording. By default `probe` is open, and
            one pass of `IDS` has been recorded.
    """
    script = textwrap.dedent(start) + textwrap.dedent(code)
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            yield child, Path(line_of(child))
        finally:
            child.kill()


def line_of(child: subprocess.Popen[str]) -> str:
    """The next line that the child prints."""
    assert child.stdout is not None
    return child.stdout.readline().strip()


def say(child: subprocess.Popen[str], text: str = "") -> None:
    """Sends the child a line."""
    assert child.stdin is not None
    child.stdin.write(text + "\n")
    child.stdin.flush()


def record_on_its_own(passes: int, paths: SimpleQueue[str]) -> None:
    """What a worker of `multiprocessing` runs."""
    probe = cases.Probe.open((4, 2))
    for _ in range(passes):
        probe.record_ids(np.array([[0, 1], [1, 2]]))
    probe.recorder.close()
    paths.put(str(probe.path))
