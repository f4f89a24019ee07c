"""What a live view looks at: found, chosen, read, and followed over restarts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.fleet import Fleet, spans
from dodoco_ext.follow import Owner
from dodoco_ext.recording import Reader
from dodoco_ext.views.tables import duration, plain, quantity
from dodoco_ext.views.top.catalog import Catalog, Entry, runs
from dodoco_ext.views.top.figures import rows_of
from dodoco_ext.views.top.frame import Choice, Frame, cost_line
from dodoco_ext.views.top.tally import Tally
from dodoco_ext.views.top.watch import Watch

_WORDS = {"dead": "killed"}


class Session:
    """A live view without a terminal: `look()` gives one picture after another.

    Args:
        source: As for `dodoco show`; None: all recordings of this user.
        window_s: How far back the window reaches, in seconds.
        num_ranks: Ranks that share the experts of a layer; None: as recorded or assumed.

    Attributes:
        whole_run: Whether figures are those of the whole run, not of the window.
    """

    def __init__(
        self, source: str | None = None, *, window_s: float = 60.0, num_ranks: int | None = None
    ) -> None:
        self.catalog = Catalog(source)
        self.whole_run = False
        self._window_s = window_s
        self._num_ranks = num_ranks
        self._choice: Choice | None = None
        self._pinned = False
        self._watch: Watch | None = None
        self._watched: tuple[str, ...] = ()
        self._trouble: list[str] = []

    def choose(self, choice: Choice) -> None:
        """Looks at something else from the next look on, and stays with it and its restarts."""
        if not choice.means(self._choice):
            self._choice, self._watch, self._watched = choice, None, ()
        self._pinned = True

    def look(self, now_s: float | None = None) -> Frame:
        """Reads everything once more; never raises for what files hold or do."""
        self._trouble = []
        self.catalog.look()
        self._decide()
        choices = self._choices()
        if self._choice is None:
            return Frame(self._waiting(), choices=choices, notes=self._notes(()))
        self._open(self._choice)
        if self._watch is None:
            return Frame(self._waiting(), self._choice, choices, notes=self._notes(()))
        tally = self._watch.look(now_s, ended=not self.is_live())
        return self._frame(self._watch, tally, choices)

    def is_live(self) -> bool:
        """Whether anything that is looked at still records."""
        return self._watch is not None and "live" in self._states(self._watch.fleet).values()

    # ---- what is looked at --------------------------------------------------------------------

    def _decide(self) -> None:
        if self._choice is None:
            meant = self.catalog.meant()
            if meant:
                first = next((e for e in meant if e.state == "live"), meant[0])
                one = self.catalog.means_one
                self._choice = Choice(first.run, first.reader.uuid if one else None, first.run)
                text = self.catalog.source
                self._pinned = text is not None and not Path(text).is_dir()
            return
        members = self._members(self._choice)
        if not members or any(entry.state == "live" for entry in members):
            return
        newest = max(entry.created_ns for entry in members)
        later = [e for e in self.catalog.entries if e.created_ns > newest]
        for entry in sorted(later, key=lambda e: e.created_ns):
            restarted = any(
                Owner.of(old.reader).is_followed_by(Owner.of(entry.reader)) for old in members
            )
            if restarted or (not self._pinned and entry.state == "live"):
                alone = self._choice.recording is not None
                chosen = entry.reader.uuid if alone else None
                self._choice = Choice(entry.run, chosen, entry.run)
                return

    def _members(self, choice: Choice) -> list[Entry]:
        """The recordings of a choice; with one recording, that alone."""
        return [
            entry
            for entry in self.catalog.entries
            if (entry.run == choice.run if choice.recording is None else False)
            or entry.reader.uuid == choice.recording
        ]

    def _open(self, choice: Choice) -> None:
        """Takes up the recordings of a choice, where they are others than at the last look."""
        members = self._members(choice)
        wanted = tuple(sorted(entry.reader.uuid for entry in members))
        if not members or wanted == self._watched:
            return  # removed meanwhile: what was read last stays
        readers = [entry.reader for entry in members if self._reads(entry.reader)]
        if not readers:
            return
        fleet = self._fleet(readers)
        if fleet is None:
            return
        self._watched = wanted
        old = self._watch
        if old is not None and old.fleet.layers and _same_layers(old.fleet, fleet):
            old.follow(fleet)
            return
        alone = choice.recording is not None or fleet.world_size == 1
        self._watch = Watch(fleet, window_s=self._window_s, num_ranks=self._num_ranks, alone=alone)

    def _reads(self, reader: Reader) -> bool:
        try:
            reader.snapshot()
        except RecordingError as error:
            self._trouble.append(str(error))
            return False
        return True

    def _fleet(self, readers: Sequence[Reader]) -> Fleet | None:
        """One fleet of them, or of the latest alone where they do not belong together."""
        for given in (readers, readers[:1]):
            try:
                return Fleet(given)
            except (InputError, RecordingError) as error:
                self._trouble.append(str(error))
        return None

    def _choices(self) -> tuple[Choice, ...]:
        found = []
        for run, entries in runs(self.catalog.entries).items():
            if len(entries) > 1:
                found.append(Choice(run, None, plain(f"{run}: all ranks")))
            for entry in entries:
                text = f"{run}: rank {entry.rank}, process {entry.pid}, {_word(entry.state)}"
                found.append(Choice(run, entry.reader.uuid, plain(text)))
        return tuple(found)

    # ---- what is said -------------------------------------------------------------------------

    def _waiting(self) -> str:
        looked = ", ".join(plain(str(folder)) for folder in self.catalog.folders)
        what = "" if self.catalog.source is None else f" of {plain(self.catalog.source)}"
        return f"No recording{what} yet; looking in {looked}."

    def _states(self, fleet: Fleet) -> dict[int, str]:
        found = {}
        for rank, reader in fleet.ranks.items():
            try:
                found[rank] = reader.state
            except RecordingError as error:
                found[rank] = error.state
        return found | (self._watch.failed if self._watch else {})

    def _frame(self, watch: Watch, tally: Tally, choices: tuple[Choice, ...]) -> Frame:
        fleet, states = watch.fleet, self._states(watch.fleet)
        window = watch.window()
        live = "live" in states.values()
        whole = self.whole_run or not window.passes.any()
        span, text = window, f"last {duration(window.seconds)}"
        if whole:
            span, text = watch.whole_run(), "whole run"
            span.seconds = _age_s(fleet, live)
        rows = rows_of(fleet.layers, span, list(watch.parts), watch.placing, watch.in_flight())
        costs = (span.by_dispatch, span.by_counts, span.by_pass)
        cost = cost_line(
            costs,
            max(watch.placing.sizes),
            watch.chance_of_passes(span),
            placed=all(watch.placing.recorded),
        )
        rate = max(tally.tokens, default=0) / tally.seconds if tally.seconds else float("nan")
        assert self._choice is not None, "something is looked at"
        return Frame(
            "",
            self._choice,
            choices,
            cost,
            status=self._status(fleet, states, rate if live else 0.0, text),
            notes=self._notes(self._remarks(watch, states, live, whole)),
            rows=rows,
            span=text,
            rank_tokens=dict(span.rank_tokens),
            tail=tuple(watch.tail),
        )

    def _status(self, fleet: Fleet, states: dict[int, str], rate: float, span: str) -> str:
        counted: dict[str, int] = {}
        for state in states.values():
            counted[state] = counted.get(state, 0) + 1
        said = ", ".join(f"{number} {_word(state)}" for state, number in sorted(counted.items()))
        alone = self._choice is not None and self._choice.recording is not None
        who = f"rank {spans(states)} of {fleet.world_size}" if alone else f"{len(states)} ranks"
        if len(states) == 1:
            who, said = f"rank {spans(states)}", _word(next(iter(states.values())))
        tokens = quantity(round(rate)) if rate == rate else "-"
        layers = f"{len(fleet.layers)} layers"
        return f"{plain(fleet.run)} | {who}: {said} | {layers} | {tokens} tokens/s | {span}"

    def _remarks(
        self, watch: Watch, states: dict[int, str], live: bool, whole: bool
    ) -> tuple[str, ...]:
        found = []
        fleet = watch.fleet
        if not live:
            ended = sorted({_word(state) for state in states.values()})
            found.append(
                f"Ended, {', '.join(ended)}: the last state is kept; a restart will be followed."
            )
        elif whole and not self.whole_run:
            found.append("Nothing was routed since the window began: figures are of the whole run.")
        broken = [r for r, s in states.items() if s not in ("live", "closed")]
        if broken and live:
            said = {_word(states[rank]) for rank in broken}
            found.append(
                f"Rank {spans(broken)}: {', '.join(sorted(said))}; the last state is kept."
            )
        if fleet.missing and not watch.alone:
            gone = [part.rank for part in fleet.missing if part.rank is not None]
            found.append(f"Missing: rank {spans(gone)} of {fleet.world_size}; not counted in.")
        if any(older.state == "live" for older in fleet.superseded):
            found.append("Two live recordings claim one rank: is DODOCO_RANK set?")
        uncovered = {
            str(part.get("name")) for reader in fleet.ranks.values() for part in _uncovered(reader)
        }
        if uncovered:
            found.append(f"Not observed: {plain(', '.join(sorted(uncovered)))}.")
        faults = _faults(fleet)
        if faults:
            found.append(f"{faults} telemetry faults: `dodoco show` names the last.")
        return tuple(found)

    def _notes(self, remarks: tuple[str, ...]) -> tuple[str, ...]:
        problems = list(self.catalog.problems.values())
        if len(problems) > 1:
            problems = [f"{problems[0]} (and {len(problems) - 1} more files)"]
        said = (*remarks, *self._trouble, *problems)
        return tuple(dict.fromkeys(plain(text) for text in said))


def _word(state: str) -> str:
    return _WORDS.get(state, state or "unreadable")


def _same_layers(a: Fleet, b: Fleet) -> bool:
    return [replace(layer, ranks=()) for layer in a.layers] == [
        replace(layer, ranks=()) for layer in b.layers
    ]


def _age_s(fleet: Fleet, live: bool) -> float:
    """How long a run has counted; nan where it was killed and nobody knows when."""
    try:
        headers = [reader.header for reader in fleet.ranks.values()]
    except RecordingError:
        return float("nan")
    end = time.time_ns() if live else max(int(h["closed_unix_ns"]) for h in headers)
    begin = min(int(h["created_unix_ns"]) for h in headers)
    return (end - begin) / 1e9 if end > begin else float("nan")


def _uncovered(reader: Reader) -> list[dict[str, object]]:
    value = reader.metadata.get("uncovered")
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def _faults(fleet: Fleet) -> int:
    try:
        return sum(int(reader.header["num_faults"]) for reader in fleet.ranks.values())
    except RecordingError:
        return 0
