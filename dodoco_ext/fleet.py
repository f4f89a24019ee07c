"""Many recordings as one run: its ranks, their counters added up, their records side by side."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.recording import RECORD_DTYPE, ROUTE, LayerSnapshot, Reader, Snapshot
from dodoco_ext.sources import find, resolve

Source: TypeAlias = str | int | os.PathLike[str] | None

MAX_WORLD_SIZE = 1 << 17
"""A header that says more is taken for damaged: each missing rank is named."""

SCOPE = {
    "layers": "exact counters (board), summed over the ranks read; a token that several ranks route "
    "(tensor parallelism) counts once a rank",
    "ranks": "one rank each: exact counters (board); tokens of the layer that saw most",
    "aligned": "records that the rings still hold: one group for every lane, iteration, micro-batch "
    "and layer; complete where every rank read that has the layer and the lane has the record",
}

KEY_DTYPE = np.dtype(
    [("lane", "<u4"), ("iteration", "<u8"), ("microbatch", "<u4"), ("layer", "<u4")]
)

_COUNTERS = (
    *("passes", "tokens", "assignments", "padded", "invalid", "capacity_dropped"),
    *("recomputed", "recorded_passes"),
)
_ARRAYS = ("counts", "gini_histogram", "max_over_mean_histogram")
_UNNAMED_RUN = re.compile(r"\d{8}-\d{6}")
_RANK = re.compile(r"\.r(\d{1,9})\.")
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Unread:
    """A file of the run that could not be read, or a rank without any.

    Attributes:
        rank: The rank, from the file's name where it cannot be read; None where that does not say.
        state: `missing` (no file), the state of the file (see `RecordingError.state`), or `restarted`
            (in a difference: another recording than in the earlier snapshot).
        problem: The reason, one line.
        path: The file, where there is one.
    """

    rank: int | None
    state: str
    problem: str
    path: Path | None = None


@dataclass(frozen=True)
class Superseded:
    """An older recording of a rank that has a newer one in the same run; it is not counted.

    Attributes:
        rank: The rank.
        path: The older file.
        state: Its state; `live` says that two owners claim one rank, which is no restart.
    """

    rank: int
    path: Path
    state: str


@dataclass(frozen=True)
class FleetLayer:
    """A layer of the run, matched by name over the ranks.

    Attributes:
        name: Qualified name of the router module.
        num_experts: Logical experts E.
        top_k: Experts a token is sent to; 0 where unknown.
        ranks: The ranks that have it: with pipeline parallelism, those of one stage.
    """

    name: str
    num_experts: int
    top_k: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FleetSnapshot:
    """The exact counters of a run at one moment, or over the window between two.

    The ranks are read one after another, not at one instant: while they record, one may be some
    passes ahead of another.

    Attributes:
        run: Name of the run.
        world_size: Ranks the run has.
        ranks: Scope one rank: its snapshot, by ascending rank.
        missing: Ranks that are not in it, and why.
        layers: Scope all ranks read: counters, counts and histograms summed over the ranks that have
            the layer. A token that several ranks route counts once a rank.
        layer_ranks: The ranks summed in each layer.
    """

    run: str
    world_size: int
    ranks: Mapping[int, Snapshot]
    missing: tuple[Unread, ...]
    layers: tuple[LayerSnapshot, ...]
    layer_ranks: tuple[tuple[int, ...], ...]

    @property
    def counts(self) -> list[NDArray[np.uint64]]:
        """Assignments per expert summed over ranks, one array [E] a layer."""
        return [layer.counts for layer in self.layers]

    @property
    def tokens(self) -> dict[int, int]:
        """Tokens of each rank: those of its layer that saw most."""
        return {
            rank: max((layer.tokens for layer in snapshot.layers), default=0)
            for rank, snapshot in self.ranks.items()
        }

    def __sub__(self, earlier: FleetSnapshot) -> FleetSnapshot:
        """What happened between two snapshots of one run.

        Only ranks that both hold, of the same recording: what a rank counted before it was restarted
        and after the earlier snapshot is not known. The others are named in `missing`.

        Raises:
            InputError: They are of two runs, or in the wrong order.
        """
        if not isinstance(earlier, FleetSnapshot):
            return NotImplemented
        if (self.run, self.world_size) != (earlier.run, earlier.world_size):
            raise InputError(
                f"snapshots of two runs ({self.run} of {self.world_size} ranks, {earlier.run} of "
                f"{earlier.world_size}) cannot be subtracted: take both from one"
            )
        ranks: dict[int, Snapshot] = {}
        missing = {part.rank: part for part in (*earlier.missing, *self.missing)}
        for rank, now in self.ranks.items():
            before = earlier.ranks.get(rank)
            if before is None:
                continue
            if before.recording != now.recording:
                problem = f"rank {rank} has another recording than in the earlier snapshot"
                missing[rank] = Unread(rank, "restarted", problem)
                continue
            ranks[rank] = now - before
        order = [layer.name for layer in self.layers]
        return _combined(self.run, self.world_size, ranks, tuple(missing.values()), order)


@dataclass(frozen=True, eq=False)
class Aligned:
    """The ROUTE records of several ranks, matched by lane, iteration, micro-batch and layer.

    A group is one such combination. Groups are ordered by lane, iteration, micro-batch and layer.
    Iterations are counted by each lane for itself, so that equal numbers in different lanes are
    different passes; lane i of one rank is matched with lane i of another.

    Attributes:
        keys: The groups, dtype `KEY_DTYPE`; `layer` is the index in `layers`.
        layers: The layers of the run.
        ranks: The ranks read, one a column.
        records: The records of each rank, one array of `RECORD_DTYPE` a column, as they were read.
        complete: For each group, whether all ranks read that have its layer and its lane have a record
            of it. Groups at both ends of the rings of a running job are often not complete.
        lost: Records of each rank that were overwritten before they could be read.
        left_out: Records of each rank that are in no group: of a type other than a forward ROUTE, of a
            layer that does not exist, or of a group that another record of the rank has taken.
        missing: Ranks of the run that are not in it, and why; `complete` does not wait for them.
    """

    keys: NDArray[np.void]
    layers: tuple[FleetLayer, ...]
    ranks: tuple[int, ...]
    records: tuple[NDArray[np.void], ...]
    complete: NDArray[np.bool_]
    lost: Mapping[int, int]
    left_out: Mapping[int, int]
    missing: tuple[Unread, ...]
    _group: NDArray[np.int64]
    _column: NDArray[np.int64]
    _row: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Where each rank's record of a group is in its `records`, [groups, ranks]; -1: nowhere."""
        rows = np.full((len(self.keys), len(self.ranks)), -1, np.int64)
        rows[self._group, self._column] = self._row
        return rows

    @property
    def present(self) -> NDArray[np.bool_]:
        """Whether a rank has a record of a group, [groups, ranks]."""
        return self.rows >= 0

    def field(self, name: str, fill: int = 0) -> NDArray[Any]:
        """One field of the records side by side.

        Args:
            name: A field of `RECORD_DTYPE`.
            fill: The value where a rank has no record of the group; see `present`.

        Returns:
            [groups, ranks], of the field's dtype. Scope of each number: one pass of one rank.
        """
        if name not in (RECORD_DTYPE.names or ()):
            raise InputError(f"records have no field {name!r}: it is one of {RECORD_DTYPE.names}")
        side_by_side = np.full(self.rows.shape, fill, RECORD_DTYPE[name])
        for column, records in enumerate(self.records):
            mine = self._column == column
            side_by_side[self._group[mine], column] = records[name][self._row[mine]]
        return side_by_side


