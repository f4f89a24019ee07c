"""torch as the C++ side sees it, through DLPack's exchange interface, with tensors on any device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dodoco_ext import _C, ops

CPU, CUDA, CUDA_HOST = 1, 2, 3
INT, UNSIGNED, FLOAT, BOOL = 0, 1, 2, 6
NAME = b"dlpack_exchange_api"


class _Described(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_DESCRIBE = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_Described))
_STREAM = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
)


class _Api(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("previous", ctypes.c_void_p),
        ("other", ctypes.c_void_p * 3),
        ("describe", _DESCRIBE),
        ("stream", _STREAM),
    )


@dataclass
class Tensor:
    """What a tensor says of itself. Its data is never looked into here."""

    data: int
    shape: Sequence[int]
    strides: Sequence[int]
    code: int = INT
    bits: int = 64
    device_type: int = CUDA
    device: int = 0
    byte_offset: int = 0
    _kept: list[Any] = field(default_factory=list)

    def describe(self, out: _Described) -> None:
        dims = ctypes.c_int64 * len(self.shape)
        shape, strides = dims(*self.shape), dims(*self.strides)
        self._kept += [shape, strides]
        out.data, out.byte_offset = self.data, self.byte_offset
        out.device_type, out.device_id = self.device_type, self.device
        out.ndim, out.shape, out.strides = len(self.shape), shape, strides
        out.type_code, out.type_bits, out.type_lanes = self.code, self.bits, 1


class Faults(list[int]):
    """Results that C++ reported."""

    def report(self, result: int, tensor: object, site: object) -> None:
        self.append(result)


@contextmanager
def exchange(
    describe: Callable[[Any, _Described], None] = Tensor.describe,
    *,
    stream: int | None = 0,
    tensor_type: type = Tensor,
    body: Callable[[Any, Any], None] = lambda tensor, site: None,
    fault: Callable[[int, Any, Any], None] | None = None,
    graph_task: Callable[[], int] = lambda: -1,
) -> Iterator[Faults]:
    """Lets C++ read tensors through `describe`. `stream`: the current one; None: not to be had."""

    def answer(tensor: Any, out: Any) -> int:
        describe(tensor, out.contents)
        return 0

    def answer_stream(device_type: int, device: int, out: Any) -> int:
        out[0] = stream
        return 0 if stream is not None else -1

    faults = Faults()
    api = _Api((1, 3), None, (None,) * 3, _DESCRIBE(answer), _STREAM(answer_stream))
    _kept.append(api)  # the module keeps its address
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    capsule = new(ctypes.addressof(api), NAME, None)
    assert _C.use_torch(
        capsule, tensor_type, graph_task, lambda: 0, body, body, body,
        fault or faults.report,
    )  # fmt: skip
    try:
        yield faults
    finally:
        _C.use_torch(
            torch.Tensor.__dlpack_c_exchange_api__,
            torch.Tensor,
            torch._C._current_graph_task_id,
            torch._C._len_torch_dispatch_stack,
            ops._route_ids,
            ops._route_map,
            ops._route_bits,
            ops._refused,
        )


_kept: list[_Api] = []
