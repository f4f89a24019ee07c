"""What all printed views share: the console, formats of numbers, and JSON without NaN."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 140
"""Columns where there is no terminal to ask: wide enough that no table of ours is squeezed."""


def console() -> Console:
    """A console on stdout: colours only on a terminal and without NO_COLOR, width from COLUMNS."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            # rich would exit with 1, as if something were wrong.
            raise BrokenPipeError

    piped = not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdecimal()
    return Plain(
        width=PIPED_WIDTH if piped else None,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=False,
    )


def make_table(console: Console, columns: Sequence[str], *, left: Sequence[str] = ()) -> Table:
    """A table without frames; numbers to the right, the columns named in `left` to the left."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0) if console.width < 100 else (0, 1, 0, 0),
        header_style="bold",
    )
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def plain(text: str) -> str:
    """Text from a file, fit for a terminal: control and formatting characters become '?'."""
    return "".join(c if c.isprintable() else "?" for c in text)


def figure(value: float, digits: int = 3) -> str:
    """A ratio with three decimals, or '-' where it was not measured."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def quantity(value: int | None) -> str:
    """A count: exact below a million, then four digits and a unit."""
    if value is None:
        return "-"
    if value < 1_000_000:
        return f"{value:,}"
    for unit in ("M", "G", "T", "P"):
        value_in_unit = value / 1000 ** ("MGTP".index(unit) + 2)
        if value_in_unit < 999.95 or unit == "P":
            break
    return f"{value_in_unit:.4g} {unit}"


def size(num_bytes: int) -> str:
    """Bytes in binary units."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def duration(seconds: float | None) -> str:
    """A time span in its two natural units at most."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    if whole < 172_800:
        return f"{whole // 3600} h"
    return f"{whole // 86_400} d"


def to_json(value: Any) -> str:
    """JSON of dataclasses, dictionaries and lists; what is not finite becomes null."""
    return json.dumps(_jsonable(value), indent=2, allow_nan=False)


def as_dict(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, not descending into them."""
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _jsonable(item) for name, item in as_dict(value).items()}
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
