"""A capture that writes into lanes of a fake device, and tensors in that device's memory."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from device_cases import OnDevice
from dodoco_ext import _C
from dodoco_ext.capture import Capture
from dodoco_ext.device import Device
from fake_cuda import FakeCuda
from transfer_cases import Sent


class Tensor:
    """Counts in the fake device's memory, which is the host's: what a CUDA tensor says of itself."""

    is_cuda = True
    device = "cuda:0"

    def __init__(self, counts: Sequence[int], *, wide: bool = True, stride: int = 1) -> None:
        self._memory = np.zeros(max(len(counts), 1) * stride, np.int64 if wide else np.uint32)
        self._memory[: len(counts) * stride : stride] = np.array(counts, np.uint64).astype(
            self._memory.dtype
        )
        self._size, self._stride = len(counts), stride

    dtype = "an integer"
    shape = ()

    def dim(self) -> int:
        return 1

    def element_size(self) -> int:
        return self._memory.itemsize

    def is_floating_point(self) -> bool:
        return False

    def data_ptr(self) -> int:
        return self._memory.ctypes.data

    def numel(self) -> int:
        return self._size

    def stride(self, _: int) -> int:
        return self._stride

    def __iter__(self) -> None:
        raise AssertionError("the host read a tensor of the device")

    __bool__ = __index__ = __int__ = tolist = item = cpu = __iter__


class OneDevice:
    """A `Capture` on a recording with lanes of a fake device; every call in `stream`."""

    def __init__(self, on: OnDevice, *, advances: bool = True) -> None:
        device = object.__new__(Device)
        device.name, device.index, device._lanes = "cuda:0", 0, on.lanes
        on.lanes.add_transfers(b"code")
        device._has_transfers = True
        device._begun_in = [0] * _C.TRANSFERS_AT_ONCE
        device._stream = lambda: self.stream  # type: ignore[method-assign]
        self.stream, self.faults = 0, list[_C.Fault]()
        recorder = SimpleNamespace(
            group=SimpleNamespace(ranks=range(on.reader.group.ranks[-1] + 1)),  # type: ignore[union-attr]
            lane=on.writer.lane(0),
            devices={"cuda:0": device},
            add_fault=self.faults.append,
        )
        self.capture = Capture(recorder, advances=advances)  # type: ignore[arg-type]

    def record(self, cuda: FakeCuda, sent: Sent, number: int, *, on_host: bool = False) -> None:
        """As a consumer does it: the clock shows the begin, then the end."""
        cuda.settle()
        cuda.set_clock(sent.begin_ns)
        transfer = self.capture.begin(
            sent.layer, sent.op, backward=sent.backward, recompute=sent.recompute,
            iteration=None if sent.iteration < 0 else sent.iteration, device="cuda:0",
        )  # fmt: skip
        cuda.settle()
        cuda.set_clock(sent.end_ns)
        counts = [
            list(each) if on_host else Tensor(each, wide=number % 2 == 0, stride=1 + number % 3)
            for each in (sent.send, sent.receive, sent.experts)
        ]
        assert (
            self.capture.end(
                transfer, counts[0], counts[1], experts=counts[2], unit=sent.unit,
                bytes_per_row=sent.bytes_per_row, timed=sent.timed,
            )  # type: ignore[arg-type]
            == -1
        )  # fmt: skip
        cuda.settle()
