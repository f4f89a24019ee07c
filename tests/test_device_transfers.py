"""Transfers on a device: the fake driver runs the code of csrc/capture.cu, in as many threads as a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

import transfer_cases
from device_cases import OnDevice
from dodoco_ext import _C
from dodoco_ext.capture import COMBINE, DISPATCH
from fake_cuda import FakeCuda
from one_device import OneDevice, Tensor
from transfer_cases import Sent, assert_records_are, assert_totals_are

KERNELS = ["dodoco_transfer_begin", "dodoco_transfer_end", "dodoco_transfer_end_constants"]


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.mark.parametrize("ranks", [1, 8, 33, 300])
@pytest.mark.parametrize("on_host", [False, True], ids=["tensors", "constants"])
def test_a_device_writes_what_the_host_would(
    tmp_path: Path, cuda: FakeCuda, ranks: int, on_host: bool
) -> None:
    transfers = transfer_cases.of_every_kind(ranks, 40, seed=ranks)
    with OnDevice(tmp_path, cuda, host_lanes=1, lanes=1, kernels=False, ranks=ranks) as on:
        device = OneDevice(on)
        for number, sent in enumerate(transfers):
            device.record(cuda, sent, number, on_host=on_host)
        assert device.faults == []
        assert_totals_are(on.reader, transfers)
        assert_records_are(on.reader, transfers)
        assert (on.reader.transfers().records["lane"] == 1).all()


def test_a_transfer_is_two_launches_and_no_other_call(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, kernels=False, ranks=4) as on:
        device = OneDevice(on)
        counts = Tensor([1, 2, 3, 4])
        with cuda.calls_made() as calls:
            transfer = device.capture.begin(0, DISPATCH, device="cuda:0")
            device.capture.end(transfer, counts, counts)  # type: ignore[arg-type]
        assert calls == ["cuLaunchKernel"] * 2
        assert [launch.name for launch in cuda.launches()] == KERNELS[:2]


def test_counts_of_the_host_launch_nothing(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, kernels=False, ranks=2) as on:
        device = OneDevice(on)
        with cuda.calls_made() as calls:
            transfer = device.capture.begin(0, DISPATCH)
            assert device.capture.end(transfer, [1, 2], [3, 4], timed=False) == 0
        assert calls == []
        assert on.reader.transfers().records["lane"].tolist() == [0]


def test_constants_of_a_captured_graph_count_once_a_replay(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, kernels=False, ranks=2) as on:
        device = OneDevice(on)
        device.stream = 64
        with cuda.capturing(64):
            transfer = device.capture.begin(0, DISPATCH, device="cuda:0")
            device.capture.end(transfer, [5, 7], [9, 11])
        assert on.lanes.captured
        assert len(on.reader.transfers()) == 0
        for replays in range(1, 4):
            cuda.set_clock(1000 * replays)
            cuda.replay()
            totals = on.reader.traffic()[0]
            assert (totals.executions, totals.sent.tolist()) == (
                replays,
                [5 * replays, 7 * replays],
            )
        assert on.reader.transfers().records["iteration"].tolist() == [0, 1, 2]


def test_a_graph_that_is_replayed_after_the_end_writes_nothing(
    tmp_path: Path, cuda: FakeCuda
) -> None:
    with OnDevice(tmp_path, cuda, kernels=False, ranks=2) as on:
        device = OneDevice(on)
        device.stream = 64
        with cuda.capturing(64):
            transfer = device.capture.begin(0, DISPATCH, device="cuda:0")
            device.capture.end(transfer, [5, 7], [9, 11])
        on.lanes.close()
        cuda.replay()
        assert on.reader.traffic()[0].executions == 0


def test_transfers_under_way_at_once_keep_their_begins(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, kernels=False, ranks=2) as on:
        device = OneDevice(on)
        begun = []
        for number in range(16):
            cuda.settle()
            cuda.set_clock(100 * number)
            begun.append(device.capture.begin(number % 2, DISPATCH, device="cuda:0"))
        cuda.settle()
        cuda.set_clock(10_000)
        for transfer in begun:
            device.capture.end(transfer, Tensor([1, 1]), Tensor([1, 1]))  # type: ignore[arg-type]
        cuda.settle()
        records = on.reader.transfers().records
        assert (records["end_ns"] - records["begin_ns"]).tolist() == [
            10_000 - 100 * number for number in range(16)
        ]


def test_a_transfer_that_ends_in_another_stream_has_no_duration(
    tmp_path: Path, cuda: FakeCuda
) -> None:
    with OnDevice(tmp_path, cuda, kernels=False, lanes=2, ranks=2) as on:
        device = OneDevice(on)
        for begin, end in ((0, 64), (64, 64)):
            device.stream = begin
            transfer = device.capture.begin(0, DISPATCH, device="cuda:0")
            device.stream = end
            device.capture.end(transfer, Tensor([1, 2]), Tensor([3, 4]))  # type: ignore[arg-type]
            cuda.settle()
        records = on.reader.transfers().records
        assert device.faults == []
        assert records["timed"].tolist() == [0, 1]


def test_settings_of_the_lane_hold_for_its_transfers(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, kernels=False, lanes=1, ranks=2) as on:
        device = OneDevice(on)
        sent = Sent(0, DISPATCH, (1, 2), (3, 4))
        for name, value in (("enabled", 0), ("enabled", 1), ("record_every", 2), ("microbatch", 9)):
            on.lanes.set(0, name, value, 0)
            device.record(cuda, sent, 0)
        found = on.reader.transfers()
        # Iteration 0 was not traffic, 3 is not recorded in the ring, 2 was before the microbatch was set.
        assert found.records["iteration"].tolist() == [1, 2]
        assert on.reader.traffic()[0].executions == 3
        device.record(cuda, sent, 0)
        assert on.reader.transfers().records["microbatch"].tolist() == [0, 0, 9]


@pytest.mark.parametrize(
    ("counts", "fault"),
    [
        ([1, 2], _C.Fault.BAD_SHAPE),
        ([1, 2, -3], _C.Fault.BAD_SHAPE),
        ([1.5, "x", 3], _C.Fault.BAD_SHAPE),
    ],
)
def test_what_does_not_fit_is_a_fault(
    tmp_path: Path, cuda: FakeCuda, counts: list[int], fault: _C.Fault
) -> None:
    with OnDevice(tmp_path, cuda, kernels=False, ranks=3) as on:
        device = OneDevice(on)
        transfer = device.capture.begin(0, COMBINE, device="cuda:0")
        assert device.capture.end(transfer, counts, [1, 2, 3]) == -1
        assert device.faults == [fault]


def test_more_constants_than_a_launch_takes_are_a_fault(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, kernels=False, ranks=600) as on:
        device = OneDevice(on)
        transfer = device.capture.begin(0, COMBINE, device="cuda:0")
        device.capture.end(transfer, [1] * 600, [1] * 600)
        assert device.faults == [_C.Fault.TOO_LARGE]
        device.capture.end(transfer, Tensor([1] * 600), [1] * 600)  # type: ignore[arg-type]
        assert device.faults == [_C.Fault.TOO_LARGE]


def test_a_refused_launch_is_a_fault(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, kernels=False, ranks=2) as on:
        device = OneDevice(on)
        transfer = device.capture.begin(0, DISPATCH, device="cuda:0")
        cuda.fail("cuLaunchKernel", code=700)
        assert device.capture.end(transfer, [1, 2], [3, 4]) == -1
        assert device.faults == [_C.Fault.DEVICE_ERROR]


def test_another_device_is_a_fault(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, kernels=False, ranks=2) as on:
        device = OneDevice(on)
        transfer = device.capture.begin(0, DISPATCH, device="cuda:3")
        assert device.capture.end(transfer, [1, 2], [3, 4]) == -1
        assert device.faults == [_C.Fault.UNSUPPORTED_DEVICE]


def test_a_recording_without_a_group_takes_no_transfers(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, kernels=False) as on:
        with pytest.raises(ValueError, match="names no group"):
            on.lanes.add_transfers(b"code")
        assert on.lanes.begin_transfer(0, 0) == -4


def test_kernels_are_called_as_the_driver_finds_them() -> None:
    source = (Path(__file__).parent.parent / "csrc" / "capture.cu").read_text()
    assert [name for name in KERNELS if f"void {name}(" in source] == KERNELS


def test_lanes_of_a_device_begin_with_no_begins(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, kernels=False, lanes=2, ranks=2) as on:
        for lane in range(2):
            words = (ctypes.c_uint64 * 16).from_address(on.control(lane) + 384)
            assert list(words) == [0] * 16
