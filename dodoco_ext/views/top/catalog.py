"""The recordings that there are: looked for again and again, opened once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dodoco_ext.errors import RecordingError
from dodoco_ext.fleet import run_of
from dodoco_ext.recording import Reader
from dodoco_ext.settings import SUFFIX, Settings
from dodoco_ext.sources import files_in


@dataclass(frozen=True)
class Entry:
    """A readable recording.

    Attributes:
        reader: Its reader; keeps the file open, also when it is removed.
        run: The run it belongs to.
        rank: Its rank.
        pid: The process that records, or did.
        created_ns: When it began, Unix ns.
    """

    reader: Reader
    run: str
    rank: int
    pid: int
    created_ns: int

    @property
    def state(self) -> str:
        """`live`, `closed`, `dead`, or why it cannot be read any more."""
        try:
            return self.reader.state
        except RecordingError as error:
            return error.state


class Catalog:
    """Finds recordings in the folders of a SOURCE.

    Args:
        source: A folder, a file, a PID, the name of a recording or of a run; None: all of this user.

    Attributes:
        entries: The recordings that SOURCE means or belong to the same folders, latest first.
        problems: Why files cannot be read, by path; those still being created are not among them.
    """

    def __init__(self, source: str | None = None) -> None:
        self.source = source
        self.entries: tuple[Entry, ...] = ()
        self.problems: dict[Path, str] = {}
        self._held: dict[Path, tuple[int, Entry]] = {}
        self._refused: dict[Path, tuple[int, ...]] = {}

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where is looked."""
        if self.source is not None and Path(self.source).is_dir():
            return (Path(self.source),)
        if self.source is not None and _is_path(self.source):
            return (Path(self.source).parent,)
        return Settings.from_environment().reading_directories()

    def look(self) -> None:
        """Looks at the folders; a file is opened when it is new, or has changed since it was refused."""
        there: set[Path] = set()
        for folder in self.folders:
            try:
                paths = files_in(folder)
            except RecordingError as error:
                self.problems[folder] = str(error)
                continue
            self.problems.pop(folder, None)
            for path in paths:
                if self._take(path):
                    there.add(path)
        self._held = {path: held for path, held in self._held.items() if path in there}
        self._refused = {path: was for path, was in self._refused.items() if path in there}
        folders = set(self.folders)
        self.problems = {p: why for p, why in self.problems.items() if p in there or p in folders}
        entries = [entry for _, entry in self._held.values()]
        self.entries = tuple(sorted(entries, key=lambda e: (-e.created_ns, e.rank)))

    def meant(self) -> tuple[Entry, ...]:
        """The entries that SOURCE names, latest first: one recording, or those of one or more runs."""
        text = self.source
        if text is None or Path(text).is_dir():
            return self.entries
        if _is_path(text):
            path = Path(text).resolve()
            return tuple(e for e in self.entries if e.reader.path.resolve() == path)
        if text.isdecimal():
            of_process = [e for e in self.entries if e.pid == int(text)]
            if of_process:
                return (of_process[0],)
        named = [e for e in self.entries if e.reader.path.name == text or e.run == text]
        return tuple(named)

    @property
    def means_one(self) -> bool:
        """Whether SOURCE means a single recording."""
        text = self.source
        if text is None or Path(text).is_dir():
            return False
        if _is_path(text) or text.endswith(SUFFIX):
            return True
        return text.isdecimal() and all(entry.run != text for entry in self.meant())

    def _take(self, path: Path) -> bool:
        try:
            status = path.lstat()
        except OSError:  # pruned between the listing and the look
            return False
        held = self._held.get(path)
        if held is not None and held[0] == status.st_ino:
            return True
        self._held.pop(path, None)
        was = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._refused.get(path) == was:
            return True
        try:
            entry = _entry(Reader(path))
        except RecordingError as error:
            # While it is created, it may become readable without a trace in its status.
            if error.state not in ("creating", "missing"):
                self._refused[path] = was
                self.problems[path] = str(error)
            return True
        self.problems.pop(path, None)
        self._refused.pop(path, None)
        self._held[path] = (status.st_ino, entry)
        return True


def _entry(reader: Reader) -> Entry:
    header = reader.header
    return Entry(
        reader,
        run_of(reader),
        int(header["rank"]),
        int(header["owner_pid"]),
        int(header["created_unix_ns"]),
    )


def _is_path(text: str) -> bool:
    return os.sep in text or Path(text).is_file()


def runs(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Entries by run, in the order given."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.run, []).append(entry)
    return found
