"""Runs a grid: every model under every condition, kept cell by cell, and what all of them say."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dodoco_ext.errors import InputError
from dodoco_ext.observatory import observe
from dodoco_ext.observatory.grid import findings, gaps, table
from dodoco_ext.observatory.grid.acquire import Plan
from dodoco_ext.observatory.grid.batch_scan import batch_sizes
from dodoco_ext.observatory.grid.pool import do_all
from dodoco_ext.observatory.grid.results import GridCondition, GridModel, Numbers, to_json
from dodoco_ext.observatory.grid.worker import Did, Done
from dodoco_ext.observatory.models import display_name
from dodoco_ext.observatory.whole import write_whole
from dodoco_ext.observatory.zoo.shipped import PREFIX


@dataclass(frozen=True)
class Progress:
    """How far a grid is.

    Attributes:
        sequences, all_sequences: Done and in all.
        cells, all_cells: Done and in all.
        seconds_left: By the pace of the cells that were run so far; None before the first.
        finished: The cell that has just been finished, as `model, condition`; "" between.
        status: Of that cell (`worker.Done.status`).
    """

    sequences: int
    all_sequences: int
    cells: int
    all_cells: int
    seconds_left: float | None
    finished: str = ""
    status: str = ""


@dataclass(frozen=True, eq=False)
class GridRun:
    """A grid that was run.

    Attributes:
        numbers: What was found.
        provenance: Software, machine, checkpoints, texts, time.
        statuses: Of each cell, by its file.
    """

    numbers: Numbers
    provenance: dict[str, Any]
    statuses: dict[str, str]


def default_jobs(models: Sequence[str], cells: int) -> int:
    """A process a core for the zoo's models, which run on one thread each; else one, for memory's sake."""
    if all(model.startswith(PREFIX) for model in models):
        return min(len(os.sched_getaffinity(0)), cells)
    return 1


def run_grid(
    plan: Plan,
    folder: Path,
    *,
    num_ranks: int = 8,
    jobs: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> GridRun:
    """Runs what is missing of a grid, and computes everything anew from its cells.

    Args:
        plan: Models, conditions, how much.
        folder: Where `cells/` is, or will be.
        num_ranks: EP group of the figures over ranks.
        jobs: Worker processes; None: `default_jobs`. The zoo's models run on one thread each, so that
            bytes of numbers do not depend on it.
        progress: Told of how far it is.

    Raises:
        InputError: Models of one name, too few sequences, or what models and conditions raise.
        DodocoError: A cell cannot be done; those that were are kept.
    """
    names = [display_name(model) for model in plan.models]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two models are called {name!r}: rename one of the folders")
    batch_sizes(plan.num_draws, plan.shape.num_sequences)
    zoo = all(model.startswith(PREFIX) for model in plan.models)
    jobs = jobs or default_jobs(plan.models, len(names) * len(plan.sources))
    started = time.perf_counter()
    follow = _Pace(plan, progress, started)
    done: dict[tuple[int, int], Done] = {}
    threads = 1 if zoo or jobs > 1 else 0
    with _alone_in(folder / "cells"):
        for message in do_all(plan, folder / "cells", num_ranks, jobs, threads):
            if isinstance(message, Done):
                done[message.task.model, message.task.condition] = message
            follow.tell(message)
    # In the plan's order, whatever the order in which they came.
    rows = [[done[m, c] for c in range(len(plan.sources))] for m in range(len(names))]
    numbers = _numbers(plan, rows, num_ranks)
    cells = [cell for row in rows for cell in row]
    provenance = {
        "grid": {
            **observe.provenance(),
            "processes": str(jobs),
            "threads": str(threads or "torch's"),
        },
        "models": {name: row[0].facts["provenance"] for name, row in zip(names, rows, strict=True)},
        "texts": observe.texts_of(plan.sources),
        "seconds": round(time.perf_counter() - started, 1),
    }
    statuses = {cell.analysed.cell.file: cell.status for cell in cells}
    return GridRun(numbers, provenance, statuses)


def write(run: GridRun, folder: Path) -> list[Path]:
    """Writes `grid.json`, and `cells.parquet` where pyarrow is installed; each whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / "grid.json"
    with write_whole(path) as partial:
        partial.write_text(to_json(run.numbers, run.provenance), encoding="utf-8")
    return [path, *table.write(run.numbers, json.dumps(run.provenance), folder)]


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other grids out of a folder, and sweeps what a killed one left half written."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another grid is being observed into {folder}: wait for it, or give another --out"
            ) from None
        for partial in folder.glob(".*.npz.*"):
            partial.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


class _Pace:
    """Turns messages into progress. Cells that were kept say nothing about the pace."""

    def __init__(
        self, plan: Plan, progress: Callable[[Progress], None] | None, started: float
    ) -> None:
        self.progress, self.started = progress, started
        self.a_cell = plan.sequences_a_cell
        self.all_cells = len(plan.models) * len(plan.sources)
        self.sequences = self.cells = self.kept = 0

    def tell(self, message: Did | Done) -> None:
        finished = status = ""
        if isinstance(message, Did):
            self.sequences += message.sequences
        else:
            cell = message.analysed.cell
            finished, status = f"{cell.model}, {cell.condition}", message.status
            self.cells += 1
            if message.status == "kept":
                self.kept += 1
                self.sequences += self.a_cell
        if self.progress is None:
            return
        total, left = self.a_cell * self.all_cells, None
        ran = self.sequences - self.kept * self.a_cell
        if ran > 0:
            pace = (time.perf_counter() - self.started) / ran
            left = pace * (total - self.sequences)
        self.progress(
            Progress(self.sequences, total, self.cells, self.all_cells, left, finished, status)
        )


def _numbers(plan: Plan, rows: list[list[Done]], num_ranks: int) -> Numbers:
    shape, cells = plan.shape, [done for row in rows for done in row]
    analysed = [[done.analysed for done in row] for row in rows]
    numbers = Numbers(
        parameters={
            "seed": plan.seed,
            "num_draws": plan.num_draws,
            "batch_size": shape.batch_size,
            "sequence_length": shape.sequence_length,
            "num_batches": shape.num_batches,
            "bos": shape.bos,
            "padding": shape.padding,
            "first_position": shape.first_position,
            "num_ranks": num_ranks,
            "batch_sizes": cells[0].batch_scan.batch_sizes,
        },
        models=[_model(row[0]) for row in rows],
        conditions=[_condition(done) for done in rows[0]],
        cells=[replace(done.analysed.cell, ep_scan=done.ep_scan) for done in cells],
        ratios=[ratio for row in analysed for ratio in gaps.ratios(row)],
        gaps=[gap for row in analysed for gap in gaps.gaps(row)],
        batch_scans=[done.batch_scan for done in cells],
    )
    return replace(numbers, findings=findings.findings(numbers))


def _model(done: Done) -> GridModel:
    cell, facts = done.analysed.cell, done.facts
    return GridModel(
        name=cell.model,
        architecture=facts["architecture"],
        num_parameters=facts["num_parameters"],
        vocab_size=facts["vocab_size"],
        num_layers=len(cell.layers),
        num_experts=cell.layers[0].num_experts,
        top_k=done.top_k,
        uncovered=facts["uncovered"],
    )


def _condition(done: Done) -> GridCondition:
    cell = done.analysed.cell
    return GridCondition(cell.condition, cell.kind, cell.source, cell.description)
