"""`dodoco show SOURCE --last 30s`: the end of a run, from its recordings."""

from __future__ import annotations

import itertools
import re
import time
from typing import TYPE_CHECKING

from dodoco_ext.errors import InputError
from dodoco_ext.fleet import Fleet, spans
from dodoco_ext.traffic.ending import SCOPE, Ending, HotExpert
from dodoco_ext.traffic.standing import Position, Stood
from dodoco_ext.views import tables
from dodoco_ext.views.fleet import print_gaps
from dodoco_ext.views.tables import duration, figure, plain, quantity

if TYPE_CHECKING:
    from rich.console import Console

    from dodoco_ext.traffic.steps import Step

SCHEMA = "dodoco.ending/1"
MAX_LAYERS = 5
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds_of(text: str) -> float:
    """A time such as `30s`, `2m` or `1h` in seconds.

    Raises:
        InputError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|min|m|h|)", text.strip())
    if match is None or not 0 < float(match[1]) < 1e7:
        raise InputError(f"--last {text!r}: give a time above 0, such as 30s, 5m or 1h")
    return float(match[1]) * _UNITS[match[2]]


def ending_json(fleet: Fleet, ending: Ending) -> str:
    """The end of a run as JSON."""
    return tables.to_json(
        {
            "schema": SCHEMA,
            "scope": SCOPE,
            "run": fleet.run,
            "world_size": fleet.world_size,
            "end_unix_ns": ending.end_ns,
            "window_s": ending.window_s,
            "step_s": ending.step_s,
            "ranks": ending.ranks,
            "stood": ending.stood,
            "hottest_experts": ending.hottest,
            "received": ending.received,
            "waited_s": ending.waited_s,
            "steps": ending.steps,
            "foreign": dict(fleet.foreign),
        }
    )


def print_ending(fleet: Fleet, ending: Ending) -> None:
    """Prints the end of a run: who died, where it stood, who was hot, and each second before."""
    console = tables.console()
    states = [rank.state for rank in ending.ranks]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    console.print(f"run {plain(fleet.run)}: {fleet.world_size} ranks, {counted}", style="bold")
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(ending.end_ns / 1e9))
    ago = duration(max(time.time() - ending.end_ns / 1e9, 0.0))
    console.print(f"last record at {at} UTC, {ago} ago")
    print_gaps(console, fleet, fleet.missing)
    console.print()
    for stood in ending.stood:
        _print_stood(console, stood)
    _print_hottest(console, ending)
    console.print()
    _print_ranks(console, ending)
    _print_steps(console, ending)


def _print_stood(console: Console, stood: Stood) -> None:
    group = f"group {plain(stood.group)} (ranks {spans(stood.ranks)})"
    if stood.at is not None:
        console.print(
            f"STOOD AT {_named(stood.at)}: rank {spans(stood.lacking)} had not finished it, rank "
            f"{spans(stood.finished)} had; {group}",
            style="bold yellow",
            soft_wrap=True,
        )
    elif stood.after is not None:
        console.print(
            f"STOOD AFTER {_named(stood.after)}: rank {spans(stood.finished)} had finished it, and none "
            f"the next transfer; {group}",
            style="bold yellow",
            soft_wrap=True,
        )
    if stood.unknown:
        text = f"rank {spans(stood.unknown)}: no transfer that could be compared; {group}"
        console.print(text, style="yellow", soft_wrap=True)


def _named(position: Position) -> str:
    kind = "backward " if position.backward else "recomputed " if position.recompute else ""
    lane = f" of lane {position.lane}" if position.lane else ""
    return (
        f"iteration {position.iteration}{lane}, layer {plain(position.layer)}, {kind}{position.op}"
    )


def _print_hottest(console: Console, ending: Ending) -> None:
    for hot in ending.hottest[:MAX_LAYERS]:
        console.print("hottest " + _hot(hot, ending), soft_wrap=True)
    if len(ending.hottest) > MAX_LAYERS:
        console.print(f"({len(ending.hottest) - MAX_LAYERS} layers more in --json)", style="dim")
    total = sum(ending.received.values())
    if total:
        rank = max(ending.received, key=lambda r: ending.received[r])
        over = ending.received[rank] * len(ending.received) / total
        what = f"{quantity(ending.received[rank])} rows, {over:.2f} times the mean"
        console.print(f"hottest rank {rank}: received {what}, {_window(ending)}")
    waited = ending.waited_s
    if any(waited.values()):
        least, most = min(waited, key=waited.__getitem__), max(waited, key=waited.__getitem__)
        console.print(
            f"waiting, estimated, {_window(ending)}: rank {most} most ({waited[most]:.2f} s), rank "
            f"{least} least ({waited[least]:.2f} s): the others waited for it"
        )


def _hot(hot: HotExpert, ending: Ending) -> str:
    where = "" if hot.rank is None else f" on rank {hot.rank}"
    if hot.scope == "window":
        what, when = "rows", _window(ending)
    else:
        what, when = "assignments", "over the whole run (the rings hold no counts per expert)"
    return (
        f"expert {hot.expert} of {plain(hot.layer)}{where}: {quantity(hot.count)} {what}, "
        f"{hot.over_mean:.2f} times the mean, {when}"
    )


def _window(ending: Ending) -> str:
    return f"in the last {ending.window_s:g} s"


def _print_ranks(console: Console, ending: Ending) -> None:
    console.print("What each rank finished last", style="bold")
    columns = ("rank", "state", "before end", "behind", "iteration", "layer", "op", "ring holds")
    table = tables.make_table(console, columns, left=("state", "layer", "op"))
    for rank in ending.ranks:
        last = rank.last
        kind = "" if last is None else "bwd " if last.backward else "re " if last.recompute else ""
        table.add_row(
            str(rank.rank),
            rank.state,
            "-" if last is None else f"{rank.before_end_s:.2f} s",
            "-" if rank.behind is None else str(rank.behind),
            "-" if last is None else str(last.iteration),
            "-" if last is None else plain(last.layer),
            "-" if last is None else kind + last.op,
            f"{rank.history_s:.1f} s",
        )
    console.print(table)
    console.print("behind: transfers that another rank had finished", style="dim")
    console.print()


def _is_empty(step: Step) -> bool:
    return not (step.passes or step.transfers)


def _print_steps(console: Console, ending: Ending) -> None:
    unit = "second" if ending.step_s == 1 else f"{ending.step_s} seconds"
    console.print(f"Each {unit} of the last {ending.window_s:g}, all ranks", style="bold")
    columns = ("before end", "iterations", "passes", "tokens", "transfers", "rows dispatched")
    table = tables.make_table(console, (*columns, "max/mean", "busiest", "waited"))
    # What lies before the first record, the rings do not hold, or the job had not begun.
    for step in itertools.dropwhile(_is_empty, ending.steps):
        if _is_empty(step):
            table.add_row(f"{step.from_s:g} s", *["-"] * 8)
            continue
        span = str(step.first) if step.first == step.last else f"{step.first}-{step.last}"
        table.add_row(
            f"{step.from_s:g} s",
            span,
            quantity(step.passes),
            quantity(step.tokens),
            quantity(step.transfers),
            quantity(step.rows),
            figure(step.max_over_mean, 2),
            "-" if step.busiest is None else f"rank {step.busiest}",
            f"{step.waited_s:.2f} s",
        )
    console.print(table)
