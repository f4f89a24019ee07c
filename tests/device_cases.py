"""Lanes on a fake device, with stand-ins for the kernels of every form."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dodoco_ext import _C
from dodoco_ext.recording import Reader
from fake_cuda import FakeCuda

FORMS = [(0, 2), (0, 4), (0, 8), (1, 0), (2, 0)]  # form and bytes of an id
MAGIC = 0x4C525443434F4444
# Byte offsets in ControlBlock, csrc/format.h.
ENABLED, EVERY, NUM_VALID, MAP_VERSION, MICROBATCH, CLOCK = 16, 20, 24, 32, 36, 56
MASK, INVERSE, LIMIT = 72, 80, 88
LANE_BYTES = 512


def block_of(columns: int) -> int:
    return 1 << max(columns - 1, 0).bit_length()


class OnDevice:
    """A recording with lanes on a fake device; closed with its context."""

    def __init__(
        self,
        folder: Path,
        cuda: FakeCuda,
        layers: Sequence[tuple[int, int]] = ((8, 2), (60, 4)),
        *,
        host_lanes: int = 1,
        lanes: int = 2,
        devices: Sequence[int] = (0,),
        kernels: bool = True,
        max_bytes: int = 1 << 20,
        ranks: int = 0,
    ) -> None:
        self.cuda, self.layers = cuda, list(layers)
        self.path = folder / f"on-device-{len(list(folder.iterdir()))}.dodoco"
        names = [{"name": f"l{i}", "num_experts": e, "top_k": k} for i, (e, k) in enumerate(layers)]
        places = ["host"] * host_lanes + [f"cuda:{d} {i}" for d in devices for i in range(lanes)]
        group = {"group": {"ranks": [*range(ranks)], "index": 0, "name": "ep"}} if ranks else {}
        self.writer = _C.RecordingWriter(
            str(self.path),
            json.dumps({"layers": names, "lanes": places, "run": "device", **group}),
            self.layers,
            num_lanes=len(places),
            max_bytes=max_bytes,
            group_size=ranks,
        )
        self.devices: list[_C.DeviceLanes] = []
        try:
            for number, device in enumerate(devices):
                first = host_lanes + number * lanes
                self.devices.append(_C.DeviceLanes(self.writer, device, first, lanes))
                if kernels:
                    for num_experts, top_k in dict.fromkeys(self.layers):
                        add_kernels(self.devices[-1], num_experts, top_k)
        except BaseException:
            for lanes in self.devices:
                with suppress(OSError):  # a driver that takes nothing back any more
                    lanes.close()
            self.writer.close()
            raise

    @property
    def lanes(self) -> _C.DeviceLanes:
        return self.devices[0]

    @property
    def reader(self) -> Reader:
        return Reader(self.path)

    def launch_ids(
        self,
        layer: int = 0,
        rows: int = 4,
        k: int = 2,
        *,
        stream: int = 0,
        id_bytes: int = 8,
        data: int = 0x7000,
        recomputed: bool = False,
        device: int = 0,
    ) -> int:
        site = self.devices[device].site_address(layer)
        return _C.launch_ids(site, data, id_bytes, rows, k, k, 1, recomputed, stream)

    def launch_map(self, layer: int, rows: int, columns: int, *, packed: bool) -> int:
        site = self.lanes.site_address(layer)
        return _C.launch_map(site, 0x7000, packed, rows, columns, columns, 1, False, 0)

    def control(self, lane: int, device: int = 0) -> int:
        """Address of a lane's DeviceLane, as its sites name it."""
        site = self.devices[device].site_address(0)
        return int(words_at(site, 8)[2]) + lane * LANE_BYTES

    def word(self, lane: int, offset: int, kind: Any = ctypes.c_uint32) -> int:
        """A word of a lane's control block, once streams have done what is in them."""
        self.cuda.settle()
        return self.peek(lane, offset, kind)

    def peek(self, lane: int, offset: int, kind: Any) -> int:
        """A word of a lane's control block as it is now."""
        return int(kind.from_address(self.control(lane) + offset).value)

    def close(self) -> None:
        for lanes in self.devices:
            lanes.close()
        self.writer.close()

    def __enter__(self) -> OnDevice:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cuda.recover()
        self.close()


def add_kernels(lanes: _C.DeviceLanes, num_experts: int, top_k: int, **changes: Any) -> None:
    """A stand-in for each form, alone and shared, named after what it is."""
    for form, id_bytes in FORMS:
        for shared in (False, True):
            block_k = block_of(top_k or 16)
            options: dict[str, Any] = {
                "form": form,
                "id_bytes": id_bytes,
                "shared": shared,
                "num_experts": num_experts,
                "block_k": block_k,
                "rows_per_program": 64,
                "max_programs": 16,
                "max_rows": 128,
                "name": f"f{form}b{id_bytes}e{num_experts}k{block_k}{'s' if shared else 'a'}",
                "num_warps": 4,
                "shared_bytes": 512,
                "code": b"cubin",
            }
            lanes.add_kernel(**{**options, **changes})


def words_at(address: int, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.frombuffer((ctypes.c_uint64 * count).from_address(address), np.uint64).copy()
