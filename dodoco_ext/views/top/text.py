"""A picture of the live view as lines of text: for `--once`, and the detail of a layer."""

from __future__ import annotations

from math import isfinite

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.cost_of_imbalance import cost_of
from dodoco_ext.views.tables import figure, plain, quantity
from dodoco_ext.views.top.columns import Layout, ordered
from dodoco_ext.views.top.figures import Row
from dodoco_ext.views.top.frame import Frame, percent

LAST_PASSES = 8
_PLAIN = str.maketrans("▁▂▃▄▅▆▇█", "_.:-=+*#")


def frame_lines(frame: Frame, width: int, sorted_by: int = 0) -> list[str]:
    """One picture, for a pipe."""
    if frame.waiting:
        return [frame.waiting, *frame.notes]
    layout = Layout.of(width, frame.rows)
    largest = layout.largest(frame.rows)
    lines = [frame.cost.text, f"({frame.cost.scope})" if frame.cost.scope else "", frame.status]
    lines += [*frame.notes, "", "".join(layout.titles(-1, reverse=False))]
    lines += ["".join(layout.cells(r, largest)) for r in ordered(frame.rows, sorted_by)]
    return [line.rstrip() for line in lines]


def without_blocks(text: str) -> str:
    """A text for a terminal that knows no block characters."""
    return text.translate(_PLAIN)


def detail_lines(frame: Frame, row: Row, width: int) -> list[str]:
    """All about one layer: figures, ranks, last passes, experts."""
    kind = f"top {row.top_k or '?'} of {row.num_experts} experts"
    total, unused = int(row.counts.sum()), int((row.counts == 0).sum())
    counted = f"{quantity(row.passes)} passes, {quantity(row.tokens)} tokens"
    gini, floor = figure(row.gini), figure(row.gini_floor)
    peak, null, high = (figure(x, 2) for x in (row.peak, row.peak_floor, row.peak_high))
    lines = [
        f"{plain(row.name)}: {kind}, {frame.span}",
        f"{counted}, {quantity(total)} assignments, {unused} experts unused",
        f"gini {gini} (uniform routing: {floor}), corrected {figure(row.gini_corrected)}",
        f"max/mean {peak} (uniform routing: {null}, 97.5 % below {high})",
        "",
        *_rank_lines(frame, row, width),
        *_pass_lines(frame, row),
        f"Experts, hottest first (mean {100 / row.num_experts:.2f} %)",
    ]
    order = np.argsort(-row.counts.astype(np.float64), kind="stable")
    return lines + _bars([f"{e:>6}" for e in order], row.counts[order], width)


def _rank_lines(frame: Frame, row: Row, width: int) -> list[str]:
    lines: list[str] = []
    if row.ranks > 1:
        how = "experts as placed" if row.placed else "contiguous placement assumed"
        how = "as recorded" if row.measured else how
        for number, loads in enumerate(row.loads):
            cost = cost_of(loads[None, :], row.num_experts, row.top_k)
            group = f", group {number}" if len(row.loads) > 1 else ""
            if not cost.steps:
                continue
            lines.append(f"Received by rank{group} ({how}): in sum {percent(cost.waiting)} waiting")
            lines += [*_bars([f"{r:>6}" for r in range(len(loads))], loads, width), ""]
    tokens = frame.rank_tokens or {}
    if len(tokens) > 1:
        values = np.array(list(tokens.values()), np.uint64)
        lines += ["Tokens routed by rank (all layers: of the one that saw most)"]
        lines += [*_bars([f"{r:>6}" for r in tokens], values, width), ""]
    return lines


def _pass_lines(frame: Frame, row: Row) -> list[str]:
    passes = frame.last_passes(row, LAST_PASSES)
    if not passes:
        return []
    lines = [
        f"{each.rank:>6} {each.iteration:>10} {each.tokens:>9}  {figure(each.gini)} "
        f"{figure(each.peak, 2):>9}"
        for each in passes
    ]
    return ["Last passes", "  rank  iteration    tokens   gini  max/mean", *lines, ""]


def _bars(names: list[str], counts: NDArray[np.uint64], width: int) -> list[str]:
    """One line a count: name, share, count, and a bar with a mark at the mean."""
    total, most = int(counts.sum()), int(counts.max(initial=0))
    room = max(min(width - 28, 60), 8)
    mean = total / len(counts) if len(counts) else 0.0
    at_mean = round(mean / most * room) if most else 0
    lines = []
    for name, count in zip(names, counts, strict=True):
        filled = round(int(count) / most * room) if most else 0
        bar = "█" * filled + " " * (room - filled)
        if 0 < at_mean < room and filled <= at_mean:
            bar = bar[:at_mean] + "|" + bar[at_mean + 1 :]
        percentage = 100 * int(count) / total if total else float("nan")
        shown = f"{percentage:.2f}%" if isfinite(percentage) else "-"
        lines.append(f"{name} {shown:>8} {quantity(int(count)):>9}  {bar}".rstrip())
    return lines
