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
from dodoco_ext.views import file_systems

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
        concerns: What is wrong though recordings can be made, each with what to do.
    """

    folder: Path
    state: str
    file_system: str
    free_bytes: int
    recording: str
    problem: str
    concerns: tuple[str, ...] = ()


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
    free, kind = shutil.disk_usage(nearest).free, file_systems.kind_of(nearest)
    recording, concerns = "", _concerns(folder, kind, shared=shared)
    if not problem:
        limits = min(max_bytes, free // 10)
        recording, problem, limit = _try(nearest, limits, new_folder=nearest != folder)
        concerns += [f"large models do not fit: {limit}"] if limit else []
    return Place(folder, state, kind, free, recording, problem, tuple(concerns))


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
        return state, _unwritable(nearest)
    info = folder.stat() if shared else folder.lstat()
    mode = stat.S_IMODE(info.st_mode)
    state = f"exists, mode {mode:o}, uid {info.st_uid}"
    if problem := distrust(folder, shared=shared):
        return state if folder.is_dir() else "not a folder", problem
    return state, _unwritable(folder)


def _unwritable(folder: Path) -> str:
    if file_systems.is_read_only(folder):
        return f"{folder} is on a read-only file system: mount it writable, or set DODOCO_DIR"
    if not os.access(folder, os.W_OK | os.X_OK):
        return (
            f"{folder} is not writable by uid {os.getuid()}: give it write access, or set "
            "DODOCO_DIR to a folder that is"
        )
    return ""


def has_gpu() -> bool:
    """Whether a driver has put an NVIDIA device here; none is opened."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def _concerns(folder: Path, kind: str, *, shared: bool) -> list[str]:
    found = []
    if file_systems.NETWORK.fullmatch(kind):
        found.append(
            f"{kind} is a network file system, where a live recording can look dead and counters old: "
            "set DODOCO_DIR to a tmpfs of this machine, and copy recordings when they are closed"
        )
    elif has_gpu() and kind not in file_systems.MEMORY:
        found.append(
            f"{kind or 'this'} is not memory, and a GPU writes to tmpfs only: set DODOCO_DIR"
        )
    if shared and folder.is_dir():
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode & 0o002 and not mode & stat.S_ISVTX:
            found.append(f"anybody may remove or replace recordings in it: chmod o-w {folder}")
        if mode & 0o050 != 0o050:
            found.append(
                f"its group cannot read it, so no other user's reader can: chmod 2750 {folder}"
            )
    return found


def _try(folder: Path, max_bytes: int, *, new_folder: bool) -> tuple[str, str, str]:
    """Makes a recording, in a new folder as the recorder would, reads it back and removes both.

    Returns:
        What it is like; why there is none, with what to do; and why it was only a small one.
    """
    # Without the suffix of recordings: neither listed nor pruned.
    path, problem = folder / f".dodoco-doctor-{secrets.token_hex(8)}", ""
    trial = path / "trial" if new_folder else path
    try:
        if new_folder:
            path.mkdir(mode=0o700)
        for layers in _MODELS:
            try:
                size, slots = _record(trial, list(layers), max_bytes)
            except ValueError as error:
                problem = f"{error}"
                continue
            finally:
                trial.unlink(missing_ok=True)
            what = _LARGE if layers is _MODELS[0] else "one layer of 8 experts"
            passes = slots // len(layers)
            text = f"{size / 2**20:.2f} MiB for {what}: history of {passes:,} passes"
            return text, "", problem
    except OSError as error:
        return "", f"{error}: set DODOCO_DIR to a folder with room", ""
    finally:
        if path.is_dir():
            path.rmdir()
    return "", problem, ""


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
        if not _C.owner_alive(str(path)):
            raise OSError(f"locks do not hold in {path.parent}: live recordings would look dead")
        return writer.file_bytes, writer.num_slots
    finally:
        writer.close()
