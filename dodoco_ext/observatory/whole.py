"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Puts a file in place once it is written and synchronised; a failure leaves the former one.

    Args:
        path: The file; its folder is there.

    Yields:
        Where to write: `.NAME.PID` beside it. Its ending is another, so that formats must be named.

    Raises:
        OSError: It cannot be written (a full disk, for one); nothing is left of it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
