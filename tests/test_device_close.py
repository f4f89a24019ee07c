"""How lanes on a device end: closed, captured before, failed, forked, at the end of the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from device_cases import MAGIC, OnDevice, add_kernels, words_at
from dodoco_ext import _C
from dodoco_ext.recording import Reader
from fake_cuda import FakeCuda, Live
from fake_torch import exchange

NOTHING = Live(0, 0, 0, 0, 0)
IGNORED, COPIED = 1, -1
HERE = Path(__file__).parent


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


def test_closing_switches_off_waits_and_gives_everything_back(
    tmp_path: Path, cuda: FakeCuda
) -> None:
    on = OnDevice(tmp_path, cuda)
    site = on.lanes.site_address(0)
    on.launch_ids()
    with cuda.calls_made() as calls:
        on.lanes.close()
    order = [call for call in calls if not call.startswith(("cuCtxP", "cuThread"))]
    assert order[0] == "cuCtxSynchronize"
    assert order[1:4] == ["cuMemsetD32Async"] * 2 + ["cuStreamSynchronize"], "a magic a lane"
    assert set(order[4:]) == {
        *("cuModuleUnload", "cuStreamDestroy", "cuMemFree", "cuMemHostUnregister"),
        "cuDevicePrimaryCtxRelease",
    }
    assert cuda.live() == NOTHING
    assert on.lanes.closed
    with cuda.calls_made() as calls:
        on.lanes.close()
        on.lanes.set(0, "enabled", 0, 0)
        # Compiled code may still call with what was a site; the memory may be anybody's by now.
        assert _C.launch_ids(site, 0x7000, 8, 4, 2, 2, 1, False, 0) == COPIED
    assert not calls
    on.writer.close()
    assert Reader(on.path).state == "closed"


def test_what_was_launched_before_is_counted(tmp_path: Path, cuda: FakeCuda) -> None:
    """In whatever stream: lanes are switched off behind it."""
    on = OnDevice(tmp_path, cuda)
    controls = {5: on.control(0), 0: on.control(1)}
    seen = []
    cuda.run_with(lambda name, arguments, _: seen.append(int(words_at(arguments[1], 1)[0])))
    for stream in controls:
        on.launch_ids(stream=stream)
    on.close()
    assert seen == [MAGIC] * 2


def test_inside_a_capture_nothing_is_waited_for(tmp_path: Path, cuda: FakeCuda) -> None:
    """A model may be collected there; to wait for the device would end the host's capture."""
    on = OnDevice(tmp_path, cuda)
    held, control = cuda.live(), on.control(0)
    with exchange(stream=5), cuda.capturing(5):
        with cuda.calls_made() as calls:
            on.close()
        assert "cuCtxSynchronize" not in calls
    assert cuda.live() == held
    assert words_at(control, 1)[0] == 0
    assert Reader(on.path).state == "closed"


def test_a_capture_in_another_thread_is_told(tmp_path: Path, cuda: FakeCuda) -> None:
    on = OnDevice(tmp_path, cuda)
    held, control = cuda.live(), on.control(0)
    with (
        cuda.capturing(9),
        pytest.raises(OSError, match="cuCtxSynchronize failed: CUDA_ERROR_STREAM_CAPTURE"),
    ):
        on.lanes.close()
    cuda.settle()
    assert words_at(control, 1)[0] == 0, "switched off all the same"
    on.close()
    assert cuda.live() == held


def test_after_a_capture_everything_stays_and_is_switched_off(
    tmp_path: Path, cuda: FakeCuda
) -> None:
    """A graph that is replayed later reads its control block, and finds no magic."""
    on = OnDevice(tmp_path, cuda)
    controls = [on.control(lane) for lane in range(2)]
    with cuda.capturing(5):
        on.launch_ids(stream=5)
    held = cuda.live()
    on.close()
    assert cuda.live() == held
    with cuda.calls_made() as calls:
        assert on.launch_ids(stream=5) == IGNORED, "nothing to report"
    assert not calls
    for control in controls:
        block = words_at(control, 16)
        assert block[0] == 0
        # The file is mapped for the device and for the host, and closed for readers.
        assert words_at(int(block[1]), 1)[0] == 0x0A0D4F434F444F44
    assert Reader(on.path).state == "closed"


