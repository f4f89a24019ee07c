"""Lanes of a device, laid out in host memory, for kernels that run in Triton's interpreter.

A recording gets two lanes: the C++ writer fills the first, the interpreted kernel the second, from
the same tensors. What they leave in the file must be the same bytes.
"""

from __future__ import annotations

import mmap
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dodoco_ext import _C
from format_reader import FormatReader

Array = NDArray[Any]

CONTROL_MAGIC = 0x4C525443434F4444
MAX_MEAN_EIGHTHS = (
    8, 9, 10, 11, 12, 14, 16, 18, 20, 22, 24, 28, 32, 36, 40, 48,
    56, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048,
)  # fmt: skip

# Words of the DeviceLane of csrc/format.h: its ControlBlock, its LaneState, the bounds of bins.
MAGIC, _, SWITCHES, NUM_VALID, MARKS, RING, LOG2_SLOTS, CLOCK_OFFSET, SCRATCH = range(9)
EVERY = slice(9, 12)
ITERATION, LAST_LAYER, HEAD = range(16, 19)
BOUNDS = slice(32, 48)

_RECORDED, _IGNORED = 0, 1
BOARD_SECTION, _RING_SECTION = 3, 4
_RING_HEADER_WORDS, _SLOT_WORDS, _LAST_PASS_WORD = 16, 16, 8
_TIME_WORDS = (4, 5)


def divisor_words(record_every: int) -> tuple[int, int, int]:
    """`every_mask`, `every_inverse` and `every_limit` of a control block."""
    every = max(record_every, 1)
    twos = every & -every
    odd = every // twos
    return twos - 1, pow(odd, -1, 1 << 64), ((1 << 64) - 1) // odd


def words_of(*parts: int) -> int:
    """Two 32-bit fields as the word that holds them."""
    low, high = parts
    return struct.unpack("<q", struct.pack("<II", low, high))[0]


