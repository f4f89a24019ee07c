"""Stands between torch's AlltoAll operators and their kernels, while somebody listens.

Every AlltoAll of torch.distributed, eager or functional, from Python or from compiled code, ends at two
operators of the dispatcher: `c10d::alltoall_base_` and `c10d::alltoall_`. They have kernels for
backends only, so that a kernel for the key before those (BackendSelect) sees each call and hands it
on. It is registered with the first listener and removed with the last: outside, nothing is left;
inside, no other operator is concerned.

A plain call on tensors of the host takes a shorter way (`short_cut`), past the dispatcher.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

BELOW = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
_unbox_group, _unbox_work = dist.ProcessGroup.unbox, dist.Work.unbox
_num_modes = torch._C._len_torch_dispatch_stack
_is_profiled: Callable[[], bool] = vars(torch.autograd)["_profiler_enabled"]
_CPU = torch.device("cpu")
_now = time.monotonic_ns
_redispatch_base = torch.ops.c10d.alltoall_base_.default.redispatch

Done = Callable[[bool], object]
# Rows to each rank, rows from each rank and, where known, rows for each local expert.
ReadSplits = Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


class Listener(Protocol):
    """Who is asked about the AlltoAlls of one group. Neither method may raise."""

    def before(
        self,
        sent: Sequence[int],
        received: Sequence[int],
        rows: torch.Tensor,
        like: torch.Tensor,
        begin_ns: int | None = None,
    ) -> Done | None:
        """A call is about to run, or under way.

        Args:
            sent: Rows to each rank [R].
            received: Rows from each rank [R].
            rows: A tensor whose trailing dimensions say what a row is.
            like: A tensor on the device of the call.
            begin_ns: When it began, by the host's monotonic clock; None: it is about to.

        Returns:
            What to call when the consumer has waited, with whether the stamps are those of the
            transfer; None if the call is none of the listener's.
        """

    def before_on_device(self, rows: torch.Tensor, read: ReadSplits) -> Done | None:
        """The same for splits that lie in tensors; `read` gives them once the call has run."""


# Groups, who listens to them, and their sizes. Replaced as a whole, never changed: calls on other threads
# read it without a lock.
_listeners: tuple[tuple[dist.ProcessGroup, Listener, int], ...] = ()
_libraries: list[torch.library.Library] = []
_methods: dict[str, tuple[Any, Any]] = {}  # of ProcessGroup: as they were, and ours
_lock = threading.Lock()
# Works that nobody has waited for yet: where C++ holds one, only this keeps its Python half alive.
_not_waited: set[ObservedWork] = set()


def listen(group: dist.ProcessGroup, listener: Listener) -> bool:
    """Starts telling `listener` of the group's AlltoAlls. False: the group has a listener."""
    global _listeners
    with _lock:
        if any(other is group for other, _, _ in _listeners):
            return False
        if not _listeners:
            _register()
        _listeners = (*_listeners, (group, listener, group.size()))
        return True


def stop_listening(listener: Listener) -> None:
    """Ends it. With the last listener, the dispatcher is as it was before the first."""
    global _listeners
    with _lock:
        _listeners = tuple(entry for entry in _listeners if entry[1] is not listener)
        if not _listeners:
            for name, (before, ours) in _methods.items():
                # Whatever somebody has put around ours goes on: without listeners, ours passes.
                if vars(dist.ProcessGroup)[name] is ours:
                    setattr(dist.ProcessGroup, name, before)
            _methods.clear()
            while _libraries:
                _libraries.pop()._destroy()


def _register() -> None:
    from .symmetric_memory import KERNELS

    c10d: dict[str, Callable[..., Any]] = {"alltoall_base_": _alltoall_base, "alltoall_": _alltoall}
    for namespace, kernels in {"c10d": c10d, "symm_mem": KERNELS}.items():
        library = torch.library.Library(namespace, "IMPL")
        _libraries.append(library)
        for name, kernel in kernels.items():
            if torch._C._dispatch_has_kernel(f"{namespace}::{name}"):
                library.impl(name, kernel, "BackendSelect", with_keyset=True)
    for name in _METHODS:
        if (method := vars(dist.ProcessGroup).get(name)) is not None:
            _methods[name] = method, short_cut(method)
            setattr(dist.ProcessGroup, name, _methods[name][1])


# Both are `c10d::alltoall_base_`; torch 2.13 knows the second name too.
_METHODS = ("alltoall_base", "all_to_all_single")


def short_cut(method: Any) -> Any:
    """A method of ProcessGroup that goes straight to the backend, as the operator's kernel does.

    A kernel in Python costs a call two ways through the dispatcher. Whatever might want to see the
    operator (modes, subclasses, the profiler, another device) takes the method as it was.
    """

    def all_to_all(group: Any, *args: Any, **kwargs: Any) -> Any:
        for other, listener, size in _listeners:
            if other is group and len(args) == 5 and not kwargs:
                output, rows, output_split_sizes, input_split_sizes, options = args
                if _num_modes() or _is_profiled() or not (_is_plain(output) and _is_plain(rows)):
                    break
                if not isinstance(output_split_sizes, list | tuple) or not isinstance(
                    input_split_sizes, list | tuple
                ):
                    break  # an array has no truth of its own
                begin_ns = _now()
                backend: Any = group._get_backend(_CPU)
                inner = backend.alltoall_base(*args)
                # While rows are under way, and not when they have arrived: a thread of the backend's holds the
                # tensors for a moment longer than its work takes, and who lets go of them last is who frees them.
                done = listener.before(
                    input_split_sizes or _equal_splits(rows, size),
                    output_split_sizes or _equal_splits(output, size),
                    rows,
                    output,
                    begin_ns,
                )
                if done is None:
                    return inner
                if options.asyncOp:
                    return ObservedWork(inner, done, listener)
                inner.wait()  # as the caller does next
                done(True)
                return inner
        return method(group, *args, **kwargs)

    return all_to_all


