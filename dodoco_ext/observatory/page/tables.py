"""The grid's numbers as tables of text, for the page and for LaTeX."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

from dodoco_ext.observatory.bands import BANDS
from dodoco_ext.observatory.page.view import View, interval, number


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: As a file's.
        title: For the reader.
        heads: One a column; those before `texts` are words, the others numbers.
        rows: Text.
        texts: Columns of words, from the left.
    """

    name: str
    title: str
    heads: list[str]
    rows: list[list[str]]
    texts: int


def tables(view: View) -> list[Table]:
    """All tables that hold a row."""
    found = (_cells(view), _layers(view), _ratios(view), _ep(view), _batch(view), _bands(view))
    return [table for table in found if table.rows]


def text(value: Any, digits: int = 3) -> str:
    """A number, or a dash."""
    found = number(value)
    return f"{found:.{digits}f}" if isfinite(found) else "–"


def spread(value: Any, digits: int = 3) -> str:
    """An interval, or a dash."""
    low, high = interval(value)
    return f"{low:.{digits}f} to {high:.{digits}f}" if isfinite(low) and isfinite(high) else "–"


_FIGURES = [
    "Gini",
    "null",
    "corrected",
    "95 %",
    "max/mean",
    "95 %",
    "null",
    "rank max/mean",
    "null",
]


def _figures(cell: dict[str, Any]) -> list[str]:
    experts, ranks = cell["experts"], cell["ranks"] or {}
    return [
        text(experts["gini"]),
        text(experts["null_gini"]),
        text(experts["corrected_gini"]),
        spread(experts["corrected_gini_interval"]),
        text(experts["max_over_mean"], 2),
        spread(experts["max_over_mean_interval"], 2),
        text(experts["null_max_over_mean"], 2),
        text(ranks.get("max_over_mean"), 2),
        text(ranks.get("null_max_over_mean"), 2),
    ]


def _cells(view: View) -> Table:
    rows = [
        [c["model"], c["condition"], c["kind"], *_figures(c), text(c["loss"], 2)]
        for c in view.cells
    ]
    return Table("grid", "every cell", ["model", "condition", "kind", *_FIGURES, "loss"], rows, 3)


def _layers(view: View) -> Table:
    rows = [
        [c["model"], c["condition"], str(index), *_figures(layer), str(layer["unused_experts"])]
        for c in view.cells
        for index, layer in enumerate(c["layers"])
    ]
    return Table(
        "layers", "every layer", ["model", "condition", "layer", *_FIGURES, "unused"], rows, 2
    )


def _ratios(view: View) -> Table:
    rows = [
        [
            r["model"],
            r["numerator"],
            r["denominator"],
            text(r["corrected"], 2),
            spread(r["corrected_interval"], 2),
            text(r["gini"], 2),
            spread(r["gini_interval"], 2),
            str(r["layers_above"]),
        ]
        for r in view.ratios()
    ]
    heads = ["model", "of", "over", "corrected", "95 %", "raw", "95 %", "layers above"]
    return Table("ratios", "mock and controls over real", heads, rows, 3)


def _ep(view: View) -> Table:
    heads = [
        "model",
        "condition",
        "arm",
        "EP",
        "experts",
        "null",
        "change",
        "ranks",
        "null",
        "change",
        "95 %",
    ]
    return Table("ep", "EP scan", [*heads, "at random", "95 %", "best"], [*_ep_rows(view)], 3)


def _ep_rows(view: View) -> Iterator[list[str]]:
    for (model, condition), scan in view.ep_scans.items():
        for arm in scan.arms:
            for point in arm.points:
                start = [model, condition, arm.name.replace("_", " "), str(point.num_ranks)]
                if point.expert is None or point.rank is None or point.random is None:
                    yield [*start, "not measurable", *["–"] * 9]
                    continue
                assert point.expert_change is not None
                assert point.rank_change is not None
                yield [
                    *start,
                    text(point.expert.value),
                    text(point.expert.null),
                    f"{point.expert_change.relative:+.1%}",
                    text(point.rank.value),
                    text(point.rank.null),
                    f"{point.rank_change.relative:+.1%}",
                    " to ".join(f"{end:+.1%}" for end in point.rank_change.interval),
                    text(point.random.mean),
                    spread(point.random.band),
                    text(point.random.best),
                ]


def _batch(view: View) -> Table:
    heads = ["model", "condition", "tokens", "batch", "raw", "95 %", "null", "corrected", "95 %"]
    rows = [
        [
            scan["model"],
            scan["condition"],
            name,
            str(size),
            text(curve["gini"][i]),
            spread(curve["gini_interval"][i]),
            text(curve["null_gini"][i]),
            text(curve["corrected_gini"][i]),
            spread(curve["corrected_gini_interval"][i]),
        ]
        for scan in view.numbers["batch_scans"]
        for name in ("growing", "equal")
        for curve in [scan[name]]
        for i, size in enumerate(scan["batch_sizes"])
    ]
    return Table("batch", "batch scan", heads, rows, 3)


def _bands(view: View) -> Table:
    rows = [
        [
            band.model,
            "corrected" if corrected else "raw",
            band.condition,
            band.band,
            text(band.lowest),
            spread(band.lowest_interval),
            *(f"{share:.0%}" for share in band.shares),
            text(band.margin),
        ]
        for corrected in (False, True)
        for band in view.bands(corrected)
    ]
    heads = ["model", "Gini", "lowest on", "band", "lowest", "95 %", *BANDS, "margin"]
    return Table("bands", "bands", heads, rows, 4)
