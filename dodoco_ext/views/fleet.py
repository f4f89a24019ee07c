"""`dodoco show RUN --fleet`: the recordings of all ranks of a run as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from dodoco_ext.alignment import Aligned
from dodoco_ext.counters import LayerSnapshot
from dodoco_ext.errors import RecordingError
from dodoco_ext.fleet import SCOPE as FLEET_SCOPE
from dodoco_ext.fleet import Fleet, Superseded, is_named, spans
from dodoco_ext.fleet_snapshot import FleetSnapshot, Unread
from dodoco_ext.placements import Placements, Received
from dodoco_ext.sources import Listed
from dodoco_ext.views import tables
from dodoco_ext.views.balances import Balance, RankBalance, balances, mean
from dodoco_ext.views.listing import describe
from dodoco_ext.views.placed import PlacementInfo, placement_info, received_by_rank, summed
from dodoco_ext.views.show import (
    counted_dict,
    print_balance,
    print_experts,
    print_names,
    print_not_assigned,
    print_ranks,
)
from dodoco_ext.views.summary import uncovered_of
from dodoco_ext.views.tables import figure, plain, quantity
from dodoco_ext.views.traffic import SCOPE as TRAFFIC_SCOPE
from dodoco_ext.views.traffic import GroupSummary, group_dict, print_traffic, summarise_traffic

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "dodoco.fleet/1"

SCOPE = {
    **FLEET_SCOPE,
    "mean_of_layers": "mean of the layers' figures, every layer of equal weight; none where one is",
    "null": "uniform routing of every token to top_k distinct experts",
}


@dataclass(frozen=True)
class Rank:
    """One rank that was read. `passes` and `tokens`: of its layer that saw most."""

    rank: int
    state: str
    path: str
    recording: str
    pid: int | None
    host: str | None
    layers: int
    lanes: int
    passes: int
    tokens: int
    lost: int
    faults: int
    uncovered: list[dict[str, str]]


@dataclass(frozen=True)
class FleetLayerSummary:
    """One layer, summed over the ranks that have it."""

    counters: LayerSnapshot
    whole_run: Balance
    ranks: RankBalance | None
    summed_ranks: tuple[int, ...]


@dataclass(frozen=True)
class Alignment:
    """What the records that the rings still hold allow to put side by side.

    Attributes:
        groups: Combinations of lane, iteration, micro-batch and layer that a rank has a record of.
        complete: Those of which every rank read that should have a record has one.
        iterations: Iterations with a record, those of different lanes counted apart.
        left_out: Records that cannot be put side by side.
    """

    groups: int
    complete: int
    iterations: int
    left_out: int


@dataclass(frozen=True)
class FleetSummary:
    """A run, summarised."""

    run: str
    world_size: int
    ranks: tuple[Rank, ...]
    missing: tuple[Unread, ...]
    unread: tuple[Unread, ...]
    superseded: tuple[Superseded, ...]
    layers: tuple[FleetLayerSummary, ...]
    aligned: Alignment
    unrouted: frozenset[str]
    traffic: tuple[GroupSummary, ...]
    foreign: Mapping[str, int]
    placements: PlacementInfo | None

    @property
    def mean_of_layers(self) -> dict[str, float]:
        """The layers' figures, averaged."""
        return {
            name: mean(getattr(layer.whole_run, name) for layer in self.layers)
            for name in ("gini", "max_over_mean")
        }

    @property
    def tokens_max_over_mean(self) -> float:
        """Tokens of the rank with most over the mean of the ranks; nan without tokens."""
        tokens = [rank.tokens for rank in self.ranks]
        return max(tokens) * len(tokens) / sum(tokens) if sum(tokens) else float("nan")


