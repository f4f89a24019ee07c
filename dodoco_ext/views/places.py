"""Whether recordings can be made in a folder: looked at, and tried with one that is removed again."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dodoco_ext import _C
from dodoco_ext.folders import distrust

# Layers tried, largest first: a recording of a large model, and the smallest sensible one.
_MODELS = (((128, 8),) * 32, ((8, 2),))
_LARGE = "32 layers of 128 experts"


@dataclass(frozen=True)
class Place:
    """A folder for recordings.

    Attributes:
        folder: The folder, which need not exist.
        state: `exists` with its mode, or how it would be created.
        file_system: Type of the file system, such as `tmpfs`; "" where unknown.
        free_bytes: Free space there.
        recording: What a recording would be like; "" where none can be made.
        problem: Why none can be made, with what to do; "" where one can.
        limited: Whether there is room for a small model only.
    """

    folder: Path
    state: str
    file_system: str
    free_bytes: int
    recording: str
    problem: str
    limited: bool = False


def examine(folder: Path, *, shared: bool, max_bytes: int) -> Place:
    """Looks at a folder and makes a trial recording; leaves nothing behind.

    Args:
        folder: The folder of the recordings.
        shared: Whether `DODOCO_DIR` names it; otherwise it must be private.
        max_bytes: Largest recording that the settings allow.
    """
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    state, problem = _look(folder, nearest, shared=shared)
    free = shutil.disk_usage(nearest).free
    recording, limited = "", False
    if not problem:
        recording, problem, limited = _try(nearest, min(max_bytes, free // 10))
    return Place(folder, state, _file_system(nearest), free, recording, problem, limited)


def _look(folder: Path, nearest: Path, *, shared: bool) -> tuple[str, str]:
    """How a folder is, and what is wrong with it."""
    if nearest != folder:
        state = f"not there yet; will be created with mode {'2750' if shared else '700'}"
        if os.path.lexists(folder):
            return "a broken link", f"{folder} is a broken link: remove it, or set DODOCO_DIR"
        if not nearest.is_dir():
            return state, f"{nearest} is not a folder: set DODOCO_DIR to another place"
        if not shared and nearest != folder.parent:
            return state, f"{folder.parent} does not exist: set DODOCO_DIR to another place"
        if not os.access(nearest, os.W_OK | os.X_OK):
            return state, f"{nearest} is not writable: set DODOCO_DIR to a folder that is"
        return state, ""
    info = folder.stat() if shared else folder.lstat()
    mode = stat.S_IMODE(info.st_mode)
    state = f"exists, mode {mode:o}, uid {info.st_uid}"
    if problem := distrust(folder, shared=shared):
        return state if folder.is_dir() else "not a folder", problem
    if not os.access(folder, os.W_OK | os.X_OK):
        return state, f"{folder} is not writable by uid {os.getuid()}: give it write access"
    return state, ""


def _try(folder: Path, max_bytes: int) -> tuple[str, str, bool]:
    """Makes a recording, reads it back and removes it: (what it is like, problem, limited)."""
    problem = ""
    for layers in _MODELS:
        # Without the suffix of recordings: neither listed nor pruned.
        path = folder / f".dodoco-doctor-{secrets.token_hex(8)}"
        try:
            size, slots = _record(path, list(layers), max_bytes)
        except ValueError as error:
            problem = f"{error}"
            continue
        except OSError as error:
            return "", f"{error}: set DODOCO_DIR to a folder with room", False
        finally:
            path.unlink(missing_ok=True)
        limited = layers is not _MODELS[0]
        passes = slots // len(layers)
        what = "one layer of 8 experts" if limited else _LARGE
        text = f"{size / 2**20:.2f} MiB for {what}: history of {passes:,} passes"
        return text, problem, limited
    return "", problem, False


def _record(path: Path, layers: list[tuple[int, int]], max_bytes: int) -> tuple[int, int]:
    writer = _C.RecordingWriter(
        str(path), '{"layers": []}', layers, max_bytes=max_bytes, mode=0o600, rank=0, world_size=1
    )
    try:
        site = np.zeros(_C.SITE_BYTES // 8, np.int64)
        ids = np.array([[0, 1], [0, 2]], np.int64)
        writer.bind_site(site.ctypes.data, 0, 0)
        _C.route_ids(site.ctypes.data, ids.ctypes.data, ids.itemsize, 2, 2, 2, 1, False)
        words, _ = _C.RecordingReader(str(path)).board(0, 0)
        counts = words[_C.BOARD_WORDS : _C.BOARD_WORDS + 3].tolist()
        if counts != [2, 1, 1]:
            raise OSError(f"a trial recording in {path.parent} read back {counts}, not [2, 1, 1]")
        return writer.file_bytes, writer.num_slots
    finally:
        writer.close()


def _file_system(path: Path) -> str:
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    best, kind = "", ""
    real = str(path.resolve())
    for line in mounts.splitlines():
        _, point, found, *_ = line.split(" ")
        point = point.encode().decode("unicode_escape", errors="replace")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, found
    return kind