def _strides(array: Array) -> list[int]:
    """In elements."""
    return [stride // array.itemsize for stride in array.strides]


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched: sizes of a tile, and programs of a shared launch (0: alone)."""

    block_rows: int
    programs: int = 0


class Twins:
    """One recording, written by the C++ writer and by an interpreted kernel.

    Args:
        kernel: The interpreted `observe`.
        layers: `(num_experts, top_k)` of each layer.
        max_bytes: Most bytes of the recording.
    """

    def __init__(
        self, kernel: Any, layers: Sequence[tuple[int, int]], *, max_bytes: int = 1 << 19
    ) -> None:
        self.kernel = kernel
        self.layers = list(layers)
        self.folder = tempfile.TemporaryDirectory(prefix="twins-")
        self.path = Path(self.folder.name) / "twins.dodoco"
        self.writer = _C.RecordingWriter(
            str(self.path), "{}", self.layers, num_lanes=2, max_bytes=max_bytes
        )
        with self.path.open("r+b") as file:
            self.mapped = mmap.mmap(file.fileno(), 0)
        self.file = np.frombuffer(self.mapped, np.uint64)
        self.format = FormatReader(str(self.path))
        self.num_slots = self.format.places[_RING_SECTION, 0][1]
        self.host_lane = self.writer.lane(0)
        self.host_sites = [np.zeros(_C.SITE_BYTES // 8, np.uint64) for _ in self.layers]
        for index, site in enumerate(self.host_sites):
            self.writer.bind_site(site.ctypes.data, 0, index)
        self._lay_out()

    def _lay_out(self) -> None:
        self.board = self.section(BOARD_SECTION, 1)
        widest = max(experts for experts, _ in self.layers)
        self.control = np.zeros(64, np.int64)
        self.scratch = np.zeros(8 + widest, np.uint32)
        self.totals = np.zeros(len(self.board), np.uint64)
        self.control[MAGIC] = CONTROL_MAGIC
        self.control[NUM_VALID] = self.control[LAST_LAYER] = -1
        self.control[LOG2_SLOTS] = self.num_slots.bit_length() - 1
        self.control[RING] = self.section(_RING_SECTION, 1).ctypes.data
        self.control[SCRATCH] = self.scratch.ctypes.data
        self.control[BOUNDS] = np.array(MAX_MEAN_EIGHTHS, np.uint32).view(np.int64)
        self.enabled, self.every, self.map_version, self.microbatch = 1, 1, 0, 0
        self.set()

    def set(self, **values: int) -> None:
        """Changes settings of both lanes; the C++ writer's `map_version` is always 0.

        Args:
            values: `enabled`, `every`, `microbatch`, `num_valid` or `map_version`.
        """
        self.num_valid = values.pop("num_valid", int(self.control[NUM_VALID]))
        for name, value in values.items():
            setattr(self, name, value)
        self.control[SWITCHES] = words_of(self.enabled, self.every)
        self.control[MARKS] = words_of(self.map_version, self.microbatch)
        self.control[NUM_VALID] = self.num_valid
        self.control[EVERY] = np.array(divisor_words(self.every), np.uint64).view(np.int64)
        lane = self.host_lane
        lane.enabled, lane.record_every, lane.num_valid = self.enabled, self.every, self.num_valid
        lane.microbatch = self.microbatch

    def section(self, kind: int, lane: int) -> NDArray[np.uint64]:
        """The words of a lane's board or ring, in the file."""
        at, count = self.format.places[kind, lane]
        if kind == _RING_SECTION:
            words = _RING_HEADER_WORDS + count * _SLOT_WORDS
        else:
            words = sum(layer[3] for layer in self.format.layers) // 8
        return self.file[at // 8 : at // 8 + words]

    def record_ids(
        self, ids: Array, launch: Launch, layer: int = 0, *, recomputed: bool = False
    ) -> None:
        """Both record ids [T, k]."""
        self.record_host(ids, layer, recomputed=recomputed)
        self.launch_ids(ids, launch, layer, recomputed=recomputed)

    def record_map(
        self, routing_map: Array, launch: Launch, layer: int = 0, *, packed: bool = False
    ) -> None:
        """Both record a map of bytes or bits."""
        host, data = self.host_sites[layer].ctypes.data, routing_map.ctypes.data
        done = _C.route_map(host, data, packed, *routing_map.shape, *routing_map.strides, False)
        assert done in (_RECORDED, _IGNORED)
        self._launch(routing_map.view(np.uint8), 2 if packed else 1, 1, layer, launch, False)

    def record_host(self, ids: Array, layer: int = 0, *, recomputed: bool = False) -> None:
        """The C++ writer alone records ids [T, k]."""
        host, strides = self.host_sites[layer].ctypes.data, _strides(ids)
        data, item = ids.ctypes.data, ids.itemsize
        done = _C.route_ids(host, data, item, *ids.shape, *strides, recomputed)
        assert done in (_RECORDED, _IGNORED)

    def launch_ids(
        self, ids: Array, launch: Launch, layer: int = 0, *, recomputed: bool = False
    ) -> None:
        """The kernel alone records ids [T, k]."""
        block_k = 1 << max(ids.shape[1] - 1, 0).bit_length()
        self._launch(ids, 0, block_k, layer, launch, recomputed)

    def _launch(
        self, data: Array, form: int, block_k: int, layer: int, launch: Launch, recomputed: bool
    ) -> None:
        # Tensors only as the holders of addresses. As on the host: a recomputed pass is not read.
        words = slice(self.format.layers[layer][2] // 8, None)
        rows, columns = data.shape
        holder = np.lib.stride_tricks.as_strided(data, (int(data.size > 0),), (0,))
        self.kernel[(max(launch.programs, 1),)](
            torch.from_numpy(holder),
            torch.from_numpy(self.control),
            torch.from_numpy(self.totals[words].view(np.int64)),
            torch.from_numpy(self.board[words].view(np.int64)),
            layer,
            self.layers[layer][1],
            0 if recomputed else rows,
            columns,
            *_strides(data),
            int(recomputed),
            FORM=form,
            E=self.layers[layer][0],
            BLOCK_K=block_k,
            BLOCK_ROWS=launch.block_rows,
            SHARED=int(launch.programs > 0),
            CLOCK=0,
        )

    def host_board(self, layer: int) -> Array:
        """The words of a layer's board block that the C++ writer wrote."""
        return self.section(BOARD_SECTION, 0)[self.format.layers[layer][2] // 8 :]

    def slots(self, lane: int) -> NDArray[np.uint32]:
        """The slots of a lane's ring [num_slots, words, (value, epoch)], in the file."""
        words = self.section(_RING_SECTION, lane)[_RING_HEADER_WORDS:]
        return words.view(np.uint32).reshape(self.num_slots, _SLOT_WORDS, 2)

    def set_head(self, head: int) -> None:
        """Both rings go on at a record's number."""
        for lane in (0, 1):
            self.section(_RING_SECTION, lane)[0] = head
        self.control.view(np.uint64)[HEAD] = head

    def lane_bytes(self, lane: int) -> tuple[Array, Array]:
        """Board and ring of a lane, copied, stamps set to 0."""
        board = self.section(BOARD_SECTION, lane).copy()
        for _, _, offset, _, _ in self.format.layers:
            board[offset // 8 + _LAST_PASS_WORD] = 0
        ring = self.section(_RING_SECTION, lane).copy()
        slots = ring[_RING_HEADER_WORDS:].view(np.uint32).reshape(self.num_slots, _SLOT_WORDS, 2)
        slots[:, _TIME_WORDS, 0] = 0
        return board, ring

    def check(self) -> None:
        """The lanes hold the same bytes, and the kernel's own memory is as it has to be."""
        (board, ring), (kernel_board, kernel_ring) = self.lane_bytes(0), self.lane_bytes(1)
        np.testing.assert_array_equal(kernel_board, board)
        np.testing.assert_array_equal(kernel_ring, ring)
        np.testing.assert_array_equal(self.totals, self.section(BOARD_SECTION, 1))
        assert not self.scratch.any()
        assert self.control.view(np.uint64)[HEAD] == ring[0]

    def close(self) -> None:
        self.writer.close()
        self.folder.cleanup()
