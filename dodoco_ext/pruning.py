"""Removing recordings whose owner is gone: what a new recorder does, and `dodoco show --prune`."""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from pathlib import Path

from dodoco_ext import _C
from dodoco_ext.settings import SUFFIX

log = logging.getLogger("dodoco")

KEPT_PER_RANK = 2
_NAME = re.compile(r"[A-Za-z0-9_-]+\.r(\d+)\.[0-9a-f]+" + re.escape(SUFFIX))
# A file that another process has created and not yet locked looks dead for an instant.
_CREATION_GRACE_S = 60.0


def prune(directory: Path, rank: int | None = None, keep: int = KEPT_PER_RANK) -> list[Path]:
    """Removes recordings that ended, but for the latest of each rank.

    Only what the recorder names itself, belongs to this user and has no living owner is touched.

    Args:
        directory: The folder of the recordings; a missing one is empty.
        rank: Only recordings of this rank; None: of every rank, each by itself.
        keep: How many of each rank stay.

    Returns:
        The files that were removed.
    """
    ended: dict[int, list[tuple[float, Path]]] = {}
    now = time.time()
    for path in directory.glob("*" + SUFFIX):
        match = _NAME.fullmatch(path.name)
        if match is None or rank not in (None, int(match[1])):
            continue
        try:
            info = path.lstat()
            ours = stat.S_ISREG(info.st_mode) and info.st_uid == os.getuid()
            settled = now - info.st_mtime > _CREATION_GRACE_S or (ours and _is_closed(path))
            if ours and settled and not _C.owner_alive(str(path)):
                ended.setdefault(int(match[1]), []).append((info.st_mtime, path))
        except OSError as error:
            log.debug("not pruned: %s: %s", path, error)  # went away, or is not ours to judge
    removed = []
    for files in ended.values():
        for _, path in sorted(files, reverse=True)[keep:]:
            try:
                path.unlink(missing_ok=True)
                removed.append(path)
            except OSError as error:
                log.warning("not pruned: %s", error)
    return removed


def _is_closed(path: Path) -> bool:
    return bool(_C.RecordingReader(str(path)).header()["closed"])