def _is_plain(tensor: object) -> bool:
    return type(tensor) is torch.Tensor and tensor.is_cpu


# A call is made from the midst of a pass, when nothing of this is in the processor's caches: what costs is how
# much code runs at all, more than what it does. Hence few functions, and no attribute read twice.


def _alltoall_base(
    keys: torch._C.DispatchKeySet,
    output: torch.Tensor,
    rows: torch.Tensor,
    group: Any,
    output_split_sizes: list[int],
    input_split_sizes: list[int],
    async_op: bool = True,
    timeout: int = -1,
) -> Any:
    done, listener, whose = None, None, _unbox_group(group)
    for other, listener, size in _listeners:
        if other is whose:
            if not output.is_meta:
                sent = input_split_sizes or _equal_splits(rows, size)
                received = output_split_sizes or _equal_splits(output, size)
                done = listener.before(sent, received, rows, output)
            break
    work = _redispatch_base(
        keys & BELOW,
        output,
        rows,
        group,
        output_split_sizes,
        input_split_sizes,
        async_op,
        timeout,
    )
    return work if done is None else _watch(work, done, listener, output, async_op)


def _alltoall(
    keys: torch._C.DispatchKeySet,
    outputs: list[torch.Tensor],
    inputs: list[torch.Tensor],
    group: Any,
    async_op: bool = True,
    timeout: int = -1,
) -> Any:
    done, listener, whose = None, None, _unbox_group(group)
    for other, listener, _ in _listeners:
        if other is whose:
            if outputs and not outputs[0].is_meta:
                sent, received = [_rows_of(x) for x in inputs], [_rows_of(x) for x in outputs]
                widest = max(inputs, key=torch.Tensor.dim)
                done = listener.before(sent, received, widest, outputs[0])
            break
    results, work = torch.ops.c10d.alltoall_.default.redispatch(
        keys & BELOW, outputs, inputs, group, async_op, timeout
    )
    return results, work if done is None else _watch(work, done, listener, outputs[0], async_op)


def _rows_of(tensor: torch.Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1


def _equal_splits(tensor: torch.Tensor, num_ranks: int) -> list[int]:
    return [_rows_of(tensor) // num_ranks] * num_ranks


def _watch(
    work: Any, done: Done, listener: Listener | None, like: torch.Tensor, async_op: bool
) -> Any:
    """What the caller gets for a work that has begun: end stamps are taken where it is waited for."""
    if like.is_cuda and not torch.cuda.is_current_stream_capturing():
        done(False)  # queued only: the host knows neither when it begins nor when it ends
        return work
    inner = _unbox_work(work)
    if not async_op:
        inner.wait()  # as the caller does next
        done(True)
        return work
    return ObservedWork(inner, done, listener).boxed()


class ObservedWork(dist.Work):
    """A work of the backend's, and word of the moment when its consumer has waited for it."""

    def __init__(self, inner: dist.Work, done: Done, listener: Listener | None) -> None:
        super().__init__()
        self.listener = listener
        self._inner = inner
        self._done: Done | None = done
        _not_waited.add(self)

    def end(self, timed: bool = True) -> None:
        """Tells whoever listens that the transfer is over; once."""
        done, self._done = self._done, None
        if done is not None:
            done(timed)

    def wait(self, *timeout: Any, **named: Any) -> Any:
        """Waits as the backend's does. A transfer that failed is not recorded."""
        try:
            result = self._inner.wait(*timeout, **named)
            self.end()
        finally:
            self._done = None
            _not_waited.discard(self)
        return result

    def is_completed(self) -> bool:
        """Whether it is; the consumer who learns that it is need not wait."""
        completed = bool(self._inner.is_completed())
        if completed:
            self.end()
            _not_waited.discard(self)
        return completed

    def get_future(self) -> Any:
        """The backend's future; the transfer ends with it, if nobody waits for the work before."""
        future = self._inner.get_future()
        future.add_done_callback(self._future_done)
        return future

    def _future_done(self, future: Any) -> None:
        self.end()
        _not_waited.discard(self)


def _delegate(name: str) -> Callable[..., Any]:
    def method(self: ObservedWork, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._inner, name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in (
    "_get_duration",
    "_get_op_type",
    "_source_rank",
    "block_current_stream",
    "exception",
    "get_future_result",
    "is_success",
    "result",
    "source_rank",
    "synchronize",
):
    if hasattr(dist.Work, _name):
        setattr(ObservedWork, _name, _delegate(_name))


def end_unfinished(listener: Listener) -> None:
    """Ends what nobody has waited for: it was executed, for a time that nobody knows."""
    for work in [*_not_waited]:
        if work.listener is listener:
            work.end(timed=False)


def listener_named(name: str) -> tuple[Listener | None, int]:
    """The listener of a group that an operator knows by name, and the group's size."""
    for group, listener, size in _listeners:
        if group.group_name == name:
            return listener, size
    return None, 0
