"""Rows that experts received, from the counts that transfers carry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.transfer_alignment import AlignedTransfers, Mask
from dodoco_ext.transfers import DISPATCH


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """Rows that the experts of one layer received, over some dispatches.

    Attributes:
        layer: Index of the layer in the run.
        counts: Rows by rank and local expert, uint64 [R, E / R]; 0 for ranks that did not count.
        transfers: How many dispatches of each rank are in it, [R].
        num_experts: Experts of the layer, as the run names it.
    """

    layer: int
    counts: NDArray[np.uint64]
    transfers: NDArray[np.int64]
    num_experts: int

    @property
    def numbered(self) -> bool:
        """Whether rank and local expert give a number: contiguous placement that covers all E.

        The number is then place in the group x E / R + local expert; that placement is an assumption.
        """
        return self.counts.size == self.num_experts

    def name(self, place: int, local: int) -> str:
        """What to call an expert of the rank at a place of the group."""
        if self.numbered:
            return str(place * self.counts.shape[1] + local)
        return f"{local} of the rank's own"


def expert_rows(aligned: AlignedTransfers, which: Mask | None = None) -> tuple[ExpertRows, ...]:
    """Adds up what forward dispatches say of the experts, one entry a layer that has any.

    What a rank recorded of its own experts is true whether or not others have a record of the transfer;
    rows that contradict themselves or the clock are left out.

    Args:
        aligned: The transfers of a group.
        which: Only of these, [n]; all by default.
    """
    chosen = aligned.of(DISPATCH) & aligned.agree & ~aligned.apart
    if which is not None:
        chosen &= which
    layers = np.unique(aligned.keys["layer"][chosen])
    found = []
    for layer in layers:
        rows = aligned.rows[chosen & (aligned.keys["layer"] == layer)]
        parts: dict[int, NDArray[np.uint64]] = {}
        counted = np.zeros(len(aligned.ranks), np.int64)
        for column, member in enumerate(aligned.members):
            if member is None:
                continue
            held = rows[:, column][rows[:, column] >= 0]
            held = held[member.transfers.records["num_experts"][held] > 0]
            if len(held):
                width = int(member.transfers.records["num_experts"][held].max())
                counts = member.transfers.experts[held, :width]
                parts[column] = counts.sum(axis=0, dtype=np.uint64)
                counted[column] = len(held)
        if not parts:
            continue
        sums = np.zeros((len(aligned.ranks), max(map(len, parts.values()))), np.uint64)
        for column, part in parts.items():
            sums[column, : len(part)] = part
        num_experts = aligned.layers[layer].num_experts
        found.append(ExpertRows(int(layer), sums, counted, num_experts))
    return tuple(found)