class Fleet:
    """Several recordings, one a rank, read as one run. Reads; writes and removes nothing.

    Args:
        readers: Recordings of one run. Where several are of one rank, the latest counts.
        unread: Files of the run that could not be read.

    Raises:
        InputError: They are not of one run: another run or world_size, a rank out of range, or a layer
            of the same name with other num_experts or top_k. The message names both files.

    Attributes:
        run: Name of the run.
        world_size: Ranks the run should have.
        ranks: The reader of each rank, by ascending rank.
        layers: The layers of all ranks. In natural order of their names where that is the order in
            which every rank executes its own, otherwise in the order of their first appearance.
        missing: Ranks without a readable recording, and why.
        unread: All files that could not be read.
        superseded: Older recordings of ranks that have a newer one.
    """

    def __init__(self, readers: Iterable[Reader], unread: Sequence[Unread] = ()) -> None:
        given = list(readers)
        if not given:
            raise InputError("a fleet needs at least one recording: give readers of one run")
        self.run, self.world_size = _common(given)
        self.ranks, self.superseded = _latest_of_each_rank(given)
        self.unread = tuple(unread)
        self.missing = _missing(self.run, self.world_size, self.ranks, self.unread)
        names = {rank: _layers_of(reader) for rank, reader in self.ranks.items()}
        self._lanes = {rank: int(r.header["num_lanes"]) for rank, r in self.ranks.items()}
        self.layers = _matched(names, {rank: r.path for rank, r in self.ranks.items()})
        place = {layer.name: index for index, layer in enumerate(self.layers)}
        self._places = {
            rank: np.array([place[name] for name, _, _ in mine], np.int64)
            for rank, mine in names.items()
        }

    @classmethod
    def open(cls, source: Source | Sequence[str | os.PathLike[str]] = None) -> Fleet:
        """Opens all recordings of a run.

        Args:
            source: A list of files; or what `dodoco_ext.open()` takes, for the run of the recording
                that it means, in that recording's folder (a folder: its latest run; None: the latest run
                of this user).

        Raises:
            RecordingError: There is none, or none can be read.
            InputError: The recordings are not of one run.
        """
        if isinstance(source, list | tuple):
            return cls(*_open_all([Path(path) for path in source]))
        anchor = resolve(source)  # type: ignore[arg-type]  # a str is a Sequence, and was no list
        reader = Reader(anchor)
        run = run_of(reader)
        text = None if source is None else Path(str(source))
        if text is not None and text.is_dir():
            listed = find((text,))
        elif text is not None and text.is_file():
            listed = find((anchor.parent,))
        else:
            listed = find()
        readers, unread = [reader], []
        for found in listed:
            if found.reader is None:
                if found.path.name.split(".")[0] == run:
                    unread.append(_unread(found.path, found.state, found.problem))
            elif found.reader.uuid != reader.uuid and run_of(found.reader) == run:
                readers.append(found.reader)
        return cls(readers, unread)

    def snapshot(self) -> FleetSnapshot:
        """The exact counters of every rank, and their sums. A rank that fails is named as missing."""
        ranks: dict[int, Snapshot] = {}
        missing = list(self.missing)
        for rank, reader in self.ranks.items():
            try:
                ranks[rank] = reader.snapshot()
            except RecordingError as error:
                missing.append(Unread(rank, error.state, str(error), reader.path))
        order = [layer.name for layer in self.layers]
        return _combined(self.run, self.world_size, ranks, tuple(missing), order)

    def records(self) -> Aligned:
        """The records that the rings still hold, aligned. A rank that fails is named as missing."""
        records: dict[int, NDArray[np.void]] = {}
        lost: dict[int, int] = {}
        missing = list(self.missing)
        for rank, reader in self.ranks.items():
            try:
                records[rank], _, lost[rank] = reader.read()
            except RecordingError as error:
                missing.append(Unread(rank, error.state, str(error), reader.path))
        return self.align(records, lost, missing)

    def align(
        self,
        records: Mapping[int, NDArray[np.void]],
        lost: Mapping[int, int] | None = None,
        missing: Sequence[Unread] | None = None,
    ) -> Aligned:
        """Aligns records that were read from ranks of this fleet, by whatever way.

        Args:
            records: The records of each rank, dtype `RECORD_DTYPE`, each rank's in order.
            lost: Records of each rank known to be lost; for the result.
            missing: Ranks left out, and why; `self.missing` by default.

        Raises:
            InputError: A rank is not of this fleet.
        """
        ranks = tuple(sorted(records))
        if foreign := [rank for rank in ranks if rank not in self.ranks]:
            raise InputError(f"rank {foreign[0]} is not in the fleet: it has {list(self.ranks)}")
        parts = [self._keyed(rank, column, records[rank]) for column, rank in enumerate(ranks)]
        keys, column, row = (
            np.concatenate([part[i] for part in parts]) if parts else np.empty(0, dtype)
            for i, dtype in enumerate((KEY_DTYPE, np.int64, np.int64))
        )
        # Stable, so that within a group the ranks keep their order, and a rank its records theirs.
        minor = keys["microbatch"].astype(np.uint64) << np.uint64(32) | keys["layer"]
        order = np.lexsort((minor, keys["iteration"], keys["lane"]))
        keys, column, row = keys[order], column[order], row[order]
        first = np.ones(len(keys), bool)
        first[1:] = keys[1:] != keys[:-1]
        group = np.cumsum(first) - 1
        # A sound writer makes no key twice; of a damaged ring's, the later record is taken.
        last = np.ones(len(keys), bool)
        last[:-1] = (group[1:] != group[:-1]) | (column[1:] != column[:-1])
        keys, group, column, row = keys[first], group[last], column[last], row[last]
        there = np.bincount(group, minlength=len(keys))
        counted = np.bincount(column, minlength=len(ranks))
        return Aligned(
            keys=keys,
            layers=self.layers,
            ranks=ranks,
            records=tuple(records[rank] for rank in ranks),
            complete=there == self._expected(ranks)[keys["lane"], keys["layer"]],
            lost={rank: (lost or {}).get(rank, 0) for rank in ranks},
            left_out={r: len(records[r]) - int(n) for r, n in zip(ranks, counted, strict=True)},
            missing=tuple(self.missing if missing is None else missing),
            _group=group,
            _column=column,
            _row=row,
        )

    def _keyed(
        self, rank: int, column: int, records: NDArray[np.void]
    ) -> tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.int64]]:
        """Keys, column and row of the records of one rank that can be aligned."""
        places = self._places[rank]
        usable = (records["type"] == ROUTE) & (records["direction"] == 0) & ~records["recompute"]
        usable &= (records["layer"] < len(places)) & (records["lane"] < self._lanes[rank])
        row = np.flatnonzero(usable)
        keys = np.empty(len(row), KEY_DTYPE)
        for name in ("lane", "iteration", "microbatch"):
            keys[name] = records[name][row]
        keys["layer"] = places[records["layer"][row]]
        return keys, np.full(len(row), column), row

    def _expected(self, ranks: Sequence[int]) -> NDArray[np.int64]:
        """How many of some ranks have each lane and layer, [lanes, layers]."""
        most = max((self._lanes[rank] for rank in ranks), default=1)
        expected = np.zeros((most, len(self.layers)), np.int64)
        for rank in ranks:
            expected[: self._lanes[rank], self._places[rank]] += 1
        return expected