def summarise_fleet(fleet: Fleet, *, num_ranks: int | None = None) -> FleetSummary:
    """Summarises a run.

    Args:
        fleet: Its recordings.
        num_ranks: Expert-parallel ranks to fold the summed counts into; None: those that placements are
            recorded of.

    Raises:
        RecordingError: No rank can be read any more.
    """
    snapshot = fleet.snapshot()
    if not snapshot.ranks:
        raise RecordingError(
            f"no rank of run {fleet.run} can be read: {snapshot.missing[0].problem}"
        )
    aligned = fleet.records()
    placements = {rank: fleet.ranks[rank].placements() for rank in snapshot.ranks}
    received = _received(fleet, snapshot, placements)
    each_balance = balances(snapshot.layers, num_ranks, received)
    parts = zip(snapshot.layers, snapshot.layer_ranks, each_balance, strict=True)
    return FleetSummary(
        run=fleet.run,
        world_size=fleet.world_size,
        ranks=tuple(
            _rank(fleet, aligned, rank, mine.layers) for rank, mine in snapshot.ranks.items()
        ),
        missing=snapshot.missing,
        unread=fleet.unread,
        superseded=fleet.superseded,
        layers=tuple(FleetLayerSummary(layer, b, r, ranks) for layer, ranks, (b, r) in parts),
        aligned=Alignment(
            groups=len(aligned),
            complete=int(aligned.complete.sum()),
            iterations=len(np.unique(aligned.keys[["lane", "iteration"]])),
            left_out=sum(aligned.left_out.values()),
        ),
        unrouted=fleet.unrouted,
        traffic=summarise_traffic(fleet),
        foreign=fleet.foreign,
        placements=max(
            filter(None, map(placement_info, placements.values())),
            key=lambda info: info.last_unix_ns,
            default=None,
        ),
    )


def _received(
    fleet: Fleet, snapshot: FleetSnapshot, placements: Mapping[int, Placements | None]
) -> list[Received | None]:
    """What each rank received of each layer; None where the placement of one that sent is not known."""
    parts: list[list[Received | None]] = [[] for _ in snapshot.layers]
    for rank, mine in snapshot.ranks.items():
        for own, part in enumerate(received_by_rank(placements[rank], mine.layers)):
            parts[fleet.place_of(rank, own)].append(part)
    return [summed(each) for each in parts]


def _rank(fleet: Fleet, aligned: Aligned, rank: int, layers: tuple[LayerSnapshot, ...]) -> Rank:
    reader = fleet.ranks[rank]
    info = describe(Listed(reader.path, reader))
    return Rank(
        rank=rank,
        state=info.state,
        path=str(reader.path),
        recording=reader.uuid,
        pid=info.pid,
        host=info.host,
        layers=len(layers),
        lanes=reader.header["num_lanes"],
        passes=max(layer.passes for layer in layers),
        tokens=max(layer.tokens for layer in layers),
        lost=aligned.lost.get(rank, 0),
        faults=reader.header["num_faults"],
        uncovered=uncovered_of(reader),
    )


def fleet_json(summary: FleetSummary, *, experts: bool) -> str:
    """The summary as JSON; `experts` adds the counts of every expert."""
    return tables.to_json(
        {
            "schema": SCHEMA,
            "scope": SCOPE,
            "run": summary.run,
            "world_size": summary.world_size,
            "ranks": summary.ranks,
            "tokens_max_over_mean": summary.tokens_max_over_mean,
            "missing": [_unread_dict(part) for part in summary.missing],
            "unread": [_unread_dict(part) for part in summary.unread],
            "superseded": [{**tables.as_dict(s), "path": str(s.path)} for s in summary.superseded],
            "placements": summary.placements,
            "mean_of_layers": summary.mean_of_layers,
            "layers": [
                {
                    **counted_dict(layer, experts=experts),
                    "summed_ranks": layer.summed_ranks,
                    "routed": layer.counters.name not in summary.unrouted,
                }
                for layer in summary.layers
            ],
            "aligned": summary.aligned,
            "traffic_scope": TRAFFIC_SCOPE,
            "traffic": [group_dict(group) for group in summary.traffic],
            "foreign": dict(summary.foreign),
        }
    )


def _unread_dict(part: Unread) -> dict[str, object]:
    return {**tables.as_dict(part), "path": None if part.path is None else str(part.path)}


