"""What kind of file system a folder lies on."""

from __future__ import annotations

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
MEMORY = ("tmpfs", "ramfs", "hugetlbfs")
# Locks and mapped pages of these are not, or not always, those that another machine sees.
NETWORK = re.compile(
    r"(fuse\.)?(9p|afs|beegfs|ceph|cephfs|cifs|davfs|gcsfuse|glusterfs|gpfs|juicefs|lustre|ncpfs|nfs\d?"
    r"|ocfs2|orangefs|panfs|rclone|s3fs|smb3|smbfs|sshfs|virtiofs|wekafs)"
)


def kind_of(path: Path) -> str:
    """Type of the file system that a path lies on, such as `tmpfs`; "" where unknown."""
    try:
        mounts = os.fsdecode(MOUNTS.read_bytes())
    except OSError:
        return ""
    best, kind = "", ""
    real = str(path.resolve())
    for point, found in re.findall(r"^\S+ (\S+) (\S+)", mounts, re.MULTILINE):
        # The kernel writes a space in a name as \040.
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of two at one place, the later hides the earlier
            best, kind = point, found
    return kind


def is_read_only(folder: Path) -> bool:
    """Whether a folder that exists lies on a file system that is mounted read-only."""
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
