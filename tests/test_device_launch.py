"""One launch a pass: with what, in which lane, and with which calls of the driver."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from device_cases import LANE_BYTES, OnDevice
from dodoco_ext import _C
from fake_cuda import FakeCuda

RECORDED, IGNORED, COPIED, SHAPE, TOO_LARGE, BAD_SITE, NO_LANE, DEVICE_ERROR = (
    *(0, 1, -1, -2, -3, -4, -5, -6),
)


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


def test_a_pass_is_one_call_of_the_driver(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda) as on, cuda.calls_made() as calls:
        for layer in (0, 1, 0, 1):
            assert on.launch_ids(layer) == RECORDED
    assert calls == ["cuLaunchKernel"] * 4


def test_a_kernel_gets_the_tensor_the_layer_and_no_scratch(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda) as on:
        on.launch_ids(1, rows=5, k=3, data=0x7100, id_bytes=4, recomputed=True)
        on.launch_map(1, 6, 60, packed=False)
        on.launch_map(1, 7, 8, packed=True)
        ids, byte_map, bit_map = cuda.launches()
        assert ids.name == "f0b4e60k4a"
        assert (ids.data, ids.control, ids.layer, ids.top_k) == (0x7100, on.control(0), 1, 4)
        # A recomputed pass is seen and not read.
        assert (ids.rows, ids.columns, ids.row_stride, ids.column_stride) == (0, 3, 3, 1)
        assert (ids.recomputed, ids.scratch) == (1, (0, 0))
        assert (ids.programs, ids.threads, ids.shared_bytes, ids.stream) == (1, 128, 512, 0)
        assert (byte_map.name, byte_map.rows, byte_map.columns) == ("f1b0e60k4a", 6, 60)
        assert (bit_map.name, bit_map.rows, bit_map.columns) == ("f2b0e60k4a", 7, 8)


@pytest.mark.parametrize("id_bytes", [2, 4, 8])
@pytest.mark.parametrize("layer", [0, 1])
def test_each_layer_and_id_type_has_its_kernel(
    tmp_path: Path, cuda: FakeCuda, layer: int, id_bytes: int
) -> None:
    with OnDevice(tmp_path, cuda) as on:
        on.launch_ids(layer, id_bytes=id_bytes)
        expected = f"f0b{id_bytes}e{on.layers[layer][0]}k{on.layers[layer][1]}a"
        assert cuda.launches()[0].name == expected


@pytest.mark.parametrize(
    ("rows", "name", "programs"),
    [(0, "a", 1), (128, "a", 1), (129, "s", 3), (192, "s", 3), (193, "s", 4), (10**6, "s", 16)],
)
def test_large_passes_are_shared_among_programs(
    tmp_path: Path, cuda: FakeCuda, rows: int, name: str, programs: int
) -> None:
    with OnDevice(tmp_path, cuda) as on:
        assert on.launch_ids(rows=rows) == RECORDED
        (launch,) = cuda.launches()
        assert (launch.name, launch.programs) == (f"f0b8e8k2{name}", programs)


def test_a_recomputed_pass_takes_one_program_as_it_is_not_read(
    tmp_path: Path, cuda: FakeCuda
) -> None:
    with OnDevice(tmp_path, cuda) as on:
        on.launch_ids(rows=10**6, recomputed=True)
        assert cuda.launches()[0].programs == 1


def test_of_several_kernels_the_tightest_is_taken(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, [(64, 2), (64, 6), (64, 0)]) as on:
        names = []
        for layer in range(3):
            on.launch_ids(layer, k=1)
            names.append(cuda.launches()[-1].name)
        assert names == ["f0b8e64k2a", "f0b8e64k8a", "f0b8e64k16a"], "an unknown top_k may be any"
        assert on.launch_ids(1, k=7) == RECORDED


# --- refusals -------------------------------------------------------------------------------------


def test_shapes_that_cannot_be_are_refused_before_the_driver(
    tmp_path: Path, cuda: FakeCuda
) -> None:
    with OnDevice(tmp_path, cuda) as on, cuda.calls_made() as calls:
        assert on.launch_ids(0, k=3) == SHAPE
        assert on.launch_ids(0, rows=-1) == SHAPE
        assert on.launch_ids(1, k=5) == SHAPE
        assert on.launch_map(0, 4, 7, packed=False) == SHAPE
        assert on.launch_map(0, 4, 8, packed=True) == SHAPE
        assert on.launch_map(1, 4, 7, packed=True) == SHAPE
        assert on.launch_ids(0, rows=2**30, k=2) == TOO_LARGE
        assert on.launch_ids(0, rows=2**40, k=1) == TOO_LARGE
        assert on.launch_map(1, 2**31 // 60 + 1, 60, packed=False) == TOO_LARGE
        assert on.launch_map(1, 2**31 // 60 + 1, 8, packed=True) == TOO_LARGE
        assert on.launch_ids(0, rows=2**30 - 1, k=2) == RECORDED
    assert calls == ["cuLaunchKernel"]


def test_a_layer_without_a_kernel_is_refused(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, kernels=False) as on:
        assert on.launch_ids() == SHAPE


@pytest.mark.parametrize("shift", [-64, 8, 64 * 2, 1 << 20])
def test_a_copied_site_is_never_looked_into(tmp_path: Path, cuda: FakeCuda, shift: int) -> None:
    with OnDevice(tmp_path, cuda) as on, cuda.calls_made() as calls:
        site = on.lanes.site_address(0) + shift
        assert _C.launch_ids(site, 0x7000, 8, 4, 2, 2, 1, False, 0) == COPIED
    assert not calls


def test_a_thread_that_ran_nothing_yet_is_given_the_context(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda) as on:
        cuda.use_device(None)
        with cuda.calls_made() as calls:
            assert on.launch_ids() == RECORDED
        refused, *rest = calls
        assert refused == "cuLaunchKernel"
        assert rest == ["cuCtxPushCurrent", "cuLaunchKernel", "cuCtxPopCurrent"]
        assert len(cuda.launches()) == 1


def test_a_site_that_is_switched_off_is_launched_no_more(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda) as on:
        _C.switch_off_device_site(on.lanes.site_address(1))
        _C.switch_off_device_site(0x7000)  # nobody's
        assert [on.launch_ids(0), on.launch_ids(1), on.launch_ids(1, k=7)] == [0, IGNORED, IGNORED]
        assert len(cuda.launches()) == 1


@pytest.mark.parametrize("code", [1, 700])
def test_a_refused_launch_is_a_result_and_the_next_one_is_tried(
    tmp_path: Path, cuda: FakeCuda, code: int
) -> None:
    with OnDevice(tmp_path, cuda) as on:
        cuda.fail("cuLaunchKernel", code=code)
        assert on.launch_ids() == DEVICE_ERROR
        assert on.launch_ids() == RECORDED


def test_a_site_that_is_switched_off_launches_nothing_more(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda) as on:
        _C.switch_off_device_site(on.lanes.site_address(0))
        _C.switch_off_device_site(1 << 40)  # nobody's
        with cuda.calls_made() as calls:
            assert on.launch_ids(0) == IGNORED
            assert on.launch_ids(1) == RECORDED
        assert calls == ["cuLaunchKernel"]


# --- lanes ----------------------------------------------------------------------------------------


def lanes_used(on: OnDevice, cuda: FakeCuda) -> list[int]:
    return [(launch.control - on.control(0)) // LANE_BYTES for launch in cuda.launches()]


def test_each_stream_has_a_lane_and_keeps_it(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, lanes=3) as on:
        for stream in (7, 0, 7, 9, 0, 9):
            assert on.launch_ids(stream=stream) == RECORDED
        assert lanes_used(on, cuda) == [0, 1, 0, 2, 1, 2]


def test_a_stream_too_many_is_refused_and_takes_nobodys_lane(
    tmp_path: Path, cuda: FakeCuda
) -> None:
    with OnDevice(tmp_path, cuda, lanes=2) as on:
        results = [on.launch_ids(stream=stream) for stream in (1, 2, 3, 1, 3, 2)]
        assert results == [RECORDED, RECORDED, NO_LANE, RECORDED, NO_LANE, RECORDED]
        assert lanes_used(on, cuda) == [0, 1, 0, 1]


def test_a_thread_chooses_a_lane_for_itself(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, lanes=3) as on:
        choice = _C.DeviceLaneChoice(on.lanes, 0)
        on.launch_ids(stream=5)
        other = threading.Thread(target=on.launch_ids, kwargs={"stream": 6})
        other.start()
        other.join()
        inner = _C.DeviceLaneChoice(on.lanes, 2)
        on.launch_ids(stream=5)
        del inner
        on.launch_ids(stream=8)
        del choice
        # Lanes that threads choose are given to no stream.
        on.launch_ids(stream=6)
        assert on.launch_ids(stream=5) == NO_LANE
        assert lanes_used(on, cuda) == [0, 1, 2, 0, 1]
        with pytest.raises(ValueError, match="lane 3 of a device with 3"):
            _C.DeviceLaneChoice(on.lanes, 3)


def test_a_stream_keeps_its_lane_until_a_thread_chooses_it_for_another(
    tmp_path: Path, cuda: FakeCuda
) -> None:
    with OnDevice(tmp_path, cuda, lanes=2) as on:
        on.launch_ids(stream=5)
        choice = _C.DeviceLaneChoice(on.lanes, 0)
        on.launch_ids(stream=5)
        del choice
        on.launch_ids(stream=5)
        choice = _C.DeviceLaneChoice(on.lanes, 0)
        on.launch_ids(stream=6)
        del choice
        on.launch_ids(stream=5)
        assert lanes_used(on, cuda) == [0, 0, 0, 0, 1]
        assert on.launch_ids(stream=6) == NO_LANE


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "never came to be"
        time.sleep(0.001)


def test_threads_launch_at_the_same_time(tmp_path: Path, cuda: FakeCuda) -> None:
    """Each in its own stream and lane; none is lost, and none waits for the interpreter lock."""
    with OnDevice(tmp_path, cuda, lanes=4) as on:
        start = threading.Barrier(4)

        def work(stream: int) -> None:
            cuda.use_device(0)
            start.wait()
            for _ in range(200):
                assert on.launch_ids(stream=stream) == RECORDED

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(work, stream) for stream in (11, 12, 13, 14)]:
                done.result()
        lanes = Counter(zip((x.stream for x in cuda.launches()), lanes_used(on, cuda), strict=True))
        assert sorted(lanes.values()) == [200] * 4
        assert {lane for _, lane in lanes} == {0, 1, 2, 3}


def test_what_a_full_stream_waits_for_may_need_the_interpreter_lock(
    tmp_path: Path, cuda: FakeCuda
) -> None:
    """As a host function in the stream does; held, neither would go on."""
    with OnDevice(tmp_path, cuda) as on, ThreadPoolExecutor(1) as pool:
        with cuda.full():
            launched = pool.submit(on.launch_ids)
            until(lambda: cuda.waiting() > 0)
        # Here before the driver gave up: that thread had let go of the lock.
        assert launched.result() == RECORDED


def test_closing_lets_what_is_being_launched_end_first(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda) as on, ThreadPoolExecutor(2) as pool:
        with cuda.full():
            launched = pool.submit(on.launch_ids)
            until(lambda: cuda.waiting() > 0)
            closed = pool.submit(on.lanes.close)
            until(lambda: on.lanes.closed)
            assert on.launch_ids() == IGNORED, "refused from now on"
            assert not closed.done()
        assert launched.result() == RECORDED
        closed.result()
        wanted = ("cuLaunchKernel", "cuCtxSynchronize", "cuMemFree")
        order = [call for call in dict.fromkeys(cuda.calls()) if call in wanted]
        assert order == [*wanted]


def test_a_choice_holds_for_its_own_device(tmp_path: Path) -> None:
    cuda = FakeCuda(num_devices=2)
    with OnDevice(tmp_path, cuda, devices=[0, 1]) as on:
        choice = _C.DeviceLaneChoice(on.devices[1], 1)
        on.launch_ids(device=0)
        on.launch_ids(device=1)
        del choice
        first, second = (launch.control for launch in cuda.launches())
        assert first == on.control(0, device=0)
        assert second == on.control(1, device=1)


def test_where_several_devices_are_the_right_one_is_made_current(tmp_path: Path) -> None:
    cuda = FakeCuda(num_devices=2)
    with OnDevice(tmp_path, cuda, devices=[0, 1]) as on, cuda.calls_made() as calls:
        assert on.launch_ids(device=1) == RECORDED
        assert on.launch_ids(device=0) == RECORDED
    assert calls == ["cuCtxPushCurrent", "cuLaunchKernel", "cuCtxPopCurrent"] * 2


# --- captures -------------------------------------------------------------------------------------


def test_captures_are_noticed_and_looked_for_no_longer(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda, lanes=3) as on:
        with cuda.calls_made() as calls:
            on.launch_ids(stream=0)
        assert calls == ["cuLaunchKernel"], "the default stream cannot be captured"
        with cuda.calls_made() as calls:
            on.launch_ids(stream=4)
        assert calls == ["cuStreamIsCapturing", "cuLaunchKernel"]
        assert not on.lanes.captured
        with cuda.capturing(5):
            on.launch_ids(stream=5)
        assert on.lanes.captured
        with cuda.calls_made() as calls:
            on.launch_ids(stream=4)
        assert calls == ["cuLaunchKernel"]


def test_what_cannot_be_asked_counts_as_captured(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda) as on:
        cuda.fail("cuStreamIsCapturing", code=700)
        assert on.launch_ids(stream=4) == RECORDED
        assert on.lanes.captured


# --- nothing that waits ---------------------------------------------------------------------------


def test_the_module_imports_no_symbol_of_cuda() -> None:
    """All of the driver comes through dlopen, so the calls that tests count are all there are."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm: install binutils")
    symbols = subprocess.check_output([nm, "-D", "--undefined-only", _C.__file__], text=True)
    assert "dlsym" in symbols
    assert not re.findall(r"\b(cu[A-Z]\w*|cuda[A-Z]\w*|nvrtc\w*|__cuda\w*)", symbols)


def test_a_thousand_passes_make_no_other_call_and_hold_nothing_more(
    tmp_path: Path, cuda: FakeCuda
) -> None:
    with OnDevice(tmp_path, cuda) as on:
        before = cuda.live()
        with cuda.calls_made() as calls:
            for number in range(1000):
                on.launch_ids(number % 2, rows=number)
        assert calls == ["cuLaunchKernel"] * 1000
        assert cuda.live() == before
