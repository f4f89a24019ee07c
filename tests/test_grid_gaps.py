"""Mock against real: ratios, and steps that add up to the gap."""

from __future__ import annotations

import numpy as np
import pytest

from dodoco_ext.observatory.grid.figures import Analysed, analyse
from dodoco_ext.observatory.grid.gaps import gaps, ratios
from grid_cases import EXPERTS, planted

SKEW = np.linspace(0, 1, EXPERTS)
KINDS = {
    "mock-uniform": ("mock", 3.0),
    "mock-unigram:a": ("mock", 1.5),
    "shuffled:a": ("control", 1.2),
    "a": ("real", 1.0),
    "b": ("real", 2.0),
}


def analysed(*sources: str) -> list[Analysed]:
    """Cells of routers of known skew, by source."""
    found = []
    for source in sources:
        kind, skew = KINDS[source]
        cell = planted(SKEW * skew, name=source, source=source, kind=kind)
        found.append(analyse(cell, f"{source}.npz", 4, 8, 0))
    return found


@pytest.fixture(scope="module")
def cells() -> list[Analysed]:
    return analysed(*KINDS)


def test_every_mock_and_control_stands_over_every_text(cells: list[Analysed]) -> None:
    found = ratios(cells)
    assert {(r.numerator, r.denominator) for r in found} == {
        (a, b) for a in ("mock-uniform", "mock-unigram:a", "shuffled:a") for b in ("a", "b")
    }
    uniform = next(r for r in found if (r.numerator, r.denominator) == ("mock-uniform", "a"))
    by_name = {a.cell.condition: a.cell.experts for a in cells}
    assert uniform.gini == by_name["mock-uniform"].gini / by_name["a"].gini
    assert uniform.corrected > uniform.gini, "the floor pulls raw ratios towards 1"
    assert uniform.corrected_interval[0] < uniform.corrected < uniform.corrected_interval[1]
    assert uniform.layers_above == 2


def test_steps_add_up_to_the_gap(cells: list[Analysed]) -> None:
    gap = gaps(cells)[0]
    assert [(s.start, s.end) for s in gap.steps] == [
        ("mock-uniform", "mock-unigram:a"),
        ("mock-unigram:a", "shuffled:a"),
        ("shuffled:a", "a"),
    ]
    assert [s.what for s in gap.steps] == ["token frequencies", "co-occurrence", "order"]
    assert sum(s.difference for s in gap.steps) == pytest.approx(gap.difference)
    assert sum(s.share for s in gap.steps) == pytest.approx(1)
    assert gap.steps[0].share > 0.6
    assert gap.difference_interval[0] > 0


def test_a_text_without_controls_of_its_own_has_one_step(cells: list[Analysed]) -> None:
    gap = gaps(cells)[1]
    assert gap.real == "b"
    assert gap.controls == []
    assert [s.what for s in gap.steps] == ["all of the text"]


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ("mock-unigram:a", ["token frequencies", "co-occurrence and order"]),
        ("shuffled:a", ["token frequencies and co-occurrence", "order"]),
    ],
)
def test_a_control_left_out_leaves_its_part_to_its_neighbour(
    control: str, expected: list[str]
) -> None:
    gap = gaps(analysed("mock-uniform", control, "a"))[0]
    assert [s.what for s in gap.steps] == expected
    assert [s.end for s in gap.controls] == [control]


def test_a_gap_that_is_none_has_no_shares() -> None:
    same = [
        analyse(planted(SKEW, name=s, source=s, kind=k), "f", 4, 8, 0)
        for s, k in (("mock-uniform", "mock"), ("a", "real"))
    ]
    gap = gaps(same)[0]
    assert gap.difference == 0
    assert np.isnan(gap.steps[0].share)


def test_without_uniform_mock_there_is_no_gap() -> None:
    assert gaps(analysed("mock-unigram:a", "a")) == []


def test_a_repeated_token_is_a_control_of_every_text() -> None:
    cells = analysed("mock-uniform", "a", "b")
    repeat = planted(SKEW * 4, name="repeated", source="mock-repeat", kind="mock")
    found = gaps([*cells, analyse(repeat, "f", 4, 8, 0)])
    assert [[s.end for s in gap.controls] for gap in found] == [["repeated"], ["repeated"]]
    assert all(len(gap.steps) == 1 for gap in found)
