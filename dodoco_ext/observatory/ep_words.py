"""What an EP scan says in words: every sentence is chosen and filled by its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from dodoco_ext.observatory.ep_results import (
    FIXED_GLOBAL,
    FIXED_PER_RANK,
    Change,
    EpArm,
    EpPoint,
    EpScan,
)
from dodoco_ext.observatory.published import EP_CHANGE, SOURCE


def against(change: Change, limit: float = EP_CHANGE) -> str:
    """`within` or `beyond` the limit with the whole interval, else `undecided`."""
    low, high = change.interval
    if not (isfinite(low) and isfinite(high)):
        return "undecided"
    if -limit <= low and high <= limit:
        return "within"
    return "beyond" if low > limit or high < -limit else "undecided"


def largest(arm: EpArm, what: str) -> tuple[EpPoint, Change] | None:
    """The point of an arm that is farthest from the smallest EP size, in `expert` or `rank` max/mean."""
    changes = [
        (point, getattr(point, f"{what}_change")) for point in arm.measured if len(arm.measured) > 1
    ]
    return max(changes, key=lambda pair: abs(pair[1].relative)) if changes else None


def ep_sentences(scan: EpScan) -> list[str]:
    """What one model shows under one condition."""
    same, grown = scan.arm(FIXED_GLOBAL), scan.arm(FIXED_PER_RANK)
    said = [f"Not measurable at EP {p.num_ranks}: {p.reason}." for p in same.points if p.reason]
    if len(same.measured) < 2:
        return [*said, "With fewer than two EP sizes there is no change to speak of."]
    first = same.measured[0]
    assert first.expert is not None
    if same.expert_by_construction:
        said.append(
            f"With {first.tokens_per_pass:,} tokens a pass at every EP size, max/mean over experts is "
            f"{first.expert.value:.2f} throughout, by construction: they are the same tokens and the same experts."
        )
    said += _ranks(same)
    if len(grown.measured) > 1:
        said += _experts(grown)
    said += _placement(same.measured[-1], scan)
    return said


def ep_findings(scans: Sequence[EpScan]) -> list[str]:
    """What all models and conditions show together; the first sentence is the answer."""
    scans = [s for s in scans if len(s.arm(FIXED_GLOBAL).measured) > 1]
    if not scans:
        return ["No EP scan has two measurable EP sizes, so nothing is said of expert parallelism."]
    ranks = [(s, *_of(s, FIXED_GLOBAL, "rank")) for s in scans]
    verdicts = [against(change) for _, _, change in ranks]
    top, point, change = max(ranks, key=lambda row: abs(row[2].relative))
    first = top.arm(FIXED_GLOBAL).measured[0]
    assert first.rank is not None
    assert point.rank is not None
    said = [
        (
            f"EP size changes the load of ranks by more than {EP_CHANGE:.0%} in {verdicts.count('beyond')} of "
            f"{len(scans)} cells, most for {top.model} under {top.condition}: max/mean over ranks goes from "
            f"{first.rank.value:.2f} at EP {first.num_ranks} to {point.rank.value:.2f} at EP {point.num_ranks} "
            f"({_percent(change)}; uniform routing: {change.null:+.0%}), at the same tokens."
        ),
        (
            "Max/mean over experts at the same tokens is the same at every EP size by construction, in every cell: "
            "no scan of that figure can tell whether the system layer corrects imbalance."
        ),
    ]
    grown = [
        (s, *_of(s, FIXED_PER_RANK, "expert"))
        for s in scans
        if len(s.arm(FIXED_PER_RANK).measured) > 1
    ]
    if grown:
        kinds = [against(change) for _, _, change in grown]
        far, point, change = max(grown, key=lambda row: abs(row[2].relative))
        said.append(
            f"At a fixed number of tokens a rank, max/mean over experts stays within {EP_CHANGE:.0%} "
            f"(published, {SOURCE}) in {kinds.count('within')} of {len(grown)} cells, leaves it in "
            f"{kinds.count('beyond')}; the largest change is {_percent(change)}, of {far.model} under "
            f"{far.condition} at EP {point.num_ranks}, where more tokens alone would change uniform routing by "
            f"{change.null:+.0%}."
        )
    ends = [(s, s.arm(FIXED_GLOBAL).measured[-1]) for s in scans]
    where = [_side(point) for _, point in ends]
    said.append(
        f"At the largest measurable EP, contiguous placement is more even than 97.5 % of "
        f"{scans[0].num_placements:,} placements at random in {where.count('below')} of {len(scans)} cells, less "
        f"even than 97.5 % in {where.count('above')}, and one of many in {where.count('within')}."
    )
    return said


def _of(scan: EpScan, arm: str, what: str) -> tuple[EpPoint, Change]:
    found = largest(scan.arm(arm), what)
    assert found is not None
    return found


def _ranks(arm: EpArm) -> list[str]:
    found = largest(arm, "rank")
    assert found is not None
    point, change = found
    first = arm.measured[0]
    assert first.rank is not None
    assert point.rank is not None
    verdict = {
        "within": f"within the {EP_CHANGE:.0%} that were published for experts",
        "beyond": f"beyond the {EP_CHANGE:.0%} that were published for experts",
    }.get(against(change), f"not to be told from {EP_CHANGE:.0%}")
    nested = all(
        b.num_ranks % a.num_ranks == 0 for a, b in zip(arm.measured, arm.measured[1:], strict=False)
    )
    tail = (
        " That it does not fall is by construction, as ranks of a larger EP are parts of those of a smaller "
        "one; how much it rises is not."
        if nested
        else ""
    )
    return [
        (
            f"Max/mean over ranks goes from {first.rank.value:.2f} at EP {first.num_ranks} (uniform routing "
            f"{first.rank.null:.2f}) to {point.rank.value:.2f} at EP {point.num_ranks} (uniform routing "
            f"{point.rank.null:.2f}): {_percent(change)}, {verdict}.{tail}"
        )
    ]


def _experts(arm: EpArm) -> list[str]:
    found = largest(arm, "expert")
    assert found is not None
    point, change = found
    first = arm.measured[0]
    assert first.expert is not None
    assert point.expert is not None
    verdict = {
        "within": f"within the published {EP_CHANGE:.0%}",
        "beyond": f"beyond the published {EP_CHANGE:.0%}",
    }.get(against(change), f"not to be told from the published {EP_CHANGE:.0%}")
    return [
        (
            f"With a fixed number of tokens a rank ({first.tokens_per_pass // first.num_ranks:,}), max/mean over "
            f"experts goes from {first.expert.value:.2f} to {point.expert.value:.2f} at EP {point.num_ranks}: "
            f"{_percent(change)}, {verdict}; the larger passes alone would move uniform routing by {change.null:+.0%}."
        )
    ]


def _side(point: EpPoint) -> str:
    """Where contiguous placement lies among those at random."""
    assert point.rank is not None
    assert point.random is not None
    low, high = point.random.band
    if point.rank.value < low:
        return "below"
    return "above" if point.rank.value > high else "within"


def _placement(point: EpPoint, scan: EpScan) -> list[str]:
    assert point.rank is not None
    assert point.random is not None
    random, (low, high) = point.random, point.random.band
    words = {
        "below": "is more even than nearly all",
        "above": "is less even than nearly all",
        "within": "is one of many among",
    }[_side(point)]
    return [
        (
            f"At EP {point.num_ranks} contiguous placement ({point.rank.value:.2f}) {words} {scan.num_placements:,} "
            f"placements at random (mean {random.mean:.2f}, 95 % from {low:.2f} to {high:.2f}); the best "
            f"of them, chosen with hindsight, has {random.best:.2f}."
        )
    ]


def _percent(change: Change) -> str:
    low, high = change.interval
    if not (isfinite(low) and isfinite(high)):
        return f"{change.relative:+.0%} (no interval: too few passes)"
    return f"{change.relative:+.0%} (95 % interval {low:+.0%} to {high:+.0%})"
