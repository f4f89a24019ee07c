"""Mock against real: ratios, and which property of the text explains the difference."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from dodoco_ext.intervals import expanded_interval
from dodoco_ext.observatory.grid.figures import Analysed
from dodoco_ext.observatory.grid.passes import FloatArray
from dodoco_ext.observatory.grid.results import Gap, GridRatio, Step
from dodoco_ext.observatory.result import Interval

UNIFORM = "mock-uniform"
NAN = float("nan")


def ratios(cells: Sequence[Analysed]) -> list[GridRatio]:
    """Every mock and control of a model over every real condition of it.

    Args:
        cells: All of one model.
    """
    real = [a for a in cells if a.cell.kind == "real"]
    return [_ratio(a, b) for a in cells if a.cell.kind != "real" for b in real]


def gaps(cells: Sequence[Analysed]) -> list[Gap]:
    """From mock-uniform to every real condition of a model; none without mock-uniform.

    The steps lead by way of the controls that are made of the text's own tokens: its frequencies
    (mock-unigram:X), then which of them stand together (shuffled:X), then their order (X itself).
    mock-repeat, which has nothing of any text, is a control of every one.

    Args:
        cells: All of one model.
    """
    mock = next((a for a in cells if a.cell.source == UNIFORM), None)
    if mock is None:
        return []
    return [_gap(mock, a, cells) for a in cells if a.cell.kind == "real"]


def _ratio(above: Analysed, below: Analysed) -> GridRatio:
    num_passes = min(above.resampled.num_passes, below.resampled.num_passes)

    def interval(top: FloatArray, bottom: FloatArray) -> Interval:
        found = np.divide(top, bottom, out=np.full(len(top), np.inf), where=bottom > 0)
        return _pair(expanded_interval(found, num_passes))

    a, b = above.cell, below.cell
    return GridRatio(
        model=a.model,
        numerator=a.condition,
        denominator=b.condition,
        numerator_kind=a.kind,
        gini=_over(a.experts.gini, b.experts.gini),
        gini_interval=interval(above.resampled.gini, below.resampled.gini),
        corrected=_over(a.experts.corrected_gini, b.experts.corrected_gini),
        corrected_interval=interval(above.resampled.corrected, below.resampled.corrected),
        layers_above=sum(
            x.experts.corrected_gini > y.experts.corrected_gini
            for x, y in zip(a.layers, b.layers, strict=True)
        ),
    )


def _gap(mock: Analysed, real: Analysed, cells: Sequence[Analysed]) -> Gap:
    text = real.cell.source
    path = [(mock, "")]
    for prefix, what in (("mock-unigram", "token frequencies"), ("shuffled", "co-occurrence")):
        found = next((a for a in cells if a.cell.source == f"{prefix}:{text}"), None)
        if found is not None:
            path.append((found, what))
    # A control left out leaves its part to the next step.
    left = {1: "all of the text", 2: "co-occurrence and order", 3: "order"}[len(path)]
    if [what for _, what in path] == ["", "co-occurrence"]:
        path[1] = (path[1][0], "token frequencies and co-occurrence")
        left = "order"
    path.append((real, left))
    whole = mock.resampled.corrected - real.resampled.corrected
    difference, interval = _difference(mock, real)
    known = interval[0] > 0 or interval[1] < 0

    def step(start: Analysed, end: Analysed, what: str) -> Step:
        value, ends = _difference(start, end)
        share, share_ends = NAN, (NAN, NAN)
        if known:
            part = start.resampled.corrected - end.resampled.corrected
            share = value / difference
            share_ends = _pair(expanded_interval(part / whole, _passes(start, end, mock, real)))
        return Step(start.cell.condition, end.cell.condition, what, value, ends, share, share_ends)

    repeats = [a for a in cells if a.cell.source.startswith("mock-repeat")]
    controls = [a for a, _ in path[1:-1]] + repeats
    return Gap(
        model=mock.cell.model,
        mock=mock.cell.condition,
        real=real.cell.condition,
        difference=difference,
        difference_interval=interval,
        controls=[step(mock, a, "all that the control shares with the text") for a in controls],
        steps=[step(a, b, what) for (a, _), (b, what) in pairwise(path)],
    )


def _difference(a: Analysed, b: Analysed) -> tuple[float, Interval]:
    found = a.resampled.corrected - b.resampled.corrected
    value = a.cell.experts.corrected_gini - b.cell.experts.corrected_gini
    return value, _pair(expanded_interval(found, _passes(a, b)))


def _passes(*cells: Analysed) -> int:
    return min(a.resampled.num_passes for a in cells)


def _over(above: float, below: float) -> float:
    return above / below if below > 0 else NAN


def _pair(ends: FloatArray) -> Interval:
    return float(ends[0]), float(ends[1])
