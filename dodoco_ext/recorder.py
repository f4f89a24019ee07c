"""The writer's side of a recording: where it is created, what it says about itself, how it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import secrets
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from numpy.typing import ArrayLike

from dodoco_ext import _C, __version__
from dodoco_ext.device import FORMS, MAX_EXPERTS, Device
from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.folders import prepare_directory
from dodoco_ext.lane_places import lanes_of, names_of
from dodoco_ext.placement_spec import PlacementSpec, check_room, packed_slots
from dodoco_ext.pruning import prune
from dodoco_ext.settings import SUFFIX, Settings

log = logging.getLogger("dodoco")

_OF_ALL_LANES = ("enabled", "record_every", "map_version")


@dataclass(frozen=True)
class LayerSpec:
    """One observed MoE layer.

    Attributes:
        name: Qualified name of the router module.
        num_experts: Logical experts that the router chooses from.
        top_k: Experts a token is sent to; 0 where it is not fixed.
        routed: Whether its router is observed. If not, only transfers are recorded of it.
    """

    name: str
    num_experts: int
    top_k: int
    routed: bool = True


@dataclass(frozen=True)
class GroupSpec:
    """The ranks that transfers are between: those of expert parallelism.

    Attributes:
        ranks: Their global ranks, in the order of the counts.
        index: Place of the own rank among them.
        name: What to call the group.
    """

    ranks: tuple[int, ...]
    index: int
    name: str = "ep"


@dataclass(frozen=True)
class Uncovered:
    """A part of the model that routes and is not observed, and why."""

    name: str
    reason: str


class Recorder:
    """Owns one recording: the mapped file, its lanes, and the sites bound to it.

    Args:
        layers: The observed layers, in execution order: the next iteration starts where a pass
            does not come after the last one in it.
        uncovered: What is not observed; written into the recording, so that readers can say so.
        lanes: Writers that record at the same time; see `use_lane()`. None: one thread, and as many
            streams a device as running and capturing a model take.
        devices: Where layers are: `cpu`, `cuda:0` and so on.
        group: The ranks that transfers are between; None: no transfers are recorded. With one there
            is a lane of the host even where all layers are on devices.
        placements: Room for `record_placement()`; None: none are recorded.
        forms: Forms in which choices arrive on devices; see `device.FORMS`.
        labels: Text to find the recording by, such as `{"model_name": ...}`.
        settings: Where and how to record; the environment's by default.

    Raises:
        InputError: A layer, the number of lanes, a label or a setting cannot be used.
        RecordingError: No folder took the recording; the message says why for each.

    Attributes:
        settings: The settings in effect.
        layers: The observed layers.
        uncovered: What is not observed.
        run: Name of the run: the first part of the file's name.
        path: The recording's file.
        lanes: The lanes of the host; none where all layers are on devices and there is no group.
        group: The ranks that transfers are between.
        placements: Room for placements.
        devices: The devices that record, by name.
        refused: The devices that could not be set up, with the reason. The recording says so as a
            fault, and `site()` of their layers cannot be had.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        *,
        uncovered: Sequence[Uncovered] = (),
        lanes: int | None = None,
        devices: Sequence[str] = ("cpu",),
        group: GroupSpec | None = None,
        placements: PlacementSpec | None = None,
        forms: Collection[str] = tuple(FORMS),
        labels: Mapping[str, str] | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or Settings.from_environment()
        self.layers = tuple(layers)
        self.uncovered = tuple(uncovered)
        for layer in self.layers:
            if not 1 <= layer.num_experts <= 65536 or not 0 <= layer.top_k <= layer.num_experts:
                raise InputError(
                    f"layer {layer.name!r}: top_k={layer.top_k} of num_experts={layer.num_experts} "
                    "is impossible; give 0 <= top_k <= num_experts"
                )
        self.num_lanes = 1 if lanes is None else lanes
        self.group = group
        self.placements = placements
        if placements is not None:
            check_room(placements)
        if group is not None:
            _check(group)
            devices = tuple(dict.fromkeys(("cpu", *devices)))
        places = lanes_of(devices, lanes)
        self.run = self.settings.run or time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        metadata = self._metadata(labels or {}, places)
        self._writer, self.path = self._create(metadata, len(places))
        self.lanes = tuple(self._writer.lane(i) for i, at in enumerate(places) if at == "cpu")
        self._sites: list[object] = []
        self._owner = os.getpid()
        self._placing = threading.Lock()
        self.devices: dict[str, Device] = {}
        self.refused: dict[str, str] = {}
        self._finalizer = weakref.finalize(self, _close, self._writer, self.devices)
        for name in dict.fromkeys(at for at in places if at != "cpu"):
            self._set_up(name, places.index(name), places.count(name), forms)
        if self.settings.record_every != 1:
            self.set("record_every", self.settings.record_every)

    def _set_up(self, name: str, first: int, count: int, forms: Collection[str]) -> None:
        # Wider layers are elsewhere: what compiles here must not fail for them.
        shapes = [(x.num_experts, x.top_k) for x in self.layers if x.num_experts <= MAX_EXPERTS]
        try:
            self.devices[name] = Device(self._writer, name, first, count, shapes, forms)
        except Exception as error:  # telemetry never takes down its host
            self.refused[name] = f"{type(error).__name__}: {error}"
            self.add_fault(_C.Fault.NO_DEVICE)
            log.error("nothing on %s is recorded: %s", name, self.refused[name])

    def bind(self, layer: int, site: object, address: int) -> None:
        """Makes `site`, an object with `_C.SITE_BYTES` bytes at `address`, stand for a layer."""
        self._writer.bind_site(address, 0, layer)
        self._sites.append(site)

    @property
    def lane(self) -> _C.Lane:
        """The host's lane that takes what threads record outside `use_lane()`."""
        return self.lanes[0]

    def set(self, name: str, value: int, lane: int | None = None) -> None:
        """Changes a setting of lanes for the passes that follow.

        On a device it takes its turn in the current stream. Where no lane is named, `enabled`,
        `record_every` and `map_version` change in all of them, `num_valid` and `microbatch` in the host's first one
        and in all of a device's, as streams choose theirs by themselves.

        Raises:
            RuntimeError: The current stream is being captured into a graph.
        """
        if lane is not None:
            host = self.lanes[lane : lane + 1]
        else:
            host = self.lanes if name in _OF_ALL_LANES else self.lanes[:1]
        # Devices first: they may refuse, and nothing has changed then.
        for device in self.devices.values():
            device.set(name, value, lane)
        for each in host:
            setattr(each, name, value)

    def get(self, name: str, lane: int | None = None) -> int:
        """A setting of a lane, or of the first one."""
        index = lane or 0
        if index < len(self.lanes):
            return int(getattr(self.lanes[index], name))
        for device in self.devices.values():
            return device.get(name, index)
        return int(getattr(self._writer.lane(index), name))  # nothing records through any lane

    @contextlib.contextmanager
    def use_lane(self, index: int) -> Iterator[None]:
        """Makes a lane the one that the calling thread records through, on the host and on devices.

        Threads that run one model at the same time each use a lane of their own: then the iterations
        of each are consecutive in its records, and no thread waits for another. Threads that share
        a lane take turns; counts are exact either way.

        Raises:
            InputError: There is no such lane, or 16 are in use by this thread.
        """
        if not 0 <= index < self.num_lanes:
            raise InputError(
                f"lane {index}: this recording has {self.num_lanes}, numbered from 0; ask for more "
                "with lanes="
            )
        choices: list[object] = []
        try:
            if self.lanes:
                choices.append(_C.LaneChoice(self.lanes[0], self.lanes[index]))
            choices += [device.use_lane(index) for device in self.devices.values()]
        except ValueError as error:
            raise InputError(str(error)) from None
        try:
            yield
        finally:
            choices.clear()

    def add_fault(self, fault: _C.Fault) -> None:
        """Counts a telemetry fault in the recording's header."""
        self._writer.add_fault(fault)

    def record_placement(
        self,
        layers: Mapping[int, ArrayLike],
        num_ranks: int,
        ranks: ArrayLike | None = None,
    ) -> int:
        """Records where experts lie from now on. The first call says where they lay before.

        Records of later passes carry the version that this returns; those before the first call have
        version 0, as the first call has. Counts so far are kept with it, so that readers know what
        was routed under which placement: exact on the host; on a device, without the passes that wait
        in its streams. Thread-safe; not for the hot path.

        Args:
            layers: For each layer that changes, the logical expert in each of its physical slots,
                [P]; -1: empty. The first call should name all layers.
            num_ranks: Expert-parallel ranks R, at most 1024.
            ranks: The rank that holds each slot, [P]; None: P / R consecutive ones each.

        Returns:
            The version, which is the number of changes so far; -1 where the recording has ended.

        Raises:
            InputError: A layer, a slot or a rank is impossible, or there is no room for placements.
            RuntimeError: The current stream is being captured into a graph.
        """
        for layer in layers:
            if layer < 0:
                raise InputError(f"no layer {layer} in this recording")
        packed = [
            (layer, num_ranks, packed_slots(layer, s, num_ranks, ranks))
            for layer, s in layers.items()
        ]
        if self._owner != os.getpid():  # a forked child, in which nobody may hold the lock
            return -1
        with self._placing:  # the version that lanes are given last is the latest
            try:
                version = self._writer.record_placement(packed)
            except ValueError as error:
                raise InputError(str(error)) from None
            if version > 0:
                self.set("map_version", version & 0xFFFFFFFF)
        return version

    @property
    def closed(self) -> bool:
        """Whether the recording has ended; its file stays readable."""
        return self._writer.closed

    @property
    def num_slots(self) -> int:
        """Records that the ring holds before the oldest is overwritten."""
        return self._writer.num_slots

    def close(self) -> None:
        """Ends the recording: later passes are ignored, the file is marked closed. Idempotent."""
        self._finalizer()

    def _metadata(self, labels: Mapping[str, str], places: Sequence[str]) -> str:
        for name, value in labels.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise InputError(f"label {name!r}={value!r}: names and values must be strings")
        torch = sys.modules.get("torch")
        return json.dumps(
            {
                "run": self.run,
                "lanes": names_of(places),
                "layers": [_described(layer) for layer in self.layers],
                "uncovered": [asdict(part) for part in self.uncovered],
                **({"group": asdict(self.group)} if self.group else {}),
                "labels": dict(labels),
                "backend": "+".join(sorted({place.partition(":")[0] for place in places})),
                "record_every": self.settings.record_every,
                "program": Path(sys.argv[0]).name if sys.argv else "",
                "host": platform.node(),
                "versions": {
                    "dodoco-ext": __version__,
                    "python": platform.python_version(),
                    **({"torch": str(torch.__version__)} if torch is not None else {}),
                },
            }
        )

    def _create(self, metadata: str, lanes: int) -> tuple[_C.RecordingWriter, Path]:
        settings = self.settings
        name = f"{self.run}.r{settings.rank:05d}.{secrets.token_hex(4)}{SUFFIX}"
        shared = settings.directory is not None
        refusals = []
        for directory in settings.directories():
            path = directory / name
            try:
                prepare_directory(directory, shared=shared)
                prune(directory, rank=settings.rank)
                room = shutil.disk_usage(directory).free // 10
                writer = _C.RecordingWriter(
                    str(path),
                    metadata,
                    [(layer.num_experts, layer.top_k) for layer in self.layers],
                    num_lanes=lanes,
                    max_bytes=min(settings.max_bytes, room),
                    mode=0o640 if shared else 0o600,
                    rank=settings.rank,
                    world_size=settings.world_size,
                    group_size=len(self.group.ranks) if self.group else 0,
                    group_index=self.group.index if self.group else 0,
                    num_slots=self.placements.num_slots if self.placements else 0,
                    kept_placements=self.placements.kept if self.placements else 0,
                )
            except (OSError, ValueError, RecordingError) as error:
                refusals.append(f"{directory}: {error}")
                continue
            if refusals:
                log.warning("recording to %s, because %s", directory, "; ".join(refusals))
            if room < settings.max_bytes:
                log.warning(
                    "the recording has %.1f MiB, a tenth of what is free in %s, and not %.1f: the last "
                    "%d records are kept; free space, or set DODOCO_MAX_BYTES=%d if that is enough",
                    writer.file_bytes / 2**20,
                    directory,
                    settings.max_bytes / 2**20,
                    writer.num_slots * lanes,
                    room,
                )
            return writer, path
        raise RecordingError(
            "cannot create a recording: " + "; ".join(refusals) + ". Set DODOCO_DIR to a folder "
            "with room"
        )


def _described(layer: LayerSpec) -> dict[str, object]:
    described = asdict(layer)
    if layer.routed:
        del described["routed"]
    return described


def _check(group: GroupSpec) -> None:
    ranks = group.ranks
    if not 1 <= len(ranks) <= _C.MAX_RANKS or len(set(ranks)) < len(ranks) or min(ranks) < 0:
        raise InputError(
            f"a group of the {len(ranks)} ranks {list(ranks)[:16]}: give 1 to {_C.MAX_RANKS} "
            "different ones"
        )
    if not 0 <= group.index < len(ranks):
        raise InputError(f"index {group.index} in a group of {len(ranks)} ranks: count from 0")


def _close(writer: _C.RecordingWriter, devices: dict[str, Device]) -> None:
    for device in devices.values():
        device.close()
    writer.close()
