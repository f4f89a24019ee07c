"""The figures of one run: collected by the benchmarks, stored as JSON, printed as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .interleave import Summary
from .tables import Table, as_markdown

# Without --benchmark-strict, a limit is missed only where the whole interval lies this far beyond it:
# a shared machine must not fail a change for its own noise.
TOLERANCE = 0.03


@dataclass
class Figures:
    """All that one run measured.

    Attributes:
        strict: Whether a limit is a limit, or is missed only by a whole interval beyond tolerance.
        effort: Blocks in units of the usual number.
        values: Figures by name, ready for JSON.
        tables: What is printed at the end.
    """

    strict: bool
    effort: float
    values: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)

    def table(self, title: str, columns: Sequence[str]) -> Table:
        """The table of that title, made at its first use."""
        return self.tables.setdefault(title, Table(title, columns))

    def blocks(self, number: int) -> int:
        """Blocks to measure, scaled by `--benchmark-effort`."""
        return max(10, round(number * self.effort))

    def add(self, name: str, summary: Summary) -> Summary:
        """Stores one figure under its name, such as `record/128x8/ratio to bincount`."""
        self.values[name] = asdict(summary)
        return summary

    def judge(self, name: str, summary: Summary, limit: float, slack: float) -> None:
        """Stores a figure that has a limit, and fails beyond it.

        Args:
            name: What it is stored and printed as.
            summary: The figure.
            limit: What its median may be, when strict.
            slack: What the lower end of its interval may be, otherwise.
        """
        self.add(name, summary)
        met = summary.p50 <= limit if self.strict else summary.low <= slack
        self.values[name] |= {"limit": limit, "limit_of_interval": slack, "met": met}
        if not met:
            wanted = (
                f"at most {limit:g}" if self.strict else f"interval not wholly beyond {slack:g}"
            )
            pytest.fail(
                f"{name}: {summary.p50:.4g} [{summary.low:.4g}, {summary.high:.4g}], {wanted}",
                pytrace=False,
            )

    def content(self, environment: dict[str, Any]) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "environment": environment,
            "strict": self.strict,
            "effort": self.effort,
            "unit": "seconds of CPU time; ratios and slowdowns are relative to 1",
            "figures": self.values,
            "tables": [asdict(table) for table in self.tables.values()],
        }

    def write(self, path: Path, environment: dict[str, Any]) -> None:
        """Stores environment, figures and tables as one JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.content(environment), indent=1) + "\n")

    def markdown(self, environment: dict[str, Any]) -> str:
        """All tables, and the line that says where they come from."""
        return as_markdown(self.content(environment))


def in_us(seconds: float) -> str:
    """Seconds as microseconds with three digits."""
    us = seconds * 1e6
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}" if us >= 10 else f"{us:.2f}"


def with_interval(summary: Summary, scale: float = 1.0, unit: str = "") -> str:
    """Median and its interval, such as `0.74 [0.72, 0.75]`."""
    p50, low, high = (value * scale for value in (summary.p50, summary.low, summary.high))
    return f"{p50:.2f}{unit} [{low:.2f}, {high:.2f}]"
