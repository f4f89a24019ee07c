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
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dodoco_ext import _C, __version__
from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.folders import distrust
from dodoco_ext.pruning import prune
from dodoco_ext.settings import SUFFIX, Settings

log = logging.getLogger("dodoco")


@dataclass(frozen=True)
class LayerSpec:
    """One observed MoE layer.

    Attributes:
        name: Qualified name of the router module.
        num_experts: Logical experts that the router chooses from.
        top_k: Experts a token is sent to; 0 where it is not fixed.
    """

    name: str
    num_experts: int
    top_k: int


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
        lanes: Writers that record at the same time; see `use_lane()`.
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
        lanes: The settings of each lane that may change while it records.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        *,
        uncovered: Sequence[Uncovered] = (),
        lanes: int = 1,
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
        if not 1 <= lanes <= _C.MAX_LANES:
            raise InputError(f"lanes={lanes}: give 1 to {_C.MAX_LANES}")
        self.run = self.settings.run or time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        metadata = self._metadata(labels or {}, lanes)
        self._writer, self.path = self._create(metadata, lanes)
        self.lanes = tuple(self._writer.lane(index) for index in range(lanes))
        for lane in self.lanes:
            lane.record_every = self.settings.record_every
        self._sites: list[object] = []
        self._finalizer = weakref.finalize(self, self._writer.close)

    def bind(self, layer: int, site: object, address: int) -> None:
        """Makes `site`, an object with `_C.SITE_BYTES` bytes at `address`, stand for a layer."""
        self._writer.bind_site(address, 0, layer)
        self._sites.append(site)

    @property
    def lane(self) -> _C.Lane:
        """The lane that takes what threads record outside `use_lane()`."""
        return self.lanes[0]

    @contextlib.contextmanager
    def use_lane(self, index: int) -> Iterator[_C.Lane]:
        """Makes a lane the one that the calling thread records through.

        Threads that run one model at the same time each use a lane of their own: then the iterations
        of each are consecutive in its records, and no thread waits for another. Threads that share
        a lane take turns; counts are exact either way.

        Raises:
            InputError: There is no such lane, or 16 are in use by this thread.
        """
        if not 0 <= index < len(self.lanes):
            raise InputError(
                f"lane {index}: this recording has {len(self.lanes)}, numbered from 0; ask for more "
                "with lanes="
            )
        try:
            choice = _C.LaneChoice(self.lanes[0], self.lanes[index])
        except ValueError as error:
            raise InputError(str(error)) from None
        try:
            yield self.lanes[index]
        finally:
            del choice

    def add_fault(self, fault: _C.Fault) -> None:
        """Counts a telemetry fault in the recording's header."""
        self._writer.add_fault(fault)

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

    def _metadata(self, labels: Mapping[str, str], lanes: int) -> str:
        for name, value in labels.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise InputError(f"label {name!r}={value!r}: names and values must be strings")
        torch = sys.modules.get("torch")
        return json.dumps(
            {
                "run": self.run,
                "lanes": ["host", *(f"host {index}" for index in range(1, lanes))],
                "layers": [asdict(layer) for layer in self.layers],
                "uncovered": [asdict(part) for part in self.uncovered],
                "labels": dict(labels),
                "backend": "cpu",
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


def prepare_directory(directory: Path, *, shared: bool) -> None:
    """Creates the folder, or checks that the one there can be trusted.

    Args:
        directory: The folder of the recordings.
        shared: Chosen by `DODOCO_DIR`: readable by its group (2750). Otherwise private (0700).

    Raises:
        RecordingError: The folder is a link, belongs to somebody else, or others may write to it.
    """
    if not os.path.lexists(directory):
        # Two processes that start together: whoever comes second finds it made, and checks it.
        with contextlib.suppress(FileExistsError):
            directory.mkdir(parents=shared, mode=0o700)
            directory.chmod(0o2750 if shared else 0o700)  # whatever the umask took away or added
    if problem := distrust(directory, shared=shared):
        raise RecordingError(problem)
