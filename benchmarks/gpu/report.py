"""What a check found, as Markdown: printed at its end, or put into a page.

A page takes it between two lines, `<!-- gpu figures -->` and `<!-- end of gpu figures -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.tables import Table

BEGIN, END = "<!-- gpu figures -->", "<!-- end of gpu figures -->"
MISSING = "not measured yet"
OTHERS = ("scatter_add chain", "histc", "one-hot sum", "atomics")

Figures = Mapping[str, Any]


def as_markdown(content: Figures) -> str:
    """Steps, tables of what was measured, and on what."""
    figures = content["figures"]
    tables = [
        steps_table(content["steps"]),
        kernel_table(figures.get("kernel", {})),
        launch_table(figures.get("launch", {})),
        decode_table(figures.get("decode", {})),
    ]
    parts = [table.markdown() for table in tables]
    if content.get("dry"):
        parts.insert(0, "*A dry run on the CPU with stand-ins: its figures mean nothing.*")
    skipped = figures.get("tests", {}).get("skipped", [])
    failed = figures.get("tests", {}).get("failed", [])
    for title, names in (("Tests that failed", failed), ("Tests that were skipped", skipped)):
        if names:
            parts.append(f"**{title}**\n\n" + "\n".join(f"* {name}" for name in names))
    origin = ", ".join(
        f"{k} {v}" for k, v in content["environment"].items() if v and k != "summary"
    )
    return "\n\n".join([*parts, f"Measured on: {origin}."])


def steps_table(steps: Figures) -> Table:
    """How each step ended."""
    table = Table("Steps of the check", ("step", "state", "seconds", "what came of it"))
    for name, outcome in steps.items():
        detail = str(outcome["detail"]).replace("|", "\\|")
        table.rows.append((name, outcome["state"], f"{outcome['seconds']:.0f}", detail))
    return table


def kernel_table(cells: Figures) -> Table:
    """One row a cell: time over an empty node, and ratios to other ways."""
    table = Table(
        "One record in a CUDA graph, us; ratios below 1: the record is faster",
        (
            *("experts, k", "tokens", "ids", "empty node", "record", "over the empty node"),
            *(f"record / {name}" for name in OTHERS),
            "counts",
        ),
    )
    for name, cell in cells.items():
        if not isinstance(cell, dict):
            continue
        shape, tokens, skew = name.split("/")
        ratios = [
            f"{cell['record over'][other]['p50']:.2f}" if other in cell["record over"] else "-"
            for other in OTHERS
        ]
        table.rows.append(
            (
                *(shape.replace(" experts, k ", ", "), tokens.partition(" ")[0], skew),
                in_us(cell["seconds"]["empty node"]["p50"]),
                in_us(cell["seconds"]["record"]["p50"]),
                with_interval(cell["record over empty node"], 1e6),
                *ratios,
                "exact" if cell["exact"] else "WRONG",
            )
        )
    return table if table.rows else _missing(table)


def launch_table(cells: Figures) -> Table:
    """One row a way: host and device time of an eager call."""
    table = Table(
        "Eager calls, us: CPU time of the host, and time on the device where calls queue up",
        ("experts, k", "tokens", "way", "host", "device"),
    )
    for name, cell in cells.items():
        if not isinstance(cell, dict):
            continue
        shape, tokens = name.split("/")
        for way, host in cell["host seconds"].items():
            device = cell["device seconds"].get(way)
            table.rows.append(
                (
                    *(shape.replace(" experts, k ", ", "), tokens.partition(" ")[0], way),
                    with_interval(host, 1e6),
                    with_interval(device, 1e6) if device else "-",
                )
            )
    return table if table.rows else _missing(table)


def decode_table(cells: Figures) -> Table:
    """One row a batch size: how much slower the model decodes."""
    layers = cells.get("layers", MISSING)
    table = Table(
        f"Decoding in CUDA graphs, Qwen3-30B-A3B's shapes, layers: {layers}; slower than bare by",
        (
            *("batch", "experts by", "bare, us a step", "bare again", "disabled", "recording"),
            *("recording, us a layer", "counts"),
        ),
    )
    for name, cell in cells.items():
        if not name.startswith("batch "):
            continue
        table.rows.append(
            (
                name.removeprefix("batch "),
                cell["experts by"],
                in_us(cell["seconds"]["bare"]["p50"]),
                *(
                    with_interval(cell["slowdown"][way], 100, " %")
                    for way in ("bare again", "disabled", "recording")
                ),
                in_us(cell["over bare, seconds a layer"]),
                "exact" if cell["exact"] else "WRONG",
            )
        )
    return table if table.rows else _missing(table)


def in_us(seconds: float) -> str:
    """Seconds as microseconds with three digits."""
    us = seconds * 1e6
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}" if us >= 10 else f"{us:.2f}"


def with_interval(summary: Figures, scale: float, unit: str = "") -> str:
    """Median and the interval of the median, such as `0.74 [0.72, 0.75]`."""
    p50, low, high = (summary[name] * scale for name in ("p50", "low", "high"))
    return f"{p50:.2f}{unit} [{low:.2f}, {high:.2f}]"


def _missing(table: Table) -> Table:
    return Table(table.title, table.columns, [[MISSING] + ["-"] * (len(table.columns) - 1)])


def put_into(page: Path, result: Path) -> None:
    """Replaces what a page shows by what a stored check found.

    Raises:
        SystemExit: The page has no place for it, or the check was a dry one.
    """
    content = json.loads(result.read_text())
    if content["dry"]:
        raise SystemExit(f"{result} is of a dry run: its figures mean nothing")
    text, found = re.subn(
        f"{re.escape(BEGIN)}.*{re.escape(END)}",
        lambda _: f"{BEGIN}\n\n{as_markdown(content)}\n\n{END}",
        page.read_text(),
        flags=re.DOTALL,
    )
    if found != 1:
        raise SystemExit(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(text)
