"""`dodoco show SOURCE`: the summary of one recording, or of a window of it, printed or as JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dodoco_ext.counters import COUNTERS
from dodoco_ext.views import tables
from dodoco_ext.views.tables import duration, figure, plain, quantity

if TYPE_CHECKING:
    from rich.console import Console

    from dodoco_ext.counters import LayerSnapshot
    from dodoco_ext.views.balances import Balance, RankBalance
    from dodoco_ext.views.summary import LayerSummary, Summary

SUMMARY_SCHEMA = "dodoco.summary/1"
LAYER_FIELDS = ("index", "name", "num_experts", "top_k", *COUNTERS, "in_flight")


class Counted(Protocol):
    """A layer's counters in some scope, and their balance."""

    @property
    def counters(self) -> LayerSnapshot:
        """Exact counters."""

    @property
    def whole_run(self) -> Balance:
        """Balance of all counts of the scope."""

    @property
    def ranks(self) -> RankBalance | None:
        """The same per expert-parallel rank."""


def summary_json(summary: Summary, *, experts: bool, saved: Path | None = None) -> str:
    """The summary as JSON; `experts` adds the counts of every expert."""
    from dodoco_ext.views.summary import FAULTS, SCOPE, WINDOW_SCOPE

    return tables.to_json(
        {
            "schema": SUMMARY_SCHEMA,
            "scope": SCOPE if summary.window is None else WINDOW_SCOPE,
            "recording": summary.recording,
            "window": summary.window,
            "saved": None if saved is None else str(saved),
            "mean_of_layers": summary.mean_of_layers,
            "layers": [_layer_dict(layer, experts=experts) for layer in summary.layers],
            "ring": summary.ring,
            "uncovered": summary.uncovered,
            "placements": summary.placements,
            "faults": {
                "count": summary.num_faults,
                "by_reason": summary.faults,
                "last": summary.last_fault,
                "meaning": FAULTS.get(summary.last_fault or ""),
            },
        }
    )


def counted_dict(layer: Counted, *, experts: bool) -> dict[str, Any]:
    """Counters, balance and ranks of a layer for JSON."""
    counters = layer.counters
    result = {name: getattr(counters, name) for name in LAYER_FIELDS}
    result["top_k"] = counters.top_k or None
    result["whole_run"] = {
        **tables.as_dict(layer.whole_run),
        "balancedness": counters.balancedness,
        "cv": counters.cv,
        "normalized_entropy": counters.normalized_entropy,
        "unused_experts": counters.unused_experts,
    }
    result["ranks"] = layer.ranks
    if experts:
        result["counts"] = [int(count) for count in counters.counts]
    return result


def _layer_dict(layer: LayerSummary, *, experts: bool) -> dict[str, Any]:
    return {**counted_dict(layer, experts=experts), "per_pass": layer.per_pass}


def print_summary(summary: Summary, *, experts: bool, saved: Path | None = None) -> None:
    """Prints the summary of a recording; `experts` adds the busiest and the quietest ones."""
    console = tables.console()
    _print_head(console, summary)
    routed = [layer.counters.name not in summary.unrouted for layer in summary.layers]
    if any(routed):
        _print_routed(
            console, replace(summary, layers=tuple(compress(summary.layers, routed))), experts
        )
    _print_notes(console, summary)
    if saved is not None:
        console.print(f"snapshot saved: {plain(str(saved))}", soft_wrap=True)


def _print_routed(console: Console, summary: Summary, experts: bool) -> None:
    counters = [layer.counters for layer in summary.layers]
    names = print_names(console, [c.name for c in counters], [c.in_flight for c in counters])
    whole = summary.mean_of_layers
    scope = "Whole run" if summary.window is None else "Since the snapshot"
    print_balance(console, scope, summary.layers, names, (whole.gini, whole.max_over_mean))
    print_not_assigned(console, summary.layers, names)
    _print_per_pass(console, summary, names)
    print_ranks(console, scope, summary.layers, names)
    if experts:
        print_experts(console, scope, summary.layers, names)


def print_names(console: Console, names: Sequence[str], in_flight: Sequence[bool]) -> list[str]:
    """Prints what layer names have in common; returns short ones, with a mark where in flight."""
    label, short = _short_names(names)
    if label:
        console.print(f"layers: {plain(label)}")
    console.print()
    return [plain(name) + "*" * mark for name, mark in zip(short, in_flight, strict=True)]


