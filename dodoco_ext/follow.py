"""Following a recording: new records as they come, to its owner's end and over its restart."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.fleet import is_named, run_of
from dodoco_ext.recording import RECORD_DTYPE, Cursor, Reader
from dodoco_ext.settings import SUFFIX, Settings
from dodoco_ext.sources import resolve

log = logging.getLogger("dodoco")

# A file in one of these states may become a recording; in any other it never will.
_MAY_COME = ("", "missing", "creating", "unfinished")


@dataclass(frozen=True, eq=False)
class Batch:
    """What one look at a recording brought.

    Attributes:
        reader: The recording; another one after the owner's restart.
        records: The records since the batch before, ordered by time, dtype `RECORD_DTYPE`.
        lost: Records overwritten before they could be read; in the first batch of a recording also
            those overwritten before it was followed.
        ended: "" while more may come. Once, in the last batch of a recording: `closed`, `dead`, or
            the state of the `RecordingError` that ended it, such as `truncated`.
        problem: That error's message.
    """

    reader: Reader
    records: NDArray[np.void]
    lost: int = 0
    ended: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Owner:
    """What is known of who recorded, also when the file is not readable any more."""

    uuid: str
    folder: Path
    rank: int
    run: str
    program: str

    @classmethod
    def of(cls, reader: Reader) -> Owner:
        """The owner of a recording."""
        program = str(reader.metadata.get("program"))
        rank = int(reader.header["rank"])
        return cls(reader.uuid, reader.path.parent, rank, run_of(reader), program)

    def is_followed_by(self, later: Owner) -> bool:
        """Whether a recording that began later is of this owner, restarted."""
        if later.uuid == self.uuid or later.rank != self.rank:
            return False
        if is_named(self.run):
            return later.run == self.run
        return not is_named(later.run) and later.program == self.program


def follow(
    source: str | int | os.PathLike[str] | None = None,
    *,
    interval: float = 0.5,
    stop: threading.Event | None = None,
    restarts: bool = True,
) -> Iterator[Batch]:
    """Yields the records of a recording, from the oldest there is, as they come.

    No record comes twice, and none is passed over that could still be read: when the owner has closed
    the recording or died, what is left is read before the last batch. The file may be removed
    meanwhile.

    After that it waits for the recording of the restarted owner and goes on with it: in the same
    folder (the default folders count as one), of the same rank, begun after this one ended, and of
    the same run if the run has a name (`DODOCO_RUN` or the launcher's), otherwise of a run without one
    and of the same program. Where several fit, the oldest, so that none is skipped.

    Args:
        source: As for `dodoco_ext.open()`; what does not exist yet is waited for.
        interval: Seconds from one look to the next; nothing is spent in between.
        stop: Set it to end: what was written before is still yielded. Also wakes it from waiting.
        restarts: Go on after the owner's restart. Otherwise the iterator ends with the recording.

    Yields:
        A batch whenever there are new records, some were lost, or the recording ended.

    Raises:
        InputError: The interval is not positive.
        RecordingError: `source` is a file that will never be readable.
    """
    if not interval > 0:
        raise InputError(f"interval={interval}: give seconds above 0")
    return _follow(source, interval, stop or threading.Event(), restarts)


def _follow(
    source: str | int | os.PathLike[str] | None,
    interval: float,
    stop: threading.Event,
    restarts: bool,
) -> Iterator[Batch]:
    reader = _first(source, interval, stop)
    while reader is not None:
        owner = Owner.of(reader)
        ended_ns = yield from _to_the_end(reader, interval, stop)
        if not restarts or stop.is_set():
            return
        log.info("%s has ended; waiting for its owner's restart", reader.path)
        reader = _successor(owner, ended_ns, interval, stop)


def _first(
    source: str | int | os.PathLike[str] | None, interval: float, stop: threading.Event
) -> Reader | None:
    waiting = False
    while True:
        try:
            return Reader(resolve(source))
        except RecordingError as error:
            if error.state not in _MAY_COME and source is not None and Path(str(source)).is_file():
                raise
            if not waiting:
                log.info("waiting: %s", error)
            waiting = True
        if stop.wait(interval):
            return None


def _to_the_end(
    reader: Reader, interval: float, stop: threading.Event
) -> Generator[Batch, None, int]:
    """Yields the batches of one recording; returns when it ended at the earliest, Unix ns."""
    cursor: Cursor | None = None
    alive_ns = int(reader.header["created_unix_ns"])
    while True:
        looked_ns, began = time.time_ns(), time.monotonic()
        stopping = stop.is_set()
        try:
            # Asked before reading: all that an owner wrote before it went is then read.
            state = reader.state
            records, cursor, lost = reader.read(cursor)
            closed_ns = int(reader.header["closed_unix_ns"])
        except RecordingError as error:
            yield Batch(reader, np.empty(0, RECORD_DTYPE), 0, error.state, str(error))
            return alive_ns
        if state == "live":
            alive_ns = looked_ns
        elif len(records):
            alive_ns = max(alive_ns, min(int(records["time_ns"].max()), looked_ns))
        ended = "" if state == "live" else state
        if len(records) or lost or ended:
            yield Batch(reader, records, lost, ended)
        if ended or stopping:
            return closed_ns if state == "closed" else alive_ns
        stop.wait(max(interval - (time.monotonic() - began), 0))


def _successor(
    owner: Owner, ended_ns: int, interval: float, stop: threading.Event
) -> Reader | None:
    refused: set[Path] = set()
    while True:
        fitting: list[tuple[int, str, Reader]] = []
        for path in _candidates(owner.folder):
            if path in refused:
                continue
            try:
                reader = Reader(path)
                began_ns, other = int(reader.header["created_unix_ns"]), Owner.of(reader)
            except RecordingError:
                continue  # perhaps still being created: looked at again
            if began_ns >= ended_ns and owner.is_followed_by(other):
                fitting.append((began_ns, path.name, reader))
            else:
                refused.add(path)
        if fitting:
            return min(fitting, key=lambda found: found[:2])[2]
        if stop.wait(interval):
            return None


def _candidates(folder: Path) -> list[Path]:
    defaults = Settings.from_environment().directories()
    folders = defaults if folder in defaults else (folder,)
    return [path for each in folders for path in each.glob("*" + SUFFIX)]
