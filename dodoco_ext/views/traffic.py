"""What moved between the ranks of a run: the part of `dodoco show RUN --fleet` about transfers."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Any

import numpy as np

from dodoco_ext import metrics, nulls
from dodoco_ext.errors import InputError
from dodoco_ext.fleet import Fleet, spans
from dodoco_ext.fleet_snapshot import Unread
from dodoco_ext.traffic.imbalance import UNKNOWN, PerDispatch, RankNull, per_dispatch
from dodoco_ext.traffic.totals import GroupTraffic, LayerTraffic, traffic_of
from dodoco_ext.traffic.waiting import SCOPE as WAITING_SCOPE
from dodoco_ext.traffic.waiting import Waiting, waiting
from dodoco_ext.transfer_alignment import OPS, AlignedTransfers
from dodoco_ext.transfers import COMBINE, DISPATCH, UNITS
from dodoco_ext.views import tables
from dodoco_ext.views.tables import figure, plain, quantity

if TYPE_CHECKING:
    from rich.console import Console

MAX_SHOWN = 16
"""Ranks up to which a matrix is printed in full; of larger groups the busiest are."""

SCOPE = {
    "matrix": "whole run, exact: rows of forward transfers, source x destination as senders counted; "
    "recomputed and backward transfers are counted apart",
    "per_dispatch": "mean over the forward dispatches that all ranks of the group have a record of, every "
    "one of equal weight",
    "null": "every token sent to top_k distinct experts uniformly, experts in equal contiguous runs on "
    "the ranks of the group (an assumption)",
    "waiting": WAITING_SCOPE,
}


@dataclass(frozen=True)
class LayerRow:
    """Rows received by dispatches of one layer, per rank of a group.

    Attributes:
        executions: Forward dispatches, of the rank with most.
        equal: Whether all ranks counted equally many.
        agree: Whether senders and receivers say the same.
        unit: What a row is; "" where the rings do not tell.
    """

    layer: str
    executions: int
    equal: bool
    agree: bool
    unit: str
    received: list[int]
    hottest: int | None
    gini: float
    gini_null: dict[str, float]
    max_over_mean: float
    max_over_mean_null: dict[str, float]
    per_dispatch: PerDispatch


@dataclass(frozen=True, eq=False)
class GroupSummary:
    """One group of ranks, summarised.

    Attributes:
        traffic: Exact totals.
        layers: Dispatches layer by layer.
        dispatch: All layers added up, likewise `combine`.
        rings: What the rings hold: `transfers`, and how many of them are `sound`, not `complete`, of
            which sender and receiver `disagree`, `apart` by the clocks, `out_of_step`.
        waits: Waiting in dispatches, combines and all transfers.
        disputes: Pairs of ranks (source, destination) that contradict each other in the rings.
    """

    traffic: GroupTraffic
    layers: tuple[LayerRow, ...]
    dispatch: LayerTraffic
    combine: LayerTraffic
    rings: dict[str, int]
    waits: dict[str, Waiting]
    disputes: tuple[tuple[int, int, int], ...]


def summarise_traffic(fleet: Fleet) -> tuple[GroupSummary, ...]:
    """Summarises the transfers of every group of a run."""
    return tuple(
        _group(fleet, traffic, aligned)
        for traffic, aligned in zip(traffic_of(fleet), fleet.transfers(), strict=True)
    )


def _group(fleet: Fleet, traffic: GroupTraffic, aligned: AlignedTransfers) -> GroupSummary:
    return GroupSummary(
        traffic=traffic,
        layers=tuple(
            _layer(fleet, each, aligned) for each in traffic.layers if each.op == DISPATCH
        ),
        dispatch=traffic.total(DISPATCH),
        combine=traffic.total(COMBINE),
        rings={
            "transfers": len(aligned),
            "sound": int(aligned.sound.sum()),
            "incomplete": int((~aligned.complete).sum()),
            "disagree": int((~aligned.agree).sum()),
            "apart": int(aligned.apart.sum()),
            "out_of_step": int(aligned.out_of_step.sum()),
            "left_out": sum(aligned.left_out.values()),
        },
        waits={
            "dispatch": waiting(aligned, aligned.keys["type"] == DISPATCH),
            "combine": waiting(aligned, aligned.keys["type"] == COMBINE),
            "all": waiting(aligned),
        },
        disputes=tuple(
            (aligned.ranks[i], aligned.ranks[j], int(aligned.disputes[i, j]))
            for i, j in np.argwhere(aligned.disputes)
        ),
    )


def _layer(fleet: Fleet, each: LayerTraffic, aligned: AlignedTransfers) -> LayerRow:
    place = [layer.name for layer in fleet.layers].index(each.layer)
    chosen = aligned.of(DISPATCH, layer=place) & aligned.sound
    units = np.unique(aligned.field("unit")[chosen])
    unit = UNITS[int(units[0])] if len(units) == 1 and units[0] < len(UNITS) else ""
    null = _null(fleet, place, each.num_ranks, unit or UNITS[0])
    received = each.received_rows
    # Of ranks that did not count nothing is known, so that there is no balance of all.
    whole = bool(each.present.all()) and bool(received.any())
    at = null.at(int(received.sum())) if null is not None and whole else UNKNOWN
    return LayerRow(
        layer=each.layer,
        executions=int(each.each("executions").max(initial=0)),
        equal=each.complete,
        agree=each.agree,
        unit=unit,
        received=[int(n) for n in received],
        hottest=aligned.ranks[int(received.argmax())] if received.any() else None,
        gini=float(metrics.gini(received)) if whole else nan,
        gini_null=_band(at, "gini"),
        max_over_mean=float(metrics.max_over_mean(received)) if whole else nan,
        max_over_mean_null=_band(at, "max_over_mean"),
        per_dispatch=per_dispatch(aligned.received_rows(chosen), null),
    )


def _null(fleet: Fleet, place: int, num_ranks: int, unit: str) -> RankNull | None:
    layer = fleet.layers[place]
    try:
        return RankNull(layer.num_experts, layer.top_k, num_ranks, unit == "token")
    except InputError:  # top_k unknown, or ranks that do not divide the experts
        return None


def _band(null: nulls.Null, name: str) -> dict[str, float]:
    return {end: getattr(null, f"{name}_{end}") for end in ("mean", "low", "high")}


def group_dict(summary: GroupSummary) -> dict[str, Any]:
    """A group for JSON."""
    return {
        "name": summary.traffic.name,
        "ranks": list(summary.traffic.ranks),
        "absent": [_unread_dict(part) for part in summary.traffic.absent],
        "layers": list(summary.layers),
        "total": {
            OPS[each.op]: {
                "sent": each.sent.tolist(),
                "received": each.received.tolist(),
                "present": each.present.tolist(),
                "complete": each.complete,
                "agree": each.agree,
                **{
                    name: each.each(name).tolist()
                    for name in (
                        *("executions", "backward", "recomputed", "untimed"),
                        *("sent_bytes", "received_bytes", "duration_ns"),
                    )
                },
            }
            for each in (summary.dispatch, summary.combine)
        },
        "rings": summary.rings,
        "disputes": [
            {"source": i, "destination": j, "transfers": n} for i, j, n in summary.disputes
        ],
        "waiting": {
            name: {
                "waited_ns": each.waited_ns.tolist(),
                "duration_ns": each.duration_ns.tolist(),
                "last": each.last.tolist(),
                "transfers": each.transfers,
                "untimed": each.untimed,
                "unsound": each.unsound,
            }
            for name, each in summary.waits.items()
        },
    }


def _unread_dict(part: Unread) -> dict[str, object]:
    return {**tables.as_dict(part), "path": None if part.path is None else str(part.path)}


def print_traffic(console: Console, summary: GroupSummary, names: dict[str, str]) -> None:
    """Prints a group: matrix, balance of ranks, waiting, and what is missing or contradicts itself.

    Args:
        console: Where to.
        summary: The group.
        names: Short names of layers.
    """
    traffic = summary.traffic
    title = f"Traffic of group {plain(traffic.name)}: ranks {spans(traffic.ranks)}"
    console.print(title, style="bold")
    for part in traffic.absent:
        text = f"NOT IN IT: rank {part.rank} ({part.state}): {part.problem}"
        console.print(plain(text), style="yellow", soft_wrap=True)
    if not traffic.layers:
        console.print("no transfer recorded yet")
        console.print()
        return
    _print_matrix(console, summary)
    _print_layers(console, summary, names)
    _print_waiting(console, summary)
    _print_checks(console, summary)
    console.print()


def _print_matrix(console: Console, summary: GroupSummary) -> None:
    ranks, matrix = summary.traffic.ranks, summary.dispatch.sent
    shown = list(range(len(ranks)))
    note = ""
    if len(ranks) > MAX_SHOWN:
        received = summary.dispatch.received_rows
        busiest = np.argsort(-received.astype(np.float64), kind="stable")[:MAX_SHOWN]
        shown = sorted(busiest.tolist())
        note = f", the {MAX_SHOWN} of {len(ranks)} that received most (all in --json)"
    console.print(
        f"rows dispatched, whole run, all layers, from each rank (line) to each (column){note}"
    )
    columns = ["from", *(str(ranks[i]) for i in shown), "all sent"]
    table = tables.make_table(console, columns)
    known = summary.dispatch.present
    for i in shown:
        cells = [_short(matrix[i, j]) if known[i] else "?" for j in shown]
        total = _short(matrix[i].sum()) if known[i] else "?"
        table.add_row(str(ranks[i]), *cells, total)
    table.add_section()
    received = summary.dispatch.received_rows
    cells = [_short(received[j]) if known[j] else "?" for j in shown]
    table.add_row("got", *cells, _short(received.sum()))
    console.print(table)


def _short(value: Any) -> str:
    """A count in at most 5 characters, where a matrix has many."""
    number = int(value)
    if number < 10_000:
        return str(number)
    for unit in "kMGTPE":
        scaled = number / 1000 ** ("kMGTPE".index(unit) + 1)
        if scaled < 999.5:
            return f"{scaled:.3g}{unit}"
    return f"{number:.1e}"


def _print_layers(console: Console, summary: GroupSummary, names: dict[str, str]) -> None:
    console.print("rows that ranks received: whole run, and mean over the dispatches in the rings")
    columns = ("layer", "dispatches", "Gini", "null 95 %", "max/mean", "null 95 % ", "hottest")
    per = ("each: Gini", "null", "corrected", "max/mean ", "null ")
    table = tables.make_table(console, (*columns, *per), left=("layer",))
    for row in summary.layers:
        mark = "" if row.equal and row.agree else "*"
        each = row.per_dispatch
        table.add_row(
            plain(names.get(row.layer, row.layer)) + mark,
            quantity(row.executions),
            figure(row.gini),
            _band_text(row.gini_null, 3),
            figure(row.max_over_mean, 2),
            _band_text(row.max_over_mean_null, 2),
            "-" if row.hottest is None else f"rank {row.hottest}",
            figure(each.gini),
            figure(each.gini_null),
            figure(each.gini_corrected),
            figure(each.max_over_mean, 2),
            figure(each.max_over_mean_null, 2),
        )
    console.print(table)
    if any(not row.equal for row in summary.layers):
        note = "* not one matrix: ranks are absent, or have not executed it equally often (yet)"
        console.print(note, style="dim")


def _band_text(band: dict[str, float], digits: int) -> str:
    low, high = figure(band["low"], digits), figure(band["high"], digits)
    return "-" if "-" in (low, high) else f"{low}-{high}"


def _print_waiting(console: Console, summary: GroupSummary) -> None:
    every = summary.waits["all"]
    if not every.transfers:
        return
    console.print("waiting, estimated: own duration over the shortest of the group, in the rings")
    columns = ("rank", "in dispatch", "in combine", "of its transfers", "last to come")
    table = tables.make_table(console, columns)
    order = np.argsort(-every.waited_ns, kind="stable")
    shown = sorted(order[:MAX_SHOWN].tolist())
    for i in shown:
        waited, spent = float(every.waited_ns[i]), float(every.duration_ns[i])
        share = f"{100 * waited / spent:.0f} %" if spent else "-"
        table.add_row(
            str(every.ranks[i]),
            _seconds(float(summary.waits["dispatch"].waited_ns[i]) / 1e9),
            _seconds(float(summary.waits["combine"].waited_ns[i]) / 1e9),
            share,
            f"{100 * int(every.last[i]) / every.transfers:.0f} %",
        )
    console.print(table)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _print_checks(console: Console, summary: GroupSummary) -> None:
    rings, every = summary.rings, summary.waits["all"]
    text = (
        f"rings: {quantity(rings['sound'])} of {quantity(rings['transfers'])} transfers are whole"
    )
    if rings["incomplete"]:
        text += f", {quantity(rings['incomplete'])} lack a rank's record"
    if every.untimed:
        text += f", {quantity(every.untimed)} without durations"
    console.print(text)
    if summary.disputes:
        pairs = ", ".join(f"{i} to {j}" for i, j, _ in summary.disputes[:6])
        more = ", ..." if len(summary.disputes) > 6 else ""
        text = (
            f"DISAGREE: sender and receiver say different things in {quantity(rings['disagree'])} "
            f"transfers (rank {pairs}{more}): left out; did a rank begin or restart later?"
        )
        console.print(text, style="yellow")
    if rings["apart"]:
        text = (
            f"APART: {quantity(rings['apart'])} transfers of equal number were at different times: left "
            "out; did a rank begin or restart later?"
        )
        console.print(text, style="yellow")
    if rings["out_of_step"]:
        text = f"OUT OF STEP: {quantity(rings['out_of_step'])} match but for their number: left out"
        console.print(text, style="yellow")
