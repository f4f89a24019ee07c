"""A result on the terminal: tables, the finding, and where everything was written."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dodoco_ext.observatory.comparison import fixed, rows, sentences
from dodoco_ext.observatory.findings import findings, limits
from dodoco_ext.observatory.report import ReportPaths
from dodoco_ext.observatory.result import Interval, Result

_MOST_LAYERS = 12


def print_result(result: Result, console: Console, recording: Path, paths: ReportPaths) -> None:
    """Prints the tables, the finding and the paths."""
    console.print(_model_line(result), highlight=False)
    console.print(_conditions(result))
    if result.ratios:
        console.print(_ratios(result))
    console.print("\nFinding", style="bold")
    for sentence in findings(result):
        console.print(f"- {sentence}", highlight=False)
    console.print("\nWhat does not follow", style="bold")
    for sentence in limits(result):
        console.print(f"- {sentence}", highlight=False)
    console.print()
    for label, path in (
        ("report", paths.html),
        ("picture", paths.png),
        ("numbers", paths.json),
        ("recording", recording),
    ):
        console.print(f"{label + ':':<10} {path}", highlight=False, soft_wrap=True)


def print_comparison(
    results: Mapping[str, Result], console: Console, page: Path, numbers: Path
) -> None:
    """Prints several models side by side, what follows, and the paths."""
    first = next(iter(results.values()))
    table = _table(
        f"\nCorrected Gini of {len(results)} models, {first.conditions[0].num_tokens:,} tokens a condition."
    )
    table.add_column("model")
    for condition in first.conditions:
        table.add_column(condition.name, justify="right")
    table.add_column("mock / real", justify="right")
    table.add_column("95 % interval", justify="right")
    for row in rows(results):
        figures = [fixed(row.corrected[condition.name]) for condition in first.conditions]
        table.add_row(row.name, *figures, _number(row.ratio), _interval(row.interval))
    console.print(table)
    console.print("\nFinding", style="bold")
    for sentence in sentences(results):
        console.print(f"- {sentence}", highlight=False)
    console.print()
    for label, path in (("report", page), ("numbers", numbers)):
        console.print(f"{label + ':':<10} {path}", highlight=False, soft_wrap=True)
    console.print(f"each model: {page.parent}/NAME/report.html", highlight=False, soft_wrap=True)


def _model_line(result: Result) -> str:
    model = result.model
    return f"{model.name}: {model.architecture}, {model.num_parameters:,} parameters"


def _conditions(result: Result) -> Table:
    first = result.conditions[0]
    tokens = result.batch_size * first.sequence_length
    every_layer = len(first.layers) <= _MOST_LAYERS
    table = _table(
        f"\n{first.num_tokens:,} tokens a condition. Gini and max/mean: of a pass of {tokens:,} tokens,\nmean of "
        f"{result.num_batches} passes. Unused experts: of the whole window."
        + (
            ""
            if every_layer
            else f" The {len(first.layers)} layers one by one are in results.json."
        )
    )
    table.add_column("condition", no_wrap=True)
    for column in ("layer", "Gini", "floor", "corrected", "max/mean", "its null", "unused"):
        table.add_column(column, justify="right", no_wrap=True)
    for condition in result.conditions:
        for index, layer in enumerate(condition.layers if every_layer else []):
            table.add_row(
                condition.name if index == 0 else "",
                str(index),
                f"{layer.gini:.3f}",
                f"{layer.null_gini:.3f}",
                f"{layer.corrected_gini:.3f}",
                f"{layer.max_over_mean:.2f}",
                f"{layer.null_max_over_mean:.2f}",
                str(layer.unused_experts),
            )
        overall = condition.overall
        table.add_row(
            "" if every_layer else condition.name,
            "all",
            f"{overall.gini:.3f}",
            f"{overall.null_gini:.3f}",
            f"{overall.corrected_gini:.3f}",
            f"{overall.max_over_mean:.2f}",
            f"{overall.null_max_over_mean:.2f}",
            f"{overall.unused_experts:.1f}",
            style="bold",
            end_section=True,
        )
    return table


def _ratios(result: Result) -> Table:
    table = _table(
        "\nMock over real, mean of all layers, with 95 % intervals: bootstrap over\n"
        f"passes ({result.batch_size} whole sequences each)."
    )
    table.add_column("ratio", no_wrap=True)
    for column in ("corrected", "interval", "raw Gini", "interval"):
        table.add_column(column, justify="right", no_wrap=True)
    for ratio in result.ratios:
        table.add_row(
            f"{ratio.numerator} / {ratio.denominator}",
            _number(ratio.corrected),
            _interval(ratio.corrected_interval),
            _number(ratio.gini),
            _interval(ratio.gini_interval),
        )
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, collapse_padding=True
    )


def _number(value: float) -> str:
    return f"{value:.2f}" if isfinite(value) else "-"


def _interval(interval: Interval) -> str:
    return f"{_number(interval[0])} to {_number(interval[1])}"