def test_only_the_captured_device_stays(tmp_path: Path) -> None:
    cuda = FakeCuda(num_devices=2)
    on = OnDevice(tmp_path, cuda, devices=[0, 1])
    with cuda.capturing(5):
        on.launch_ids(stream=5, device=1)
    kept = on.control(0, device=1)
    on.close()
    live = cuda.live()
    assert (live.allocations, live.registrations, live.contexts) == (1, 1, 1)
    assert words_at(kept, 1)[0] == 0


def test_the_writer_may_close_first(tmp_path: Path, cuda: FakeCuda) -> None:
    on = OnDevice(tmp_path, cuda)
    control = on.control(0)
    on.writer.close()
    assert words_at(control, 1)[0] == MAGIC
    assert words_at(int(words_at(control, 2)[1]), 1)[0] == 0x0A0D4F434F444F44, "still mapped"
    mapped = str(on.path) in Path("/proc/self/maps").read_text()
    on.lanes.close()
    assert cuda.live() == NOTHING
    assert mapped
    assert str(on.path) not in Path("/proc/self/maps").read_text(), "and by nobody any more"


@pytest.mark.parametrize(
    "call", ["cuCtxPushCurrent", "cuCtxSynchronize", "cuMemsetD32Async", "cuStreamSynchronize"]
)
def test_a_device_that_cannot_be_waited_for_keeps_what_it_has(
    tmp_path: Path, cuda: FakeCuda, call: str
) -> None:
    on = OnDevice(tmp_path, cuda)
    file = int(words_at(on.control(0), 2)[1])
    before = cuda.live()
    cuda.fail(call, code=700, sticky=True)
    with pytest.raises(OSError, match=rf"{call} failed: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"):
        on.lanes.close()
    cuda.recover()
    on.close()  # once is enough
    assert cuda.live() == before
    assert words_at(file, 1)[0] == 0x0A0D4F434F444F44, "still mapped"
    assert Reader(on.path).state == "closed"


def test_a_driver_that_has_shut_down_is_no_error(tmp_path: Path, cuda: FakeCuda) -> None:
    on = OnDevice(tmp_path, cuda)
    cuda.fail("cuCtxPushCurrent", code=4, sticky=True)
    on.close()
    assert Reader(on.path).state == "closed"


def test_open_lanes_have_a_limit_and_closing_makes_room(tmp_path: Path, cuda: FakeCuda) -> None:
    held = [OnDevice(tmp_path, cuda, kernels=False, max_bytes=1 << 18) for _ in range(64)]
    with pytest.raises(ValueError, match="64 recordings on devices are open"):
        OnDevice(tmp_path, cuda, max_bytes=1 << 18)
    held.pop().close()
    with OnDevice(tmp_path, cuda, max_bytes=1 << 18) as on:
        assert on.launch_ids() == 0
    for each in held:
        each.close()
    assert cuda.live() == NOTHING


def test_a_forked_child_makes_no_call(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda) as on:
        site = on.lanes.site_address(0)

        child = os.fork()
        if child == 0:  # no assertion, no cleanup: only what the parent waits for
            before = len(cuda.calls())
            result = _C.launch_ids(site, 0x7000, 8, 4, 2, 2, 1, False, 0)
            on.lanes.set(0, "enabled", 0, 0)
            choice = _C.DeviceLaneChoice(on.lanes, 1)
            on.lanes.calibrate_clock("read_clock", b"cubin")
            add_kernels(on.lanes, 8, 2)
            del choice
            on.close()
            os._exit(0 if (result, len(cuda.calls())) == (IGNORED, before) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert on.launch_ids() == 0
        assert on.lanes.get(0, "enabled") == 1
        assert Reader(on.path).state == "live"


AT_EXIT = """
import sys
from pathlib import Path
from device_cases import OnDevice
from fake_cuda import FakeCuda
on = OnDevice(Path(sys.argv[1]), FakeCuda())
on.launch_ids()
on.reader
print(on.path)
"""


def test_a_process_that_closes_nothing_ends_as_it_would(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(_C.__file__).parent.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Reader(done.stdout.strip()).state in ("closed", "dead")
