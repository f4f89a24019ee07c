"""Which forward pass a recomputed transfer repeats."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

_MOST = 4096
"""Forward transfers of a layer that are remembered: more than micro-batches are ever under way."""


def in_backward() -> bool:
    """Whether the calling thread is in a backward pass; a forward method run there is a repetition."""
    return torch._C._current_graph_task_id() != -1


@dataclass(frozen=True, slots=True)
class Origin:
    """A forward transfer.

    Attributes:
        iteration: What was recorded of it; -1 where only the device knows.
        microbatch: The index it was recorded with.
    """

    iteration: int
    microbatch: int


class Origins:
    """The latest forward transfers of one layer and operation, by autograd's sequence numbers.

    Autograd numbers its nodes in the order in which forward passes make them. A reentrant checkpoint is one
    node, made before what it runs; so what it repeats is the first transfer after its number. A
    checkpoint that is not reentrant is repeated when a node made within it asks for what it saved: what
    that repeats is the last transfer before that node's number.
    """

    def __init__(self) -> None:
        # Apart: passes without gradients (evaluation, reentrant checkpoints) and those with.
        self._numbers: tuple[deque[int], deque[int]] = deque(maxlen=_MOST), deque(maxlen=_MOST)
        self._origins: tuple[deque[Origin], deque[Origin]] = (
            deque(maxlen=_MOST),
            deque(maxlen=_MOST),
        )

    def note(self, origin: Origin) -> None:
        """Remembers a forward transfer that has just run."""
        kind = int(torch.is_grad_enabled())
        self._numbers[kind].append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._origins[kind].append(origin)

    def find(self) -> Origin | None:
        """The forward transfer that the one about to run repeats; None if there is none."""
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return None
        number = node._sequence_nr()
        kind = 0 if "Checkpoint" in node.name() else 1
        place = bisect_right(self._numbers[kind], number) - kind
        return self._origins[kind][place] if 0 <= place < len(self._origins[kind]) else None