def run_of(reader: Reader) -> str:
    """The run that a recording belongs to, as its owner named it."""
    named = reader.metadata.get("run")
    return named if isinstance(named, str) and named else reader.path.name.split(".")[0]


def is_named(run: str) -> bool:
    """Whether somebody chose this name: the default is the time of the start, to the second."""
    return _UNNAMED_RUN.fullmatch(run) is None


def spans(ranks: Iterable[int]) -> str:
    """Ranks as text, runs of them abbreviated: `0 to 3, 7`."""
    pieces: list[list[int]] = []
    for rank in sorted(ranks):
        if pieces and rank == pieces[-1][-1] + 1:
            pieces[-1][1:] = [rank]
        else:
            pieces.append([rank])
    return ", ".join(" to ".join(map(str, piece)) for piece in pieces)


def _open_all(paths: Sequence[Path]) -> tuple[list[Reader], list[Unread]]:
    readers, unread = [], []
    for path in paths:
        try:
            readers.append(Reader(path))
        except RecordingError as error:
            unread.append(_unread(path, error.state, str(error)))
    if unread and not readers:
        raise RecordingError(f"no recording can be read: {unread[0].problem}", unread[0].state)
    return readers, unread


def _unread(path: Path, state: str, problem: str) -> Unread:
    match = _RANK.search(path.name)
    return Unread(int(match[1]) if match else None, state, problem, path)


