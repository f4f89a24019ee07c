"""Which ranks exchange tokens at a layer, and how many of them share its experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dodoco_ext.fleet import Fleet, FleetLayer


@dataclass(frozen=True)
class Placing:
    """How experts lie on ranks: as recorded, else in equal contiguous runs, which is an assumption.

    Attributes:
        sizes: Ranks that share the experts of each layer, [L]; 1: the layer is taken expert by expert.
        blocks: For each layer, the block that each rank is in; ranks of a block exchange tokens.
        num_blocks: Most blocks of a layer.
        known: Whether recordings name the groups; otherwise they are assumed too.
        recorded: Whether the experts of each layer lie as recorded, [L].
    """

    sizes: tuple[int, ...]
    blocks: tuple[dict[int, int], ...]
    num_blocks: int
    known: bool
    recorded: tuple[bool, ...]

    @classmethod
    def of(
        cls, fleet: Fleet, num_ranks: int | None, *, alone: bool, placed: Sequence[int] = ()
    ) -> Placing:
        """What is known, or assumed, of a run.

        Args:
            fleet: The run.
            num_ranks: Ranks that share the experts, where the user says so.
            alone: A single rank is looked at: nothing is known of what the others send to its experts.
            placed: For each layer, on how many ranks its experts lie as all recordings say; 0: they do not.
        """
        groups = [] if alone or num_ranks else [group.ranks for group in fleet.groups]
        known = bool(groups)
        staged = any(layer.ranks != fleet.layers[0].ranks for layer in fleet.layers)
        sizes, blocks, recorded = [], [], []
        for index, layer in enumerate(fleet.layers):
            on = placed[index] if placed and not alone else 0
            size, blocked = _of_layer(layer, fleet, num_ranks or on, groups, staged, alone)
            recorded.append(1 < on == size)
            if size > 1 and layer.num_experts % size and not recorded[-1]:
                size = 1
            sizes.append(size)
            blocks.append(blocked)
        most = max((max(blocked.values(), default=0) for blocked in blocks), default=0) + 1
        return cls(tuple(sizes), tuple(blocks), most, known, tuple(recorded))


def _of_layer(
    layer: FleetLayer,
    fleet: Fleet,
    num_ranks: int | None,
    groups: Sequence[tuple[int, ...]],
    staged: bool,
    alone: bool,
) -> tuple[int, dict[int, int]]:
    """How many ranks share a layer's experts, and the block of each rank that has it."""
    mine = [group for group in groups if set(group) & set(layer.ranks)]
    if mine:
        return len(mine[0]), {rank: i for i, group in enumerate(mine) for rank in group}
    if num_ranks:
        size = num_ranks
    elif alone:
        size = 1
    else:
        size = len(layer.ranks) if staged else fleet.world_size
    everyone = layer.ranks if staged or alone else range(fleet.world_size)
    whole = size > 1 and len(everyone) % size == 0
    return size, {rank: place // size if whole else 0 for place, rank in enumerate(everyone)}
