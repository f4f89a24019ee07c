"""Reading a recording: `Reader`, `Snapshot`, and the records as structured numpy arrays."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import _C, metrics
from dodoco_ext.errors import DodocoError, InputError, RecordingError
from dodoco_ext.transfers import (
    Group,
    TrafficTotals,
    Transfers,
    group_of,
    read_traffic,
    read_transfers,
)

if TYPE_CHECKING:
    import pandas
    import pyarrow

Counts: TypeAlias = NDArray[np.uint64]
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
COUNTERS = (
    "passes",
    "tokens",
    "assignments",
    "padded",
    "invalid",
    "capacity_dropped",
    "recomputed",
    "recorded_passes",
)
"""Fields of a `LayerSnapshot` that are single counters, in the order of the board's words."""

ARRAYS = ("counts", "gini_histogram", "max_over_mean_histogram")
"""Fields of a `LayerSnapshot` that are arrays of counters."""


@dataclass(frozen=True, eq=False)
class LayerSnapshot:
    """The counters of one layer at one moment, or over the window between two.

    Attributes:
        index: Position in execution order.
        name: Qualified name of the router module.
        num_experts: Logical experts E.
        top_k: Experts a token is sent to; 0 where unknown.
        passes: Executions counted.
        tokens: Rows routed.
        assignments: (token, expert) pairs; the sum of `counts`.
        padded: (token, slot) pairs that were padding.
        invalid: Ids outside [0, E) other than the padding id -1.
        capacity_dropped: Assignments missing from routing maps.
        recomputed: Executions during backward, seen and not counted.
        recorded_passes: Passes that also went to the ring and the histograms.
        counts: Assignments per expert, uint64 [E].
        gini_histogram: Passes by size class and per-pass Gini, uint64 [20, 32]: row c holds passes
            of 2^c to 2^(c+1) - 1 tokens, bin b Gini from b/32 to (b+1)/32.
        max_over_mean_histogram: The same for max/mean, bins starting at `MAX_OVER_MEAN_BOUNDS`.
        in_flight: The writer was in the middle of a pass: counters may disagree by that one pass.
    """

    index: int
    name: str
    num_experts: int
    top_k: int
    passes: int
    tokens: int
    assignments: int
    padded: int
    invalid: int
    capacity_dropped: int
    recomputed: int
    recorded_passes: int
    counts: Counts
    gini_histogram: Counts
    max_over_mean_histogram: Counts
    in_flight: bool

    @property
    def gini(self) -> float:
        """Gini of `counts`; nan where nothing was counted."""
        return float(metrics.gini(self.counts))

    @property
    def max_over_mean(self) -> float:
        """Largest count over the mean count; nan where nothing was counted."""
        return float(metrics.max_over_mean(self.counts))

    @property
    def balancedness(self) -> float:
        """Mean count over the largest; nan where nothing was counted."""
        return float(metrics.balancedness(self.counts))

    @property
    def cv(self) -> float:
        """Coefficient of variation of `counts`; nan where nothing was counted."""
        return float(metrics.cv(self.counts))

    @property
    def normalized_entropy(self) -> float:
        """Entropy of `counts` over its largest possible value; nan where nothing was counted."""
        return float(metrics.normalized_entropy(self.counts))

    @property
    def unused_experts(self) -> int:
        """Experts that received nothing."""
        return int(metrics.unused_experts(self.counts))

    def __sub__(self, earlier: LayerSnapshot) -> LayerSnapshot:
        if not isinstance(earlier, LayerSnapshot):
            return NotImplemented
        changed: dict[str, Any] = {
            name: getattr(self, name) - getattr(earlier, name) for name in COUNTERS
        }
        for name in ARRAYS:
            changed[name] = getattr(self, name) - getattr(earlier, name)
        if self.passes < earlier.passes:
            raise InputError("a later snapshot was subtracted from an earlier one: swap them")
        return replace(self, **changed, in_flight=self.in_flight or earlier.in_flight)


MAX_OVER_MEAN_BOUNDS: tuple[float, ...] = _C.MAX_MEAN_BOUNDS


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The exact counters of a recording: all layers, all lanes added up.

    Attributes:
        recording: Unique id of the recording, hexadecimal.
        time_ns: When it was taken, Unix nanoseconds.
        start_ns: When counting began, Unix nanoseconds.
        layers: One entry a layer, in execution order.
    """

    recording: str
    time_ns: int
    start_ns: int
    layers: tuple[LayerSnapshot, ...]

    @property
    def counts(self) -> list[Counts]:
        """Assignments per expert, one array a layer."""
        return [layer.counts for layer in self.layers]

    def __sub__(self, earlier: Snapshot) -> Snapshot:
        """What happened between two snapshots of one recording.

        Raises:
            InputError: They are of different recordings, or in the wrong order.
        """
        if not isinstance(earlier, Snapshot):
            return NotImplemented
        if self.recording != earlier.recording:
            raise InputError(
                f"snapshots of two recordings ({self.recording[:8]}, {earlier.recording[:8]}) "
                "cannot be subtracted: take both from one"
            )
        layers = tuple(a - b for a, b in zip(self.layers, earlier.layers, strict=True))
        return Snapshot(self.recording, self.time_ns, earlier.time_ns, layers)

    def to_rows(self) -> list[dict[str, Any]]:
        """One dictionary a layer: counters, metrics, and `counts` as a list."""
        rows = []
        for layer in self.layers:
            row = {f.name: getattr(layer, f.name) for f in fields(layer)}
            del row["gini_histogram"], row["max_over_mean_histogram"]
            row["counts"] = [int(count) for count in layer.counts]
            for name in (
                "gini",
                "max_over_mean",
                "balancedness",
                "cv",
                "normalized_entropy",
                "unused_experts",
            ):
                row[name] = getattr(layer, name)
            rows.append(row)
        return rows

    def to_arrow(self) -> pyarrow.Table:
        """`to_rows()` as an Arrow table.

        Raises:
            DodocoError: pyarrow is not installed.
        """
        try:
            import pyarrow
        except ImportError:
            raise DodocoError("pyarrow is missing: pip install 'dodoco-ext[trace]'") from None
        return pyarrow.Table.from_pylist(self.to_rows())

    def to_pandas(self) -> pandas.DataFrame:
        """`to_rows()` as a data frame.

        Raises:
            DodocoError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise DodocoError("pandas is missing: pip install 'dodoco-ext[trace]'") from None
        return pandas.DataFrame(self.to_rows())


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
