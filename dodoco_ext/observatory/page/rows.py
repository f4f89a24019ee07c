"""Charts of one row a figure: bands, ratios of mock over real, and what explains their gap."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import isfinite, log

from dodoco_ext.observatory.bands import PUBLISHED, BandResult
from dodoco_ext.observatory.page.svg import marker, ticks
from dodoco_ext.observatory.page.view import Data, View, interval, number
from dodoco_ext.observatory.published import MOCK_OVER_REAL, MODELS, SOURCE


class Rows:
    """Rows under each other, label above mark, on one x axis.

    Args:
        title: What a screen reader says.
        x_range: Ends of the axis.
        x_title: Its name.
        logarithmic: Ratios are spaced by their logarithm.
    """

    width = 400
    _left, _right, _row = 8, 12, 40

    def __init__(
        self, title: str, x_range: tuple[float, float], x_title: str, logarithmic: bool = False
    ) -> None:
        self._title, self._x_title, self._log = title, x_title, logarithmic
        low, high = x_range
        pad = 1.06 if logarithmic else (high - low) * 0.04
        self._low, self._high = (low / pad, high * pad) if logarithmic else (low, high + pad)
        self._levels: list[tuple[float, str, str]] = []
        self._parts: list[str] = []
        self._count = 0

    def x(self, value: float) -> float:
        """Place of a value."""
        value = min(max(value, self._low), self._high)
        low, high, at = (
            (log(v) for v in (self._low, self._high, value))
            if self._log
            else (self._low, self._high, value)
        )
        return round(
            self._left + (self.width - self._left - self._right) * (at - low) / (high - low), 1
        )

    def level(self, value: float, css: str, text: str) -> None:
        """A vertical line through all rows, named at the top."""
        if self._low <= value <= self._high:
            self._levels.append((value, css, text))

    def row(
        self,
        label: str,
        value: float,
        bounds: tuple[float, float],
        css: str,
        tip: str,
        shape: int = 0,
        also: float | None = None,
    ) -> None:
        """A marker with its interval, and a hollow one for another reading of the same."""
        y = self._top(label)
        if not isfinite(value):
            return
        low, high = (v if isfinite(v) else value for v in bounds)
        self._parts.append(f'<path class="whisker {css}" d="M{self.x(low)} {y}H{self.x(high)}"/>')
        if also is not None and isfinite(also):
            self._parts.append(f'<path class="hollow" d="{marker(shape, self.x(also), y, 6)}"/>')
        self._parts.append(
            f'<path class="mark {css}" tabindex="0" data-tip="{escape(tip)}" d="{marker(shape, self.x(value), y, 5)}">'
            f"<title>{escape(tip)}</title></path>"
        )

    def bar(self, label: str, low: float, high: float, css: str, tip: str) -> None:
        """A bar between two ends."""
        y = self._top(label)
        left, right = sorted((self.x(low), self.x(high)))
        self._parts.append(
            f'<path class="bar {css}" tabindex="0" data-tip="{escape(tip)}" '
            f'd="M{left} {y - 6}H{right}V{y + 6}H{left}z">'
            f"<title>{escape(tip)}</title></path>"
        )

    def _top(self, label: str) -> float:
        y = 30 + self._row * self._count + 24
        self._count += 1
        self._parts.append(
            f'<text class="label" x="{self._left}" y="{y - 10}">{escape(label)}</text>'
        )
        return y

    def __str__(self) -> str:
        """The whole SVG element."""
        bottom = 30 + self._row * self._count
        axis = [
            (
                f'<path class="grid" d="M{self.x(value)} 26V{bottom}"/>'
                f'<text class="tick" x="{self.x(value)}" y="{bottom + 16}">{value:g}</text>'
            )
            for value in ticks(self._low, self._high, 7)
        ]
        for value, css, text in self._levels:
            left = css in ("one", "edge low") or self.x(value) > self.width * 0.66
            side = "end" if left else ""
            offset = -4 if side else 4
            axis.append(
                f'<path class="level {css}" data-level="{value}" d="M{self.x(value)} 12V{bottom}"/>'
                f'<text class="note {side} {css}" x="{self.x(value) + offset}" y="20">{escape(text)}</text>'
            )
        return (
            f'<svg class="rows" viewBox="0 0 {self.width} {bottom + 38}" role="img" '
            f'aria-label="{escape(self._title)}" data-low="{self._low}" data-high="{self._high}" '
            f'data-left="{self._left}" data-right="{self.width - self._right}">'
            f"{''.join(axis)}{''.join(self._parts)}"
            f'<text class="tick" x="{self.width / 2}" y="{bottom + 34}">{escape(self._x_title)}</text></svg>'
        )


def bands_chart(view: View, bands: Sequence[BandResult], corrected: bool) -> Rows:
    """Lowest Gini on real text of each model, between the edges, and what was published of others."""
    highest = max([0.4, *(b.lowest_interval[1] for b in bands if isfinite(b.lowest_interval[1]))])
    kind = "corrected" if corrected else "raw"
    chart = Rows(
        "Bands", (0.0, highest), f"lowest Gini on real text ({kind}; published: as published)"
    )
    chart.level(PUBLISHED.resilient, "edge low", "resilient up to here")
    chart.level(PUBLISHED.concentrated, "edge high", "concentrated above")
    for band in bands:
        low, high = band.lowest_interval
        chart.row(
            f"{band.model}: {band.lowest:.3f} on {band.condition}",
            band.lowest,
            band.lowest_interval,
            "own",
            f"{band.model}: {band.lowest:.3f} ({low:.3f} to {high:.3f}), {band.band}",
        )
    for model in MODELS:
        low, high = model.lowest
        chart.bar(
            f"{model.mixer}, published: {model.short}",
            low,
            min(high, highest),
            "published" if model.stated else "published unstated",
            f"{model.checkpoint} ({SOURCE}, not run here): {model.says}; {model.band}",
        )
    return chart


def ratio_chart(view: View, model: str) -> Rows | None:
    """Mocks and controls over each real text."""
    ratios = [r for r in view.ratios(model) if isfinite(number(r["corrected"]))]
    if not ratios:
        return None
    ends = [
        v
        for r in ratios
        for v in (*interval(r["corrected_interval"]), number(r["gini"]))
        if isfinite(v) and v > 0
    ]
    chart = Rows(
        f"Mock over real, {model}",
        (min(0.8, *ends), max(MOCK_OVER_REAL * 1.05, *ends)),
        "ratio of Gini (filled: corrected, hollow: raw)",
        logarithmic=True,
    )
    chart.level(1.0, "one", "real text")
    chart.level(MOCK_OVER_REAL, "published", f"published: up to {MOCK_OVER_REAL}")
    for ratio in ratios:
        low, high = interval(ratio["corrected_interval"])
        place = view.colour(ratio["numerator"])
        chart.row(
            f"{ratio['numerator']} / {ratio['denominator']}",
            number(ratio["corrected"]),
            (low, high),
            f"c{place % 6} s{place}",
            f"{ratio['numerator']} over {ratio['denominator']}: corrected {number(ratio['corrected']):.2f} "
            f"({low:.2f} to {high:.2f}), raw {number(ratio['gini']):.2f}",
            place,
            number(ratio["gini"]),
        )
    return chart


def gap_chart(gap: Data) -> Rows:
    """From mock to a real text step by step; each bar starts where the last one ended."""
    steps = gap["steps"]
    at = [0.0]
    for step in steps:
        at.append(at[-1] + number(step["difference"]))
    chart = Rows(
        f"From {gap['mock']} to {gap['real']}",
        (min(at), max(*at, 1e-3)),
        "corrected Gini explained, from the mock's (0)",
    )
    chart.level(0.0, "one", "")
    for step, start, end in zip(steps, at, at[1:], strict=False):
        low, high = interval(step["difference_interval"])
        share = number(step["share"])
        part = f", {share:.0%} of the gap" if isfinite(share) else ""
        css = "falls" if end >= start else "rises"
        chart.bar(
            f"{step['what']}: {-number(step['difference']):+.3f}",
            start,
            end,
            css,
            f"{step['start']} to {step['end']}: corrected Gini {-number(step['difference']):+.3f} "
            f"({-high:+.3f} to {-low:+.3f}){part}",
        )
    return chart
