"""The exact counters of a run: one snapshot a rank, and their sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.counters import ARRAYS, COUNTERS, LayerSnapshot, Snapshot
from dodoco_ext.errors import InputError

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
        return combined(self.run, self.world_size, ranks, tuple(missing.values()), order)


def combined(
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
        name: sum(getattr(layer, name) for layer in layers) & _WORD for name in COUNTERS
    }
    for name in ARRAYS:
        changed[name] = np.sum([getattr(layer, name) for layer in layers], axis=0, dtype=np.uint64)
    in_flight = any(layer.in_flight for layer in layers)
    return replace(layers[0], index=index, in_flight=in_flight, **changed)
