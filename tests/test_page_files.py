"""What `dodoco report` writes beside the page: answers, figures and tables, and what it says when it cannot."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from dodoco_ext import cli
from dodoco_ext.observatory.grid.results import Numbers
from dodoco_ext.observatory.page.answers import answers
from dodoco_ext.observatory.page.latex import escape
from dodoco_ext.observatory.page.render import render
from dodoco_ext.observatory.page.svg import ticks
from dodoco_ext.observatory.page.tables import tables
from dodoco_ext.observatory.page.view import View
from dodoco_ext.observatory.page.write import write_page
from dodoco_ext.observatory.report_command import FORMATS
from page_cases import CONDITIONS, PART, WHOLE, planted_numbers, write_grid


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return planted_numbers(WHOLE, PART)


@pytest.fixture
def results(tmp_path: Path, numbers: Numbers) -> Path:
    return write_grid(tmp_path / "grid", numbers)


def test_the_command_writes_page_figures_and_tables(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["report", str(results)]) == 0
    said = [Path(line) for line in capsys.readouterr().out.splitlines()]
    found = {str(path.relative_to(results)) for path in said}
    names = {"grid", "bands", "ratios", "ep", "batch"}
    assert found == {
        "report.html",
        *(f"figures/{name}.{ending}" for name in names for ending in ("png", "svg")),
        *(f"tables/{name}.tex" for name in names | {"layers"}),
    }
    assert all(path.stat().st_size > 300 for path in said)


def test_the_page_refers_to_nothing_outside_itself(results: Path) -> None:
    text = render(View.of_folder(results))
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)[^"']*""", text) == []
    assert re.findall(r"url\(|@import|https?://|//cdn", text) == []
    assert "<model>" not in text
    assert "R&amp;D_&lt;model&gt;" in text


def test_every_figure_of_the_grid_is_in_the_page(results: Path, numbers: Numbers) -> None:
    text = render(View.of_folder(results))
    for cell in numbers.cells:
        assert f"{cell.experts.corrected_gini:.3f}</td>" in text
    for sentence in numbers.findings:
        assert sentence.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in text


