"""Which folders can be trusted with recordings: the rule of those who write and of `dodoco doctor`."""

from __future__ import annotations

import os
import stat
from pathlib import Path


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
