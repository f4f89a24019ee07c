"""Charts as SVG text: one panel with axes, lines, bands and markers, coloured by the page's own style."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import cos, isfinite, log2, pi, sin

Points = Sequence[tuple[float, float]]

MARKERS = ("circle", "square", "up", "diamond", "down", "cross")
"""One a condition, so that colour is never the only difference."""


def marker(shape: int, x: float, y: float, size: float = 4.5) -> str:
    """Path data of a marker around a point."""
    name = MARKERS[shape % len(MARKERS)]
    if name == "circle":
        return f"M{x - size:.1f} {y:.1f}a{size} {size} 0 1 0 {2 * size} 0a{size} {size} 0 1 0 {-2 * size} 0z"
    if name == "square":
        half = size * 0.9
        return f"M{x - half:.1f} {y - half:.1f}h{2 * half:.1f}v{2 * half:.1f}h{-2 * half:.1f}z"
    if name == "cross":
        arm = size * 0.4
        return (
            f"M{x - size:.1f} {y - arm:.1f}h{size - arm:.1f}v{arm - size:.1f}h{2 * arm:.1f}v{size - arm:.1f}"
            f"h{size - arm:.1f}v{2 * arm:.1f}h{arm - size:.1f}v{size - arm:.1f}h{-2 * arm:.1f}v{arm - size:.1f}"
            f"h{arm - size:.1f}z"
        )
    corners, turn = {"up": (3, -pi / 2), "diamond": (4, -pi / 2), "down": (3, pi / 2)}[name]
    at = [
        (
            x + 1.25 * size * cos(turn + 2 * pi * i / corners),
            y + 1.25 * size * sin(turn + 2 * pi * i / corners),
        )
        for i in range(corners)
    ]
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in at) + "z"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in a range, evenly spaced."""
    if not (isfinite(low) and isfinite(high)) or high <= low:
        return [low] if isfinite(low) else []
    for exponent in range(-6, 7):
        for first in (1, 2, 5):
            step = first * 10.0**exponent
            start = -int(-low // step) if low % step else int(low // step)
            count = int((high - start * step) / step + 1e-9) + 1
            if count <= most:
                return [round((start + i) * step, 9) for i in range(count)]
    return [low, high]


class Panel:
    """A chart with a categorical (powers of two) or linear x axis and a linear y axis.

    Args:
        title: Above it; also what a screen reader says.
        xs: Values on the x axis, each with a tick, spaced by their logarithm.
        y_range: Lowest and highest value on the y axis.
        x_title, y_title: Names of the axes.
    """

    width, height = 380, 270
    _left, _right, _top, _bottom = 46, 14, 40, 42

    def __init__(
        self,
        title: str,
        xs: Sequence[float],
        y_range: tuple[float, float],
        x_title: str,
        y_title: str,
    ) -> None:
        self.title, self._xs = title, [*xs]
        low, high = y_range
        pad = (high - low) * 0.06 or 0.1
        self._low, self._high = (low if low in (0.0, 1.0) else low - pad), high + pad
        self._parts: list[str] = []
        bottom = self.height - self._bottom
        for value in ticks(self._low, self._high):
            y = self.y(value)
            self._parts.append(
                f'<path class="grid" d="M{self._left} {y}H{self.width - self._right}"/>'
                f'<text class="tick end" x="{self._left - 6}" y="{y + 4:.1f}">{value:g}</text>'
            )
        for value in self._xs:
            self._parts.append(
                f'<text class="tick" x="{self.x(value)}" y="{bottom + 17}">{value:g}</text>'
            )
        middle = (self._left + self.width - self._right) / 2
        self._parts += [
            f'<text class="title" x="{self._left}" y="17">{escape(title)}</text>',
            f'<text class="tick" x="{middle}" y="{self.height - 8}">{escape(x_title)}</text>',
            (
                f'<text class="tick" transform="translate(13 {self._top + (bottom - self._top) / 2:.0f}) rotate(-90)">'
                f"{escape(y_title)}</text>"
            ),
        ]

    def x(self, value: float) -> float:
        """Place of a value on the x axis."""
        first, last = log2(self._xs[0]), log2(self._xs[-1])
        share = (log2(value) - first) / (last - first) if last > first else 0.5
        left, right = self._left + 14, self.width - self._right - 14
        return round(left + (right - left) * share, 1)

    def y(self, value: float) -> float:
        """Place of a value on the y axis."""
        bottom = self.height - self._bottom
        return round(
            bottom - (bottom - self._top) * (value - self._low) / (self._high - self._low), 1
        )

    def line(self, points: Points, css: str) -> None:
        """A line through the points that are known."""
        known = [(x, y) for x, y in points if isfinite(y)]
        if len(known) > 1:
            path = "L".join(f"{self.x(x)} {self.y(y)}" for x, y in known)
            self._parts.append(f'<path class="line {css}" d="M{path}"/>')

    def band(self, xs: Sequence[float], bounds: Points, css: str) -> None:
        """The area between the two ends of each interval that is known."""
        known = [
            (x, b) for x, b in zip(xs, bounds, strict=True) if isfinite(b[0]) and isfinite(b[1])
        ]
        if len(known) > 1:
            there = [f"{self.x(x)} {self.y(high)}" for x, (_, high) in known]
            back = [f"{self.x(x)} {self.y(low)}" for x, (low, _) in reversed(known)]
            self._parts.append(f'<path class="band {css}" d="M{"L".join(there + back)}z"/>')

    def dots(self, points: Points, shape: int, css: str, tips: Sequence[str]) -> None:
        """A marker and its text at each point that is known."""
        for (x, y), tip in zip(points, tips, strict=True):
            if isfinite(y):
                self._parts.append(
                    f'<path class="mark {css}" tabindex="0" data-tip="{escape(tip)}" '
                    f'd="{marker(shape, self.x(x), self.y(y))}"><title>{escape(tip)}</title></path>'
                )

    def note(self, text: str) -> None:
        """A line of text under the title."""
        self._parts.append(
            f'<text class="note" x="{self._left}" y="{self._top - 8}">{escape(text)}</text>'
        )

    def level(self, value: float, css: str, text: str) -> None:
        """A horizontal line with its name, where it is within the axis."""
        if self._low <= value <= self._high:
            y, right = self.y(value), self.width - self._right
            self._parts.append(
                f'<path class="level {css}" d="M{self._left} {y}H{right}"/>'
                f'<text class="note end {css}" x="{right}" y="{y - 4}">{escape(text)}</text>'
            )

    def __str__(self) -> str:
        """The whole SVG element."""
        return (
            f'<svg class="panel" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(self.title)}">{"".join(self._parts)}</svg>'
        )
