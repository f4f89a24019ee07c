"""The columns of the table: what they show, how wide they are, and how rows are ordered by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.views.tables import figure, plain, quantity
from dodoco_ext.views.top.figures import Row

BLOCKS = "▁▂▃▄▅▆▇█"
NARROW = 80


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: Its heading.
        key: What rows are ordered by; nan comes last in either direction.
        falling: Whether the largest comes first, as long as the order is not reversed.
        left: Whether text begins at the left.
    """

    title: str
    key: Callable[[Row], float]
    falling: bool = True
    left: bool = False


COLUMNS = (
    Column("layer", lambda row: row.index, falling=False, left=True),
    Column("gini", lambda row: row.gini),
    Column("floor", lambda row: row.gini_floor),
    Column("corr", lambda row: row.gini_corrected),
    Column("max/mean", lambda row: row.peak),
    Column("null", lambda row: row.peak_floor),
    Column("hottest", lambda row: row.hottest[0][1] if row.hottest else float("nan"), left=True),
    Column("tok/s", lambda row: row.tokens_per_s),
    Column("trend", lambda row: last(row.gini_line), left=True),
)


@dataclass(frozen=True)
class Layout:
    """Columns at one width of the terminal.

    Attributes:
        widths: Of each column, the gap behind it included.
        hottest: Experts named.
        tokens: Whether the line shows tokens a second, not Gini.
    """

    widths: tuple[int, ...]
    hottest: int
    tokens: bool

    @classmethod
    def of(cls, width: int, rows: Sequence[Row], *, tokens: bool = False) -> Layout:
        """The best use of a width of at least 80 columns; what is narrower is cut off at the right."""
        width = max(width, NARROW)
        hottest = 2 if width < 110 else 3
        fixed = (6, 6, 6, 9, 6, 11 * hottest, 8)
        longest = max((len(plain(row.short)) for row in rows), default=5)
        room = width - sum(fixed)
        name = min(max(longest, 6) + 1, room - 9)
        trend = min(room - name, 61)
        return cls((name, *fixed, trend), hottest, tokens)

    def titles(self, sorted_by: int, *, reverse: bool) -> tuple[str, ...]:
        """The headings; that of the order is marked."""
        found = []
        for index, (column, width) in enumerate(zip(COLUMNS, self.widths, strict=True)):
            title = column.title
            if title == "trend":
                title = "tok/s ->" if self.tokens else "gini ->"
            if index == sorted_by:
                title = ("v" if column.falling != reverse else "^") + title
            found.append(_fit(title, width, left=column.left))
        return tuple(found)

    def cells(self, row: Row, largest: float) -> tuple[str, ...]:
        """The cells of a row, each exactly as wide as its column.

        Args:
            row: The row.
            largest: What a full block of the line means: the largest value of all rows.
        """
        mark = "!" if row.peak > row.peak_high else " "
        hot = "".join(
            f"{e} {100 * share:.1f}%".ljust(11) for e, share in row.hottest[: self.hottest]
        ).rstrip()
        name = plain(row.short) + ("*" if row.in_flight else "")
        texts = (
            name,
            figure(row.gini),
            figure(row.gini_floor),
            figure(row.gini_corrected),
            figure(row.peak, 2) + mark,
            figure(row.peak_floor, 2),
            hot or "-",
            rate(row.tokens_per_s),
            sparkline(self.line(row), self.widths[-1] - 1, largest),
        )
        return tuple(
            _fit(text, width, left=column.left)
            for text, width, column in zip(texts, self.widths, COLUMNS, strict=True)
        )

    def line(self, row: Row) -> NDArray[np.float64]:
        """The values of a row's line."""
        return row.tokens_line if self.tokens else row.gini_line

    def largest(self, rows: Sequence[Row]) -> float:
        """The largest value of all lines: they have one scale."""
        values = [value for row in rows for value in self.line(row) if isfinite(value)]
        return float(max(values, default=0.0))


def ordered(rows: Sequence[Row], sorted_by: int, *, reverse: bool = False) -> list[Row]:
    """Rows in the order of a column; equal ones in the order of the layers."""
    column = COLUMNS[sorted_by]
    sign = -1.0 if column.falling != reverse else 1.0

    def key(row: Row) -> tuple[bool, float, int]:
        value = column.key(row)
        return (not isfinite(value), sign * value if isfinite(value) else 0.0, row.index)

    return sorted(rows, key=key)


def matching(rows: Sequence[Row], text: str) -> list[Row]:
    """Rows whose name holds a text, whatever its case."""
    return [row for row in rows if text.lower() in row.name.lower()]


def sparkline(values: NDArray[np.float64], width: int, largest: float) -> str:
    """Values as blocks, the latest at the right; a gap where nothing was counted.

    Args:
        values: Oldest first.
        width: Characters; where there are more values, neighbours are averaged.
        largest: What a full block means.
    """
    if width < 1 or not len(values):
        return ""
    groups = np.array_split(values, min(width, len(values)))
    text = ""
    for group in groups:
        known = group[np.isfinite(group)]
        if not len(known):
            text += " "
        elif largest <= 0:
            text += BLOCKS[0]
        else:
            level = round(float(known.mean()) / largest * (len(BLOCKS) - 1))
            text += BLOCKS[min(max(level, 0), len(BLOCKS) - 1)]
    return text


def rate(value: float) -> str:
    """Tokens a second in at most seven characters."""
    if not isfinite(value):
        return "-"
    return f"{value:.1f}" if value < 10 else quantity(round(value)).replace(" ", "")


def last(values: NDArray[np.float64]) -> float:
    """The latest value; nan where there is none."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else float("nan")


def _fit(text: str, width: int, *, left: bool) -> str:
    """A text in a column, a gap behind it."""
    room = width - 1
    if len(text) > room:
        text = text[: room - 1] + "~"  # no ellipsis: it is not one column wide everywhere
    return (text.ljust(room) if left else text.rjust(room)) + " "
