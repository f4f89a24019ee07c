"""What `benchmarks/gpu` and `tests/gpu` use of `torch.cuda`, imitated on the CPU.

Proves the logic around a GPU where there is none: streams run at once and in order, events are
readings of the host's clock, and a graph is the list of ops that were called while it was captured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

DEVICE = "cpu"
_SYNCHRONISING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.bincount.default,
}


class Stream:
    """A stream whose work is done as soon as it is asked for."""

    cuda_stream = 0

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...


class Event:
    """A moment on the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._enable_timing, self._s = enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._s = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds until another event."""
        assert self._enable_timing, "an event without timing has no elapsed time"
        return (end._s - self._s) * 1e3


_current = Stream()


def current_stream(device: object = None) -> Stream:
    return _current


@contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    yield


@contextmanager
def device(device: object) -> Iterator[None]:
    yield


def device_count() -> int:
    return 1


def synchronize(device: object = None) -> None: ...


def _sleep(cycles: int) -> None: ...


def graph_pool_handle() -> None: ...


def memory_stats(device: object = None) -> dict[str, int]:
    """No allocation is counted on the CPU."""
    return {"allocation.all.allocated": 0}


def mem_get_info(device: object = None) -> tuple[int, int]:
    """Bytes that are free and bytes in all: enough for what runs dry."""
    return 1 << 40, 1 << 40


def empty_cache() -> None: ...


class _Refusing(TorchDispatchMode):
    """Raises where torch would wait for a GPU."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _SYNCHRONISING:
            raise RuntimeError("called a synchronizing CUDA operation")
        return func(*args, **(kwargs or {}))


_refusing: list[_Refusing] = []


def set_sync_debug_mode(debug_mode: str | int) -> None:
    """`error`: what waits for the device raises."""
    assert debug_mode in ("error", "default"), debug_mode
    if debug_mode == "error" and not _refusing:
        _refusing.append(_Refusing())
        _refusing[-1].__enter__()
    elif debug_mode == "default" and _refusing:
        _refusing.pop().__exit__(None, None, None)


class CUDAGraph:
    """The ops of a capture, run again by `replay()` into the tensors that the capture made."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, made in self.calls:
                _write_over(made, function(*args, **kwargs))

    def reset(self) -> None:
        self.calls.clear()


class _Capturing(TorchDispatchMode):
    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self._graph = graph
        # By address; kept, so that no address comes again.
        self._made: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SYNCHRONISING:
            raise RuntimeError("operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            # Captured and not run, unless what it changes is the capture's own: shapes and indices may
            # depend on that. What an in-place op returns is its first argument.
            made = args[0] if func._schema.returns else None
            if isinstance(args[0], torch.Tensor) and self._is_own(args[0]):
                func(*args, **kwargs)
            self._graph.calls.append((func, args, kwargs, None))
        else:
            made = func(*args, **kwargs)
            self._graph.calls.append((func, args, kwargs, made))
            storages = [
                t.untyped_storage() for t in tree_flatten(made)[0] if isinstance(t, torch.Tensor)
            ]
            foreign = {
                t.untyped_storage().data_ptr()
                for t in tree_flatten((args, kwargs))[0]
                if isinstance(t, torch.Tensor)
            }
            self._made |= {s.data_ptr(): s for s in storages if s.data_ptr() not in foreign}
        return made

    def _is_own(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._made


def _write_over(made: Any, again: Any) -> None:
    if made is None:
        return
    for old, new in zip(tree_flatten(made)[0], tree_flatten(again)[0], strict=True):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


@contextmanager
def graph(
    cuda_graph: CUDAGraph, pool: object = None, stream: Stream | None = None
) -> Iterator[None]:
    """Captures what is called inside."""
    with _Capturing(cuda_graph):
        yield
