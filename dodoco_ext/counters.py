"""What has been counted: `Snapshot`, and a `LayerSnapshot` for each layer, which can be subtracted."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import _C, metrics
from dodoco_ext.errors import DodocoError, InputError

if TYPE_CHECKING:
    import pandas
    import pyarrow

Counts: TypeAlias = NDArray[np.uint64]

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