def test_same_numbers_same_bytes(results: Path, tmp_path: Path) -> None:
    first, second = (write_page(results, tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == [path.name for path in second]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_figures_are_what_they_are_called(results: Path) -> None:
    for path in write_page(results, only=["figures"]):
        if path.suffix == ".svg":
            assert ET.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes().startswith(b"\x89PNG\r\n")
    batch = (results / "figures" / "batch.svg").read_text("utf-8")
    assert all(name.replace("<", "&lt;").replace(">", "&gt;") in batch for name, *_ in CONDITIONS)


def test_tables_are_latex_with_as_many_cells_in_every_row(results: Path) -> None:
    view = View.of_folder(results)
    for path in write_page(results, only=["latex"]):
        lines = path.read_text("utf-8").splitlines()
        columns = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", lines[1])
        assert columns
        rows = [line for line in lines if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns[1])}
        assert view.digest in lines[0]
        assert [line for line in lines if line.startswith("\\") and not line.endswith(r"\\")] == [
            lines[1],
            r"\toprule",
            r"\midrule",
            r"\bottomrule",
            r"\end{tabular}",
        ]
    grid = (results / "tables" / "grid.tex").read_text("utf-8")
    assert r"R\&D\_<model> & english & real" in grid


def test_what_tex_reads_otherwise_is_escaped() -> None:
    assert escape(r"a_b & 50% \ {x} ~ ^ $ #") == (
        r"a\_b \& 50\% \textbackslash{} \{x\} \textasciitilde{} \textasciicircum{} \$ \#"
    )


def test_tables_hold_every_cell_layer_and_ep_size(results: Path, numbers: Numbers) -> None:
    rows = {table.name: table.rows for table in tables(View.of_folder(results))}
    assert len(rows["grid"]) == len(numbers.cells) == 8
    assert len(rows["layers"]) == sum(len(cell.layers) for cell in numbers.cells)
    assert len(rows["ep"]) == 8 * 2 * 4
    missing = [row for row in rows["ep"] if "not measurable" in row]
    assert {(row[0], row[3]) for row in missing} == {(PART, "16"), (PART, "32")}
    assert len(rows["ratios"]) == len(numbers.ratios)


def view_of(numbers: Numbers) -> View:
    return View(json.loads(json.dumps(_document(numbers))))


def _document(numbers: Numbers) -> dict[str, Any]:
    from dodoco_ext.observatory.grid.results import to_json

    found: dict[str, Any] = json.loads(to_json(numbers, {}))
    return found


def test_answers_are_the_numbers_of_the_model_asked_for(numbers: Numbers) -> None:
    view = view_of(numbers)
    concentration, mock, ep = answers(view, PART)
    cell = numbers.cell(PART, "english")
    assert concentration.question == "How concentrated is my model?"
    assert concentration.figure == f"{cell.experts.corrected_gini:.3f}"
    assert concentration.short == "Persistently concentrated"
    [ratio] = [r for r in numbers.ratios if r.model == PART and r.numerator_kind == "mock"]
    assert mock.figure == f"{ratio.corrected:.2f}×"
    assert mock.short == "Yes, it overestimates"
    assert "Published for other models: up to 2.35" in mock.text
    change = cell.ep_scan.arms[0].points[1].rank_change.relative
    assert ep.figure == f"{change:+.0%}"
    assert ep.short == "For ranks, yes"
    assert "by construction" in ep.text
    everything = answers(view)
    assert "1 persistently concentrated" in everything[0].short
    assert everything[1].short == "Yes, both ways"


def test_what_was_not_observed_is_said_and_not_shown_as_zero(numbers: Numbers) -> None:
    def only(*kinds: str) -> Numbers:
        kept = [c for c in numbers.cells if c.kind in kinds and c.model == WHOLE]
        return replace(
            numbers,
            models=numbers.models[:1],
            conditions=[c for c in numbers.conditions if c.kind in kinds],
            cells=kept,
            ratios=[],
            gaps=[],
            batch_scans=[],
        )

    concentration, mock, ep = answers(view_of(only("mock")))
    assert (concentration.short, concentration.figure) == ("Not observed", "–")
    assert (mock.short, mock.figure) == ("Not observed", "–")
    assert ep.figure != "–"
    real = only("real")
    real.cells[:] = [replace(cell, ep_scan=None) for cell in real.cells]
    _, mock, ep = answers(view_of(real))
    assert mock.short == "Not observed"
    assert ep.short == "Not measurable"
    page = render(view_of(real))
    assert "No mock stands beside a real text here." in page
    assert "There is no EP scan of this model." in page
    assert "No real text was observed, so there is no band." in render(view_of(only("mock")))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "grid.json").unlink(), "no grid.json in"),
        (lambda folder: (folder / "grid.json").write_text("{"), "is damaged"),
        (
            lambda folder: (folder / "grid.json").write_text(
                (folder / "grid.json").read_text().replace('"seed": 0', '"seed": 1', 1)
            ),
            "does not match its digest",
        ),
    ],
)
def test_what_cannot_be_reported_is_said_in_one_line(
    results: Path, capsys: pytest.CaptureFixture[str], spoil: Any, message: str
) -> None:
    spoil(results)
    assert cli.run(["report", str(results)]) == 1
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said


def test_a_folder_that_cannot_be_written_to_is_named(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.run(["report", str(results), "--out", str(tmp_path / "file" / "below")]) == 1
    assert "give another --out" in capsys.readouterr().err


def test_formats_of_the_command_are_those_that_are_written() -> None:
    from dodoco_ext.observatory.page import write

    assert write.FORMATS == FORMATS


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 0.4, [0.0, 0.1, 0.2, 0.3, 0.4]),
        (1.0, 5.3, [1, 2, 3, 4, 5]),
        (0.93, 1.21, [0.95, 1.0, 1.05, 1.1, 1.15, 1.2]),
        (-0.02, 0.03, [-0.02, -0.01, 0.0, 0.01, 0.02, 0.03]),
    ],
)
def test_ticks_are_round_and_within(low: float, high: float, wanted: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(wanted)
