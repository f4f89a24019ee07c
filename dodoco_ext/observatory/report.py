"""The report: one page without any outside reference, one picture, and the numbers as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

from dodoco_ext.errors import InputError
from dodoco_ext.observatory import charts
from dodoco_ext.observatory.findings import findings, limits, verdict
from dodoco_ext.observatory.result import Interval, Result
from dodoco_ext.observatory.whole import write_whole

_TEMPLATE = "templates/report.html.j2"


@dataclass(frozen=True)
class ReportPaths:
    """Where a report was written.

    Attributes:
        html: The page.
        png: The picture.
        json: The numbers.
    """

    html: Path
    png: Path
    json: Path


def write_report(result: Result, out: Path) -> ReportPaths:
    """Writes `report.html`, `report.png` and `results.json`.

    Args:
        result: What was observed.
        out: Folder; created if missing.

    Raises:
        InputError: matplotlib or Jinja2 is missing.
    """
    check_dependencies()
    out.mkdir(parents=True, exist_ok=True)
    paths = ReportPaths(out / "report.html", out / "report.png", out / "results.json")
    result.write_json(paths.json)
    with write_whole(paths.png) as partial:
        charts.write_png(result, partial)
    with write_whole(paths.html) as partial:
        partial.write_text(render_html(result), encoding="utf-8")
    return paths


def check_dependencies() -> None:
    """Fails before minutes of work do.

    Raises:
        InputError: matplotlib or Jinja2 is missing.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"the report needs {error.name}: pip install 'dodoco-ext[report]'"
        ) from None


def render_html(result: Result) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(fixed=_fixed, interval=_interval, verdict=verdict)
    source = files("dodoco_ext.observatory").joinpath(_TEMPLATE).read_text("utf-8")
    order = charts.expert_order(result)
    reference = (result.of_kind("real") or result.conditions)[0]
    return environment.from_string(source).render(
        result=result,
        first=result.conditions[0],
        reference=reference,
        findings=findings(result),
        limits=limits(result),
        tiles=_tiles(result),
        gini_svg=charts.gini_svg(result),
        maps=[
            {
                "condition": condition,
                "by_load": charts.png_uri(charts.heat(condition, order)),
                "by_id": charts.png_uri(charts.heat(condition)),
            }
            for condition in result.conditions
        ],
        map_height=max(84, min(420, 26 * len(reference.layers))),
        legend=legend(),
        ends=round(2**charts.DOUBLINGS),
        hover=_hover_data(result, order),
    )


def _tiles(result: Result) -> list[tuple[str, str, str]]:
    """Headline figures: value, label, note."""
    tiles = []
    ratio = next((r for r in result.ratios if isfinite(r.corrected)), None)
    if ratio is not None:
        note = f"95 % interval {_interval(ratio.corrected_interval, 2)}"
        label = f"{ratio.numerator} over {ratio.denominator}, corrected Gini"
        tiles.append((f"{ratio.corrected:.2f}×", label, note))
    for real in result.of_kind("real")[:2]:
        note = f"95 % interval {_interval(real.overall.corrected_gini_interval, 3)}"
        tiles.append((f"{real.overall.corrected_gini:.3f}", f"corrected Gini of {real.name}", note))
    first = result.conditions[0]
    tokens = result.batch_size * first.sequence_length
    floor = f"{first.overall.null_gini:.3f}"
    tiles.append((floor, "null floor of Gini", f"uniform routing, {tokens:,} tokens a pass"))
    return tiles


def legend() -> str:
    """The colour scale of expert maps as a CSS gradient."""
    import numpy as np

    scale = charts.colours(np.geomspace(2.0**-charts.DOUBLINGS, 2.0**charts.DOUBLINGS, 13))
    stops = ", ".join(f"rgb({r},{g},{b})" for r, g, b in scale.tolist())
    return f"linear-gradient(90deg, {stops})"


def _hover_data(result: Result, order: list[Any]) -> str:
    """Counts and expert order for the page's script; `</` cannot occur in these numbers."""
    counts = [[layer.counts for layer in c.layers] for c in result.conditions]
    return json.dumps(
        {"counts": counts, "order": [o.tolist() for o in order]}, separators=(",", ":")
    )


def _fixed(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isfinite(value) else "–"


def _interval(interval: Interval, digits: int = 3) -> str:
    return f"{_fixed(interval[0], digits)} to {_fixed(interval[1], digits)}"
