"""The grid's figures for print, each as PNG and SVG; the same numbers give the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dodoco_ext.observatory import report
from dodoco_ext.observatory.bands import PUBLISHED
from dodoco_ext.observatory.ep_results import FIXED_GLOBAL, FIXED_PER_RANK
from dodoco_ext.observatory.page.heat import scale
from dodoco_ext.observatory.page.view import View, interval, number
from dodoco_ext.observatory.published import MOCK_OVER_REAL, MODELS, SOURCE
from dodoco_ext.observatory.whole import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#7f1200", "#ba8300", "#9b7af4", "#2e9eaa", "#282d7e", "#58253d")
"""Of conditions, as the page has them on white (templates/grid.css)."""

_MARKERS = ("o", "s", "^", "D", "v", "P")


def write_figures(view: View, folder: Path) -> list[Path]:
    """Writes `NAME.png` and `NAME.svg` of every figure that the grid holds numbers for.

    Args:
        view: The grid.
        folder: Created if missing.

    Raises:
        InputError: matplotlib is missing.
    """
    report.check_dependencies()
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    drawings: list[tuple[str, Callable[[View, Figure], bool]]] = [
        ("grid", _grid),
        ("bands", _bands),
        ("ratios", _ratios),
        ("ep", _ep),
        ("batch", _batch),
    ]
    with mpl.rc_context({"svg.hashsalt": view.digest, "font.size": 8, "svg.fonttype": "none"}):
        for name, draw in drawings:
            figure = Figure(layout="constrained")
            FigureCanvasAgg(figure)
            if not draw(view, figure):
                continue
            for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                path = folder / f"{name}.{ending}"
                with write_whole(path) as partial:
                    figure.savefig(partial, format=ending, dpi=160, metadata=metadata)
                paths.append(path)
    return paths


def _style(view: View, condition: str) -> dict[str, object]:
    place = view.colour(condition)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "label": condition,
    }


def _grid(view: View, figure: Figure) -> bool:
    from matplotlib.colors import ListedColormap

    names = view.names()
    table = np.full((len(view.models), len(names)), np.nan)
    for row, model in enumerate(view.models):
        for column, name in enumerate(names):
            cell = view.cell(model, name)
            if cell is not None:
                table[row, column] = number(cell["experts"]["corrected_gini"])
    figure.set_size_inches(2.2 + 1.1 * len(names), 1.4 + 0.4 * len(view.models))
    axes = figure.subplots()
    colours = ListedColormap([np.array(scale(i / 63)) / 255 for i in range(64)])
    image = axes.imshow(table, cmap=colours, aspect="auto")
    low, high = np.nanmin(table), np.nanmax(table)
    for (row, column), value in np.ndenumerate(table):
        if isfinite(value):
            dark = high > low and (value - low) / (high - low) < 0.5
            axes.text(
                column, row, f"{value:.3f}", ha="center", va="center", color="w" if dark else "k"
            )
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set_yticks(range(len(view.models)), view.models)
    figure.colorbar(image, ax=axes, label="corrected Gini")
    return True


def _bands(view: View, figure: Figure) -> bool:
    bands = view.bands()
    if not bands:
        return False
    figure.set_size_inches(6, 1.2 + 0.3 * (len(bands) + len(MODELS)))
    axes = figure.subplots()
    labels = []
    for row, band in enumerate(bands):
        axes.plot(band.lowest_interval, [row, row], color=COLOURS[4], linewidth=3)
        axes.plot([band.lowest], [row], "o", color=COLOURS[4])
        labels.append(f"{band.model}: {band.band}")
    right = max(0.4, *(band.lowest for band in bands)) * 1.05
    for row, model in enumerate(MODELS, start=len(bands)):
        low, high = model.lowest
        line = "-" if model.stated else ":"
        axes.plot([low, min(high, right)], [row, row], line, color="#555555", linewidth=2)
        labels.append(f"{model.mixer} (published): {model.band}")
    for edge in (PUBLISHED.resilient, PUBLISHED.concentrated):
        axes.axvline(edge, color="k", linestyle="--", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, right)
    axes.set_xlabel(f"lowest raw Gini on real text; grey: {SOURCE}, not run here")
    return True


def _ratios(view: View, figure: Figure) -> bool:
    ratios = [r for r in view.ratios() if isfinite(number(r["corrected"]))]
    if not ratios:
        return False
    figure.set_size_inches(6.5, 1.1 + 0.19 * len(ratios))
    axes = figure.subplots()
    for row, ratio in enumerate(ratios):
        style = _style(view, ratio["numerator"])
        ends = [v for v in interval(ratio["corrected_interval"]) if isfinite(v)]
        axes.plot(ends, [row] * len(ends), color=str(style["color"]), linewidth=2)
        axes.plot([number(ratio["corrected"])], [row], linestyle="", **style)  # type: ignore[arg-type]
        axes.plot([number(ratio["gini"])], [row], "o", mfc="none", mec="#777777")
    axes.axvline(1, color="k", linewidth=0.8)
    axes.axvline(MOCK_OVER_REAL, color="k", linestyle="--", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(
        range(len(ratios)), [f"{r['model']}: {r['numerator']} / {r['denominator']}" for r in ratios]
    )
    axes.invert_yaxis()
    axes.set_xlabel(
        f"ratio of Gini (filled: corrected, ring: raw); dashed: {MOCK_OVER_REAL}, {SOURCE}"
    )
    return True


def _ep(view: View, figure: Figure) -> bool:
    models = [m for m in view.models if any(key[0] == m for key in view.ep_scans)]
    if not models:
        return False
    figure.set_size_inches(2.6 * len(models) + 0.6, 6.4)
    grid = figure.subplots(3, len(models), squeeze=False)
    kinds = (("rank", FIXED_GLOBAL), ("rank", FIXED_PER_RANK), ("expert", FIXED_PER_RANK))
    for column, model in enumerate(models):
        for row, (what, name) in enumerate(kinds):
            axes: Axes = grid[row, column]
            _ep_axes(view, axes, model, what, name)
            if row == 0:
                axes.set_title(model)
            if column == 0:
                axes.set_ylabel(f"max/mean over {what}s\n{name.replace('_', ' ')} tokens")
    _legend(figure, grid[0, 0])
    return True


def _ep_axes(view: View, axes: Axes, model: str, what: str, name: str) -> None:
    drawn = False
    for condition in view.names():
        scan = view.ep_scans.get((model, condition))
        points = scan.arm(name).measured if scan else ()
        if not points:
            continue
        sizes = [p.num_ranks for p in points]
        axes.plot(sizes, [getattr(p, what).value for p in points], **_style(view, condition))  # type: ignore[arg-type]
        if not drawn:
            nulls = [getattr(p, what).null for p in points]
            axes.plot(sizes, nulls, "--", color="#777777", label="uniform routing")
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            drawn = True
    if not drawn:
        axes.text(0.5, 0.5, "not measurable", ha="center", transform=axes.transAxes)


def _batch(view: View, figure: Figure) -> bool:
    scans = view.numbers["batch_scans"]
    models = [m for m in view.models if any(scan["model"] == m for scan in scans)]
    if not models:
        return False
    figure.set_size_inches(2.6 * len(models) + 0.6, 4.6)
    grid = figure.subplots(2, len(models), squeeze=False)
    for column, model in enumerate(models):
        for row, name in enumerate(("growing", "equal")):
            axes: Axes = grid[row, column]
            for scan in (s for s in scans if s["model"] == model):
                curve, sizes = scan[name], scan["batch_sizes"]
                style = _style(view, scan["condition"])
                axes.plot(sizes, [number(v) for v in curve["corrected_gini"]], **style)  # type: ignore[arg-type]
                raw = [number(v) for v in curve["gini"]]
                axes.plot(sizes, raw, ":", color=str(style["color"]))
                null = [number(v) for v in curve["null_gini"]]
            axes.plot(sizes, null, "--", color="#777777", label="uniform routing")
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            if row == 0:
                axes.set_title(model)
            if column == 0:
                axes.set_ylabel(f"Gini, {name} token counts\n(dotted: raw)")
    _legend(figure, grid[0, 0])
    return True


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
