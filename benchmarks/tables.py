"""Tables of a stored run as Markdown, printed or put into a page.

    python benchmarks/tables.py benchmarks/results/RUN.json
    python benchmarks/tables.py benchmarks/results/RUN.json --into docs/overhead.md

A page takes them between two lines, `<!-- figures -->` and `<!-- end of figures -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BEGIN, _END = "<!-- figures -->", "<!-- end of figures -->"


@dataclass
class Table:
    """Cells under a title."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def markdown(self) -> str:
        """The title in bold, and the table."""
        lines = [
            f"**{self.title}**",
            "",
            "| " + " | ".join(self.columns) + " |",
            "|" + "---|" * len(self.columns),
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        return "\n".join(lines)


def as_markdown(content: Mapping[str, Any]) -> str:
    """Tables of a run, and a line that says on what they were measured."""
    origin = ", ".join(f"{key} {value}" for key, value in content["environment"].items() if value)
    tables = [Table(**table).markdown() for table in content["tables"]]
    return "\n\n".join([*tables, f"Measured on: {origin}."])


def main() -> int:
    """Prints the tables of a run, or puts them into a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="JSON file written by --benchmark-results")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="Markdown page to put them into")
    arguments = parser.parse_args()
    markdown = as_markdown(json.loads(arguments.run.read_text()))
    if arguments.into is None:
        print(markdown)
        return 0
    page = arguments.into.read_text()
    new, found = re.subn(
        f"{re.escape(_BEGIN)}.*{re.escape(_END)}",
        lambda _: f"{_BEGIN}\n\n{markdown}\n\n{_END}",
        page,
        flags=re.DOTALL,
    )
    if found != 1:
        print(f"{arguments.into} has no lines {_BEGIN} and {_END}", file=sys.stderr)
        return 1
    arguments.into.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
