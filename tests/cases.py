"""Routing passes of every shape, and a probe without torch to record them with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from covering import Row, covering_array
from dodoco_ext import _C
from dodoco_ext.counters import LayerSnapshot, Snapshot
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import Reader
from dodoco_ext.reference import ReferencePass
from dodoco_ext.settings import Settings

Array = NDArray[np.generic]

EXPERTS = (1, 2, 8, 60, 64, 72, 128, 160, 256, 384, 512, 1024)
TOKENS = (0, 1, 7, 4096, 65536)
COUNTERS = ("tokens", "assignments", "padded", "invalid", "capacity_dropped")
STATISTICS = ("max_count", "gini_numerator", "unused_experts")
# Small on purpose: a test makes hundreds of recordings.
SMALL_BYTES = 1 << 19

ID_FACTORS = {
    "E": EXPERTS,
    "k": tuple(range(1, 17)),
    "T": TOKENS,
    "dtype": ("int16", "int32", "int64"),
    "layout": ("contiguous", "transposed", "stepped", "offset", "same_rows", "same_slots"),
    "padding": ("none", "slots", "rows", "num_valid"),
    "invalid": ("none", "E", "negative", "lowest", "2^32+3"),
    "skew": ("uniform", "extreme"),
}
MAP_FACTORS = {
    "E": EXPERTS,
    "k": (0, 1, 2, 6, 8, 16),
    "T": TOKENS,
    "form": ("bool", "uint8", "bits"),
    "layout": ("contiguous", "transposed", "stepped", "offset", "same_rows"),
    "num_valid": ("all", "some", "none", "beyond"),
    "dropped": ("none", "some"),
    "past_E": (False, True),
}


def _possible_ids(row: Row) -> bool:
    if row.get("invalid") == "2^32+3" and row.get("dtype", "int64") != "int64":
        return False
    return bool(row.get("k", 1) <= row.get("E", 1024))


def _possible_map(row: Row) -> bool:
    if row.get("past_E") and (row.get("form", "bits") != "bits" or row.get("E", 1) % 8 == 0):
        return False
    # The base of a stepped map is six times as large.
    if row.get("layout") == "stepped" and row.get("T", 0) * row.get("E", 0) > 1 << 23:
        return False
    return bool(row.get("k", 1) <= row.get("E", 1024))


def id_rows() -> list[Row]:
    """The covering array of passes given as ids."""
    return covering_array(ID_FACTORS, _possible_ids)


def map_rows() -> list[Row]:
    """The covering array of passes given as routing maps."""
    return covering_array(MAP_FACTORS, _possible_map)


def name_of(row: Row) -> str:
    """A readable test id."""
    return "-".join(f"{key}={value}" for key, value in row.items())


def _choices(rng: np.random.Generator, T: int, k: int, E: int, skew: str) -> NDArray[np.int64]:
    """k distinct experts a token; `extreme` sends nearly all tokens to the same ones."""
    first = (
        rng.integers(0, E, T) if skew == "uniform" else np.where(rng.random(T) < 0.01, E // 2, 0)
    )
    # Distinct because the step is coprime to E.
    step = next(step for step in range(E // 2 + 1, 2 * E + 2) if np.gcd(step, E) == 1)
    return (first[:, None] + np.arange(k) * step) % E


def make_ids(row: Row) -> tuple[Array, int | None]:
    """The ids of a row of the covering array, laid out as it says, and the number of valid rows."""
    E, k, T = row["E"], row["k"], row["T"]
    rng = np.random.default_rng([E, k, T, len(row["layout"])])
    ids = _choices(rng, T, k, E, row["skew"])
    dtype = np.dtype(row["dtype"])
    wrong = {
        "E": E,
        "negative": -2,
        "lowest": np.iinfo(dtype).min,
        "2^32+3": (1 << 32) + 3,
    }
    if row["invalid"] != "none":
        where = rng.random(ids.shape) < 0.2
        where[: 1 if T < 8 else 0] = True
        ids[where] = wrong[row["invalid"]]
    num_valid = None
    if row["padding"] == "slots":
        ids[rng.random(ids.shape) < 0.3] = -1
    elif row["padding"] == "rows":
        ids[rng.random(T) < 0.3] = -1
    elif row["padding"] == "num_valid":
        num_valid = T * 2 // 3
    return lay_out(ids.astype(dtype), row["layout"]), num_valid


def make_map(row: Row) -> tuple[Array, int | None]:
    """The routing map of a row of the covering array, and the number of valid rows."""
    E, k, T = row["E"], row["k"], row["T"]
    rng = np.random.default_rng([E, k, T, len(row["layout"])])
    chosen = np.zeros((T, E), dtype=bool)
    np.put_along_axis(chosen, _choices(rng, T, max(k, 1), E, "uniform"), True, axis=1)
    if row["dropped"] == "some":
        chosen[rng.random(T) < 0.4, rng.integers(0, E)] = False
        chosen[rng.random(T) < 0.1] = False
        chosen[:1] = False
    if row["form"] == "bits":
        routing_map: Array = np.packbits(chosen, axis=1, bitorder="little")
        if row["past_E"]:
            routing_map[rng.random(T) < 0.5, -1] |= 0x80
            routing_map[:1, -1] |= 0x80
    elif row["form"] == "uint8":
        # Anything but 0 is a choice.
        routing_map = chosen * rng.integers(1, 256, (T, 1), dtype=np.uint8)
    else:
        routing_map = chosen
    num_valid = {"all": None, "some": T // 2, "none": 0, "beyond": T + 5}[row["num_valid"]]
    return lay_out(routing_map, row["layout"]), num_valid


def lay_out(values: Array, layout: str) -> Array:
    """The same values [rows, columns] in other strides; for `same_*`, as many of them as can be."""
    rows, columns = values.shape
    if layout == "contiguous":
        return values
    if layout == "transposed":
        return np.ascontiguousarray(values.T).T
    if layout == "stepped":
        base = np.ones((rows * 2, columns * 3), values.dtype)
        base[::2, 1::3] = values
        return base[::2, 1::3]
    if layout == "offset":
        base = np.ones((rows + 1, columns + 5), values.dtype)
        base[1:, 2 : 2 + columns] = values
        return base[1:, 2 : 2 + columns]
    row_stride, column_stride = values.strides
    if layout == "same_rows":
        row_stride = 0
    else:
        assert layout == "same_slots", layout
        column_stride = 0
    return np.lib.stride_tricks.as_strided(values, values.shape, (row_stride, column_stride))


@dataclass
class Probe:
    """A recording and its sites in numpy memory: records without torch.

    Attributes:
        recorder: The open recorder.
        sites: One site a layer.
        reader: A reader of its file.
    """

    recorder: Recorder
    sites: list[Array]
    reader: Reader

    @classmethod
    def open(cls, *layers: tuple[int, int], max_bytes: int = SMALL_BYTES) -> Probe:
        """Opens a recording of layers given as (num_experts, top_k), in the environment's folder."""
        environment = Settings.from_environment()
        settings = Settings(
            directory=environment.directory,
            max_bytes=max_bytes,
            run=environment.run,
            rank=environment.rank,
        )
        specs = [LayerSpec(f"layers.{i}.router", E, k) for i, (E, k) in enumerate(layers)]
        recorder = Recorder(specs, settings=settings)
        sites = [np.zeros(_C.SITE_BYTES // 8, np.uint64) for _ in layers]
        for index, site in enumerate(sites):
            recorder.bind(index, site, site.ctypes.data)
        return cls(recorder, sites, Reader(recorder.path))

    @property
    def path(self) -> Path:
        return self.recorder.path

    def record_ids(self, ids: Array, layer: int = 0, *, recomputed: bool = False) -> int:
        """Records ids [T, k] of any strides; returns what the op's body says."""
        strides = [stride // ids.itemsize for stride in ids.strides]
        site = self.sites[layer].ctypes.data
        return _C.route_ids(site, ids.ctypes.data, ids.itemsize, *ids.shape, *strides, recomputed)

    def record_map(self, routing_map: Array, layer: int = 0, *, packed: bool = False) -> int:
        """Records a map of bytes of any strides; returns what the op's body says."""
        site, data = self.sites[layer].ctypes.data, routing_map.ctypes.data
        return _C.route_map(site, data, packed, *routing_map.shape, *routing_map.strides, False)

    def snapshot(self) -> Snapshot:
        return self.reader.snapshot()

    def set_num_valid(self, num_valid: int | None) -> None:
        self.recorder.lane.num_valid = -1 if num_valid is None else num_valid


def assert_layer_is(layer: LayerSnapshot, expected: ReferencePass) -> None:
    """The board holds exactly this one pass."""
    np.testing.assert_array_equal(layer.counts, expected.counts)
    assert not layer.in_flight
    found = {name: getattr(layer, name) for name in COUNTERS}
    assert found == {name: getattr(expected, name) for name in COUNTERS}


def assert_record_is(record: np.void, expected: ReferencePass) -> None:
    """A ring record holds exactly this pass."""
    names = COUNTERS + STATISTICS
    assert {n: int(record[n]) for n in names} == {n: getattr(expected, n) for n in names}
