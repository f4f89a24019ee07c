"""What a device is given when it is set up: the arena, sites, settings, lanes, clock."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from device_cases import (
    CLOCK,
    ENABLED,
    EVERY,
    INVERSE,
    LIMIT,
    MAGIC,
    MAP_VERSION,
    MASK,
    MICROBATCH,
    NUM_VALID,
    OnDevice,
    add_kernels,
    words_at,
)
from dodoco_ext import _C
from dodoco_ext.recording import Reader
from fake_cuda import FakeCuda, Live

NOTHING = Live(0, 0, 0, 0, 0)


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


def test_sites_name_their_layer_and_the_lanes(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, [(8, 2), (60, 4), (384, 8)], lanes=2) as on:
        for layer in range(3):
            address = on.lanes.site_address(layer)
            magic, itself, control, number, *rest = words_at(address, 8)
            assert magic == 0x455449534F434F44
            assert (itself, control, number) == (address, on.control(0), layer)
            assert rest == [0, 0, 0, 0]
        with pytest.raises(ValueError, match="no layer 3"):
            on.lanes.site_address(3)


def test_a_lane_has_its_own_parts_of_the_file_and_of_the_device(
    tmp_path: Path, cuda: FakeCuda
) -> None:
    with OnDevice(tmp_path, cuda, host_lanes=1, lanes=2) as on:
        reader = on.reader
        seen = set()
        for lane in range(2):
            words = words_at(on.control(lane), 64)
            control, state, bounds = words[:16], words[16:32], words[32:48]
            assert control[0] == MAGIC
            file = int(control[1])
            assert words_at(file, 1)[0] == 0x0A0D4F434F444F44, "the device's address of the file"
            ring, log2_slots, scratch = int(control[5]), int(control[6]), int(control[8])
            assert 1 << log2_slots == reader.num_slots
            assert state.tolist() == [0, 2**64 - 1] + [0] * 14
            assert not words_at(scratch, (8 + 64) // 2).any()
            eighths = bounds.view(np.uint32)
            assert [bound / 8 for bound in eighths] == list(_C.MAX_MEAN_BOUNDS)
            # What is stored through the device's addresses is in the file.
            ctypes.c_uint64.from_address(ring).value = lane + 1
            assert _C.RecordingReader(str(on.path)).head(1 + lane) == lane + 1
            seen |= {ring, scratch}
        assert len(seen) == 4, "lanes share nothing"


def test_a_launch_names_the_layers_block_in_both_memories(tmp_path: Path, cuda: FakeCuda) -> None:
    shapes = [(8, 2), (60, 4), (384, 8)]
    with OnDevice(tmp_path, cuda, shapes, lanes=2) as on:
        seen = set()
        for lane, stream in enumerate((0, 7)):
            for layer in range(3):
                assert on.launch_ids(layer, stream=stream) == 0
                launch = cuda.launches()[-1]
                assert (launch.control, launch.layer) == (on.control(lane), layer)
                assert launch.top_k == shapes[layer][1]
                size = 16 + -(-shapes[layer][0] // 8) * 8 + 20 * 64
                assert not words_at(launch.totals, size).any()
                ctypes.c_uint64.from_address(launch.board + 8).value = 70 + layer
                words, _ = _C.RecordingReader(str(on.path)).board(1 + lane, layer)
                assert (words[1], len(words)) == (70 + layer, size)
                seen |= {launch.totals, launch.board}
        assert len(seen) == 12


def test_a_file_is_registered_once_and_each_device_has_its_own_address(tmp_path: Path) -> None:
    cuda = FakeCuda(num_devices=2)
    with OnDevice(tmp_path, cuda, devices=[0, 1]) as on:
        assert cuda.calls().count("cuMemHostRegister") == 1
        assert cuda.calls().count("cuMemHostGetDevicePointer") == 2
        files = {int(words_at(on.control(0, device), 16)[1]) for device in range(2)}
        assert len(files) == 2
        on.devices[0].close()
        assert cuda.live().registrations == 1, "the other device still writes"
    assert cuda.live() == NOTHING


SETTINGS = {
    "enabled": (0, ENABLED, ctypes.c_uint32, 1),
    "record_every": (6, EVERY, ctypes.c_uint32, 1),
    "num_valid": (1 << 33, NUM_VALID, ctypes.c_int64, -1),
    "map_version": (9, MAP_VERSION, ctypes.c_uint32, 0),
    "microbatch": (65535, MICROBATCH, ctypes.c_uint32, 0),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_changed_by_the_stream(tmp_path: Path, cuda: FakeCuda, name: str) -> None:
    value, offset, kind, before = SETTINGS[name]
    with OnDevice(tmp_path, cuda) as on:
        assert [on.lanes.get(lane, name) for lane in range(2)] == [before] * 2
        assert on.word(1, offset, kind) == before
        with cuda.calls_made() as calls:
            on.lanes.set(1, name, value, 5)
        assert set(calls) == {
            "cuCtxPushCurrent",
            "cuThreadExchangeStreamCaptureMode",
            "cuStreamIsCapturing",
            "cuMemsetD32Async",
            "cuCtxPopCurrent",
        }, "in stream order, no wait, no copy from memory that must stay"
        assert on.word(1, offset, kind) == value
        assert on.word(0, offset, kind) == before, "the other lane's"
        assert [on.lanes.get(lane, name) for lane in range(2)] == [before, value]


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 6, 7, 12, 96, 97, 1000, 1 << 31, (1 << 32) - 1])
def test_multiples_of_record_every_are_told_without_division(
    tmp_path: Path, cuda: FakeCuda, every: int
) -> None:
    with OnDevice(tmp_path, cuda) as on:
        on.lanes.set(0, "record_every", every, 0)
        mask, inverse, limit = (on.word(0, at, ctypes.c_uint64) for at in (MASK, INVERSE, LIMIT))
    far = [0, every, 3 * every, 2**40 // every * every, 2**63 // every * every]
    for number in {*range(200), *(max(n + d, 0) for n in far for d in (-2, -1, 0, 1, 2))}:
        told = number & mask == 0 and number * inverse % 2**64 <= limit
        assert told == (number % every == 0), (number, every)


def test_settings_are_refused_while_the_stream_is_captured(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda) as on:
        with cuda.capturing(5), pytest.raises(RuntimeError, match=r"captured.*each replay"):
            on.lanes.set(0, "enabled", 0, 5)
        # The default stream, while another one is captured.
        cuda.fail("cuStreamIsCapturing", code=906)
        with pytest.raises(RuntimeError, match="captured"):
            on.lanes.set(0, "enabled", 0, 0)
        assert on.word(0, ENABLED) == 1
        assert on.lanes.get(0, "enabled") == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("colour", 1, "no setting 'colour'"),
        ("record_every", 0, "record_every=0: give 1 to 4294967295"),
        ("record_every", 1 << 32, "record_every=4294967296: give 1 to"),
        ("enabled", -1, "enabled=-1: give 0 to"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, cuda: FakeCuda, name: str, value: int, message: str
) -> None:
    with OnDevice(tmp_path, cuda) as on, pytest.raises(ValueError, match=message):
        on.lanes.set(0, name, value, 0)


def test_a_lane_that_is_not_there_has_no_settings(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda) as on:
        with pytest.raises(ValueError, match="lane 2 of a device with 2"):
            on.lanes.set(2, "enabled", 0, 0)
        with pytest.raises(ValueError, match="lane 2 of a device with 2"):
            on.lanes.get(2, "enabled")


def test_a_setting_that_the_driver_refuses_keeps_its_value(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda) as on:
        cuda.fail("cuMemsetD32Async", code=700)
        with pytest.raises(OSError, match="cuMemsetD32Async failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
            on.lanes.set(0, "num_valid", 3, 0)
        assert on.lanes.get(0, "num_valid") == -1
        on.lanes.set(0, "num_valid", 3, 0)
        assert (on.lanes.get(0, "num_valid"), on.word(0, NUM_VALID, ctypes.c_int64)) == (3, 3)


def test_settings_wait_for_their_turn_in_the_stream(tmp_path: Path, cuda: FakeCuda) -> None:
    """A pass that was launched before keeps what it was launched with."""
    with OnDevice(tmp_path, cuda) as on:
        seen = []
        cuda.run_with(lambda *_: seen.append(on.peek(0, NUM_VALID, ctypes.c_int64)))
        on.launch_ids(stream=5)
        on.lanes.set(0, "num_valid", 3, 5)
        on.launch_ids(stream=5)
        assert seen == []
        cuda.settle()
        assert seen == [-1, 3]


def test_the_clock_is_calibrated_for_all_lanes(tmp_path: Path, cuda: FakeCuda) -> None:
    import time

    with OnDevice(tmp_path, cuda) as on:
        cuda.set_clock(1_000)
        before = time.monotonic_ns()
        on.lanes.calibrate_clock("read_clock", b"cubin")
        after = time.monotonic_ns()
        offsets = [on.word(lane, CLOCK, ctypes.c_int64) for lane in range(2)]
        assert offsets[0] == offsets[1]
        assert before <= offsets[0] + 1_000 <= after


def test_setting_up_is_done_before_anything_is_launched(tmp_path: Path, cuda: FakeCuda) -> None:
    """In a stream of its own, which waits for nothing that the host has under way."""
    with OnDevice(tmp_path, cuda) as on:
        on.lanes.calibrate_clock("read_clock", b"cubin")
        control = on.control(1)
        assert words_at(control, 1)[0] == MAGIC
        assert on.peek(1, CLOCK, ctypes.c_int64) != 0
        assert not {"cuCtxSynchronize", "cuMemcpyHtoD", "cuMemsetD8"} & set(cuda.calls())
        assert cuda.live().streams == 1


def test_functions_are_loaded_before_their_first_launch(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda) as on:
        on.lanes.calibrate_clock("read_clock", b"cubin")
        calls = cuda.calls()
        assert calls.count("cuFuncGetAttribute") == calls.count("cuModuleGetFunction") == 21


# --- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "count"), [(0, 4), (3, 1), (1, 0)], ids=["too many", "beyond", "none"]
)
def test_lanes_that_the_recording_lacks_are_refused(
    tmp_path: Path, cuda: FakeCuda, first: int, count: int
) -> None:
    with (
        OnDevice(tmp_path, cuda, lanes=2) as on,
        pytest.raises(ValueError, match="of a recording with 3"),
    ):
        _C.DeviceLanes(on.writer, 0, first, count)


def test_a_closed_recording_takes_no_device(tmp_path: Path, cuda: FakeCuda) -> None:
    on = OnDevice(tmp_path, cuda)
    on.close()
    with pytest.raises(ValueError, match="closed"):
        _C.DeviceLanes(on.writer, 0, 1, 1)
    assert cuda.live() == NOTHING


def test_a_device_that_is_not_there(tmp_path: Path, cuda: FakeCuda) -> None:
    assert _C.device_capability(0) == 90
    with pytest.raises(OSError, match=r"cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE \(101\)"):
        _C.device_capability(3)
    with pytest.raises(OSError, match="CUDA_ERROR_INVALID_DEVICE"):
        OnDevice(tmp_path, cuda, devices=[3])
    assert cuda.live() == NOTHING


SETUP_CALLS = [
    "cuDevicePrimaryCtxRetain",
    "cuDeviceGetCount",
    "cuCtxPushCurrent",
    "cuMemHostRegister",
    "cuMemHostGetDevicePointer",
    "cuMemAlloc",
    "cuStreamCreate",
    "cuMemcpyHtoDAsync",
    "cuMemsetD32Async",
    "cuStreamSynchronize",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
]


def test_these_are_all_the_calls_of_setting_up(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda):
        left = {"cuDeviceGet", "cuCtxPopCurrent", "cuThreadExchangeStreamCaptureMode", "cuInit"}
        assert set(cuda.calls()) - left == set(SETUP_CALLS)


@pytest.mark.parametrize("call", SETUP_CALLS)
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from then on"])
def test_whatever_fails_nothing_is_left_behind(
    tmp_path: Path, cuda: FakeCuda, call: str, sticky: bool
) -> None:
    cuda.fail(call, code=801, sticky=sticky)
    with pytest.raises(OSError, match=f"{call} failed: .*801") as caught:
        OnDevice(tmp_path, cuda)
    assert re.search(r"CUDA_ERROR_NOT_SUPPORTED|unknown error", str(caught.value))
    if not sticky:  # otherwise nothing could be given back either
        assert cuda.live() == NOTHING
    cuda.recover()
    (recording,) = tmp_path.iterdir()
    # The recording is whole, and another device can take it.
    assert Reader(recording).state == "closed"
    with OnDevice(tmp_path, cuda):
        pass


def test_large_kernels_ask_for_their_shared_memory(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, kernels=False) as on:
        add_kernels(on.lanes, 8, 2)
        assert "cuFuncSetAttribute" not in cuda.calls()
        add_kernels(on.lanes, 8, 2, shared_bytes=100_000)
        assert cuda.calls().count("cuFuncSetAttribute") == 10