def _common(readers: list[Reader]) -> tuple[str, int]:
    """Run and world_size that all recordings share."""
    first = readers[0]
    run, world_size = run_of(first), int(first.header["world_size"])
    for reader in readers:
        rank, size = int(reader.header["rank"]), int(reader.header["world_size"])
        if run_of(reader) != run:
            raise InputError(
                f"{first.path} is of run {run} and {reader.path} of run {run_of(reader)}: give "
                "recordings of one run; its ranks share a name where DODOCO_RUN is set for all"
            )
        if size != world_size:
            raise InputError(
                f"{first.path} is of world_size {world_size} and {reader.path} of world_size "
                f"{size}: give recordings of one launch, and each launch a DODOCO_RUN of its own"
            )
        if rank >= size or size > MAX_WORLD_SIZE:
            raise InputError(
                f"{reader.path} says that it is rank {rank} of {size}: leave it out; its launcher "
                "set DODOCO_RANK or DODOCO_WORLD_SIZE wrongly, or it is damaged"
            )
    return run, world_size


def _latest_of_each_rank(
    readers: list[Reader],
) -> tuple[dict[int, Reader], tuple[Superseded, ...]]:
    by_age = sorted(readers, key=lambda r: (r.header["created_unix_ns"], r.path.name))
    latest: dict[int, Reader] = {}
    superseded = []
    for reader in by_age:
        rank = int(reader.header["rank"])
        older = latest.get(rank)
        if older is not None and older.uuid != reader.uuid:
            superseded.append(Superseded(rank, older.path, _state(older)))
        latest[rank] = reader
    return dict(sorted(latest.items())), tuple(superseded)


