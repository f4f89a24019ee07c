"""How many rows a transfer of each of Megatron's dispatchers carries: from the tensors it has itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from dodoco_ext.capture import COMBINE, DISPATCH

from .deepep import received
from .megatron_symbols import ALLGATHER, ALLTOALL, FLEX

Methods = tuple[tuple[str, Callable[..., Any]], ...]


class Rows(NamedTuple):
    """What one transfer carries.

    Attributes:
        send: Rows to each rank, [R], on the host or on the device.
        receive: Rows from each rank, [R].
        experts: Rows received for each local expert, or None where that is not known.
        bytes_per_row: Bytes of a row.
        unit: "assignment" or "token".
        timed: Whether stamps of the host are those of the transfer.
        device: Where the counts are; None: on the host.
        bytes_back: Bytes of a row on the way back.
    """

    send: Any
    receive: Any
    experts: Any
    bytes_per_row: int
    unit: str
    timed: bool
    device: str | None
    bytes_back: int

    def back(self, bytes_per_row: int | None = None) -> Rows:
        """The same rows the other way: the backward of a transfer, or the combine after a dispatch.

        Args:
            bytes_per_row: Bytes of a row of those; by default `bytes_back`.
        """
        width = self.bytes_back if bytes_per_row is None else bytes_per_row
        return Rows(self.receive, self.send, None, width, self.unit, self.timed, self.device, width)


class Counts(Protocol):
    """What is known of one dispatcher's transfers; an object for each."""

    methods: Methods

    def before(self, op: int, dispatcher: Any, tensors: Sequence[torch.Tensor]) -> str | None:
        """Looks at what a method is about to send; returns the device to stamp on, None for the host."""

    def after(self, op: int, dispatcher: Any) -> Rows | None:
        """The rows of the transfer that has just run; None if there was none."""

    def node(self, result: torch.Tensor) -> Any:
        """The autograd node whose backward is the transfer's; None where no gradient is wanted."""


def _width(tensor: torch.Tensor) -> int:
    """Bytes of a row."""
    return tensor.element_size() * math.prod(tensor.shape[1:])


def _node(result: torch.Tensor) -> Any:
    node = result.grad_fn
    while node is not None and node.name().startswith("ToCopy"):
        node = node.next_functions[0][0]
    return node


class _AllToAll:
    """MoEAlltoAllTokenDispatcher: splits that it computes in `preprocess` and moves to the host later.

    On a device they are taken as `preprocess` leaves them there, before that move. On the host, and where
    rows are padded to a capacity, they are taken after the transfer, which has waited for them.
    """

    def __init__(self) -> None:
        self.methods: Methods = (("preprocess", self._preprocess),)
        self._fresh: tuple[Any, Any, Any] | None = None
        self._counts: tuple[Any, Any, Any] | None = None
        self._sent: Rows | None = None
        self._about = (0, 0, 0, False)

    def _preprocess(self, probe: Any, dispatcher: Any, call: Any, args: Any, kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        if getattr(dispatcher.input_splits, "is_cuda", False):
            self._fresh = dispatcher.input_splits, dispatcher.output_splits, result
        return result

    def before(self, op: int, dispatcher: Any, tensors: Sequence[torch.Tensor]) -> str | None:
        tokens = tensors[0]
        others = sum(_width(each) for each in tensors[1:] if isinstance(each, torch.Tensor))
        row = _width(tokens)
        self._about = (tokens.shape[0], row + others, row, tokens.is_cuda)
        if op == DISPATCH:
            present = dispatcher.input_splits
            if getattr(
                present, "is_cuda", False
            ):  # a graph has left them, and preprocess did not run
                self._counts = present, dispatcher.output_splits, dispatcher.tokens_per_expert
            else:
                self._counts = self._fresh
            self._fresh = None
        return None if self._counts is None else str(self._counts[0].device)

    def after(self, op: int, dispatcher: Any) -> Rows | None:
        num_rows, width, width_back, on_device = self._about
        if op == COMBINE:
            sent, self._sent = self._sent, None
            # The same rows the other way round; no probabilities travel along.
            return sent and sent.back(width_back)
        send, receive, experts = self._counts or (
            dispatcher.input_splits,
            dispatcher.output_splits,
            dispatcher.tokens_per_expert,
        )
        if send is None or dispatcher.drop_and_pad:
            ranks = dispatcher.ep_size
            send = receive = [num_rows // ranks] * ranks
        where = None if self._counts is None else str(send.device)
        if dispatcher.tp_size > 1 or getattr(experts, "is_cuda", False) != (where is not None):
            experts = None  # with tensor parallelism they include what other ranks received
        self._sent = Rows(
            send, receive, experts, width, "assignment", not on_device, where, width_back
        )
        return self._sent

    def node(self, result: torch.Tensor) -> Any:
        return _node(result)


class _AllGather:
    """MoEAllGatherTokenDispatcher: every rank gets all tokens of all ranks, whoever needs them."""

    methods: Methods = ()

    def __init__(self) -> None:
        self._about = (0, 0, 0, False)

    def before(self, op: int, dispatcher: Any, tensors: Sequence[torch.Tensor]) -> str | None:
        tokens = tensors[0]
        width = row = _width(tokens)
        if op == DISPATCH:
            width += sum(_width(each) for each in (*tensors[1:], dispatcher.routing_map))
        self._about = tokens.shape[0], width, row, tokens.is_cuda
        return None

    def after(self, op: int, dispatcher: Any) -> Rows | None:
        num_rows, width, width_back, on_device = self._about
        ranks = dispatcher.tp_size * dispatcher.ep_size
        # The gathering dispatch takes equal numbers of rows from all; so does the scattering combine.
        each = [num_rows if op == DISPATCH else num_rows // ranks] * ranks
        return Rows(each, each, None, width, "token", not on_device, None, width_back)

    def node(self, result: torch.Tensor) -> Any:
        return _node(result)


class _DeepEP:
    """MoEFlexTokenDispatcher over DeepEP: what the handle of a dispatch holds, on the device."""

    methods: Methods = ()

    def __init__(self) -> None:
        self._about = (0, 0)
        self._sent: Rows | None = None

    def before(self, op: int, dispatcher: Any, tensors: Sequence[torch.Tensor]) -> str | None:
        tokens = tensors[0]
        row = _width(tokens)
        probs = dispatcher._comm_manager.token_probs if op == DISPATCH else None
        self._about = row + (0 if probs is None else _width(probs)), row
        return str(tokens.device) if tokens.is_cuda else None

    def after(self, op: int, dispatcher: Any) -> Rows | None:
        width, width_back = self._about
        if op == COMBINE:
            sent, self._sent = self._sent, None
            return sent and sent.back(width_back)
        handle = dispatcher._comm_manager.handle
        rank = torch.distributed.get_rank(dispatcher.tp_ep_group)
        in_rank = handle[_IN_RANK[len(handle)]]
        send, receive = in_rank.sum(0, dtype=torch.int32), received(handle, rank)
        where = str(send.device) if send.is_cuda else None
        self._sent = Rows(send, receive, None, width, "token", True, where, width_back)
        return self._sent

    def node(self, result: torch.Tensor) -> Any:
        return _node(result)


# Which part of a DeepEP handle says which token goes to which rank, bool [T, R], by the handle's length.
_IN_RANK = {6: 4, 10: 0}

COUNTS: dict[str, Callable[[], Counts]] = {
    ALLTOALL.name: _AllToAll,
    ALLGATHER.name: _AllGather,
    FLEX.name: _DeepEP,
}
