"""Room for placements in a recording, and slots as the recording holds them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dodoco_ext import _C
from dodoco_ext.errors import InputError


@dataclass(frozen=True)
class PlacementSpec:
    """Room for where experts lie, which a load balancer changes.

    Attributes:
        num_slots: Most physical experts of a layer, replicas included, over all ranks.
        kept: Placements kept of each layer, at least 2; older ones are overwritten.
    """

    num_slots: int
    kept: int = 4


def check_room(room: PlacementSpec) -> None:
    """Raises an InputError where a recording cannot have such room."""
    if not 1 <= room.num_slots <= _C.MAX_SLOTS:
        raise InputError(f"num_slots={room.num_slots}: give 1 to {_C.MAX_SLOTS}")
    if not 2 <= room.kept <= _C.MAX_KEPT:
        raise InputError(f"kept={room.kept} placements: give 2 to {_C.MAX_KEPT}")


def packed_slots(
    layer: int, slots: ArrayLike, num_ranks: int, ranks: ArrayLike | None
) -> NDArray[np.uint32]:
    """Slots as the recording holds them: expert, and rank in the high half."""
    experts = np.asarray(slots)
    if experts.ndim != 1 or experts.dtype.kind not in "iu" or not 1 <= num_ranks <= _C.MAX_RANKS:
        raise InputError(
            f"layer {layer}: slots {experts.dtype} {list(experts.shape)} on {num_ranks} ranks: give "
            f"integers [P] and 1 to {_C.MAX_RANKS} ranks"
        )
    if ranks is None:
        if len(experts) % num_ranks:
            raise InputError(
                f"layer {layer}: {num_ranks} ranks do not divide {len(experts)} slots: give ranks="
            )
        held = np.arange(len(experts)) // max(len(experts) // num_ranks, 1)
    else:
        held = np.asarray(ranks)
    if held.shape != experts.shape or held.dtype.kind not in "iu":
        raise InputError(f"layer {layer}: ranks {list(held.shape)} of {len(experts)} slots")
    wrong = (experts < -1) | (experts > 0xFFFF) | (held < 0) | (held >= num_ranks)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise InputError(
            f"layer {layer}, slot {at}: expert {experts[at]} on rank {held[at]} of {num_ranks}"
        )
    words = experts.astype(np.int64) | held.astype(np.int64) << 16
    return np.where(experts == -1, _C.EMPTY_SLOT, words).astype(np.uint32)