def _print_head(console: Console, summary: Summary) -> None:
    r = summary.recording
    console.print(f"{plain(r.model or r.name)}: {r.state}", style="bold")
    console.print(f"recording {plain(r.path)} ({tables.size(r.bytes or 0)})", soft_wrap=True)
    versions = ", ".join(f"{plain(k)} {plain(v)}" for k, v in (r.versions or {}).items())
    where = f" on {plain(r.host)}" if r.host else ""
    console.print(f"by        {plain(r.program or '-')}, process {r.pid}{where}, {versions}")
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime((r.created_unix_ns or 0) / 1e9))
    lasted = f", lasted {duration(r.duration_s)}" if r.state == "closed" else ""
    console.print(f"began     {began} ({duration(r.age_s)} ago){lasted}")
    world = f"rank {r.rank} of {r.world_size}"
    others = "; the other ranks have recordings of their own" if (r.world_size or 1) > 1 else ""
    console.print(f"scope     {world} only{others}")
    if summary.window is not None:
        w = summary.window
        taken = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(w.from_unix_ns / 1e9))
        console.print(f"window    {duration(w.seconds)}, since {taken}: {plain(w.snapshot)}")
    if summary.placements is not None:
        console.print(f"placed    {summary.placements.text}")
    extra = {k: v for k, v in (r.labels or {}).items() if k != "model_name"}
    if extra:
        console.print("labels    " + ", ".join(f"{plain(k)}={plain(v)}" for k, v in extra.items()))


def print_balance(
    console: Console,
    scope: str,
    layers: Sequence[Counted],
    names: list[str],
    mean: tuple[float, float],
) -> None:
    """Prints counters and balance of each layer.

    Args:
        console: Where to.
        scope: What the counters cover, the first words of the heading.
        layers: The layers.
        names: Their short names.
        mean: Mean Gini and max/mean of the layers.
    """
    shapes = {(s.counters.num_experts, s.counters.top_k) for s in layers}
    shape = ", ".join(f"top {k or '?'} of {e} experts" for e, k in sorted(shapes))
    console.print(f"{scope}, exact counts (board): {shape}", style="bold")
    varied = ("experts",) if len(shapes) > 1 else ()
    columns = ("layer", *varied, "passes", "tokens", "assigned", "Gini", "null 95 %")
    table = tables.make_table(
        console, (*columns, "max/mean", "null 95 %", "unused"), left=("layer",)
    )
    for name, layer in zip(names, layers, strict=True):
        c = layer.counters
        counted = (quantity(c.passes), quantity(c.tokens), quantity(c.assignments))
        shape_cell = (f"{c.top_k or '?'} of {c.num_experts}",) if varied else ()
        figures = _balance_cells(layer.whole_run)
        table.add_row(name, *shape_cell, *counted, *figures, str(c.unused_experts))
    if len(names) > 1:
        blank = [""] * (len(varied) + 3)
        table.add_section()
        table.add_row("mean", *blank, figure(mean[0]), "", figure(mean[1], 2), "", "")
    console.print(table)
    console.print()


def print_not_assigned(console: Console, layers: Sequence[Counted], names: list[str]) -> None:
    """Prints what of the passes was not assigned to an expert, where there is any."""
    fields = ("padded", "invalid", "capacity_dropped", "recomputed")
    if not any(getattr(layer.counters, f) for layer in layers for f in fields):
        console.print("Not assigned: none (no padding, invalid ids, capacity drops, recomputation)")
        console.print()
        return
    console.print(
        "Not assigned: (token, expert) slots; recomputed: passes not counted", style="bold"
    )
    table = tables.make_table(
        console, ("layer", "padded", "invalid", "dropped", "recomputed"), left=("layer",)
    )
    for name, layer in zip(names, layers, strict=True):
        table.add_row(name, *(quantity(getattr(layer.counters, f)) for f in fields))
    console.print(table)
    console.print()


