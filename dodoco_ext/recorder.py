"""The writer's side of a recording: where it is created, what it says about itself, how it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dodoco_ext import _C, __version__
from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.folders import distrust
from dodoco_ext.settings import SUFFIX, Settings

log = logging.getLogger("dodoco")

KEPT_PER_RANK = 2
_NAME = re.compile(r"[A-Za-z0-9_-]+\.r(\d+)\.[0-9a-f]+" + re.escape(SUFFIX))
# A file that another process has created and not yet locked looks dead for an instant.
_CREATION_GRACE_S = 60.0


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
        labels: Text to find the recording by, such as `{"model_name": ...}`.
        settings: Where and how to record; the environment's by default.

    Raises:
        InputError: A layer, a label or a setting cannot be used.
        RecordingError: No folder took the recording; the message says why for each.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        *,
        uncovered: Sequence[Uncovered] = (),
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
        self._writer, self.path = self._create(self._metadata(labels or {}))
        self.lane = self._writer.lane(0)
        self.lane.record_every = self.settings.record_every
        self._sites: list[object] = []
        self._finalizer = weakref.finalize(self, self._writer.close)

    def bind(self, layer: int, site: object, address: int) -> None:
        """Makes `site`, an object with `_C.SITE_BYTES` bytes at `address`, stand for a layer."""
        self._writer.bind_site(address, 0, layer)
        self._sites.append(site)

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

    def _metadata(self, labels: Mapping[str, str]) -> str:
        for name, value in labels.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise InputError(f"label {name!r}={value!r}: names and values must be strings")
        torch = sys.modules.get("torch")
        return json.dumps(
            {
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

    def _create(self, metadata: str) -> tuple[_C.RecordingWriter, Path]:
        settings = self.settings
        run = settings.run or time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        name = f"{run}.r{settings.rank:05d}.{secrets.token_hex(4)}{SUFFIX}"
        shared = settings.directory is not None
        refusals = []
        for directory in settings.directories():
            path = directory / name
            try:
                prepare_directory(directory, shared=shared)
                prune(directory, rank=settings.rank)
                writer = _C.RecordingWriter(
                    str(path),
                    metadata,
                    [(layer.num_experts, layer.top_k) for layer in self.layers],
                    max_bytes=min(settings.max_bytes, shutil.disk_usage(directory).free // 10),
                    mode=0o640 if shared else 0o600,
                    rank=settings.rank,
                    world_size=settings.world_size,
                )
            except (OSError, ValueError, RecordingError) as error:
                refusals.append(f"{directory}: {error}")
                continue
            if refusals:
                log.warning("recording to %s, because %s", directory, "; ".join(refusals))
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
            if shared:
                directory.chmod(0o2750)
    if problem := distrust(directory, shared=shared):
        raise RecordingError(problem)


def prune(directory: Path, *, rank: int) -> list[Path]:
    """Removes dead recordings of this rank but for the latest `KEPT_PER_RANK`; returns them."""
    dead: list[tuple[float, Path]] = []
    now = time.time()
    for path in directory.glob("*" + SUFFIX):
        match = _NAME.fullmatch(path.name)
        if match is None or int(match[1]) != rank:
            continue
        try:
            info = path.lstat()
            settled = now - info.st_mtime > _CREATION_GRACE_S or _is_closed(path)
            if info.st_uid == os.getuid() and settled and not _C.owner_alive(str(path)):
                dead.append((info.st_mtime, path))
        except OSError as error:
            log.debug("not pruned: %s: %s", path, error)  # went away, or is not ours to judge
    removed = []
    for _, path in sorted(dead, reverse=True)[KEPT_PER_RANK:]:
        path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def _is_closed(path: Path) -> bool:
    return bool(_C.RecordingReader(str(path)).header()["closed"])
