"""What a grid says, in sentences that are chosen and filled by its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

from dodoco_ext.observatory.bands import Evidence, assign_bands, band_sentences
from dodoco_ext.observatory.ep_words import ep_findings
from dodoco_ext.observatory.findings import verdict
from dodoco_ext.observatory.grid.results import BatchScan, Gap, GridCell, GridRatio, Numbers, Slope
from dodoco_ext.observatory.result import Interval

PUBLISHED_RATIO = 2.35
"""Largest overestimate of Gini by mock tokens in arXiv 2605.20982, of other models; never run here."""

SEED_P = 0.01
"""Below this probability draws of one cell are said to differ by more than their sequences."""

_VERDICTS = {
    "above": "overestimated in",
    "below": "underestimated in",
    "level": "neither in",
    "unknown": "undecided in",
}


def findings(numbers: Numbers) -> list[str]:
    """Sentences on concentration, mock against real, batch size, EP and bands; then on what does not follow."""
    return [
        *_concentration(numbers),
        *_ranks(numbers),
        *_verdicts(numbers),
        *_largest(numbers),
        *_explained(numbers),
        *_trends(numbers),
        *_resemblance(numbers),
        *ep_findings([cell.ep_scan for cell in numbers.cells if cell.ep_scan is not None]),
        *_bands(numbers),
        *_seeds(numbers),
        *_limits(numbers),
    ]


def _concentration(numbers: Numbers) -> Iterator[str]:
    for condition in numbers.conditions:
        cells = [c for c in numbers.cells if c.condition == condition.name]
        if condition.kind != "real" or len(cells) < 2:
            continue
        ordered = sorted(cells, key=lambda c: c.experts.corrected_gini)
        least, most = ordered[0], ordered[-1]
        apart = least.experts.corrected_gini_interval[1] < most.experts.corrected_gini_interval[0]
        said = "the most even router is" if apart else "no two routers can be told apart:"
        yield (
            f"On {condition.name} {said} that of {least.model} (corrected Gini {_gini(least)}), "
            f"the least even that of {most.model} ({_gini(most)})."
        )
    flat = [c for c in numbers.cells if c.experts.corrected_gini == 0]
    if flat:
        yield (
            f"{len(flat)} of {len(numbers.cells)} cells cannot be told from uniform routing: "
            f"{', '.join(f'{c.model} on {c.condition}' for c in flat)}."
        )
    else:
        yield f"None of the {len(numbers.cells)} cells could be uniform routing."


def _ranks(numbers: Numbers) -> Iterator[str]:
    cells = [c for c in numbers.cells if c.kind == "real" and c.ranks is not None]
    if not cells:
        return
    ranks = [c.ranks for c in cells if c.ranks is not None]
    experts = [c.experts.max_over_mean for c in cells]
    low, high = min(f.max_over_mean for f in ranks), max(f.max_over_mean for f in ranks)
    floor = max(f.null_max_over_mean for f in ranks)
    above = sum(f.max_over_mean_interval[0] > f.null_max_over_mean for f in ranks)
    yield (
        f"On real text the busiest expert of a pass gets {min(experts):.2f} to {max(experts):.2f} times the "
        f"mean; over {numbers.parameters['num_ranks']} ranks of equal runs of experts the busiest rank gets "
        f"{low:.2f} to {high:.2f} times, where uniform routing would give {floor:.2f} at most: above that "
        f"in {above} of {len(ranks)} cells."
    )


def _verdicts(numbers: Numbers) -> Iterator[str]:
    for real in (c for c in numbers.conditions if c.kind == "real"):
        for mock in (c for c in numbers.conditions if c.source == "mock-uniform"):
            found = _of(numbers, mock.name, real.name)
            names = {
                kind: [r.model for r in found if verdict(r.corrected_interval) == kind]
                for kind in _VERDICTS
            }
            parts = [
                f"{_VERDICTS[kind]} {len(models)} ({', '.join(models)})"
                for kind, models in names.items()
                if models
            ]
            yield (
                f"Corrected Gini of {real.name} by {mock.name}, {len(found)} "
                f"{'model' if len(found) == 1 else 'models'}: {'; '.join(parts)}."
            )


def _largest(numbers: Numbers) -> Iterator[str]:
    mocks = [r for r in numbers.ratios if r.numerator_kind == "mock"]
    raw = [r for r in mocks if isfinite(r.gini)]
    corrected = [r for r in mocks if isfinite(r.corrected)]
    if not raw or not corrected:
        return
    a, b = max(raw, key=lambda r: r.gini), max(corrected, key=lambda r: r.corrected)
    low = min(corrected, key=lambda r: r.corrected)
    low_end, high_end = b.corrected_interval
    said = "more than" if low_end > PUBLISHED_RATIO else "less than"
    if low_end <= PUBLISHED_RATIO <= high_end:
        said = "not to be told from"
    yield (
        f"The largest ratio of a mock over a text is {a.gini:.2f} ({_ends(a.gini_interval, 2)}) in raw Gini, "
        f"{_named(a)}, and {b.corrected:.2f} ({_ends(b.corrected_interval, 2)}) in corrected Gini, {_named(b)}: "
        f"{said} the {PUBLISHED_RATIO} published for other models."
    )
    above = sum(verdict(r.corrected_interval) == "above" for r in corrected)
    below = sum(verdict(r.corrected_interval) == "below" for r in corrected)
    yield (
        f"Of {len(corrected)} ratios of a mock over a text {above} lie above 1, {below} below; the smallest is "
        f"{low.corrected:.2f} ({_ends(low.corrected_interval, 2)}), {_named(low)}."
    )


def _explained(numbers: Numbers) -> Iterator[str]:
    for gap in numbers.gaps:
        if len(gap.steps) < 2:
            continue
        start = (
            f"{gap.model}: from {gap.mock} to {gap.real} corrected Gini changes by "
            f"{-gap.difference:+.3f} ({-gap.difference_interval[1]:+.3f} to {-gap.difference_interval[0]:+.3f})"
        )
        known = [step for step in gap.steps if isfinite(step.share)]
        if not known:
            yield f"{start}, which cannot be told from none; so there is nothing to explain."
            continue
        largest = max(known, key=lambda step: abs(step.difference))
        parts = "; ".join(
            f"{step.what} {step.share:.0%} ({step.share_interval[0]:.0%} to {step.share_interval[1]:.0%})"
            for step in known
        )
        yield f"{start}. Of that: {parts}. The largest part: {largest.what}."
    yield from _unexplained(numbers.gaps)


def _unexplained(gaps: list[Gap]) -> Iterator[str]:
    bare = sorted({gap.real for gap in gaps if len(gap.steps) < 2})
    if bare and len(bare) < len({gap.real for gap in gaps}):
        yield (
            f"What explains the gaps to {' and '.join(bare)} was not asked: no control was made of "
            f"{'its' if len(bare) == 1 else 'their'} tokens."
        )


def _trends(numbers: Numbers) -> Iterator[str]:
    for kind, plural in (("mock", "mock"), ("control", "control"), ("real", "real-text")):
        scans = [s for s in numbers.batch_scans if s.kind == kind]
        if not scans:
            continue
        first, last = scans[0].batch_sizes[0], scans[0].batch_sizes[-1]
        raw = _counts([s.growing.raw_slope.verdict for s in scans])
        corrected = _counts([s.growing.corrected_slope.verdict for s in scans])
        fallen = [s.growing.raw_slope for s in scans if s.growing.raw_slope.verdict == "falls"]
        sentence = (
            f"From batch {first} to {last}, {len(scans)} {plural} cells: raw Gini {raw}; beyond chance, "
            f"corrected Gini {corrected}."
        )
        if fallen:
            shares = [slope.chance / slope.value for slope in fallen]
            sentence += (
                f" Of the fall of raw Gini, {min(shares):.0%} to {max(shares):.0%} is what independent tokens "
                "of the same loads show."
            )
        kept = [s for s in scans if s.verdict == "survives"]
        if kept:
            low, high = min(map(_change, kept)), max(map(_change, kept))
            sentence += (
                f" The trend that survives correction in {len(kept)} of them changes Gini by {low:+.0%} to "
                f"{high:+.0%} over the whole range."
            )
        else:
            sentence += " No trend survives correction."
        yield sentence
    scans = numbers.batch_scans
    if not scans:
        return
    agree = sum(s.growing.corrected_slope.verdict == s.equal.corrected_slope.verdict for s in scans)
    yield (
        f"At equal token counts, drawn from all sequences of a batch, the verdict on the corrected trend is the "
        f"same in {agree} of {len(scans)} cells: "
        + (
            "what survives is not a matter of how many tokens are counted, but of how many sequences they come from."
            if agree > len(scans) / 2
            else "what survives depends on how many tokens are counted."
        )
    )


def _resemblance(numbers: Numbers) -> Iterator[str]:
    layers = [
        (ends, slope)
        for s in numbers.batch_scans
        for ends, slope in zip(s.dispersion_interval, s.layer_slope, strict=True)
    ]
    alike = [slope for ends, slope in layers if ends[0] > 1]
    apart = [slope for ends, slope in layers if ends[0] <= 1]
    if not layers:
        return
    said = (
        f"In {len(alike)} of {len(layers)} layers, over all cells, the tokens of a sequence are routed more alike than "
        f"independent ones would be; corrected Gini falls with the batch in {_falling(alike)} of these"
    )
    if apart:
        said += f", and in {_falling(apart)} of the other {len(apart)}"
    yield said + "."


def _falling(slopes: list[Slope]) -> int:
    return sum(slope.verdict == "falls" for slope in slopes)


def _bands(numbers: Numbers) -> Iterator[str]:
    evidence: dict[str, dict[str, Evidence]] = {}
    for cell in numbers.cells:
        if cell.kind == "real":
            found = Evidence(cell.experts.gini, cell.experts.gini_interval)
            evidence.setdefault(cell.model, {})[cell.condition] = found
    if evidence:
        yield from band_sentences(assign_bands(evidence, seed=numbers.parameters["seed"]))


def _seeds(numbers: Numbers) -> Iterator[str]:
    known = [c for c in numbers.cells if isfinite(c.draws.p_value)]
    if not known:
        return
    apart = [c for c in known if c.draws.p_value < SEED_P]
    yield (
        f"In {len(apart)} of {len(known)} cells the {numbers.parameters['num_draws']} draws differ by more than "
        f"their sequences explain (p < {SEED_P}; by chance about {len(known) * SEED_P:.1f} would)"
        + (f": {', '.join(f'{c.model} on {c.condition}' for c in apart)}." if apart else ".")
    )


def _limits(numbers: Numbers) -> Iterator[str]:
    yield (
        "By construction: evaluated teacher-forced and without drops, a sequence is routed alike in every batch, so "
        "what changes with the batch is how many sequences a histogram sums, never how one is routed."
    )
    if len(numbers.models) > 1:
        yield "Each model is one of one training: that its architecture is the reason does not follow."


def _of(numbers: Numbers, numerator: str, denominator: str) -> list[GridRatio]:
    pair = (numerator, denominator)
    return [r for r in numbers.ratios if (r.numerator, r.denominator) == pair]


def _change(scan: BatchScan) -> float:
    first, last = scan.growing.corrected_gini[0], scan.growing.corrected_gini[-1]
    return last / first - 1 if first > 0 else float("nan")


def _counts(verdicts: list[str]) -> str:
    words = {"falls": "falls in", "rises": "rises in", "none": "has no trend in"}
    parts = [f"{said} {verdicts.count(kind)}" for kind, said in words.items() if kind in verdicts]
    return ", ".join(parts)


def _named(ratio: GridRatio) -> str:
    return f"{ratio.model}, {ratio.numerator} over {ratio.denominator}"


def _gini(cell: GridCell) -> str:
    return f"{cell.experts.corrected_gini:.3f}, {_ends(cell.experts.corrected_gini_interval, 3)}"


def _ends(interval: Interval, digits: int) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"
