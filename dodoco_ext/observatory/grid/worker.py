"""A worker process: acquires cells and analyses them, one after the other, on one thread."""

from __future__ import annotations

import errno
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from dodoco_ext.errors import DodocoError, InputError
from dodoco_ext.observatory.ep_results import EpScan
from dodoco_ext.observatory.ep_scan import ep_scan
from dodoco_ext.observatory.grid import cells
from dodoco_ext.observatory.grid.acquire import Plan, Subjects
from dodoco_ext.observatory.grid.batch_scan import batch_scan
from dodoco_ext.observatory.grid.figures import Analysed, analyse
from dodoco_ext.observatory.grid.results import BatchScan


@dataclass(frozen=True)
class Task:
    """One cell to do: the number of its model and of its condition in the plan."""

    model: int
    condition: int


@dataclass(frozen=True)
class Did:
    """Sequences run since the last message."""

    sequences: int


@dataclass(frozen=True, eq=False)
class Done:
    """One cell done.

    Attributes:
        task: Which.
        status: `new`, `kept`, or what was wrong with the file that was there.
        analysed: Its figures.
        batch_scan: Its scan over batch sizes.
        ep_scan: Its scan over EP sizes.
        facts: Of model and machine (`cells.Cell.facts`).
        top_k: k of each layer.
    """

    task: Task
    status: str
    analysed: Analysed
    batch_scan: BatchScan
    ep_scan: EpScan
    facts: dict[str, Any]
    top_k: list[int]


@dataclass(frozen=True)
class Failed:
    """A cell that could not be done.

    Attributes:
        task: Which.
        error: In one line.
        by_input: What was given is wrong (`InputError`).
    """

    task: Task
    error: str
    by_input: bool = False


Message = Did | Done | Failed


class Work:
    """Does one task after another.

    Args:
        plan: What to acquire.
        folder: Where cells are kept.
        num_ranks: EP group of the figures over ranks.
    """

    def __init__(self, plan: Plan, folder: Path, num_ranks: int) -> None:
        self.plan = plan
        self.num_ranks = num_ranks
        self.subjects = Subjects(plan, folder)

    def do(self, task: Task, connection: Connection) -> Done:
        """Acquires a cell, unless it is there, and analyses what is then on disk."""
        told = 0

        def tell(sequences: int) -> None:
            nonlocal told
            told += sequences
            if told >= 16:  # a message a sequence would cost more than it says
                connection.send(Did(told))
                told = 0

        model = self.plan.models[task.model]
        path, status = self.subjects.acquire(model, task.condition, tell)
        cell = cells.read(path)
        seed = self.plan.seed
        size = self.plan.shape.batch_size
        analysed = analyse(cell, path.name, size, self.num_ranks, seed)
        over_ep = ep_scan(
            cell.counts,
            cell.top_k,
            model=cell.model,
            condition=cell.name,
            sequences_per_pass=size,
            seed=seed,
        )
        if told:
            connection.send(Did(told))
        return Done(task, status, analysed, batch_scan(cell, seed), over_ep, cell.facts, cell.top_k)


def serve(connection: Connection, plan: Plan, folder: Path, num_ranks: int, threads: int) -> None:
    """Does the tasks that come through a connection until it closes.

    Args:
        connection: Tasks in, messages out. It closes when the parent ends, however it ends.
        plan: What to acquire.
        folder: Where cells are kept.
        num_ranks: EP group of the figures over ranks.
        threads: Threads of torch; 0 leaves the number to torch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    if threads:
        torch.set_num_threads(threads)
    work = Work(plan, folder, num_ranks)
    while True:
        try:
            task: Task = connection.recv()
        except (EOFError, OSError):  # a parent that ends with messages unread resets it
            return
        try:
            message: Message = work.do(task, connection)
        except DodocoError as error:
            message = Failed(task, str(error), isinstance(error, InputError))
        except OSError as error:
            message = Failed(task, _line(error, folder))
        try:
            connection.send(message)
        except BrokenPipeError:  # the parent is gone; the cell is on disk
            return


def _line(error: OSError, folder: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left in {folder}: make room and run the same command again"
    return f"cannot write to {folder} ({error.strerror or error}): give another --out"
