"""The three answers of the first screen, for all models and for each one; every word is chosen by numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, log

from dodoco_ext.observatory.bands import BANDS
from dodoco_ext.observatory.ep_results import (
    FIXED_GLOBAL,
    FIXED_PER_RANK,
    Change,
    EpPoint,
    EpScan,
)
from dodoco_ext.observatory.ep_words import against, largest
from dodoco_ext.observatory.findings import verdict
from dodoco_ext.observatory.page.view import Data, View, interval, number
from dodoco_ext.observatory.published import EP_CHANGE, MOCK_OVER_REAL


@dataclass(frozen=True)
class Answer:
    """One question and what the numbers say.

    Attributes:
        key: `concentration`, `mock` or `ep`.
        question: In the reader's words.
        short: The answer in a few words.
        figure: The figure that it rests on.
        text: What the figure is, with interval, null and the published figure.
    """

    key: str
    question: str
    short: str
    figure: str
    text: str


def answers(view: View, model: str | None = None) -> list[Answer]:
    """The three answers, for one model or over all."""
    return [_concentration(view, model), _mock(view, model), _ep(view, model)]


def _concentration(view: View, model: str | None) -> Answer:
    whose = "my model" if model or len(view.models) == 1 else "each model"
    question = f"How concentrated is {whose}?"
    cells = [c for c in view.of_kind("real", model) if c["experts"]["corrected_gini"] is not None]
    if not cells:
        return Answer(
            "concentration", question, "Not observed", "–", "No real text is among the conditions."
        )
    ordered = sorted(cells, key=lambda c: number(c["experts"]["corrected_gini"]))
    low, high = ordered[0], ordered[-1]
    values = [number(c["experts"]["corrected_gini"]) for c in (low, high)]
    bands = [b for b in view.bands() if model in (None, b.model)]
    named = [
        (band, sum(b.band == band for b in bands))
        for band in BANDS
        if any(b.band == band for b in bands)
    ]
    short = ", ".join(band if len(bands) == 1 else f"{count} {band}" for band, count in named)
    peaks = sorted(number(c["experts"]["max_over_mean"]) for c in cells)
    null = max(number(c["experts"]["null_max_over_mean"]) for c in cells)
    where = (
        f"on {low['condition']}"
        if low is high
        else f"{_place(low, model)} to {_place(high, model)}"
    )
    return Answer(
        "concentration",
        question,
        short[:1].upper() + short[1:],
        _span(values, "{:.3f}"),
        f"Corrected Gini on real text, {where} (0: even, up to 1). The busiest expert of a pass gets "
        f"{_span([peaks[0], peaks[-1]], '{:.1f}')} times the mean; uniform routing: {null:.1f}.",
    )


def _mock(view: View, model: str | None) -> Answer:
    question = "Does mock data mislead me?"
    ratios = [r for r in view.ratios(model, "mock") if isfinite(number(r["corrected"]))]
    if not ratios:
        return Answer("mock", question, "Not observed", "–", "There is no mock beside a real text.")
    kinds = [verdict(interval(r["corrected_interval"])) for r in ratios]
    above, below = kinds.count("above"), kinds.count("below")
    short = {
        (True, True): "Yes, both ways",
        (True, False): "Yes, it overestimates",
        (False, True): "Yes, it underestimates",
    }.get((above > 0, below > 0), "Not that this run can tell")
    values = sorted(number(r["corrected"]) for r in ratios)
    far = max(ratios, key=lambda r: abs(log(max(number(r["corrected"]), 1e-9))))
    low, high = interval(far["corrected_interval"])
    whose = "" if model or len(view.models) == 1 else f"{far['model']}, "
    return Answer(
        "mock",
        question,
        short,
        _span([values[0], values[-1]], "{:.2f}") + "×",
        f"Corrected Gini of mock over real: above 1 in {above} and below in {below} of {len(ratios)} comparisons. "
        f"Farthest: {whose}{far['numerator']} over {far['denominator']}, {number(far['corrected']):.2f} ({low:.2f} to "
        f"{high:.2f}). Published for other models: up to {MOCK_OVER_REAL}.",
    )


def _ep(view: View, model: str | None) -> Answer:
    question = "Does expert parallelism change it?"
    real = {(c["model"], c["condition"]) for c in view.of_kind("real", model)}
    mine = {key: s for key, s in view.ep_scans.items() if model in (None, key[0])}
    scans = [s for key, s in mine.items() if key in real] or [*mine.values()]
    scans = [s for s in scans if len(s.arm(FIXED_GLOBAL).measured) > 1]
    if not scans:
        return Answer(
            "ep", question, "Not measurable", "–", "No two EP sizes of the scan divide the experts."
        )
    found = [(s, *_largest(s, FIXED_GLOBAL, "rank")) for s in scans]
    beyond = sum(against(change) == "beyond" for _, _, change in found)
    short = (
        f"For ranks, in {beyond} of {len(found)} cells"
        if 0 < beyond < len(found)
        else (
            "For ranks, yes"
            if beyond
            else f"By no more than {EP_CHANGE:.0%} that this run can tell"
        )
    )
    scan, point, change = max(found, key=lambda row: abs(row[2].relative))
    first = scan.arm(FIXED_GLOBAL).measured[0]
    assert first.rank is not None
    assert point.rank is not None
    values = sorted(row[2].relative for row in found)
    whose = (
        scan.condition if model or len(view.models) == 1 else f"{scan.model} on {scan.condition}"
    )
    return Answer(
        "ep",
        question,
        short,
        _span([values[0], values[-1]], "{:+.0%}"),
        f"Busiest rank over mean, EP {first.num_ranks} to {point.num_ranks}, same tokens; most {whose}: "
        f"{first.rank.value:.2f} to {point.rank.value:.2f} (uniform routing {change.null:+.0%}). Over experts "
        f"it cannot change, by construction{_grown(scans)}. Published: at most {EP_CHANGE:.0%}.",
    )


def _grown(scans: Sequence[EpScan]) -> str:
    grown = [s for s in scans if len(s.arm(FIXED_PER_RANK).measured) > 1]
    if not grown:
        return ""
    changes = sorted(_largest(s, FIXED_PER_RANK, "expert")[1].relative for s in grown)
    return f"; with tokens a rank fixed, {_span([changes[0], changes[-1]], '{:+.0%}')}"


def _largest(scan: EpScan, arm: str, what: str) -> tuple[EpPoint, Change]:
    found = largest(scan.arm(arm), what)
    assert found is not None
    return found


def _place(cell: Data, model: str | None) -> str:
    return str(cell["condition"]) if model else f"{cell['model']} on {cell['condition']}"


def _span(values: Sequence[float], form: str) -> str:
    low, high = (form.format(value) for value in (values[0], values[-1]))
    return low if low == high else f"{low} to {high}"
