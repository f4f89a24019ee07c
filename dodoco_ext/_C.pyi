"""Types of the C++ module. Only integers, strings and numpy arrays cross this boundary."""

import enum
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Body = Callable[[Any, Any], None]
# Numbers, or where they lie: (address, size, stride, is_wide).
DeviceCounts = list[int] | tuple[int, int, int, bool]

version: str
format_version: int
has_cuda: bool
cuda_archs: str

SITE_BYTES: int
MAX_LANES: int
MAX_RANKS: int
MAX_SLOTS: int
MAX_KEPT: int
EMPTY_SLOT: int
TRANSFERS_AT_ONCE: int
FLAG_BACKWARD: int
FLAG_RECOMPUTE: int
FLAG_UNTIMED: int
FLAG_TOKENS: int
TRAFFIC_WORDS: int
BOARD_WORDS: int
SIZE_CLASSES: int
GINI_BINS: int
MAX_MEAN_BINS: int
MAX_MEAN_BOUNDS: tuple[float, ...]

class RecordingError(OSError):
    state: str

class Fault(enum.Enum):
    NONE = 0
    UNSUPPORTED_DTYPE = 1
    BAD_SHAPE = 2
    TOO_LARGE = 3
    UNSUPPORTED_DEVICE = 4
    COPIED_SITE = 5
    INTERNAL = 6
    NO_DEVICE = 7
    NO_LANE = 8
    DEVICE_ERROR = 9
    UNATTRIBUTED = 10

class Lane:
    @property
    def address(self) -> int: ...
    enabled: bool
    record_every: int
    num_valid: int
    map_version: int
    microbatch: int

class LaneChoice:
    def __init__(self, usual: Lane, chosen: Lane) -> None: ...

class RecordingWriter:
    def __init__(
        self,
        path: str,
        metadata: str,
        layers: list[tuple[int, int]],
        *,
        num_lanes: int = 1,
        max_bytes: int = ...,
        mode: int = 0o600,
        rank: int = 0,
        world_size: int = 1,
        group_size: int = 0,
        group_index: int = 0,
        num_slots: int = 0,
        kept_placements: int = 0,
    ) -> None: ...
    def lane(self, index: int) -> Lane: ...
    def bind_site(self, address: int, lane: int, layer: int) -> None: ...
    def add_fault(self, fault: Fault) -> None: ...
    def record_placement(self, layers: list[tuple[int, int, NDArray[np.uint32]]]) -> int: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...

class DeviceLanes:
    def __init__(
        self, writer: RecordingWriter, device: int, first_lane: int, num_lanes: int
    ) -> None: ...
    def add_kernel(
        self,
        form: int,
        id_bytes: int,
        shared: bool,
        num_experts: int,
        block_k: int,
        rows_per_program: int,
        max_programs: int,
        max_rows: int,
        name: str,
        num_warps: int,
        shared_bytes: int,
        code: bytes,
    ) -> None: ...
    def calibrate_clock(self, name: str, code: bytes) -> None: ...
    def add_transfers(self, code: bytes) -> None: ...
    def begin_transfer(self, slot: int, stream: int) -> int: ...
    def end_transfer(
        self,
        kind: int,
        layer: int,
        iteration: int,
        advances: bool,
        begin_slot: int,
        begin_ns: int,
        bytes_per_row: int,
        sent: DeviceCounts,
        received: DeviceCounts,
        experts: DeviceCounts,
        stream: int,
    ) -> int: ...
    def site_address(self, layer: int) -> int: ...
    def set(self, lane: int, name: str, value: int, stream: int) -> None: ...
    def get(self, lane: int, name: str) -> int: ...
    def close(self) -> None: ...
    @property
    def num_lanes(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def captured(self) -> bool: ...
    @property
    def closed(self) -> bool: ...

class DeviceLaneChoice:
    def __init__(self, lanes: DeviceLanes, lane: int) -> None: ...

class RecordingReader:
    def __init__(self, path: str) -> None: ...
    def header(self) -> dict[str, Any]: ...
    def owner_alive(self) -> bool: ...
    def metadata(self) -> bytes: ...
    def layers(self) -> list[tuple[int, int]]: ...
    @property
    def num_lanes(self) -> int: ...
    def num_slots(self, lane: int) -> int: ...
    def head(self, lane: int) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def group_index(self) -> int: ...
    def traffic(self, lane: int, block: int) -> tuple[NDArray[np.uint64], bool]: ...
    def transfers(
        self, lane: int, position: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint32], int, int]: ...
    def placements(
        self, layer: int
    ) -> tuple[list[tuple[int, int, int, int, NDArray[np.uint64], NDArray[np.uint32]]], int]: ...
    def placements_recorded(self) -> int: ...
    @property
    def placements_kept(self) -> int: ...
    def board(self, lane: int, layer: int) -> tuple[NDArray[np.uint64], bool]: ...
    def ring(
        self, lane: int, position: int, limit: int = ...
    ) -> tuple[NDArray[np.uint8], int, int, int]: ...

def push_transfer(
    lane: int,
    kind: int,
    layer: int,
    iteration: int,
    advances: int,
    begin_ns: int,
    end_ns: int,
    bytes_per_row: int,
    sent: Any,
    received: Any,
    experts: Any,
    /,
) -> int: ...
def transfer_code() -> bytes: ...
def switch_off_device_site(site: int) -> None: ...
def device_capability(device: int) -> int: ...
def owner_alive(path: str) -> bool: ...
def use_torch(
    exchange_api: object,
    tensor_type: type,
    graph_task_id: Callable[[], int],
    dispatch_stack_length: Callable[[], int],
    general_ids: Body,
    general_map: Body,
    general_bits: Body,
    fault: Callable[[int, Any, Any], None],
    /,
) -> bool: ...
def op_ids(ids: Any, site: Any, /) -> None: ...
def op_map(routing_map: Any, site: Any, /) -> None: ...
def op_bits(routing_map: Any, site: Any, /) -> None: ...
def direct_ids(ids: Any, site: Any, /) -> bool: ...
def direct_map(routing_map: Any, site: Any, /) -> bool: ...
def direct_bits(routing_map: Any, site: Any, /) -> bool: ...
def route_ids(
    site: int,
    data: int,
    bytes_per_id: int,
    rows: int,
    k: int,
    row_stride: int,
    slot_stride: int,
    recomputed: bool,
    /,
) -> int: ...
def route_map(
    site: int,
    data: int,
    packed: bool,
    rows: int,
    columns: int,
    row_stride: int,
    column_stride: int,
    recomputed: bool,
    /,
) -> int: ...
def launch_ids(
    site: int,
    data: int,
    bytes_per_id: int,
    rows: int,
    k: int,
    row_stride: int,
    slot_stride: int,
    recomputed: bool,
    stream: int,
    /,
) -> int: ...
def launch_map(
    site: int,
    data: int,
    packed: bool,
    rows: int,
    columns: int,
    row_stride: int,
    column_stride: int,
    recomputed: bool,
    stream: int,
    /,
) -> int: ...
