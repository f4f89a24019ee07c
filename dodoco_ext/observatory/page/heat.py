"""The grid as a heat map of numbers, and layer by expert maps."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.observatory import charts
from dodoco_ext.observatory.page.view import Data, View, interval, number

_ANCHORS = np.array(
    [(12, 35, 81), (62, 77, 110), (113, 115, 121), (167, 155, 112), (221, 199, 88), (254, 232, 70)],
    dtype=np.float64,
)
"""Dark to light, blue to yellow: lightness orders it in print, and no kind of colour blindness hides it."""


@dataclass(frozen=True)
class Metric:
    """A figure of the grid.

    Attributes:
        key, title: Its name in the page and for the reader.
        scope: `experts` or `ranks`.
        name: Of the figure in the cell.
        digits: Shown.
    """

    key: str
    title: str
    scope: str
    name: str
    digits: int


METRICS = (
    Metric("corrected", "corrected Gini", "experts", "corrected_gini", 3),
    Metric("gini", "raw Gini", "experts", "gini", 3),
    Metric("peak", "max/mean over experts", "experts", "max_over_mean", 2),
    Metric("ranks", "max/mean over ranks", "ranks", "max_over_mean", 2),
)


@dataclass(frozen=True)
class Square:
    """One cell of the heat map; `style` is CSS, empty where nothing was observed."""

    text: str
    tip: str
    style: str
    condition: str
    model: str


@dataclass(frozen=True)
class HeatMap:
    """One metric over the grid: a row a model."""

    metric: Metric
    rows: list[tuple[str, list[Square]]]
    low: str
    high: str


def heat_maps(view: View) -> list[HeatMap]:
    """The grid by each metric that was observed."""
    return [found for metric in METRICS if (found := _heat_map(view, metric)) is not None]


def _heat_map(view: View, metric: Metric) -> HeatMap | None:
    values = [v for c in view.cells if isfinite(v := _value(c, metric))]
    if not values:
        return None
    low, high = min(values), max(values)
    rows = [
        (model, [_square(view, model, name, metric, low, high) for name in view.names()])
        for model in view.models
    ]
    return HeatMap(metric, rows, f"{low:.{metric.digits}f}", f"{high:.{metric.digits}f}")


def _value(cell: Data | None, metric: Metric) -> float:
    figures = cell[metric.scope] if cell else None
    return number(figures[metric.name]) if figures else number(None)


def _square(
    view: View, model: str, condition: str, metric: Metric, low: float, high: float
) -> Square:
    cell = view.cell(model, condition)
    value = _value(cell, metric)
    if cell is None or not isfinite(value):
        return Square("–", f"{model}, {condition}: not observed", "", condition, model)
    rgb = scale((value - low) / (high - low) if high > low else 0.5)
    ink = "#000" if contrast(rgb, (0, 0, 0)) >= contrast(rgb, (255, 255, 255)) else "#fff"
    figures, digits = cell[metric.scope], metric.digits
    ends = interval(figures[f"{metric.name}_interval"])
    null = {"corrected_gini": 0.0, "gini": "null_gini", "max_over_mean": "null_max_over_mean"}[
        metric.name
    ]
    floor = number(figures[null]) if isinstance(null, str) else null
    tip = (
        f"{model}, {condition} ({cell['kind']}): {metric.title} {value:.{digits}f} "
        f"({ends[0]:.{digits}f} to {ends[1]:.{digits}f}); uniform routing {floor:.{digits}f}"
    )
    colour = ",".join(str(part) for part in rgb)
    return Square(
        f"{value:.{digits}f}", tip, f"background:rgb({colour});color:{ink}", condition, model
    )


def scale(share: float) -> tuple[int, int, int]:
    """Colour of a value between the lowest (0) and the highest (1)."""
    steps = np.arange(len(_ANCHORS))
    at = min(max(share, 0.0), 1.0) * steps[-1]
    red, green, blue = (round(float(np.interp(at, steps, _ANCHORS[:, i]))) for i in range(3))
    return red, green, blue


def contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Contrast ratio of two sRGB colours (WCAG 2.2), from 1 to 21."""
    lighter, darker = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(rgb: tuple[int, int, int]) -> float:
    parts = [c / 255 for c in rgb]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def gradient() -> str:
    """The scale as a CSS gradient."""
    stops = ", ".join(f"rgb{scale(i / 10)}" for i in range(11))
    return f"linear-gradient(90deg, {stops})"


def expert_maps(view: View, model: str) -> list[dict[str, Any]]:
    """Layer by expert pictures of a model's cells, experts ordered by load and by id."""
    cells = [c for name in view.names() if (c := view.cell(model, name)) is not None]
    reference = next((c for c in cells if c["kind"] == "real"), cells[0] if cells else None)
    if reference is None:
        return []
    order = [np.argsort(-np.array(layer["counts"]), kind="stable") for layer in reference["layers"]]
    return [
        {
            "cell": cell,
            "reference": reference["condition"],
            "order": [o.tolist() for o in order],
            "by_load": charts.png_uri(_map(cell, order)),
            "by_id": charts.png_uri(_map(cell, None)),
        }
        for cell in cells
    ]


def _map(cell: Data, order: list[NDArray[np.int64]] | None) -> charts.Rgb:
    rows = []
    for index, layer in enumerate(cell["layers"]):
        counts = np.array(layer["counts"], dtype=np.float64)
        share = counts * len(counts) / max(counts.sum(), 1.0)
        rows.append(charts.colours(share if order is None else share[order[index]]))
    return np.stack(rows)
