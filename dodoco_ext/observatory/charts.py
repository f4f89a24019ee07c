"""Pictures of a result: heat maps and the Gini chart, as SVG for the page and as one PNG."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.observatory.result import ConditionResult, LayerResult, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rgb = NDArray[np.uint8]

DOUBLINGS = 3.0
"""The colour scale ends at 2**-DOUBLINGS and 2**DOUBLINGS times the uniform share."""

UNUSED = (24, 24, 27)
"""Colour of an expert without any assignment."""

_ANCHORS = np.array(
    [
        (33, 71, 145),
        (73, 127, 190),
        (154, 195, 222),
        (244, 244, 240),
        (246, 189, 132),
        (222, 115, 51),
        (157, 42, 18),
    ],
    dtype=np.float64,
)


def share_of_uniform(layer: LayerResult) -> NDArray[np.float64]:
    """Each expert's share of the layer's assignments over the uniform share 1 / E [E]."""
    counts = np.array(layer.counts, dtype=np.float64)
    share: NDArray[np.float64] = counts * len(counts) / max(counts.sum(), 1.0)
    return share


def colours(share: NDArray[np.float64]) -> Rgb:
    """Colours of shares relative to uniform, logarithmic and diverging around 1; `UNUSED` for 0 [..., 3]."""
    position = np.log2(np.where(share > 0, share, 1.0)) / (2 * DOUBLINGS) + 0.5
    position = np.clip(position, 0, 1) * (len(_ANCHORS) - 1)
    steps = np.arange(len(_ANCHORS))
    rgb = np.stack([np.interp(position, steps, _ANCHORS[:, c]) for c in range(3)], axis=-1)
    rgb[share == 0] = UNUSED
    return rgb.round().astype(np.uint8)


def expert_order(result: Result) -> list[NDArray[np.int64]]:
    """Experts of each layer by falling load under the first real condition, else the first one."""
    reference = (result.of_kind("real") or result.conditions)[0]
    return [np.argsort(-np.array(x.counts), kind="stable") for x in reference.layers]


def heat(condition: ConditionResult, order: list[NDArray[np.int64]] | None = None) -> Rgb:
    """One pixel an expert, one row a layer [layers, experts, 3]; shorter layers are padded with white."""
    width = max(layer.num_experts for layer in condition.layers)
    image = np.full((len(condition.layers), width, 3), 255, dtype=np.uint8)
    for row, layer in enumerate(condition.layers):
        share = share_of_uniform(layer)
        image[row, : len(share)] = colours(share if order is None else share[order[row]])
    return image


def png_uri(image: Rgb) -> str:
    """An 8-bit RGB image [height, width, 3] as a data URI (PNG, ISO/IEC 15948)."""
    height, width, _ = image.shape
    rows = b"".join(b"\0" + image[y].tobytes() for y in range(height))

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9))
    return "data:image/png;base64," + base64.b64encode(data + chunk(b"IEND", b"")).decode()


def gini_svg(result: Result) -> str:
    """Dot chart of the conditions: null floor, raw and corrected Gini of each layer and overall, interval."""
    row, left, width, top = 46, 170, 760, 8
    height = top + row * len(result.conditions) + 44
    most = max(max(x.gini for x in c.layers) for c in result.conditions)
    limit = max(0.2, math.ceil(most * 10 + 0.3) / 10)
    bottom = top + row * len(result.conditions)

    def x(value: float) -> float:
        return round(left + (width - left - 20) * value / limit, 1)

    parts = []
    for tick in np.arange(0, limit + 1e-9, 0.1 if limit <= 1 else 0.2):
        parts.append(f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x(tick)}" y="{bottom + 18}">{tick:.1f}</text>')
    middle = (left + width - 20) / 2
    parts.append(
        f'<text class="tick" x="{middle}" y="{bottom + 38}">Gini (0: every expert alike)</text>'
    )
    for index, condition in enumerate(result.conditions):
        parts += _gini_row(condition, top + row * index + row / 2, left, x)
    label = "Gini of every condition: null floor, raw, corrected with interval"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )


def _gini_row(
    condition: ConditionResult, y: float, left: int, x: Callable[[float], float]
) -> list[str]:
    overall, kind = condition.overall, condition.kind
    low, high = overall.corrected_gini_interval
    corrected = f"corrected {overall.corrected_gini:.3f} ({low:.3f} to {high:.3f})"
    layers = [
        _dot(
            f"layer {kind}",
            x(layer.corrected_gini),
            y,
            3.5,
            f"layer {number}: {layer.corrected_gini:.3f}",
        )
        for number, layer in enumerate(condition.layers)
    ]
    return [
        f'<text class="name" x="{left - 14}" y="{y - 1}">{escape(condition.name)}</text>',
        f'<text class="kind {kind}" x="{left - 14}" y="{y + 14}">{kind}</text>',
        f'<line class="axis" x1="{x(0)}" x2="{x(max(overall.gini, high))}" y1="{y}" y2="{y}"/>',
        f'<path class="floor" d="M{x(overall.null_gini)} {y - 14}v28"/>',
        *layers,
        _dot("raw", x(overall.gini), y, 7, f"raw {overall.gini:.3f}"),
        f'<line class="interval {kind}" x1="{x(low)}" x2="{x(high)}" y1="{y}" y2="{y}"/>',
        _dot(f"dot {kind}", x(overall.corrected_gini), y, 5.5, corrected),
    ]


def _dot(classes: str, x: float, y: float, radius: float, title: str) -> str:
    return (
        f'<circle class="{classes}" cx="{x}" cy="{y}" r="{radius}"><title>{title}</title></circle>'
    )


def write_png(result: Result, path: Path) -> None:
    """Heat maps of all conditions and the Gini chart in one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure

    count = len(result.conditions)
    rows = (count + 1) // 2
    deep = len(result.conditions[0].layers) > 12
    figure = Figure(
        figsize=(13, (3.0 if deep else 1.75) * rows + 0.45 * count + 1.6), layout="constrained"
    )
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows + 1, 2, height_ratios=[1.0] * rows + [0.36 * count])
    order = expert_order(result)
    axes = []
    for index, condition in enumerate(result.conditions):
        axis = figure.add_subplot(grid[index // 2, index % 2])
        axis.imshow(heat(condition, order), aspect="auto", interpolation="nearest")
        axis.set_title(f"{condition.name} ({condition.kind})", loc="left", fontsize=10)
        axis.set_ylabel("layer", fontsize=8)
        if not deep:
            axis.set_yticks(range(len(condition.layers)))
        axis.set_xticks([])
        axis.tick_params(labelsize=8)
        axes.append(axis)
    reference = (result.of_kind("real") or result.conditions)[0].name
    for axis in axes[-2:]:
        axis.set_xlabel(f"experts, in each layer by their load under {reference}", fontsize=8)
    ends = 2.0**DOUBLINGS
    scale = np.geomspace(1 / ends, ends, 256)
    mappable = ScalarMappable(LogNorm(1 / ends, ends), ListedColormap(colours(scale) / 255.0))
    bar = figure.colorbar(
        mappable, ax=axes, shrink=0.7, pad=0.01, ticks=[1 / ends, 0.5, 1, 2, ends]
    )
    bar.ax.set_yticklabels([f"1/{ends:.0f}", "1/2", "1", "2", f"{ends:.0f}"], fontsize=8)
    bar.ax.minorticks_off()
    bar.set_label("share of assignments / uniform share (black: unused)", fontsize=8)
    _draw_gini(figure.add_subplot(grid[rows, :]), result)
    figure.suptitle(f"Routing of {result.model.name} under {count} data conditions", fontsize=12)
    canvas.print_png(path, metadata={"Software": None})  # type: ignore[no-untyped-call]


_KIND_COLOURS = {"mock": "#c2410c", "control": "#7c5cbf", "real": "#0f766e"}


def _draw_gini(axis: Axes, result: Result) -> None:
    for index, condition in enumerate(result.conditions):
        colour = _KIND_COLOURS[condition.kind]
        overall = condition.overall
        layers = [layer.corrected_gini for layer in condition.layers]
        axis.plot(layers, [index] * len(layers), ".", color=colour, alpha=0.45)
        axis.plot(overall.corrected_gini_interval, [index, index], color=colour, linewidth=3)
        axis.plot([overall.corrected_gini], [index], "o", color=colour, label="corrected, overall")
        axis.plot([overall.gini], [index], "o", mfc="none", mec="#555555", markersize=10)
        axis.plot([overall.null_gini], [index], "|", color="#555555", markersize=16)
    axis.set_yticks(range(len(result.conditions)), [c.name for c in result.conditions], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel(
        "Gini of a pass: corrected with 95 % interval (filled), its layers (small), raw (ring), null floor (bar)",
        fontsize=8,
    )
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
