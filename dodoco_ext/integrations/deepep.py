"""DeepEP's `Buffer`: its own counts are taken, and its own counters are handed in.

Known by names alone (DeepEP is no package of PyPI): normal mode's `dispatch` and `combine`, and low-latency
mode's `low_latency_dispatch`, of versions 1.1 to 1.2. Rows are tokens: one that two experts of a rank
want is sent there once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from dodoco_ext.capture import COMBINE, DISPATCH
from dodoco_ext.errors import InputError

from .attribution import Call
from .stream_events import when_waited

if TYPE_CHECKING:
    from .distributed import AlltoAllCapture

_MISSING = object()
_METHODS = ("dispatch", "combine", "low_latency_dispatch")
# Parts of a dispatch's handle, by its length: (rows from ranks up to each, [R, R] or [R]).
_INTRANODE_PARTS, _INTERNODE_PARTS, _INTERNODE_PREFIX = 6, 10, 6


@dataclass(frozen=True)
class ExpertCounters:
    """What DeepEP's kernels have counted in the tensors that were handed to them.

    Attributes:
        received: Tokens received by each local expert, int64 [layers, local experts]; DeepEP counts in 32
            bits, so that a counter starts again after 4,294,967,295.
        wait: What DeepEP calls the time spent waiting for each rank, int64 [layers, R, R], in its unit.
    """

    received: torch.Tensor
    wait: torch.Tensor


@dataclass(slots=True)
class _Sent:
    """A dispatch that a handle came from: its place, and the rows that combine takes back.

    Attributes:
        call: Its place.
        send: Rows to each rank.
        arrived: Rows from the ranks up to each: filled in once the dispatch has run.
    """

    call: Call
    send: torch.Tensor
    arrived: torch.Tensor
    _receive: torch.Tensor | None = None

    @property
    def receive(self) -> torch.Tensor:
        """Rows from each rank; to be asked for where the current stream has waited for the dispatch."""
        if self._receive is None:  # two small kernels, once a dispatch
            self._receive = _differences(self.arrived)
        return self._receive


class BufferProbe:
    """Replaces methods in one `Buffer` instance; `restore()` puts back exactly what was there."""

    def __init__(
        self,
        capture: AlltoAllCapture,
        buffer: Any,
        num_local_experts: int | None,
        device: str | None,
    ) -> None:
        missing = [name for name in (*_METHODS, "group_size", "rank") if not hasattr(buffer, name)]
        if missing:
            raise InputError(
                f"{type(buffer).__name__} has no {', '.join(missing)}: give an instance of deep_ep.Buffer"
            )
        size, ours = buffer.group_size, capture.group.size()
        if size != ours:
            raise InputError(f"a buffer of {size} ranks, and the captured group has {ours}")
        self._capture = capture
        self._buffer = buffer
        # By the last tensor of a handle, which each dispatch makes anew: as long as that lives, so may a combine.
        self._sent: WeakIdKeyDictionary = WeakIdKeyDictionary()
        # Calls that went on in DeepEP's own stream, and that nobody has waited for yet.
        self._unwaited = 0
        self._counters = self._waits = None
        if num_local_experts is not None:
            place = device or (
                f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
            )
            layers = len(capture.layers)
            # Made now: in a captured graph, each replay would clear them again.
            self._counters = torch.zeros(layers, num_local_experts, dtype=torch.int32, device=place)
            self._waits = torch.zeros(layers, size, size, dtype=torch.int64, device=place)
        self._replaced: list[tuple[str, Any, Callable[..., Any]]] = []
        for name in _METHODS:
            original = getattr(buffer, name)
            ours_now = functools.wraps(original)(
                functools.partial(getattr(self, f"_{name}"), original, inspect.signature(original))
            )
            self._replaced.append((name, vars(buffer).get(name, _MISSING), ours_now))
            setattr(buffer, name, ours_now)

    def restore(self) -> None:
        """Puts back what is still ours. Idempotent."""
        for name, before, ours in self._replaced:
            if vars(self._buffer).get(name) is not ours:
                continue
            if before is _MISSING:
                delattr(self._buffer, name)
            else:
                setattr(self._buffer, name, before)
        self._replaced.clear()
        if self._unwaited:
            self._capture.passed_over["async_finish"] += self._unwaited
            self._unwaited = 0

    def counters(self) -> ExpertCounters:
        """A copy on the host of what low-latency dispatches have counted.

        The one thing here that waits for the device: call it between steps, not in them.

        Raises:
            InputError: There are no counters: observe_buffer() was not told num_local_experts.
        """
        if self._counters is None or self._waits is None:
            raise InputError("no counters: give observe_buffer() num_local_experts=")
        received = self._counters.to("cpu", torch.int64) & 0xFFFFFFFF
        return ExpertCounters(received, self._waits.to("cpu"))

    def _dispatch(
        self, original: Callable[..., Any], signature: inspect.Signature, *args: Any, **kwargs: Any
    ) -> Any:
        known = self._guarded(
            lambda: self._begin_dispatch(signature.bind(*args, **kwargs).arguments)
        )
        result = original(*args, **kwargs)
        if known is not None:
            self._guarded(lambda: self._after_dispatch(known, result))
        return result

    def _begin_dispatch(self, given: dict[str, Any]) -> Any:
        rows, handle = given["x"], given.get("handle")
        width = sum(_width(x) for x in (rows if isinstance(rows, tuple) else (rows,)))
        if handle is None:
            send = given["num_tokens_per_rank"]
            call = self._place(width)
            if call is None:
                return None
        else:  # a dispatch with a known layout: in backward, gradients of a combine
            before = self._sent.get(handle[-1])
            if before is None:
                self._capture.unattributed()
                return None
            send, in_backward = before.send, not self._capture.attribution.is_forward()
            call = Call(
                before.call.layer,
                COMBINE if in_backward else DISPATCH,
                None,
                width,
                backward=in_backward,
                iteration=before.call.iteration if in_backward else None,
            )
        return call, send, handle, self._begin(call, send), given.get("async_finish")

    def _place(self, width: int) -> Call | None:
        call = self._capture.attribution.place_dispatch(width)
        if call is None:
            self._capture.unattributed()
        elif call.layer < 0:
            self._capture.passed_over["outside"] += 1
            return None
        return call

    def _begin(self, call: Call, like: torch.Tensor) -> Any:
        return self._capture.writer.begin(
            call.layer,
            call.op,
            backward=call.backward,
            recompute=call.recompute,
            iteration=call.iteration,
            device=str(like.device) if like.is_cuda else None,
        )

    def _after_dispatch(self, known: Any, result: Any) -> None:
        call, send, handle, transfer, later = known
        if handle is not None:
            before = self._sent[handle[-1]]
        else:
            handle = result[4]
            before = _Sent(call, send, _arrived(handle, self._buffer.rank))
            # Known from now on: a combine may be queued behind the dispatch before anybody waits.
            self._sent[handle[-1]] = before
        self._finish(result[-1], later, lambda: self._end(call, transfer, send, before.receive))

    def _end(self, call: Call, transfer: Any, send: torch.Tensor, receive: torch.Tensor) -> None:
        iteration = self._capture.writer.end(
            transfer, send, receive, bytes_per_row=call.row_bytes, unit="token"
        )
        if call.iteration is None and iteration >= 0:
            call.iteration = iteration

    def _combine(
        self, original: Callable[..., Any], signature: inspect.Signature, *args: Any, **kwargs: Any
    ) -> Any:
        known = self._guarded(
            lambda: self._begin_combine(signature.bind(*args, **kwargs).arguments)
        )
        result = original(*args, **kwargs)
        if known is not None:
            self._guarded(lambda: self._after_combine(known, result))
        return result

    def _after_combine(self, known: Any, result: Any) -> None:
        call, transfer, before, later = known
        # What was received goes back to where it came from.
        self._finish(
            result[-1], later, lambda: self._end(call, transfer, before.receive, before.send)
        )

    def _begin_combine(self, given: dict[str, Any]) -> Any:
        before = self._sent.get(given["handle"][-1])
        if before is None:
            self._capture.unattributed()
            return None
        in_backward = not self._capture.attribution.is_forward()
        call = Call(
            before.call.layer,
            DISPATCH if in_backward else COMBINE,
            None,
            _width(given["x"]),
            backward=in_backward,
            recompute=before.call.recompute and not in_backward,
            iteration=before.call.iteration,
        )
        return call, self._begin(call, before.send), before, given.get("async_finish")

    def _low_latency_dispatch(
        self, original: Callable[..., Any], signature: inspect.Signature, *args: Any, **kwargs: Any
    ) -> Any:
        handed = self._guarded(lambda: self._counters_for(signature, args, kwargs)) or {}
        return original(*args, **{**kwargs, **handed})

    def _counters_for(
        self, signature: inspect.Signature, args: Any, kwargs: Any
    ) -> dict[str, torch.Tensor]:
        if self._counters is None or self._waits is None:
            self._capture.passed_over["low latency"] += 1
            return {}
        call = self._place(0)
        if call is None:
            return {}
        given = signature.bind(*args, **kwargs).arguments
        ours = {
            "cumulative_local_expert_recv_stats": self._counters[call.layer],
            "dispatch_wait_recv_cost_stats": self._waits[call.layer],
        }
        # A None given by position cannot be replaced by name: leave that one alone.
        by_position = [*signature.parameters][: len(args)]
        return {
            name: tensor
            for name, tensor in ours.items()
            if name in signature.parameters and name not in by_position and given.get(name) is None
        }

    def _finish(self, event: Any, later: bool, end: Callable[[], None]) -> None:
        """Records a transfer: now, or where the current stream waits for the call's event."""
        if not later:
            end()
        elif when_waited(event, lambda: self._end_later(end)):
            self._unwaited += 1
        else:
            self._capture.passed_over["async_finish"] += 1

    def _end_later(self, end: Callable[[], None]) -> None:
        if self._replaced:  # not restored meanwhile
            self._unwaited -= 1
            self._guarded(end)

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # telemetry never takes down its host
            self._capture.failed(error)
            return None


def _width(rows: torch.Tensor) -> int:
    return rows.element_size() * rows.shape[-1]


def received(handle: tuple[Any, ...], rank: int) -> torch.Tensor:
    """Rows from each rank, [R], out of the prefix sums that a dispatch's handle holds.

    Two small kernels in the current stream, and no look at what they compute.
    """
    return _differences(_arrived(handle, rank))


def _arrived(handle: tuple[Any, ...], rank: int) -> torch.Tensor:
    if len(handle) == _INTRANODE_PARTS:
        prefix: torch.Tensor = handle[0][:, rank]
    elif len(handle) == _INTERNODE_PARTS:
        prefix = handle[_INTERNODE_PREFIX]
    else:
        raise ValueError(f"a handle of {len(handle)} parts: DeepEP 1.1 and 1.2 have 6 or 10")
    return prefix


def _differences(prefix: torch.Tensor) -> torch.Tensor:
    return torch.diff(prefix, prepend=torch.zeros_like(prefix[:1]))