def _print_per_pass(console: Console, summary: Summary, names: list[str]) -> None:
    ring = summary.ring
    since = "" if summary.window is None else " since the snapshot"
    if not ring.records:
        console.print(f"Per pass: no records in the ring{since or ' yet'}")
        console.print()
        return
    console.print(f"Per pass, mean over the passes{since} still in the ring", style="bold")
    columns = ("layer", "passes", "tokens/pass", "Gini", "null", "corrected", "max/mean", "null ")
    table = tables.make_table(console, columns, left=("layer",))
    for name, layer in zip(names, summary.layers, strict=True):
        p = layer.per_pass
        low, high = quantity(p.tokens_min), quantity(p.tokens_max)
        each = low if low == high else f"{low} to {high}"
        figures = (figure(p.gini), figure(p.gini_null))
        peaks = (figure(p.max_over_mean, 2), figure(p.max_over_mean_null, 2))
        counted = (quantity(p.passes), each if p.passes else "-")
        table.add_row(name, *counted, *figures, figure(p.gini_corrected), *peaks)
    if len(names) > 1:
        mean = summary.mean_of_layers
        figures = (figure(mean.pass_gini), figure(mean.pass_gini_null))
        peaks = (figure(mean.pass_max_over_mean, 2), figure(mean.pass_max_over_mean_null, 2))
        table.add_section()
        table.add_row("mean", "", "", *figures, figure(mean.pass_gini_corrected), *peaks)
    console.print(table)
    lost = f", {quantity(ring.lost)} older ones overwritten" if ring.lost else ", none overwritten"
    held = f"{quantity(ring.records)} of {quantity(ring.slots)} records"
    if since:
        held = f"{quantity(ring.records)} records{since}"
    every = f", one iteration in {ring.record_every}" if (ring.record_every or 1) > 1 else ""
    console.print(
        f"ring: {held}{lost}; "
        f"{quantity(ring.iterations)} iterations, {duration(ring.seconds)} of history{every}"
    )
    console.print()


def print_ranks(console: Console, scope: str, layers: Sequence[Counted], names: list[str]) -> None:
    """Prints the balance of expert-parallel ranks, where it was asked for."""
    first = layers[0].ranks
    if first is None:
        return
    how = "as placed" if first.recorded else "assuming equal contiguous runs of experts"
    console.print(f"{scope} per expert-parallel rank: {first.num_ranks} ranks, {how}", style="bold")
    columns = ("layer", "Gini", "null 95 %", "max/mean", "null 95 %", "busiest rank", "its share")
    table = tables.make_table(console, columns, left=("layer",))
    problems = []
    for name, layer in zip(names, layers, strict=True):
        ranks = layer.ranks
        if ranks is None or ranks.balance is None:
            table.add_row(name, "not measurable", *[""] * 5)
            problems.append(ranks.problem if ranks else None)
            continue
        share = "-"
        if ranks.busiest is not None and ranks.counts:
            share = f"{100 * ranks.counts[ranks.busiest] / sum(ranks.counts):.1f} %"
        busiest = "-" if ranks.busiest is None else str(ranks.busiest)
        table.add_row(name, *_balance_cells(ranks.balance), busiest, share)
    console.print(table)
    _print_placed(console, [layer.ranks for layer in layers if layer.ranks is not None])
    for problem in dict.fromkeys(filter(None, problems)):
        _note(console, f"not measurable: {problem} evenly; choose --ep from its divisors")
    console.print()


def _print_placed(console: Console, ranks: Sequence[RankBalance]) -> None:
    """Says how far loads by recorded placements are known."""
    placed = [each for each in ranks if each.recorded]
    total = sum(sum(each.counts or ()) for each in placed)
    estimated, unplaced = (
        sum(getattr(each, n) for each in placed) for n in ("estimated", "unplaced")
    )
    if estimated:
        share = 100 * estimated / total
        _note(console, f"estimated: {share:.1f} % is an even split over replicas on several ranks")
    if unplaced:
        _note(console, f"left out: {quantity(unplaced)} assignments under placements that are gone")


