"""AlltoAlls of torch.distributed whose tensors are on a device: a fake one, and stand-ins for its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from device_cases import OnDevice
from dodoco_ext import _C
from dodoco_ext.integrations import collectives
from dodoco_ext.integrations.attribution import Attribution
from dodoco_ext.integrations.distributed import AlltoAllCapture
from fake_cuda import FakeCuda
from one_device import OneDevice, Tensor

LIKE: Any = SimpleNamespace(is_cuda=True, is_meta=False, device="cuda:0")
ROWS = torch.zeros(3, 4)


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def on(tmp_path: Path, cuda: FakeCuda) -> Iterator[OnDevice]:
    with OnDevice(tmp_path, cuda, kernels=False, ranks=2) as lanes:
        yield lanes


class Listening(AlltoAllCapture):
    """A capture of one layer in order, without a group or a recording of its own."""

    def __init__(self, device: OneDevice) -> None:
        self.passed_over = Counter()
        self.writer = device.capture
        self.attribution = Attribution(1, ordered=True)
        self._recorder: Any = SimpleNamespace(add_fault=device.faults.append)
        self._logged = set()


@pytest.fixture
def device(on: OnDevice) -> OneDevice:
    return OneDevice(on)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


class NotOursToWaitFor:
    """A work of a backend whose stream the host runs ahead of."""

    def wait(self) -> None:
        raise AssertionError("waited for a device")


class Queued(dist.Work):
    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def wait(self, *timeout: Any) -> bool:
        self.waits += 1
        return True


@pytest.mark.parametrize("async_op", [False, True])
def test_a_queued_call_is_recorded_without_times_or_launches(
    on: OnDevice, device: OneDevice, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, async_op: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    listener, work = Listening(device), NotOursToWaitFor()
    with cuda.calls_made() as calls:
        done = listener.before([1, 2], [3, 4], ROWS, LIKE)
        assert done is not None
        assert collectives._watch(work, done, listener, LIKE, async_op) is work
    assert calls == []
    found = on.reader.transfers()
    assert (found.sent.tolist(), found.received.tolist()) == ([[1, 2]], [[3, 4]])
    assert not found.records["timed"].any()
    assert found.records["bytes_per_row"].tolist() == [16]


def test_a_captured_call_is_two_nodes_and_counts_once_a_replay(
    on: OnDevice, device: OneDevice, cuda: FakeCuda, capturing: None
) -> None:
    device.stream = 64
    listener = Listening(device)
    with cuda.capturing(64):
        done = listener.before([1, 2], [3, 4], ROWS, LIKE)
        assert done is not None
        queued = Queued()
        work = collectives._watch(queued.boxed(), done, listener, LIKE, async_op=True)
        assert queued.waits == 0
        dist.Work.unbox(work).wait()  # which orders streams, and is captured too
        assert queued.waits == 1
    for replays in range(1, 4):
        cuda.replay()
        totals = on.reader.traffic()[0]
        assert (totals.executions, totals.sent.tolist()) == (replays, [replays, 2 * replays])
    assert on.reader.transfers().records["timed"].all()
    assert listener.passed_over == {}


def test_splits_on_the_device_are_read_there(
    on: OnDevice, device: OneDevice, cuda: FakeCuda
) -> None:
    listener = Listening(device)
    rows: Any = SimpleNamespace(dtype=torch.bfloat16, shape=(3, 4), is_cuda=True, device="cuda:0")
    read: Any = lambda: (Tensor([5, 6]), Tensor([7, 8]), Tensor([9]))  # noqa: E731
    done = listener.before_on_device(rows, read)
    assert done is not None
    done(True)
    cuda.settle()
    found = on.reader.transfers()
    assert (found.sent.tolist(), found.received.tolist()) == ([[5, 6]], [[7, 8]])
    assert found.experts[0].tolist() == [9]
    assert found.records["bytes_per_row"].tolist() == [8]


def test_splits_that_cannot_be_read_are_a_fault(device: OneDevice) -> None:
    def read() -> Any:
        raise RuntimeError("an operator changed its splits")

    listener = Listening(device)
    rows: Any = SimpleNamespace(dtype=torch.bfloat16, shape=(3, 4), is_cuda=True, device="cuda:0")
    done = listener.before_on_device(rows, read)
    assert done is not None
    done(True)
    assert device.faults == [_C.Fault.INTERNAL]
