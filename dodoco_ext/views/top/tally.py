"""What was counted over a span of time: sums that can be added, and those of one look at a rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import metrics
from dodoco_ext.cost_of_imbalance import Cost
from dodoco_ext.counters import Snapshot

Words = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Counters:
    """The counters of one recording at one moment, or between two.

    Attributes:
        scalars: Passes, tokens and assignments of each layer, uint64 [3, L].
        counts: Assignments by layer and expert, uint64 [L, E]; zeros past a layer's own experts.
        in_flight: Layers read in the middle of a pass, [L].
    """

    scalars: Words
    counts: Words
    in_flight: NDArray[np.bool_]

    @classmethod
    def of(cls, snapshot: Snapshot) -> Counters:
        """Those of a snapshot."""
        layers = snapshot.layers
        counts = np.zeros((len(layers), max(layer.num_experts for layer in layers)), np.uint64)
        for row, layer in zip(counts, layers, strict=True):
            row[: layer.num_experts] = layer.counts
        scalars = [[getattr(x, n) for x in layers] for n in ("passes", "tokens", "assignments")]
        flying = np.array([layer.in_flight for layer in layers], bool)
        return cls(np.array(scalars, np.uint64), counts, flying)

    def since(self, earlier: Counters) -> Counters | None:
        """What was counted after an earlier moment; None where counters went backwards."""
        if (self.scalars < earlier.scalars).any() or (self.counts < earlier.counts).any():
            return None
        return Counters(
            self.scalars - earlier.scalars, self.counts - earlier.counts, self.in_flight
        )


@dataclass(eq=False)
class Tally:
    """What all ranks counted over a span.

    Attributes:
        seconds: Its length; nan where nobody knows.
        scalars: Passes, tokens and assignments of each layer, summed over ranks, uint64 [3, L].
        counts: Assignments by block of ranks that exchange tokens, layer and expert, uint64 [B, L, E].
        placed: Assignments that each rank of a block received, by block and layer, as experts were placed
            when they were counted, [R].
        rank_tokens: Tokens that each rank routed: those of its layer that saw most.
        rank_loads: Rows received by each rank of a group in recorded dispatches, by layer, [R].
        by_dispatch: Cost of imbalance from recorded dispatches, each a step.
        by_pass: The same expert by expert from the records of passes, each a step.
        by_counts: The same from `counts`; what lies between two looks is one step.
    """

    seconds: float
    scalars: Words
    counts: Words
    placed: dict[tuple[int, int], NDArray[np.float64]] = field(default_factory=dict)
    rank_tokens: dict[int, int] = field(default_factory=dict)
    rank_loads: dict[int, Words] = field(default_factory=dict)
    by_dispatch: Cost = field(default_factory=Cost)
    by_pass: Cost = field(default_factory=Cost)
    by_counts: Cost = field(default_factory=Cost)
    _ginis: dict[tuple[int, ...], NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def empty(cls, num_blocks: int, num_layers: int, num_experts: int) -> Tally:
        """Nothing counted."""
        counts = np.zeros((num_blocks, num_layers, num_experts), np.uint64)
        return cls(0.0, np.zeros((3, num_layers), np.uint64), counts)

    @property
    def passes(self) -> Words:
        """Passes of each layer, [L]."""
        passes: Words = self.scalars[0]
        return passes

    @property
    def tokens(self) -> Words:
        """Tokens of each layer, [L]."""
        tokens: Words = self.scalars[1]
        return tokens

    def gini_of(self, layers: list[int], num_experts: int) -> NDArray[np.float64]:
        """Gini of some layers of E experts, [n]; computed once, until something is added."""
        key = (num_experts, *layers)
        if key not in self._ginis:
            counts = self.counts[:, layers, :num_experts].sum(axis=0)
            self._ginis[key] = np.asarray(metrics.gini(counts))
        return self._ginis[key]

    def add(self, other: Tally) -> None:
        """Adds what was counted over another span."""
        self._ginis.clear()
        self.seconds += other.seconds
        self.scalars = self.scalars + other.scalars
        self.counts = self.counts + other.counts
        for rank, tokens in other.rank_tokens.items():
            self.rank_tokens[rank] = self.rank_tokens.get(rank, 0) + tokens
        for (block, layer), received in other.placed.items():
            self.add_placed(block, layer, received)
        for layer, loads in other.rank_loads.items():
            self.add_loads(layer, loads)
        self.by_dispatch += other.by_dispatch
        self.by_pass += other.by_pass
        self.by_counts += other.by_counts

    def add_loads(self, layer: int, loads: Words) -> None:
        """Adds rows received by each rank of a group, [R]."""
        mine = self.rank_loads.get(layer)
        fits = mine is not None and len(mine) == len(loads)
        self.rank_loads[layer] = mine + loads if mine is not None and fits else loads

    def add_placed(self, block: int, layer: int, loads: NDArray[np.float64]) -> None:
        """Adds assignments received by each rank of a block, [R]."""
        mine = self.placed.get((block, layer), np.zeros(0))
        size = max(len(mine), len(loads))
        total = np.zeros(size)
        total[: len(mine)] += mine
        total[: len(loads)] += loads
        self.placed[block, layer] = total
