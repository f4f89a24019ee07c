"""Copying recordings to where they outlast their machine: whole, or not at all."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from dodoco_ext import _C
from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.fleet import run_of
from dodoco_ext.recording import Reader
from dodoco_ext.settings import SUFFIX

Wanted: TypeAlias = Callable[[Path, Reader | None], bool]

_ENDED = ("closed", "dead")
_UNBORN = ("creating", "unfinished")


def copy_recording(source: Path, archive: Path) -> Path:
    """Copies a recording into a folder under its own name.

    Whoever looks there meanwhile finds the whole copy or none: it is written under another name, synced
    to the disk and renamed. An earlier copy of the same recording is replaced, nothing else.

    Returns:
        The copy.

    Raises:
        InputError: Another recording, or something else, has that name there.
        OSError: It cannot be read or written; nothing is left behind, and the source is untouched.
    """
    target = archive / source.name
    if os.path.lexists(target) and not _same(source, target):
        raise InputError(
            f"{target} is there and no copy of {source}: give another folder, or move it away"
        )
    temporary = archive / f".{source.name}.{secrets.token_hex(4)}"
    try:
        with source.open("rb") as reading:
            info = os.fstat(reading.fileno())
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "wb") as writing:
                shutil.copyfileobj(reading, writing, 1 << 20)
                writing.flush()
                if writing.tell() < info.st_size:
                    raise OSError(f"{source} became shorter while it was copied")
                os.fchmod(handle, 0o640)
                os.utime(handle, ns=(info.st_atime_ns, info.st_mtime_ns))
                os.fsync(handle)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(archive)
    return target


class Collector:
    """Brings the recordings of a job from the folder where they are made to an archive.

    Args:
        folder: Where the job records.
        archive: Where to copy to; created when something is copied.
        wanted: Whether a file there, with its reader where it is readable, is the job's; all by default.

    Attributes:
        copied: The copy of each recording that ended and is in the archive.
        partly: The copy, from when it was last looked at, of each that has not ended.
        problems: Why a recording is not in the archive; its source stays.
    """

    def __init__(
        self, folder: Path, archive: Path, wanted: Wanted = lambda _path, _reader: True
    ) -> None:
        self.folder = folder
        self.archive = archive
        self.copied: dict[Path, Path] = {}
        self.partly: dict[Path, Path] = {}
        self.problems: dict[Path, str] = {}
        self._wanted = wanted

    def live(self) -> list[Path]:
        """The job's recordings that an owner still holds."""
        return [path for path, state in self._job() if state == "live"]

    def look(self, *, unended: bool = False) -> None:
        """Copies what has ended and is not copied yet.

        Args:
            unended: Also what has not ended, as it is now, and what cannot be read. A copy of a live
                recording may catch its writer in the middle of a pass, which readers mark.
        """
        for path, state in self._job():
            if path in self.copied or not (state in _ENDED or unended):
                continue
            try:
                self.archive.mkdir(parents=True, exist_ok=True)
                copy = copy_recording(path, self.archive)
            except FileNotFoundError as error:
                if not path.exists():  # pruned by its job since it was listed
                    continue
                self.problems[path] = _reason(error)
            except (OSError, InputError) as error:
                self.problems[path] = _reason(error)
            else:
                self.problems.pop(path, None)
                self.partly.pop(path, None)
                (self.partly if state == "live" else self.copied)[path] = copy

    def _job(self) -> list[tuple[Path, str]]:
        found = []
        try:
            paths = sorted(p for p in self.folder.iterdir() if p.name.endswith(SUFFIX))
        except OSError:
            return []
        for path in paths:
            try:
                reader = Reader(path)
                if self._wanted(path, reader):
                    found.append((path, reader.state))
            except RecordingError as error:
                if error.state != "missing" and self._wanted(path, None):
                    # Whoever creates it holds the lock; until then it is nobody's.
                    unborn = error.state in _UNBORN and _C.owner_alive(str(path))
                    found.append((path, "live" if unborn else error.state))
        return found


def of_this_job(run: str | None, since_ns: int) -> Wanted:
    """Tells a job's recordings in a folder that it shares with others.

    Args:
        run: Name of the run; None: unknown, so that all are its that began while it ran.
        since_ns: When the job started, Unix ns.
    """
    host = platform.node()

    def wanted(path: Path, reader: Reader | None) -> bool:
        if reader is None:
            return run is not None and path.name.split(".")[0] == run
        if reader.metadata.get("host") != host:
            return False
        if run is not None:
            return run_of(reader) == run
        return int(reader.header["created_unix_ns"]) >= since_ns

    return wanted


def _same(source: Path, target: Path) -> bool:
    """Whether both are one recording; damaged ones if they are equally long."""
    try:
        return Reader(source).uuid == Reader(target).uuid
    except RecordingError:
        return (
            target.is_file()
            and not target.is_symlink()
            and target.stat().st_size == source.stat().st_size
        )


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
