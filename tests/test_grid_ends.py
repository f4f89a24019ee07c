"""A grid's processes that end in the middle of a message: the other side says so, or ends too."""

from __future__ import annotations

import os
import signal
import struct
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("transformers")

from dodoco_ext.observatory.grid.pool import _received, _Worker
from dodoco_ext.observatory.grid.worker import Failed, Task, serve

TASK = Task(model=0, condition=1)


def nothing(_: Connection) -> None:
    """Ends between two messages."""


def unread(connection: Connection) -> None:
    """Ends with a message in its queue, which it had not read."""
    assert connection.poll(5)


def half(connection: Connection) -> None:
    """Ends when it has sent 3 of a message's 1,000 bytes."""
    os.write(connection.fileno(), struct.pack("!i", 1000) + b"abc")


def ended(how: Any) -> Connection:
    """What is left to the other side."""
    ours, theirs = Pipe()
    ours.send(TASK)
    if how is not unread:
        theirs.recv()
    how(theirs)
    theirs.close()
    return ours


@pytest.mark.parametrize("how", [nothing, unread, half])
def test_a_worker_that_was_killed_is_a_failure_of_its_cell(how: Any) -> None:
    process = SimpleNamespace(join=lambda: None, exitcode=-signal.SIGKILL)
    worker = SimpleNamespace(connection=ended(how), process=process, task=TASK)
    message = _received(cast(_Worker, worker))
    assert isinstance(message, Failed)
    assert message.task == TASK
    assert message.error.startswith("a worker process ended with status -9")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", [nothing, unread, half])
def test_a_worker_ends_when_its_parent_has(
    how: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C stays this process's
    serve(ended(how), cast(Any, None), tmp_path, 8, 0)