def _state(reader: Reader) -> str:
    try:
        return reader.state
    except RecordingError as error:
        return error.state


def _missing(
    run: str, world_size: int, ranks: Mapping[int, Reader], unread: Sequence[Unread]
) -> tuple[Unread, ...]:
    reasons = {part.rank: part for part in unread}
    problem = f"no recording of run {run}"
    if not is_named(run):
        problem += " (a name made from the start time, which ranks may not share: set DODOCO_RUN)"
    return tuple(
        reasons.get(rank) or Unread(rank, "missing", f"rank {rank} has {problem}")
        for rank in range(world_size)
        if rank not in ranks
    )


def _layers_of(reader: Reader) -> list[tuple[str, int, int]]:
    """Name, num_experts and top_k of the layers of one recording, in execution order."""
    layers = [(layer.name, layer.num_experts, layer.top_k) for layer in reader.snapshot().layers]
    names = [name for name, _, _ in layers]
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise InputError(
            f"{reader.path} has two layers named {twice!r}: layers are matched by name; leave it out"
        )
    return layers


def _matched(
    names: Mapping[int, list[tuple[str, int, int]]], paths: Mapping[int, Path]
) -> tuple[FleetLayer, ...]:
    found: dict[str, FleetLayer] = {}
    for rank, layers in names.items():
        for name, num_experts, top_k in layers:
            known = found.get(name)
            if known is None:
                found[name] = FleetLayer(name, num_experts, top_k, (rank,))
            elif (known.num_experts, known.top_k) == (num_experts, top_k):
                found[name] = replace(known, ranks=(*known.ranks, rank))
            else:
                raise InputError(
                    f"layer {name!r} has top {known.top_k} of {known.num_experts} experts in "
                    f"{paths[known.ranks[0]]} and top {top_k} of {num_experts} in {paths[rank]}: "
                    "give recordings of one model"
                )
    places = {name: place for place, name in enumerate(sorted(found, key=_natural))}
    for layers in names.values():
        mine = [places[name] for name, _, _ in layers]
        if mine != sorted(mine):
            return tuple(found.values())
    return tuple(sorted(found.values(), key=lambda layer: places[layer.name]))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that orders `layers.2` before `layers.10`."""
    parts = re.split(r"([0-9]{1,18})", name)
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)]


def _combined(
    run: str,
    world_size: int,
    ranks: Mapping[int, Snapshot],
    missing: tuple[Unread, ...],
    order: Sequence[str],
) -> FleetSnapshot:
    """A snapshot with the layers of some ranks summed by name, in a given order."""
    parts: dict[str, dict[int, LayerSnapshot]] = {name: {} for name in order}
    for rank, snapshot in ranks.items():
        for layer in snapshot.layers:
            parts.setdefault(layer.name, {})[rank] = layer
    held = {name: layers for name, layers in parts.items() if layers}
    return FleetSnapshot(
        run=run,
        world_size=world_size,
        ranks=ranks,
        missing=tuple(sorted(missing, key=lambda part: -1 if part.rank is None else part.rank)),
        layers=tuple(_summed(i, list(held[name].values())) for i, name in enumerate(held)),
        layer_ranks=tuple(tuple(layers) for layers in held.values()),
    )


def _summed(index: int, layers: list[LayerSnapshot]) -> LayerSnapshot:
    # Modulo 2^64 as the arrays: a hostile file must not make numbers that numpy cannot hold.
    changed: dict[str, Any] = {
        name: sum(getattr(layer, name) for layer in layers) & _WORD for name in _COUNTERS
    }
    for name in _ARRAYS:
        changed[name] = np.sum([getattr(layer, name) for layer in layers], axis=0, dtype=np.uint64)
    in_flight = any(layer.in_flight for layer in layers)
    return replace(layers[0], index=index, in_flight=in_flight, **changed)
