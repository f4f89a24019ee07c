"""Many recordings as one run: its ranks, their counters added up, their records side by side."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.alignment import Aligned, Part, align
from dodoco_ext.counters import Snapshot
from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.fleet_snapshot import FleetSnapshot, Unread, combined
from dodoco_ext.groups import RankGroup, groups_of
from dodoco_ext.recording import Reader
from dodoco_ext.sources import find, resolve
from dodoco_ext.transfer_alignment import AlignedTransfers, Member, align_transfers

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

_UNNAMED_RUN = re.compile(r"\d{8}-\d{6}")
_RANK = re.compile(r"\.r(\d{1,9})\.")


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
        unrouted: Names of layers whose router no rank observes: only transfers are recorded of them.
        groups: The groups of ranks that recorded transfers between them.
        foreign: Other runs whose recordings lie in the same folder, with their number; for `open()` with
            a folder or a file.
    """

    foreign: Mapping[str, int]

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
        self.unrouted = unrouted(self.ranks.values())
        self.groups: tuple[RankGroup, ...] = groups_of(self.ranks, self.missing)
        self.foreign = {}
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
        in_folder = text is not None and (text.is_dir() or text.is_file())
        listed = find((anchor.parent,)) if in_folder else find()
        readers, unread = [reader], []
        foreign: dict[str, int] = {}
        for found in listed:
            if found.reader is None:
                if found.path.name.split(".")[0] == run:
                    unread.append(_unread(found.path, found.state, found.problem))
            elif found.reader.uuid != reader.uuid and run_of(found.reader) == run:
                readers.append(found.reader)
            elif found.reader.uuid != reader.uuid and in_folder:
                foreign[run_of(found.reader)] = foreign.get(run_of(found.reader), 0) + 1
        fleet = cls(readers, unread)
        fleet.foreign = foreign
        return fleet

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
        return combined(self.run, self.world_size, ranks, tuple(missing), order)

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
        parts = {rank: Part(self._lanes[rank], self._places[rank], records[rank]) for rank in ranks}
        return align(
            parts,
            self.layers,
            {rank: (lost or {}).get(rank, 0) for rank in ranks},
            tuple(self.missing if missing is None else missing),
        )

    def transfers(self) -> tuple[AlignedTransfers, ...]:
        """The transfers that the rings still hold, aligned, one entry a group of ranks.

        Ranks whose recording cannot be read or is of another group are named in its `absent`.
        """
        aligned = []
        for group in self.groups:
            members: dict[int, Member] = {}
            absent = list(group.absent)
            for rank, reader in group.readers.items():
                try:
                    transfers = reader.transfers()
                except RecordingError as error:
                    absent.append(Unread(rank, error.state, str(error), reader.path))
                    continue
                host = str(reader.metadata.get("host") or "")
                members[rank] = Member(transfers, self._places[rank], self._lanes[rank], host)
            aligned.append(align_transfers(group.name, group.ranks, members, self.layers, absent))
        return tuple(aligned)

    def place_of(self, rank: int, layer: int) -> int:
        """Where a layer of a rank's recording is in `layers`."""
        return int(self._places[rank][layer])

    def num_layers(self, rank: int) -> int:
        """How many layers a rank's recording has."""
        return len(self._places[rank])


def unrouted(readers: Iterable[Reader]) -> frozenset[str]:
    """Names of layers of which recordings say that no router is observed, and none that one is."""
    said: dict[str, bool] = {}
    for reader in readers:
        for layer in reader.metadata["layers"]:
            routed = not (isinstance(layer, dict) and layer.get("routed") is False)
            name = str(layer["name"])
            said[name] = said.get(name, False) or routed
    return frozenset(name for name, routed in said.items() if not routed)


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
