"""The C++ bodies of the ops, given tensors in the memory of a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from device_cases import LANE_BYTES, OnDevice
from dodoco_ext import _C
from fake_cuda import FakeCuda
from fake_torch import BOOL, CPU, CUDA_HOST, FLOAT, INT, UNSIGNED, Tensor, exchange

Call = Callable[[Any, Any], Any]
CALLS = {
    "ids": (_C.op_ids, _C.direct_ids),
    "map": (_C.op_map, _C.direct_map),
    "bits": (_C.op_bits, _C.direct_bits),
}


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def on(tmp_path: Path, cuda: FakeCuda) -> Iterator[OnDevice]:
    with OnDevice(tmp_path, cuda) as made:
        yield made


def site_of(on: OnDevice, layer: int = 0, **changes: Any) -> Tensor:
    return Tensor(on.lanes.site_address(layer), (8,), (1,), **changes)


def some_ids(**changes: Any) -> Tensor:
    return Tensor(0x7000, (5, 2), (2, 1), **changes)


@pytest.mark.parametrize("which", [0, 1], ids=["op", "direct"])
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_ids_are_launched_as_they_lie_in_the_current_stream(
    on: OnDevice, cuda: FakeCuda, bits: int, which: int
) -> None:
    ids = Tensor(0x7000, (5, 3), (24, 2), bits=bits, byte_offset=16)
    with exchange(stream=7) as faults:
        done = CALLS["ids"][which](ids, site_of(on, 1))
    assert (done, faults) == ((None, True)[which], [])
    (launch,) = cuda.launches()
    assert launch.name == f"f0b{bits // 8}e60k4a"
    assert (launch.data, launch.rows, launch.columns) == (0x7010, 5, 3)
    assert (launch.row_stride, launch.column_stride) == (24, 2)
    assert (launch.layer, launch.stream, launch.recomputed) == (1, 7, 0)


@pytest.mark.parametrize("which", [0, 1], ids=["op", "direct"])
@pytest.mark.parametrize(
    ("form", "columns", "code", "name"),
    [
        ("map", 60, UNSIGNED, "f1b0e60k4a"),
        ("map", 60, BOOL, "f1b0e60k4a"),
        ("bits", 8, UNSIGNED, "f2b0e60k4a"),
    ],
)
def test_maps_are_launched(
    on: OnDevice, cuda: FakeCuda, form: str, columns: int, code: int, name: str, which: int
) -> None:
    tensor = Tensor(0x7000, (6, columns), (1, 6), code, 8)
    with exchange() as faults:
        CALLS[form][which](tensor, site_of(on, 1))
    (launch,) = cuda.launches()
    assert (launch.name, faults) == (name, [])
    assert (launch.rows, launch.columns) == (6, columns)
    assert (launch.row_stride, launch.column_stride) == (1, 6)


def test_a_pass_inside_backward_is_a_recomputed_one(on: OnDevice, cuda: FakeCuda) -> None:
    with exchange(graph_task=lambda: 5):
        _C.op_ids(some_ids(), site_of(on))
    assert cuda.launches()[0].recomputed == 1


def test_a_lane_that_the_thread_chose_is_used(on: OnDevice, cuda: FakeCuda) -> None:
    choice = _C.DeviceLaneChoice(on.lanes, 1)
    with exchange(stream=7):
        _C.op_ids(some_ids(), site_of(on))
    del choice
    assert cuda.launches()[0].control == on.control(0) + LANE_BYTES


@pytest.mark.parametrize("form", CALLS)
@pytest.mark.parametrize(
    "changes",
    [
        {"code": FLOAT, "bits": 32},
        {"code": INT, "bits": 8},
        {"shape": (5, 2, 1), "strides": (2, 1, 1)},
        {"device_type": CUDA_HOST},
        {"device_type": 10},
    ],
    ids=["float", "int8", "3-D", "pinned", "another device"],
)
def test_what_is_not_plain_is_left_to_python(
    on: OnDevice, cuda: FakeCuda, form: str, changes: dict[str, Any]
) -> None:
    tensor = Tensor(**{"data": 0x7000, "shape": (5, 2), "strides": (2, 1), **changes})
    seen: list[Any] = []
    op, direct = CALLS[form]
    with exchange(body=lambda *arguments: seen.append(arguments)) as faults, cuda.calls_made() as c:
        site = site_of(on)
        op(tensor, site)
        assert direct(tensor, site) is False
    assert seen == [(tensor, site)]
    assert (c, faults) == ([], [])


# --- sites and tensors that do not belong together: -1, and nobody looks into either --------------


@pytest.mark.parametrize(
    ("of_ids", "of_site"),
    [
        ({"device_type": CPU}, {}),
        ({}, {"device_type": CPU}),
        ({"device": 1}, {}),
        ({}, {"device": 1}),
    ],
    ids=["ids on the host", "site on the host", "ids elsewhere", "site elsewhere"],
)
def test_a_moved_model_is_reported(
    on: OnDevice, cuda: FakeCuda, of_ids: dict[str, int], of_site: dict[str, int]
) -> None:
    """The ids' address is none of this process: looked into, it would end it."""
    site = site_of(on, **of_site)
    with exchange() as faults, cuda.calls_made() as calls:
        _C.op_ids(some_ids(**of_ids), site)
        assert _C.direct_map(Tensor(0x7000, (5, 8), (8, 1), UNSIGNED, 8, **of_ids), site) is True
    assert (faults, calls) == ([-1, -1], [])


