"""Tests against real engines: their shared helpers, and the table of transformers' families."""

from __future__ import annotations

from pathlib import Path

import pytest

COLUMNS = ("family", "observed module", "hook", "form", "experts", "top-k", "layers", "result")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--families-table",
        type=Path,
        metavar="FILE",
        help="write the table of transformers' MoE families and their results to this file",
    )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Prints each family with its result, so that a run says what it covered."""
    latest = {
        value[0]: (*value, "not built" if report.skipped else report.outcome)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == "transformers_family"
    }
    rows = sorted(latest.values())
    if not rows:
        return
    widths = [max(len(row[i]) for row in (COLUMNS, *rows)) for i in range(len(COLUMNS))]
    terminalreporter.section("MoE families of transformers")
    for row in (COLUMNS, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
    passed = sum(row[-1] == "passed" for row in rows)
    terminalreporter.write_line(f"{passed} of {len(rows)} passed")
    path = config.getoption("--families-table", None)
    if path is not None:
        path.write_text(_document(rows), encoding="utf-8")


def _document(rows: list[tuple[str, ...]]) -> str:
    import transformers

    import families

    lines = [
        families.DOCUMENT.format(version=transformers.__version__, count=len(rows)).rstrip(),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| " + " | ".join("---" for _ in COLUMNS) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"
