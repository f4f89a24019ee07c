"""Worker processes, and who gets which cell."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from dodoco_ext.errors import DodocoError, InputError
from dodoco_ext.observatory.grid.acquire import Plan
from dodoco_ext.observatory.grid.worker import Did, Done, Failed, Task, serve

_SECONDS_TO_END = 10.0


class Queue:
    """Cells to do. A worker stays with its model while that has any, and then takes the fullest other one.

    Args:
        num_models: Models of the plan.
        num_conditions: Conditions of each.
    """

    def __init__(self, num_models: int, num_conditions: int) -> None:
        self._waiting = {m: [Task(m, c) for c in range(num_conditions)] for m in range(num_models)}
        self._taken: dict[int, int] = dict.fromkeys(self._waiting, 0)

    def next(self, model: int | None) -> Task | None:
        """The next cell of a worker that holds this model (None: none yet)."""
        if model is not None and self._waiting[model]:
            return self._waiting[model].pop(0)
        if model is not None:
            self._taken[model] -= 1
        open_models = [m for m, tasks in self._waiting.items() if tasks]
        if not open_models:
            return None
        # Ties go to the model given first: the order is the plan's.
        chosen = min(open_models, key=lambda m: (self._taken[m], -len(self._waiting[m]), m))
        self._taken[chosen] += 1
        return self._waiting[chosen].pop(0)


class _Worker:
    def __init__(self, plan: Plan, folder: Path, num_ranks: int, threads: int) -> None:
        # A fresh interpreter: forking a process in which torch has threads can hang.
        context = multiprocessing.get_context("spawn")
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=serve, args=(theirs, plan, folder, num_ranks, threads), daemon=True
        )
        self.process.start()
        theirs.close()  # or its end would not be seen
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        self.task = task
        with suppress(BrokenPipeError):  # that it ended is told by the end of its messages
            self.connection.send(task)

    def end(self) -> None:
        self.connection.close()
        self.process.join(_SECONDS_TO_END if self.task is None else 0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def do_all(
    plan: Plan, folder: Path, num_ranks: int, jobs: int, threads: int
) -> Iterator[Did | Done]:
    """Does every cell of a plan.

    Args:
        plan: What to acquire.
        folder: Where cells are kept.
        num_ranks: EP group of the figures over ranks.
        jobs: Worker processes.
        threads: Threads of torch in each; 0 leaves it to torch.

    Yields:
        What workers tell, as it comes.

    Raises:
        InputError: What was given does not do; cells under way are finished first.
        DodocoError: A cell cannot be done, or a worker ended.
    """
    queue = Queue(len(plan.models), len(plan.sources))
    jobs = min(jobs, len(plan.models) * len(plan.sources))
    workers: list[_Worker] = []
    failed: list[Failed] = []
    try:
        for _ in range(jobs):
            worker = _Worker(plan, folder, num_ranks, threads)
            workers.append(worker)
            task = queue.next(None)
            assert task is not None, "more workers than cells"
            worker.give(task)
        while busy := {w.connection: w for w in workers if w.task is not None}:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection), "connections alone were waited for"
                worker = busy[ready]
                message = _received(worker)
                if isinstance(message, Did):
                    yield message
                    continue
                assert worker.task is not None, "only busy workers tell"
                model, worker.task = worker.task.model, None
                if isinstance(message, Failed):
                    failed.append(message)
                else:
                    yield message
                following = None if failed else queue.next(model)
                if following is not None:
                    worker.give(following)
    finally:
        for worker in workers:
            worker.end()
    if failed:
        raise (InputError if failed[0].by_input else DodocoError)(failed[0].error)


def _received(worker: _Worker) -> Did | Done | Failed:
    assert worker.task is not None, "only busy workers are read"
    try:
        message: Did | Done | Failed = worker.connection.recv()
    except (EOFError, OSError):  # between messages, or in the middle of one
        worker.process.join()
        return Failed(
            worker.task,
            f"a worker process ended with status {worker.process.exitcode} (out of memory?): "
            "run the same command again, with fewer --jobs",
        )
    return message
