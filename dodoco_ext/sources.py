"""One meaning of SOURCE for every command: a file, a folder, a PID, a name, a run, or nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dodoco_ext.errors import RecordingError
from dodoco_ext.recording import Reader
from dodoco_ext.settings import SUFFIX, Settings


@dataclass(frozen=True)
class Listed:
    """A recording found in a folder: its file, and a reader or the reason why there is none."""

    path: Path
    reader: Reader | None
    problem: str = ""


def find(directories: tuple[Path, ...] | None = None) -> list[Listed]:
    """Lists recordings, latest first.

    Args:
        directories: Where to look; the settings' folders by default. A missing one is empty.
    """
    found: list[tuple[float, Path]] = []
    for directory in directories or Settings.from_environment().directories():
        for path in directory.glob("*" + SUFFIX):
            try:
                found.append((path.lstat().st_mtime, path))
            except FileNotFoundError:
                continue  # pruned between the listing and the look
    listed = []
    for _, path in sorted(found, reverse=True):
        try:
            listed.append(Listed(path, Reader(path)))
        except RecordingError as error:
            listed.append(Listed(path, None, str(error)))
    return listed


def open_recording(source: str | int | os.PathLike[str] | None = None) -> Reader:
    """Opens a recording.

    Args:
        source: A file, a folder (its latest recording), the PID of a process that records, the
            name of a recording or the run it belongs to; None: the latest recording of this user.

    Returns:
        A reader of it.

    Raises:
        RecordingError: There is none, or it cannot be read; the message says where was looked.
    """
    return Reader(resolve(source))


def resolve(source: str | int | os.PathLike[str] | None) -> Path:
    """Finds the recording that a SOURCE means; see `dodoco_ext.open()`.

    Raises:
        RecordingError: Nothing matches; the message says where was looked.
    """
    if source is None:
        return _latest(find(), "there is no recording yet", None)
    text = os.fspath(source) if not isinstance(source, int) else str(source)
    path = Path(text)
    if path.is_dir():
        return _latest(find((path,)), f"{path} holds no recording", path)
    if path.is_file():
        return path.resolve()  # the reader itself follows no link
    recordings = find()
    if text.isdecimal():
        chosen = [r for r in recordings if r.reader and r.reader.header["owner_pid"] == int(text)]
        return _latest(chosen, f"no recording of process {text}", None)
    chosen = [r for r in recordings if r.path.name == text or r.path.name.split(".")[0] == text]
    return _latest(chosen, f"{text} is neither a file nor a recording nor a run", None)


def _latest(recordings: list[Listed], complaint: str, where: Path | None) -> Path:
    for recording in recordings:
        if recording.reader is not None:
            return recording.path
    if recordings:
        raise RecordingError(recordings[0].problem)
    folders = (where,) if where else Settings.from_environment().directories()
    looked = ", ".join(str(folder) for folder in folders)
    raise RecordingError(
        f"{complaint} (looked in {looked}): run `dodoco observe`, attach(), or give a file"
    )
