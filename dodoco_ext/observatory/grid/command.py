"""`dodoco observe --preset grid`: progress, tables and files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dodoco_ext.observatory.comparison import fixed
from dodoco_ext.observatory.conditions import GRID, Shape
from dodoco_ext.observatory.data import check_file
from dodoco_ext.observatory.grid.results import Numbers, to_json
from dodoco_ext.observatory.loading import Loading
from dodoco_ext.observatory.models import quiet

if TYPE_CHECKING:
    from dodoco_ext.observatory.grid.run import Progress

NUM_DRAWS = 4
NUM_RANKS = 8

_LABELS = {".html": "report:", ".json": "numbers:", ".parquet": "table:"}


def observe_grid(
    models: tuple[str, ...],
    sources: tuple[str, ...],
    folder: Path,
    shape: Shape,
    seed: int,
    num_draws: int | None,
    num_ranks: int | None,
    jobs: int | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Runs a grid, or what is missing of it, writes it and prints it.

    Args:
        models: As `--model` takes them; none: the zoo's.
        sources: SOURCE of each condition; none: `conditions.GRID`.
        folder: Results folder.
        shape: A draw of a condition.
        seed: Of everything random.
        num_draws: Draws of a condition; None: `NUM_DRAWS`.
        num_ranks: EP group of the figures over ranks; None: `NUM_RANKS`.
        jobs: Worker processes; None: as fits.
        loading: How models are loaded.
        as_json: Print JSON.
    """
    # Quiet: where kernels of other packages are missing is no news here.
    with quiet():
        from dodoco_ext.observatory.grid.acquire import Plan
        from dodoco_ext.observatory.grid.run import run_grid, write
        from dodoco_ext.observatory.page.write import write_page
        from dodoco_ext.observatory.zoo.shipped import PREFIX
        from dodoco_ext.observatory.zoo.species import SPECIES
    plan = Plan(
        models=models or tuple(f"{PREFIX}{name}" for name in SPECIES),
        sources=sources or GRID,
        shape=shape,
        seed=seed,
        num_draws=num_draws or NUM_DRAWS,
        loading=loading,
    )
    for source in plan.sources:
        check_file(source)
    errors = Console(stderr=True)
    try:
        with _progress(errors) as progress:
            run = run_grid(
                plan, folder, num_ranks=num_ranks or NUM_RANKS, jobs=jobs, progress=progress
            )
    except KeyboardInterrupt:
        errors.print(
            "interrupted: finished cells are kept, the same command goes on", soft_wrap=True
        )
        raise
    paths = write(run, folder)
    page, *_ = write_page(folder)
    if as_json:
        click.echo(to_json(run.numbers, run.provenance), nl=False)
        return
    print_grid(run.numbers, Console())
    console = Console()
    for path in (page, *paths):
        console.print(f"{_LABELS[path.suffix]:<9} {path}", soft_wrap=True, highlight=False)
    if len(paths) == 1:
        console.print("no table: pip install 'dodoco-ext[trace]' for cells.parquet")


def print_grid(numbers: Numbers, console: Console) -> None:
    """Prints corrected Gini and max/mean over ranks of every cell, and what follows."""
    tokens = numbers.cells[0].num_tokens
    ranks = numbers.parameters["num_ranks"]
    console.print(
        _table(
            numbers,
            f"Corrected Gini, {tokens:,} tokens a cell.",
            lambda c: c.experts.corrected_gini,
        )
    )
    if any(c.ranks is not None for c in numbers.cells):
        title = f"Max/mean over {ranks} ranks of equal runs of experts."
        nan = float("nan")
        console.print(
            _table(numbers, title, lambda c: nan if c.ranks is None else c.ranks.max_over_mean)
        )
    console.print("Finding", style="bold")
    for sentence in numbers.findings:
        console.print(f"- {sentence}", highlight=False)
    console.print()


def _table(numbers: Numbers, title: str, figure: Callable[..., float]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="")
    table.add_column("model")
    for condition in numbers.conditions:
        table.add_column(condition.name, justify="right")
    for model in numbers.models:
        cells = [numbers.cell(model.name, c.name) for c in numbers.conditions]
        table.add_row(model.name, *(fixed(figure(cell)) for cell in cells))
    return table


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left; without a terminal a line a cell. A damaged cell is always told."""
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task("cells", total=1, left="")

        def tell(now: Progress) -> None:
            count = f"{now.cells} of {now.all_cells} cells"
            left = "" if now.seconds_left is None else f"about {_time(now.seconds_left)} left"
            bars.update(
                bar, description=count, total=now.all_sequences, completed=now.sequences, left=left
            )
            if not now.finished:
                return
            if now.status not in ("new", "kept"):
                said = f"{now.finished}: {now.status}; it was made again"
                console.print(said, highlight=False, soft_wrap=True)
            if not console.is_terminal:
                kept = " (kept)" if now.status == "kept" else ""
                parts = [f"{now.finished}{kept}: {count}", *([left] if left else [])]
                console.print(", ".join(parts), highlight=False, soft_wrap=True)

        yield tell


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