def print_fleet(summary: FleetSummary, *, experts: bool) -> None:
    """Prints the summary of a run; `experts` adds the busiest and the quietest ones."""
    console = tables.console()
    read = f"{len(summary.ranks)} of {summary.world_size} ranks"
    console.print(f"run {plain(summary.run)}: {read}", style="bold")
    console.print(
        "scope     all ranks read, summed; a token that several ranks route counts once a rank"
    )
    if summary.placements is not None:
        console.print(f"placed    {summary.placements.text}")
    print_gaps(console, summary, summary.missing)
    counters = [layer.counters for layer in summary.layers]
    names = print_names(console, [c.name for c in counters], [c.in_flight for c in counters])
    routed = [c.name not in summary.unrouted for c in counters]
    if any(routed):
        layers = tuple(compress(summary.layers, routed))
        _print_counts(console, layers, list(compress(names, routed)), experts=experts)
    if summary.unrouted:
        note = f"{len(summary.unrouted)} layers: routers not observed, transfers only"
        console.print(note, style="dim")
        console.print()
    _print_each_rank(console, summary)
    short = {c.name: name for c, name in zip(counters, names, strict=True)}
    for group in summary.traffic:
        print_traffic(console, group, short)
    a = summary.aligned
    console.print(
        f"rings: {quantity(a.complete)} of {quantity(a.groups)} passes (lane, iteration, micro-batch, "
        f"layer) are held by all ranks that have the layer; {quantity(a.iterations)} iterations"
    )
    parts: dict[tuple[str, str], list[int]] = {}
    for rank in summary.ranks:
        for part in rank.uncovered:
            parts.setdefault((part["name"], part["reason"]), []).append(rank.rank)
    for (name, reason), ranks in parts.items():
        text = f"NOT OBSERVED: {name}: {reason} (rank {spans(ranks)})"
        console.print(plain(text), style="yellow")
    if faulty := [rank for rank in summary.ranks if rank.faults]:
        where = spans(rank.rank for rank in faulty)
        text = (
            f"FAULTS: {sum(r.faults for r in faulty)} in rank {where}: `dodoco show` its recording"
        )
        console.print(text, style="red")
    everywhere = {rank.rank for rank in summary.ranks}
    if any(set(layer.summed_ranks) != everywhere for layer in summary.layers):
        console.print("not every rank has every layer: each is summed over its own", style="dim")
    if any(c.in_flight for c in counters):
        note = "* in flight: read during a pass of a rank, or its writer died in one"
        console.print(note, style="dim")


def _print_counts(
    console: Console, layers: tuple[FleetLayerSummary, ...], names: list[str], *, experts: bool
) -> None:
    scope = "Whole run, all ranks read"
    whole = tuple(
        mean(getattr(layer.whole_run, name) for layer in layers)
        for name in ("gini", "max_over_mean")
    )
    print_balance(console, scope, layers, names, (whole[0], whole[1]))
    print_not_assigned(console, layers, names)
    print_ranks(console, scope, layers, names)
    if experts:
        print_experts(console, scope, layers, names)


def print_gaps(
    console: Console, summary: Fleet | FleetSummary, missing: tuple[Unread, ...]
) -> None:
    """Prints what of a run is missing, unreadable, superseded, or of another run.

    Args:
        console: Where to.
        summary: The run.
        missing: Ranks that are not in what follows.
    """
    absent = [part.rank for part in missing if part.state == "missing"]
    if absent:
        ranks = spans(rank for rank in absent if rank is not None)
        console.print(f"MISSING: no recording of rank {ranks}", style="yellow")
        if not is_named(summary.run):
            note = "the run's name is a start time, which ranks may not share: set DODOCO_RUN"
            console.print(note, style="yellow")
    files = {part.path: part for part in (*summary.unread, *missing) if part.path}
    for part in files.values():
        rank = "a rank" if part.rank is None else f"rank {part.rank}"
        text = f"NOT READ: {rank} ({part.state}): {part.problem}"
        console.print(plain(text), style="yellow", soft_wrap=True)
    for older in summary.superseded:
        live = older.state == "live"
        why = "two owners claim it; the newer is counted" if live else "its rank was restarted"
        text = f"not counted: {older.path} (rank {older.rank}, {older.state}): {why}"
        console.print(plain(text), style="yellow" if live else "dim", soft_wrap=True)
    if summary.foreign:
        runs = ", ".join(f"{plain(run)} ({n})" for run, n in list(summary.foreign.items())[:8])
        more = ", ..." if len(summary.foreign) > 8 else ""
        console.print(f"not of this run, in the same folder: {runs}{more}", style="dim")


def _print_each_rank(console: Console, summary: FleetSummary) -> None:
    console.print("Each rank: its layer that saw most", style="bold")
    columns = ("rank", "state", "layers", "passes", "tokens", "pid", "host", "lost records")
    table = tables.make_table(console, columns, left=("state", "host"))
    for r in summary.ranks:
        pid = "-" if r.pid is None else str(r.pid)
        counted = (quantity(r.passes), quantity(r.tokens), pid, plain(r.host or "-"))
        table.add_row(str(r.rank), r.state, quantity(r.layers), *counted, quantity(r.lost))
    console.print(table)
    spread = figure(summary.tokens_max_over_mean, 2)
    console.print(f"tokens of the busiest rank over the mean of the ranks: {spread}")
    console.print()
