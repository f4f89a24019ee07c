"""One meaning of SOURCE for every command: a file, a folder, a PID, a name, a run, or nothing."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from dodoco_ext.errors import RecordingError
from dodoco_ext.recording import Reader
from dodoco_ext.settings import SUFFIX, Settings

log = logging.getLogger("dodoco")


@dataclass(frozen=True)
class Listed:
    """A recording found in a folder: its file, and a reader or the reason why there is none.

    Attributes:
        path: The file.
        reader: A reader of it, or None.
        problem: Why there is none.
        state: What it was when it was found: `live`, `closed`, `dead`, or the state of the
            `RecordingError` that says why it cannot be read.
    """

    path: Path
    reader: Reader | None
    problem: str = ""
    state: str = ""


def find(directories: tuple[Path, ...] | None = None) -> list[Listed]:
    """Lists recordings, latest first.

    Args:
        directories: Where to look; the settings' folders by default. A missing one is empty.

    Raises:
        RecordingError: There is none, and a folder may not be listed by this user.
    """
    found: list[tuple[float, Path]] = []
    refusals: list[RecordingError] = []
    for directory in directories or Settings.from_environment().reading_directories():
        try:
            paths = files_in(directory)
        except RecordingError as error:
            refusals.append(error)
            continue
        for path in paths:
            try:
                found.append((path.lstat().st_mtime, path))
            except FileNotFoundError:
                continue  # pruned between the listing and the look
    if refusals and not found:
        raise refusals[0]
    for refusal in refusals:
        log.warning("%s", refusal)
    listed = []
    for _, path in sorted(found, reverse=True):
        try:
            reader = Reader(path)
            listed.append(Listed(path, reader, state=reader.state))
        except RecordingError as error:
            listed.append(Listed(path, None, str(error), error.state))
    return listed


def files_in(directory: Path) -> list[Path]:
    """The files in a folder that are named as recordings; none where there is no such folder.

    Raises:
        RecordingError: The folder may not be listed by this user.
    """
    try:
        # Not glob(): to it, a folder that may not be listed is an empty one.
        return [path for path in directory.iterdir() if path.name.endswith(SUFFIX)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _forbidden(directory, error) from None


def _forbidden(path: Path, error: OSError) -> RecordingError:
    return RecordingError(
        f"{path}: {error.strerror}: read it as its owner or as a member of its group; DODOCO_DIR "
        "makes recordings that a group may read",
        "unreadable",
    )


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
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # behind a folder that this user may not enter
        raise _forbidden(path, error) from None
    if is_folder:
        return _latest(find((path,)), f"{path} holds no recording", path)
    if is_file:
        return path.resolve()  # the reader itself follows no link
    recordings = find()
    named = [r for r in recordings if r.path.name == text or r.path.name.split(".")[0] == text]
    if not text.isdecimal():
        return _latest(named, f"{text} is neither a file nor a recording nor a run", None)
    by_pid = [r for r in recordings if r.reader and r.reader.header["owner_pid"] == int(text)]
    return _latest(by_pid or named, f"no recording of process {text}, nor a run of that name", None)


def means_one(source: str) -> bool:
    """Whether a SOURCE means one recording by itself: a file, a recording's name, a process."""
    return Path(source).is_file() or source.isdecimal() or source.endswith(SUFFIX)


def _latest(recordings: list[Listed], complaint: str, where: Path | None) -> Path:
    for recording in recordings:
        if recording.reader is not None:
            return recording.path
    if recordings:
        raise RecordingError(recordings[0].problem, recordings[0].state)
    folders = (where,) if where else Settings.from_environment().directories()
    looked = ", ".join(str(folder) for folder in folders)
    raise RecordingError(
        f"{complaint} (looked in {looked}): run `dodoco observe`, attach(), or give a file"
    )