def test_a_copy_of_a_site_is_reported(on: OnDevice, cuda: FakeCuda) -> None:
    with exchange() as faults, cuda.calls_made() as calls:
        _C.op_ids(some_ids(), Tensor(0x9000, (8,), (1,)))
        _C.op_ids(some_ids(), Tensor(on.lanes.site_address(0) + 8, (7,), (1,)))
    assert (faults, calls) == ([-1, -1], [])


def test_a_devices_site_is_not_looked_into_by_the_host(on: OnDevice, cuda: FakeCuda) -> None:
    site = on.lanes.site_address(0)
    with cuda.calls_made() as calls:
        assert _C.route_ids(site, 0x7000, 8, 4, 2, 2, 1, False) == -1
        assert _C.route_map(site, 0x7000, False, 4, 8, 8, 1, False) == -1
    assert calls == []


def test_a_hosts_site_is_not_looked_into_for_a_device(on: OnDevice, cuda: FakeCuda) -> None:
    with cuda.calls_made() as calls:
        assert _C.launch_ids(0x9000, 0x7000, 8, 4, 2, 2, 1, False, 0) == -1
        assert _C.launch_map(0x9000, 0x7000, False, 4, 8, 8, 1, False, 0) == -1
    assert calls == []


# --- refusals -------------------------------------------------------------------------------------


def test_refusals_are_reported_with_what_was_refused(on: OnDevice, cuda: FakeCuda) -> None:
    reports: list[Any] = []
    with exchange(fault=lambda *report: reports.append(report)):
        wide, site = Tensor(0x7000, (5, 3), (3, 1)), site_of(on)
        _C.op_ids(wide, site)
        assert _C.direct_ids(wide, site) is True, "not to be run again by the op"
        assert reports == [(-2, wide, site)] * 2
        _C.switch_off_device_site(on.lanes.site_address(0))
        _C.op_ids(wide, site)
        assert len(reports) == 2
    assert cuda.launches() == []


def test_without_a_stream_nothing_is_launched(on: OnDevice, cuda: FakeCuda) -> None:
    with exchange(stream=None) as faults, cuda.calls_made() as calls:
        _C.op_ids(some_ids(), site_of(on))
    assert (faults, calls) == ([-6], [])


def test_an_error_of_the_report_is_the_callers(on: OnDevice) -> None:
    def refuse(*_: object) -> None:
        raise LookupError("no such recorder")

    with exchange(fault=refuse), pytest.raises(LookupError, match="no such recorder"):
        _C.op_ids(Tensor(0x7000, (5, 3), (3, 1)), site_of(on))


def test_once_given_back_nothing_is_launched(tmp_path: Path, cuda: FakeCuda) -> None:
    with OnDevice(tmp_path, cuda) as on:
        site = site_of(on)
        on.lanes.close()
        with exchange() as faults, cuda.calls_made() as calls:
            _C.op_ids(some_ids(), site)
    assert (faults, calls) == ([-1], [])
