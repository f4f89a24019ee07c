"""Looking at the recordings of a run again and again: what each look brought, and the last minute."""

from __future__ import annotations

import contextlib
import time
from collections import deque

import numpy as np
from numpy.typing import NDArray

from dodoco_ext import metrics
from dodoco_ext.cost_of_imbalance import Cost, cost_of, cost_of_peaks
from dodoco_ext.errors import RecordingError
from dodoco_ext.fleet import Fleet
from dodoco_ext.null_grid import floors
from dodoco_ext.placements import Placements
from dodoco_ext.recording import RECORD_DTYPE, ROUTE, Cursor, Reader
from dodoco_ext.views.top.dispatches import Dispatches
from dodoco_ext.views.top.placing import Placing
from dodoco_ext.views.top.tally import Counters, Tally

Records = NDArray[np.void]

POINTS = 60
"""Parts of the window that are told apart, in sparklines and when it moves on."""

TAIL = 8192
"""Records of passes kept, for the last ones of a layer."""


class Watch:
    """The counters of a run, read at every look.

    Args:
        fleet: The run.
        window_s: How far back the window reaches.
        num_ranks: Ranks that share the experts; None: as recorded or assumed, see `Placing`.
        alone: Whether a single rank is looked at.

    Attributes:
        fleet: The run as it is now; `follow` replaces it.
        placing: How its experts lie on ranks.
        parts: What was counted, part by part of the window, oldest first.
        history: Costs of what the rings held at the first look and since; other sums are not kept here.
        failed: Ranks that cannot be read any more, with the state of the file.
        tail: Rank, and record of each of the last passes: `(rank, records)` of the latest looks.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        window_s: float = 60.0,
        num_ranks: int | None = None,
        alone: bool = False,
    ) -> None:
        self.window_s = window_s
        self._num_ranks = num_ranks
        self.alone = alone
        self.parts: deque[Tally] = deque()
        self.failed: dict[int, str] = {}
        self.tail: deque[tuple[int, Records]] = deque()
        self._counters: dict[str, Counters] = {}
        self._cursors: dict[str, Cursor] = {}
        self._placements: dict[str, Placements | None] = {}
        self._placed: tuple[int, ...] = ()
        self._dispatches = Dispatches()
        self._last_s: float | None = None
        self.follow(fleet)
        self.history = self._empty()

    def follow(self, fleet: Fleet) -> None:
        """Goes on with the same layers in other recordings, as after the restart of a rank."""
        self.fleet = fleet
        self._look_up_placements()
        self._place_experts()
        self.num_experts = max(layer.num_experts for layer in fleet.layers)
        self.failed = {rank: why for rank, why in self.failed.items() if rank in fleet.ranks}
        self._forget_other_shapes()

    def _place_experts(self) -> None:
        placed = self._placed
        self.placing = Placing.of(self.fleet, self._num_ranks, alone=self.alone, placed=placed)

    def _forget_other_shapes(self) -> None:
        if self.parts and self.parts[0].counts.shape != self._empty().counts.shape:
            self.parts.clear()

    def _look_up_placements(self) -> bool:
        """Reads where experts lie; whether that is now known of other layers or ranks than before."""
        on: list[set[int]] = [set() for _ in self.fleet.layers]
        for rank, reader in self.fleet.ranks.items():
            with contextlib.suppress(RecordingError):  # as it was when it could be read
                known = self._placements.get(reader.uuid)
                self._placements[reader.uuid] = reader.placements(known)
            placements = self._placements.get(reader.uuid)
            for own in range(self.fleet.num_layers(rank)):
                now = placements.layers[own].current if placements else None
                on[self.fleet.place_of(rank, own)].add(now.num_ranks if now else 0)
        placed = tuple(sizes.pop() if len(sizes) == 1 else 0 for sizes in on)
        changed = placed != self._placed
        self._placed = placed
        return changed

    def look(self, now_s: float | None = None, *, ended: bool = False) -> Tally:
        """Reads all ranks once; what has been counted since the last look, nothing at the first.

        Args:
            now_s: The time, by a clock that does not jump; now by default.
            ended: Nobody recorded any more before this look: an empty one does not move the window.
        """
        now = time.monotonic() if now_s is None else now_s
        first = self._last_s is None
        # The counts first: the passes between two reads lay under placements that are then known.
        read = {rank: self._read(rank, reader) for rank, reader in self.fleet.ranks.items()}
        if self._look_up_placements():
            self._place_experts()
            self._forget_other_shapes()
        tally = self._empty()
        tally.seconds = now - self._last_s if self._last_s is not None else 0.0
        for rank, found in read.items():
            if found is not None:
                self._count(rank, *found, tally)
        for loads in self._dispatches.look(self.fleet):
            layer = self.fleet.layers[loads.layer]
            sums = loads.rows.sum(axis=0, dtype=np.uint64)
            tally.add_loads(loads.layer, sums)
            self.history.add_loads(loads.layer, sums)
            tally.by_dispatch += cost_of(
                loads.rows, layer.num_experts, layer.top_k, assignments=loads.assignments
            )
        tally.by_counts = self.cost_of_counts(tally)
        self.history.by_dispatch += tally.by_dispatch
        self.history.by_pass += tally.by_pass
        self._last_s = now
        if not first and (tally.passes.any() or not ended):
            self._keep(tally)
        return tally

    def window(self) -> Tally:
        """The sums of the window."""
        total = self._empty()
        for part in self.parts:
            total.add(part)
        return total

    def whole_run(self) -> Tally:
        """The counters since the recordings began, those of unreadable ranks as last seen."""
        total = self._empty()
        for rank, reader in self.fleet.ranks.items():
            counters = self._counters.get(reader.uuid)
            if counters is not None:
                self._place(rank, counters, total)
                self._receive(rank, reader, counters, None, total)
        total.by_dispatch, total.by_pass = self.history.by_dispatch, self.history.by_pass
        total.rank_loads = self.history.rank_loads
        total.by_counts = self.cost_of_counts(total)
        return total

    def in_flight(self) -> set[int]:
        """Layers that were read in the middle of a pass at the last look."""
        found = set()
        for rank, reader in self.fleet.ranks.items():
            counters = self._counters.get(reader.uuid)
            if counters is not None:
                found |= {
                    self.fleet.place_of(rank, int(i)) for i in np.flatnonzero(counters.in_flight)
                }
        return found

    def cost_of_counts(self, tally: Tally) -> Cost:
        """The cost of one step of each layer and block, its load all that was counted."""
        cost = Cost()
        for (num_experts, top_k, size), members in self._kinds().items():
            placed = [i for i in members if self.placing.recorded[i]]
            received = [x for (_, i), x in tally.placed.items() if i in placed and len(x) == size]
            if received:
                cost += cost_of(np.array(received), num_experts, top_k)
            members = [i for i in members if i not in placed]
            loads = tally.counts[:, members, :num_experts].reshape(-1, num_experts)
            if size > 1 and members:
                placement = metrics.contiguous_placement(num_experts, size)
                loads = metrics.rank_counts(loads, placement)
            cost += cost_of(loads, num_experts, top_k)
        return cost

    def chance_of_passes(self, tally: Tally) -> float:
        """What ranks would wait under uniform routing in every pass by itself, passes of one size.

        That size is the mean of what was counted: assignments of all ranks of a block in one pass.
        """
        ranks = max(len(self.fleet.ranks), 1)
        mean = chance = 0.0
        for (num_experts, top_k, size), members in self._kinds().items():
            pairs = tally.scalars[2, members].astype(np.float64) / size
            passes = tally.scalars[0, members].astype(np.float64) / ranks * self.placing.num_blocks
            counted = passes > 0
            each = pairs[counted] * size / passes[counted]
            if num_experts % size:  # unequal shares: what chance does is not known
                return float("nan")
            peaks = floors(each, num_experts, top_k, size if size > 1 else None).peak
            mean += float(pairs[counted].sum())
            chance += float((pairs[counted] * peaks).sum())
        return 1.0 - mean / chance if chance else float("nan")

    def _kinds(self) -> dict[tuple[int, int, int], list[int]]:
        """Layers that share E, k and the number of ranks."""
        kinds: dict[tuple[int, int, int], list[int]] = {}
        for index, layer in enumerate(self.fleet.layers):
            kind = (layer.num_experts, layer.top_k, self.placing.sizes[index])
            kinds.setdefault(kind, []).append(index)
        return kinds

    def _empty(self) -> Tally:
        return Tally.empty(self.placing.num_blocks, len(self.fleet.layers), self.num_experts)

    def _read(self, rank: int, reader: Reader) -> tuple[Counters, Records] | None:
        try:
            counters = Counters.of(reader.snapshot())
            records, self._cursors[reader.uuid], _ = reader.read(self._cursors.get(reader.uuid))
        except RecordingError as error:
            self.failed[rank] = error.state
            return None
        self.failed.pop(rank, None)
        return counters, records

    def _count(self, rank: int, counters: Counters, records: Records, tally: Tally) -> None:
        reader = self.fleet.ranks[rank]
        before = self._counters.get(reader.uuid)
        self._counters[reader.uuid] = counters
        # One that was not there at the last look has begun since, as a restarted rank's.
        grown = counters if before is None else counters.since(before)
        if grown is not None and self._last_s is not None:
            self._place(rank, grown, tally)
            self._receive(rank, reader, counters, before, tally)
        records = _forward(records, self.fleet.num_layers(rank))
        if len(records):
            self._remember(rank, records)
            if len(self.fleet.ranks) == 1:
                tally.by_pass += self._cost_of_passes(rank, records)

    def _place(self, rank: int, counters: Counters, tally: Tally) -> None:
        places = [self.fleet.place_of(rank, i) for i in range(counters.counts.shape[0])]
        blocks = [self.placing.blocks[place].get(rank, 0) for place in places]
        tally.scalars[:, places] += counters.scalars
        tally.counts[blocks, places, : counters.counts.shape[1]] += counters.counts
        tally.rank_tokens[rank] = int(counters.scalars[1].max(initial=0))

    def _receive(
        self, rank: int, reader: Reader, now: Counters, before: Counters | None, tally: Tally
    ) -> None:
        """Adds what each rank received of what one counted, where its experts lie as recorded."""
        placements = self._placements.get(reader.uuid)
        for own in range(now.counts.shape[0]) if placements else ():
            place = self.fleet.place_of(rank, own)
            if not self.placing.recorded[place] or placements is None:
                continue
            experts = slice(self.fleet.layers[place].num_experts)
            start = before.counts[own, experts] if before is not None else None
            received = placements.layers[own].received(now.counts[own, experts], start)
            block = self.placing.blocks[place].get(rank, 0)
            tally.add_placed(block, place, received.loads)

    def _cost_of_passes(self, rank: int, records: Records) -> Cost:
        cost = Cost()
        for own in range(self.fleet.num_layers(rank)):
            layer = self.fleet.layers[self.fleet.place_of(rank, own)]
            mine = records[records["layer"] == own]
            if len(mine):
                sums, peaks, experts = mine["assignments"], mine["max_count"], layer.num_experts
                cost += cost_of_peaks(sums, peaks, experts, experts, layer.top_k)
        return cost

    def _remember(self, rank: int, records: Records) -> None:
        placed = records[-TAIL:].copy()
        places = [self.fleet.place_of(rank, i) for i in range(self.fleet.num_layers(rank))]
        placed["layer"] = np.array(places, np.uint32)[placed["layer"]]
        self.tail.append((rank, placed))
        while len(self.tail) > 1 and sum(len(r) for _, r in self.tail) > TAIL:
            self.tail.popleft()

    def _keep(self, tally: Tally) -> None:
        grain = self.window_s / POINTS
        if self.parts and self.parts[-1].seconds + tally.seconds <= grain * 1.01:
            self.parts[-1].add(tally)
        else:
            self.parts.append(tally)
        while len(self.parts) > 1 and sum(p.seconds for p in self.parts) > self.window_s * 1.01:
            self.parts.popleft()


def _forward(records: Records, num_layers: int) -> Records:
    """Forward passes with assignments, of layers that there are."""
    sound = (records["type"] == ROUTE) & (records["direction"] == 0) & ~records["recompute"]
    sound &= (records["layer"] < num_layers) & (records["assignments"] > 0)
    sound &= records["max_count"] <= records["assignments"]
    return records[sound] if len(records) else np.empty(0, RECORD_DTYPE)