def print_experts(
    console: Console, scope: str, layers: Sequence[Counted], names: list[str]
) -> None:
    """Prints the busiest and the quietest experts of each layer."""
    console.print(
        f"Experts, {scope[0].lower()}{scope[1:]}: expert (count over the mean count)", style="bold"
    )
    table = tables.make_table(
        console, ("layer", "busiest", "quietest"), left=("layer", "busiest", "quietest")
    )
    shown = max((console.width - 30) // 22, 1)
    for name, layer in zip(names, layers, strict=True):
        counts = [int(count) for count in layer.counters.counts]
        mean = sum(counts) / len(counts)
        order = sorted(range(len(counts)), key=lambda e, c=counts: (-c[e], e))  # type: ignore[misc]
        cells = [
            "  ".join(f"{e} ({counts[e] / mean:.2f})" for e in chosen) if mean else "-"
            for chosen in (order[:shown], order[::-1][:shown])
        ]
        table.add_row(name, *cells)
    console.print(table)
    console.print()


def _print_notes(console: Console, summary: Summary) -> None:
    from dodoco_ext.views.summary import FAULTS

    if summary.unrouted:
        _note(console, f"{len(summary.unrouted)} layers: routers not observed, transfers only")
    if summary.group is not None:
        others = f"group {summary.group.name} of {len(summary.group.ranks)} ranks"
        _note(console, f"transfers in {others}: `dodoco show {summary.recording.run} --fleet`")

    simulated, sizes = summary.ring.null_sizes[1], summary.ring.null_sizes[0]
    note = "null: uniform routing of each token to top-k distinct experts"
    if sizes > simulated:
        note += f", simulated at {simulated} of {sizes} pass sizes and interpolated between them"
    if any(layer.counters.top_k == 0 for layer in summary.layers):
        note += "; '-' where top-k is unknown"
    _note(console, note)
    at = "its own loads" if summary.ring.loads_known else "smooth loads (too many to simulate)"
    _note(
        console,
        f"corrected: root mean squared Gini of a layer's passes without what chance adds at {at}",
    )
    if any(layer.counters.in_flight for layer in summary.layers):
        why = (
            "its writer died in the middle of"
            if summary.recording.state == "dead"
            else "read during"
        )
        _note(console, f"* in flight: {why} a pass; counters may disagree by that one pass")
    if summary.recording.state == "dead":
        _note(console, "dead: its process went without closing it; what was counted is kept")
    if summary.ring.implausible:
        noun = "record was" if summary.ring.implausible == 1 else "records were"
        _note(console, f"damaged: {summary.ring.implausible} impossible {noun} left out")
    for part in summary.uncovered:
        _note(console, f"NOT OBSERVED: {part['name']}: {part['reason']}", style="yellow")
    if summary.num_faults:
        meaning = FAULTS.get(summary.last_fault or "", "unknown to this version")
        several = ", ".join(f"{number} {name}" for name, number in summary.faults.items())
        each = f" ({several})" if len(summary.faults) > 1 else ""
        text = f"FAULTS: {summary.num_faults}{each}, the last {summary.last_fault}: {meaning}"
        _note(console, text, style="red")


def _note(console: Console, text: str, style: str = "dim") -> None:
    console.print(plain(text), style=style)


def _balance_cells(balance: Balance) -> tuple[str, str, str, str]:
    gini, peak = balance.gini_null, balance.max_over_mean_null
    return (
        figure(balance.gini),
        _band(gini.low, gini.mean, gini.high, 3),
        figure(balance.max_over_mean, 2),
        _band(peak.low, peak.mean, peak.high, 2),
    )


def _band(low: float, mean: float, high: float, digits: int) -> str:
    """The band, or only the mean where its ends are unknown."""
    if figure(low) == "-" or figure(high) == "-":
        return figure(mean, digits)
    return f"{figure(low, digits)}-{figure(high, digits)}"


def _short_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """What layer names have in common, as a pattern, and what tells them apart."""
    if len(names) < 2:
        return "", list(names)
    parts = [name.split(".") for name in names]
    shortest = min(len(p) for p in parts)
    head = 0
    while head < shortest - 1 and len({p[head] for p in parts}) == 1:
        head += 1
    tail = 0
    while tail < shortest - 1 - head and len({p[-1 - tail] for p in parts}) == 1:
        tail += 1
    first = parts[0]
    end = len(first) - tail
    pattern = ".".join([*first[:head], "*", *first[end:]])
    short = [".".join(p[head : len(p) - tail]) for p in parts]
    if len(set(short)) < len(short) or not (head or tail):
        return "", list(names)
    return pattern, short
