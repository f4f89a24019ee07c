"""Curves of a model: imbalance against EP size and against batch size, every one beside its null."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from dodoco_ext.observatory.ep_results import FIXED_GLOBAL, FIXED_PER_RANK, EpArm, EpPoint
from dodoco_ext.observatory.page.svg import Panel, marker
from dodoco_ext.observatory.page.view import View, interval, number
from dodoco_ext.observatory.published import EP_CHANGE

COLOURS = 6
"""Colours that the page has for conditions; more of them share colours and differ by marker and dash."""

_ARMS = {FIXED_GLOBAL: "same tokens a pass", FIXED_PER_RANK: "same tokens a rank"}


def css(place: int) -> str:
    """Class of a condition's marks."""
    return f"c{place % COLOURS} s{place}" + (" more" if place >= COLOURS else "")


def ep_panels(view: View, model: str) -> list[Panel]:
    """Ranks, then experts, in both arms."""
    return [
        panel
        for what in ("rank", "expert")
        for arm in _ARMS
        if (panel := _ep_panel(view, model, arm, what)) is not None
    ]


def _ep_panel(view: View, model: str, name: str, what: str) -> Panel | None:
    arms = {
        condition: view.ep_scans[model, condition].arm(name)
        for condition in view.names()
        if (model, condition) in view.ep_scans
    }
    arms = {condition: arm for condition, arm in arms.items() if arm.measured}
    if not arms:
        return None
    sizes = [point.num_ranks for point in next(iter(arms.values())).points]
    points_of = [point for arm in arms.values() for point in arm.measured]
    highest = max(getattr(point, what).value for point in points_of)
    if what == "rank":
        highest = max(highest, *(p.random.band[1] for p in points_of if p.random is not None))
    title = f"max/mean over {what}s, {_ARMS[name]}"
    panel = Panel(title, sizes, (1.0, highest), "EP ranks", "max/mean")
    first = next(iter(arms.values()))
    nulls = [(p.num_ranks, getattr(p, what)) for p in first.measured]
    panel.band([x for x, _ in nulls], [peak.null_band for _, peak in nulls], "null")
    panel.line([(x, peak.null) for x, peak in nulls], "null")
    for condition, arm in arms.items():
        place = view.colour(condition)
        if what == "rank":
            known = [(p.num_ranks, p.random.band) for p in arm.measured if p.random is not None]
            panel.band([x for x, _ in known], [band for _, band in known], f"random {css(place)}")
        elif name == FIXED_PER_RANK:
            first_value = getattr(arm.measured[0], what).value
            ends = (first_value * (1 - EP_CHANGE), first_value * (1 + EP_CHANGE))
            measured = [p.num_ranks for p in arm.measured]
            panel.band(measured, [ends] * len(measured), f"published random {css(place)}")
        points = [(p.num_ranks, getattr(p, what).value) for p in arm.measured]
        panel.line(points, css(place))
        panel.dots(points, place, css(place), [_ep_tip(condition, p, what) for p in arm.measured])
    missing = [str(p.num_ranks) for p in first.points if p.reason]
    if what == "expert" and missing:
        panel.note(f"not measurable at EP {', '.join(missing)}")
    elif what == "expert" and all(arm.expert_by_construction for arm in arms.values()):
        panel.note("flat by construction: same tokens, same experts")
    elif what == "expert":
        panel.note(f"dashed: the published {EP_CHANGE:.0%}, around the smallest EP")
    elif missing:
        panel.note(f"not measurable at EP {', '.join(missing)}")
    return panel


def _ep_tip(condition: str, point: EpPoint, what: str) -> str:
    peak = getattr(point, what)
    low, high = peak.interval
    text = f"{condition}, EP {point.num_ranks}: {peak.value:.3f}"
    if isfinite(low) and isfinite(high):
        text += f" ({low:.3f} to {high:.3f})"
    text += f"; uniform routing {peak.null:.3f}"
    if what == "rank" and point.random is not None:
        low, high = point.random.band
        text += f"; placed at random {point.random.mean:.3f} ({low:.3f} to {high:.3f})"
    return text


def unmeasurable(arms: Sequence[EpArm]) -> list[str]:
    """Why EP sizes are missing, each reason once."""
    return [
        *dict.fromkeys(
            f"EP {p.num_ranks}: {p.reason}" for arm in arms for p in arm.points if p.reason
        )
    ]


def batch_panels(view: View, model: str) -> list[Panel]:
    """Gini against batch size, whole passes and as many tokens from each."""
    scans = {c: s for c in view.names() if (s := view.batch_scan(model, c)) is not None}
    panels = []
    for name, title in (("growing", "whole passes"), ("equal", "equal token counts")):
        curves = {condition: scan[name] for condition, scan in scans.items()}
        if not curves:
            continue
        sizes = next(iter(scans.values()))["batch_sizes"]
        values = [number(v) for c in curves.values() for k in _SHOWN for v in c[k]]
        known = [v for v in values if isfinite(v)]
        panel = Panel(
            f"Gini, {title}", sizes, (min(0.0, *known), max(known)), "sequences a batch", "Gini"
        )
        null = next(iter(curves.values()))
        panel.band(sizes, [interval(band) for band in null["null_gini_band"]], "null")
        panel.line([*zip(sizes, map(number, null["null_gini"]), strict=True)], "null")
        for condition, curve in curves.items():
            place = view.colour(condition)
            panel.line([*zip(sizes, map(number, curve["gini"]), strict=True)], f"raw {css(place)}")
            points = [*zip(sizes, map(number, curve["corrected_gini"]), strict=True)]
            panel.line(points, css(place))
            tips = [
                f"{condition}, batch {size}, {tokens:,} tokens: corrected {number(c):.3f} "
                f"({interval(i)[0]:.3f} to {interval(i)[1]:.3f}), raw {number(g):.3f}, uniform routing {number(n):.3f}"
                for size, tokens, c, i, g, n in zip(
                    sizes,
                    curve["tokens"],
                    curve["corrected_gini"],
                    curve["corrected_gini_interval"],
                    curve["gini"],
                    curve["null_gini"],
                    strict=True,
                )
            ]
            panel.dots(points, place, css(place), tips)
        panels.append(panel)
    return panels


_SHOWN = ("gini", "corrected_gini", "null_gini")


def key(place: int) -> str:
    """A small picture of a condition's line and marker."""
    return (
        f'<svg class="key" viewBox="0 0 28 14" aria-hidden="true"><path class="line {css(place)}" d="M1 7H27"/>'
        f'<path class="mark {css(place)}" d="{marker(place, 14, 7)}"/></svg>'
    )
