"""Which layer, direction and iteration an AlltoAll belongs to.

Forward calls are placed by the scope that their thread is in (`LayerScopes`), or by their order. A
backward call runs under a node of autograd's, whose sequence number was the latest when the forward
call ran. A recomputed call runs inside a graph task and in a scope that was entered there. What is
known of the forward call must fit (rows there are rows back); what does not fit is not placed.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

DISPATCH, COMBINE = 2, 3

_graph_task = torch._C._current_graph_task_id
_next_node: Callable[[], int] = vars(torch.autograd)["_get_sequence_nr"]
_MOST_CALLS = 1 << 14  # forward calls that may wait for their backward
_MOST_PER_LAYER = 64  # forward calls of a layer that may wait for their recomputation


@dataclass(slots=True, eq=False)
class Call:
    """One call and where it belongs.

    Attributes:
        layer: Index in the recording; -1 for a call that is no transfer of a layer.
        op: DISPATCH or COMBINE.
        splits: Rows to and from each rank; None where only the device knows.
        row_bytes: Bytes a row.
        backward: Whether it carries gradients back.
        recompute: Whether it repeats a forward one.
        iteration: Of the recording, once the forward call has ended; None before, and where unknown.
        task: Graph task that last used it for a backward call.
    """

    layer: int
    op: int
    splits: tuple[Sequence[int], Sequence[int]] | None
    row_bytes: int
    backward: bool = False
    recompute: bool = False
    iteration: int | None = None
    task: int = -1

    def is_way_back_of(self, other: Call) -> bool:
        """Whether this call takes back the rows that the other one brought."""
        if self.row_bytes != other.row_bytes:
            return False
        if self.splits is None or other.splits is None:
            return self.splits is other.splits
        (sent, received), (brought, taken) = self.splits, other.splits
        return list(sent) == list(taken) and list(received) == list(brought)

    def repeats(self, other: Call) -> bool:
        """Whether this call moves the rows that the other one did."""
        if self.splits is None or other.splits is None:
            return self.splits is other.splits
        return all(
            list(mine) == list(theirs)
            for mine, theirs in zip(self.splits, other.splits, strict=True)
        )


@dataclass(slots=True)
class _Scope:
    layer: int
    op: int  # 0: dispatch and combine in turn
    task: int  # the graph task in which it was entered; -1 outside of any
    calls: int = 0


class LayerScopes(threading.local):
    """The scopes that a thread is in, the innermost last."""

    def __init__(self) -> None:
        self.entered: list[_Scope] = []

    @contextlib.contextmanager
    def enter(self, layer: int, op: int = 0) -> Iterator[None]:
        """What the thread calls inside belongs to a layer."""
        self.entered.append(_Scope(layer, op, _graph_task()))
        try:
            yield
        finally:
            self.entered.pop()

    def current_layer(self) -> int | None:
        """The layer of the innermost scope."""
        return self.entered[-1].layer if self.entered else None


class _Order(threading.local):
    def __init__(self) -> None:
        self.calls = 0


@dataclass
class Attribution:
    """Places the calls of one recording.

    Attributes:
        num_layers: Layers in the recording.
        ordered: Whether calls outside of scopes are dispatch and combine of one layer after the
            other; without scopes, nothing says which layer a recomputed call belongs to.
    """

    num_layers: int
    ordered: bool
    scopes: LayerScopes = field(default_factory=LayerScopes)
    order: _Order = field(default_factory=_Order)

    def __post_init__(self) -> None:
        # By thread and latest sequence number: several where compiled code makes them in one node.
        self._forward: OrderedDict[tuple[int, int], list[Call]] = OrderedDict()
        self._latest: dict[tuple[int, int], deque[tuple[int, int, Call]]] = {}

    def place(
        self, splits: tuple[Sequence[int], Sequence[int]] | None, row_bytes: int
    ) -> Call | None:
        """Says where a call that is about to run belongs, or None where that is unknown."""
        task = _graph_task()
        entered = self.scopes.entered
        if entered and (task == -1 or entered[-1].task == task):
            return self._in_scope(entered[-1], task, splits, row_bytes)
        if task != -1:
            return self._way_back(task, Call(-1, 0, splits, row_bytes, backward=True))
        if not self.ordered:
            call = Call(-1, 0, splits, row_bytes)  # remembered, so that its way back is known
        else:
            pair, second = divmod(self.order.calls, 2)
            self.order.calls += 1
            call = Call(pair % self.num_layers, COMBINE if second else DISPATCH, splits, row_bytes)
        self._remember(call)
        return call

    def is_forward(self) -> bool:
        """Whether the thread runs a forward pass, maybe again, and not a backward function."""
        task, entered = _graph_task(), self.scopes.entered
        return task == -1 or (bool(entered) and entered[-1].task == task)

    def place_dispatch(self, row_bytes: int) -> Call | None:
        """The same for a call that says itself that it is a dispatch, with splits on the device."""
        if not self.is_forward():
            return None
        entered = self.scopes.entered
        if entered:
            return self._in_scope(
                _Scope(entered[-1].layer, DISPATCH, entered[-1].task),
                _graph_task(),
                None,
                row_bytes,
            )
        layer = -1
        if self.ordered:
            layer = self.order.calls // 2 % self.num_layers
            self.order.calls += 2
        call = Call(layer, DISPATCH, None, row_bytes)
        self._remember(call)
        return call

    def _in_scope(
        self,
        scope: _Scope,
        task: int,
        splits: tuple[Sequence[int], Sequence[int]] | None,
        row_bytes: int,
    ) -> Call | None:
        number = scope.calls
        scope.calls += 1
        # A scope of one transfer: what follows the first call are probabilities, scales and such.
        layer = -1 if scope.op and number else scope.layer
        op = scope.op or (DISPATCH, COMBINE)[number % 2]
        call = Call(layer, op, splits, row_bytes, recompute=task != -1)
        if call.recompute and layer >= 0:
            original = self._original(call)
            if original is None:
                return None
            call.iteration = original.iteration
        self._remember(call)
        return call

    def _remember(self, call: Call) -> None:
        if torch.is_inference_mode_enabled():
            return  # no way back
        thread, latest = threading.get_ident(), _next_node() - 1
        self._forward.setdefault((thread, latest), []).append(call)
        if len(self._forward) > _MOST_CALLS:
            self._forward.popitem(last=False)
        if not call.recompute and call.layer >= 0:
            calls = self._latest.get((call.layer, call.op))
            if calls is None:
                calls = self._latest[call.layer, call.op] = deque(maxlen=_MOST_PER_LAYER)
            calls.append((thread, latest, call))

    def _original(self, again: Call) -> Call | None:
        """The forward call that a recomputed one repeats."""
        node = torch._C._current_autograd_node()
        known = [*self._latest.get((again.layer, again.op), ())]
        if node is None or not known:
            return None
        number, own = node._sequence_nr(), threading.get_ident()
        here = [entry for entry in known if entry[0] == own] or known
        if len({thread for thread, _, _ in here}) > 1:
            return None  # threads count nodes by themselves: their numbers cannot be compared
        if node.name() == "CheckpointFunctionBackward":
            # This node came first, then what ran inside.
            found = next((call for _, latest, call in here if latest >= number), None)
        else:
            # Recomputation starts at a node behind the call, or else right before it.
            before = [call for _, latest, call in here if latest <= number]
            found = before[-1] if before else here[0][2]
        return found if found is not None and again.repeats(found) else None

    def _way_back(self, task: int, call: Call) -> Call | None:
        node = torch._C._current_autograd_node()
        if node is None or (self.ordered and _is_recomputing(node)):
            return None
        number, own = node._sequence_nr(), threading.get_ident()
        brought = self._forward.get((own, number))
        if brought is None:
            # On a device, autograd has threads of its own.
            others = [calls for (_, at), calls in [*self._forward.items()] if at == number]
            if len(others) != 1:
                return None
            brought = others[0]
        for forward in reversed(brought):
            if forward.task != task and call.is_way_back_of(forward):
                forward.task = task
                call.layer, call.op = forward.layer, forward.op
                call.iteration = forward.iteration
                return call
        return None


def _is_recomputing(node: torch.autograd.graph.Node) -> bool:
    """Whether checkpointed code seems to run again, rather than a backward function.

    Hooks on saved tensors are how it is found out; those of others make this say yes too often.
    """
    hooks: object = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None or node.name() == "CheckpointFunctionBackward"
