"""Which folders can be trusted with recordings, for those who write and `dodoco doctor`; making one."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from dodoco_ext.errors import RecordingError


def distrust(folder: Path, *, shared: bool) -> str:
    """Why a folder that exists cannot be trusted, with what to do; "" if it can.

    Args:
        folder: The folder of the recordings.
        shared: Chosen by `DODOCO_DIR`, and shared on purpose. Otherwise it must be no link, belong to
            this user, and be closed to everybody else.
    """
    advice = "remove it, or set DODOCO_DIR to a folder of your own"
    info = folder.stat() if shared else folder.lstat()
    if not stat.S_ISDIR(info.st_mode):
        return f"{folder} is not a folder: {advice}"
    mode, uid = stat.S_IMODE(info.st_mode), os.getuid()
    if not shared and (info.st_uid != uid or mode & 0o077):
        return f"{folder} is not private to uid {uid} (it has uid {info.st_uid}, mode {mode:o}): {advice}"
    return ""


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
