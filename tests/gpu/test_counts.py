"""What kernels leave in a recording is what the C++ writer leaves, time stamps aside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import cases
from covering import Row, covering_array
from dodoco_ext import _C, ops
from dodoco_ext.counters import ARRAYS, COUNTERS
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import Reader

pytestmark = pytest.mark.gpu

# Fewer sizes than on the CPU: each (E, k) costs seconds of compiling.
EXPERTS = (1, 8, 60, 128, 512, 1024)
TOKENS = (0, 1, 7, 300, 4096, 65536)
ID_FACTORS = {**cases.ID_FACTORS, "E": EXPERTS, "k": (1, 2, 6, 8), "T": TOKENS}
MAP_FACTORS = {**cases.MAP_FACTORS, "E": EXPERTS, "k": (0, 1, 8), "T": TOKENS}
ID_ROWS = covering_array(ID_FACTORS, cases._possible_ids)
MAP_ROWS = covering_array(MAP_FACTORS, cases._possible_map)
OPS = {"ids": ops.route_ids, "map": ops.route_map, "bits": ops.route_bits}


def put(values: np.ndarray[Any, Any], place: str) -> torch.Tensor:
    """The same values in the same strides, on a device."""
    here = torch.from_numpy(values)
    if here.numel() == 0:
        return here.to(place)
    span = 1 + sum((n - 1) * s for n, s in zip(here.shape, here.stride(), strict=True))
    flat = here.as_strided((span,), (1,), here.storage_offset())
    return flat.to(place).as_strided(here.shape, here.stride())


class Layer:
    """One layer of a recording in one place, taking one form of choice."""

    def __init__(self, place: str, num_experts: int, top_k: int, form: str) -> None:
        spec = LayerSpec("router", num_experts, top_k)
        self.recorder = Recorder([spec], devices=[place], forms=[form])
        assert not self.recorder.refused, self.recorder.refused
        self.site = ops.make_site(self.recorder, 0, place)
        self.place, self.form = place, form
        self.reader = Reader(self.recorder.path)

    def record(self, choice: np.ndarray[Any, Any], num_valid: int | None) -> None:
        self.recorder.set("num_valid", -1 if num_valid is None else num_valid)
        OPS[self.form](put(choice, self.place), self.site)

    def close(self) -> None:
        self.recorder.close()
        ops.release_site(self.site.data_ptr())


@pytest.fixture
def make_layer() -> Iterator[Callable[..., Layer]]:
    made: list[Layer] = []

    def make(*arguments: Any) -> Layer:
        made.append(Layer(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module", autouse=True)
def compiled(place: str) -> None:
    """All kernels at once, on all cores: one layer after the other would take minutes."""
    if place == "cpu":
        return
    from dodoco_ext.triton_kernels import build

    capability = _C.device_capability(0)
    build.compile_kernels({(row["E"], row["k"]) for row in ID_ROWS}, {0}, capability)
    build.compile_kernels({(row["E"], row["k"]) for row in MAP_ROWS}, {1, 2}, capability)


def assert_same(ours: Layer, oracle: Layer) -> None:
    """Counters, histograms and records are equal, but for the time."""
    (got,), (wanted,) = ours.reader.snapshot().layers, oracle.reader.snapshot().layers
    for name in COUNTERS:
        assert getattr(got, name) == getattr(wanted, name), name
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), name)
    records, expected = ours.reader.records(), oracle.reader.records()
    for name in records.dtype.names:
        if name not in ("time_ns", "lane"):
            np.testing.assert_array_equal(records[name], expected[name], name)
    assert ours.reader.header["num_faults"] == 0


def compare(
    make_layer: Callable[..., Layer], place: str, cuda: Any, row: Row, form: str, choice: Any
) -> None:
    values, num_valid = choice
    ours = make_layer(place, row["E"], row["k"], form)
    oracle = make_layer("cpu", row["E"], row["k"], form)
    for layer in (ours, oracle):
        layer.record(values, num_valid)
        layer.record(values[: len(values) // 2], None)
        layer.record(values, None)
    cuda.synchronize()
    assert oracle.reader.snapshot().layers[0].passes == 3
    assert_same(ours, oracle)


@pytest.mark.parametrize("row", ID_ROWS, ids=cases.name_of)
def test_ids(row: Row, make_layer: Callable[..., Layer], place: str, cuda: Any) -> None:
    compare(make_layer, place, cuda, row, "ids", cases.make_ids(row))


@pytest.mark.parametrize("row", MAP_ROWS, ids=cases.name_of)
def test_maps(row: Row, make_layer: Callable[..., Layer], place: str, cuda: Any) -> None:
    form = "bits" if row["form"] == "bits" else "map"
    compare(make_layer, place, cuda, row, form, cases.make_map(row))


def test_sampling_disabling_and_a_lapped_ring(
    make_layer: Callable[..., Layer], place: str, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DODOCO_MAX_BYTES", str(1 << 17))
    rng = np.random.default_rng(0)
    layers = make_layer(place, 64, 6, "ids"), make_layer("cpu", 64, 6, "ids")
    # A device has two lanes where the host has one, so its rings are shorter: the tail is compared.
    passes = [rng.integers(-1, 65, (int(rng.integers(0, 2000)), 6)) for _ in range(700)]
    for layer in layers:
        for number, ids in enumerate(passes):
            layer.recorder.set("record_every", 3 if 100 <= number < 200 else 1)
            layer.recorder.set("enabled", int(not 200 <= number < 250))
            layer.record(ids, None)
    cuda.synchronize()
    (got,), (wanted,) = (layer.reader.snapshot().layers for layer in layers)
    assert wanted.passes == 650
    for name in COUNTERS + ARRAYS:
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), name)
    records, expected = (layer.reader.records() for layer in layers)
    tail = min(len(records), len(expected))
    assert 0 < len(records) < wanted.recorded_passes, "the ring was lapped"
    for name in ("iteration", "tokens", "assignments", "max_count", "gini_numerator", "invalid"):
        np.testing.assert_array_equal(records[name][-tail:], expected[name][-tail:], name)


def test_stamps_are_the_hosts_time(make_layer: Callable[..., Layer], place: str, cuda: Any) -> None:
    layer = make_layer(place, 8, 2, "ids")
    ids = np.zeros((4, 2), np.int64)
    before = time.time_ns()
    for _ in range(100):
        layer.record(ids, None)
    cuda.synchronize()
    after = time.time_ns()
    stamps = layer.reader.records()["time_ns"].astype(np.int64)
    assert len(stamps) == 100
    assert (np.diff(stamps) >= 0).all()
    # The device's clock was set by the host's at attach, to within a launch.
    slack_ns = 1_000_000
    assert before - slack_ns <= stamps[0] <= stamps[-1] <= after + slack_ns
