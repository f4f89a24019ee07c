"""Reading a recording: `Reader`, and the records as structured numpy arrays."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import _C
from dodoco_ext.counters import COUNTERS, Counts, LayerSnapshot, Snapshot
from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.placements import Placements, read_placements
from dodoco_ext.transfers import (
    Group,
    TrafficTotals,
    Transfers,
    group_of,
    read_traffic,
    read_transfers,
)

Cursor: TypeAlias = tuple[int, ...]

# Mirrors RouteRecord in csrc/recording_reader.h.
RECORD_DTYPE = np.dtype(
    [
        ("iteration", "<u8"),
        ("time_ns", "<u8"),
        ("gini_numerator", "<u8"),
        ("layer", "<u4"),
        ("microbatch", "<u4"),
        ("tokens", "<u4"),
        ("assignments", "<u4"),
        ("max_count", "<u4"),
        ("padded", "<u4"),
        ("invalid", "<u4"),
        ("capacity_dropped", "<u4"),
        ("unused_experts", "<u4"),
        ("map_version", "<u4"),
        ("type", "u1"),
        ("lane", "u1"),
        ("direction", "u1"),
        ("recompute", "?"),
        ("reserved", "<u4"),
    ]
)
ROUTE = 1
# Words that are times: kLastPassMonotonicNs of a board's block, kLastEndMonotonicNs of a traffic block.
_LAST_PASS, _LAST_END = 8, 10


class Reader:
    """Reads one recording, live or not, of this process or another.

    Args:
        path: The recording's file. `dodoco_ext.open()` also takes a PID, a folder or a name.

    Raises:
        RecordingError: The file is missing, damaged, still being created or of another version.

    Attributes:
        path: The recording's file.
        metadata: What the recorder wrote about itself: layers, uncovered parts, labels, versions.
        uuid: Unique id of the recording, hexadecimal.
        group: The ranks that its transfers are between; None where none are recorded.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = _C.RecordingReader(str(self.path))
            self._layers = self._file.layers()
            self.metadata: dict[str, Any] = json.loads(self._file.metadata())
            self._names = [str(layer["name"]) for layer in self.metadata["layers"]]
            self.group: Group | None = group_of(
                self.metadata, self._file.group_size, self._file.group_index
            )
        except _C.RecordingError as error:
            raise RecordingError(str(error), error.state) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            problem = f"{self.path} is damaged: unreadable metadata ({error})"
            raise RecordingError(problem, "damaged") from None
        if len(self._names) != len(self._layers):
            problem = f"{self.path} is damaged: metadata and layer table disagree"
            raise RecordingError(problem, "damaged")
        header = self.header
        self.uuid: str = header["uuid"].hex()
        self._created_ns = int(header["created_unix_ns"])

    @property
    def header(self) -> dict[str, Any]:
        """The header's fields as they are now: rank, world size, owner's PID, faults, times."""
        with _readable():
            return self._file.header()

    @property
    def state(self) -> str:
        """`live` (an owner holds the lock), `closed` (ended properly) or `dead` (owner gone)."""
        alive = self._file.owner_alive()  # first: an owner that closes in between is not dead
        if self.header["closed"]:
            return "closed"
        return "live" if alive else "dead"

    @property
    def num_slots(self) -> int:
        """Records the ring of each lane holds."""
        return self._file.num_slots(0)

    def snapshot(self) -> Snapshot:
        """Copies the exact counters of every layer.

        Raises:
            RecordingError: The file was truncated meanwhile.
        """
        time_ns = time.time_ns()
        layers = tuple(self._layer(index) for index in range(len(self._layers)))
        return Snapshot(self.uuid, time_ns, self._created_ns, layers)

    def cursor(self) -> Cursor:
        """The present end of the ring, to `read()` from later."""
        with _readable():
            return tuple(self._file.head(lane) for lane in range(self._file.num_lanes))

    def read(self, cursor: Cursor | None = None) -> tuple[NDArray[np.void], Cursor, int]:
        """Reads the ROUTE records written since a cursor.

        Args:
            cursor: From `cursor()` or an earlier `read()`; None: the oldest that are still there.

        Returns:
            The records, ordered by time, dtype `RECORD_DTYPE`; the cursor to continue from; and how
            many slots of the ring since the given cursor were overwritten before they could be read.
            A ROUTE record takes one slot, a transfer several.
        """
        start = self._start(cursor)
        parts: list[NDArray[np.void]] = []
        following: list[int] = []
        lost = 0
        for lane, position in enumerate(start):
            with _readable():
                data, next_position, lane_lost, _ = self._file.ring(lane, position)
            parts.append(data.view(RECORD_DTYPE))
            following.append(next_position)
            lost += lane_lost
        if len(parts) == 1:
            return parts[0], tuple(following), lost
        merged = np.concatenate(parts)
        order = np.argsort(np.ascontiguousarray(merged["time_ns"]), kind="stable")
        return merged.take(order), tuple(following), lost

    def _start(self, cursor: Cursor | None) -> Cursor:
        start = (0,) * self._file.num_lanes if cursor is None else cursor
        if len(start) != self._file.num_lanes:
            raise InputError(f"cursor {cursor!r} is not of this recording: take it from cursor()")
        return start

    def transfers(self, cursor: Cursor | None = None) -> Transfers:
        """Reads the transfers (DISPATCH and COMBINE records) written since a cursor.

        Args:
            cursor: From `cursor()`, or `next_cursor` of an earlier result; None: the oldest that are
                still there.
        """
        with _readable():
            return read_transfers(self._file, self._start(cursor), self.group)

    def traffic(self) -> tuple[TrafficTotals, ...]:
        """The exact totals of all transfers, one entry for every layer and type."""
        with _readable():
            return read_traffic(self._file, len(self._layers), self.group)

    def placements(self, known: Placements | None = None) -> Placements | None:
        """Where experts lay, and what had been counted then; None where there is no room for that.

        Args:
            known: From an earlier call; returned as it is where nothing has been recorded since.
        """
        with _readable():
            return read_placements(self._file, len(self._layers), known)

    def last_ns(self) -> int:
        """When the last pass was counted, Unix nanoseconds; 0: none was.

        Of layers whose router is not observed, the last transfer.
        """
        lanes, layers = range(self._file.num_lanes), self.metadata["layers"]
        unrouted = [isinstance(layer, dict) and layer.get("routed") is False for layer in layers]
        ends = [0]
        with _readable():
            for lane in lanes:
                for index, blind in enumerate(unrouted):
                    if not blind:
                        ends.append(int(self._file.board(lane, index)[0][_LAST_PASS]))
                    elif self.group is not None:
                        blocks = (2 * index, 2 * index + 1)
                        ends += [int(self._file.traffic(lane, b)[0][_LAST_END]) for b in blocks]
        header = self.header
        offset = int(header["created_unix_ns"]) - int(header["created_monotonic_ns"])
        return max(ends) + offset if max(ends) else 0

    def records(self) -> NDArray[np.void]:
        """All ROUTE records that the ring still holds, oldest first, dtype `RECORD_DTYPE`."""
        return self.read()[0]

    def _layer(self, index: int) -> LayerSnapshot:
        num_experts, top_k = self._layers[index]
        total: Counts | None = None
        in_flight = False
        for lane in range(self._file.num_lanes):
            with _readable():
                words, consistent = self._file.board(lane, index)
            total = words if total is None else total + words
            in_flight = in_flight or not consistent
        assert total is not None, "a recording has at least one lane"
        counters = {name: int(total[word]) for word, name in enumerate(COUNTERS)}
        histograms = total[len(total) - _C.SIZE_CLASSES * (_C.GINI_BINS + _C.MAX_MEAN_BINS) :]
        split = _C.SIZE_CLASSES * _C.GINI_BINS
        return LayerSnapshot(
            index=index,
            name=self._names[index],
            num_experts=num_experts,
            top_k=top_k,
            counts=total[_C.BOARD_WORDS : _C.BOARD_WORDS + num_experts].copy(),
            gini_histogram=histograms[:split].reshape(_C.SIZE_CLASSES, _C.GINI_BINS).copy(),
            max_over_mean_histogram=histograms[split:]
            .reshape(_C.SIZE_CLASSES, _C.MAX_MEAN_BINS)
            .copy(),
            in_flight=in_flight,
            **counters,
        )


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """What C++ says of a file that changed while it was open, as the package's own error."""
    try:
        yield
    except _C.RecordingError as error:
        raise RecordingError(str(error), error.state) from None
