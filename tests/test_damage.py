"""What is no recording, or no longer a whole one, is refused in one line and never a crash."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import cases
from dodoco_ext import _C
from dodoco_ext.errors import RecordingError
from dodoco_ext.recording import Reader

IDS = np.array([[0, 1], [1, 2], [-1, 9]])


@pytest.fixture
def probe() -> Iterator[cases.Probe]:
    """An open recording of two layers."""
    opened = cases.Probe.open((4, 2), (8, 2))
    yield opened
    opened.recorder.close()


SECTIONS = 248  # offset of the section table in the header; 40 bytes an entry


def patched(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def section(path: Path, kind: int) -> tuple[int, int, int]:
    """(offset of the entry, offset of the section, bytes) of the first section of a kind."""
    image = path.read_bytes()
    for entry in range(SECTIONS, SECTIONS + 64 * 40, 40):
        found, _, offset, size = struct.unpack_from("<IIQQ", image, entry)
        if found == kind:
            return entry, offset, size
    raise AssertionError(f"no section of kind {kind}")


def with_metadata(text: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        _, offset, size = section(path, 1)
        assert len(text) <= size
        patched(path, offset, text.ljust(size))

    return change


def with_section(kind: int, field: int, value: int) -> Callable[[Path], None]:
    """Changes one field of a section: 8 offset, 16 bytes, 24 count."""
    return lambda path: patched(path, section(path, kind)[0] + field, struct.pack("<Q", value))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "0 bytes long, too short"),
    "short": (lambda path: os.truncate(path, 4095), "4095 bytes long, too short"),
    "text": (lambda path: path.write_text("hello\n" * 2000), "not a DODOCO recording"),
    "zeros": (lambda path: path.write_bytes(bytes(8192)), "still being created"),
    "magic": (lambda path: patched(path, 0, b"X"), "not a DODOCO recording"),
    "version": (lambda path: patched(path, 8, b"\2\0\0\0"), "version 2.*matching dodoco-ext"),
    "creating": (lambda path: patched(path, 24, bytes(4)), "still being created"),
    "state": (lambda path: patched(path, 24, b"\7"), "unknown state 7"),
    "header": (lambda path: patched(path, 12, b"\1"), "impossible header"),
    "sections": (lambda path: patched(path, 28, b"\xff\xff"), "impossible header"),
    "layers": (lambda path: patched(path, 68, bytes(4)), "number of lanes or layers"),
    "lanes": (lambda path: patched(path, 72, b"\x11"), "number of lanes or layers"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "is truncated"),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), "is truncated"),
    "offset": (with_section(3, 8, 1 << 40), "lies outside the file"),
    "overflow": (with_section(3, 8, (1 << 64) - 64), "lies outside the file"),
    "size": (with_section(4, 16, 1 << 40), "lies outside the file"),
    "misaligned": (with_section(4, 8, 4097), "lies outside the file"),
    "ring count": (with_section(4, 24, 3), "impossible ring"),
    "ring size": (with_section(4, 24, 1 << 40), "impossible ring"),
    "no slots": (with_section(4, 24, 0), "impossible ring"),
    "layer count": (with_section(2, 24, 2), "impossible layer table"),
    "no board": (lambda path: patched(path, section(path, 3)[0], b"\x63"), "no board or no ring"),
    "no metadata": (lambda path: patched(path, section(path, 1)[0], b"\x63"), "section is missing"),
    "layer": (lambda path: patched(path, section(path, 2)[1], bytes(4)), "impossible layer"),
    "json": (with_metadata(b"{"), "unreadable metadata"),
    "utf-8": (with_metadata(b"\xff\xfe"), "unreadable metadata"),
    "no object": (with_metadata(b"3"), "unreadable metadata"),
    "no layers": (with_metadata(b"{}"), "unreadable metadata"),
    "no names": (with_metadata(b'{"layers": [1]}'), "unreadable metadata"),
    "fewer layers": (with_metadata(b'{"layers": []}'), "layer table disagree"),
    "deep json": (with_metadata(b"[" * 20000), "unreadable metadata"),
}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A closed recording that can be read, with room for long metadata."""
    path = tmp_path / "whole.dodoco"
    metadata = '{"layers": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}'.ljust(20000)
    writer = _C.RecordingWriter(str(path), metadata, [(4, 2), (4, 2), (4, 2)], max_bytes=1 << 18)
    writer.close()
    assert Reader(path).state == "closed"
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_recording_is_refused_in_one_line(damage: str, whole: Path) -> None:
    change, complaint = DAMAGES[damage]
    change(whole)
    with pytest.raises(RecordingError, match=complaint) as caught:
        Reader(whole)
    assert "\n" not in str(caught.value)
    assert str(whole) in str(caught.value)


def test_other_things_than_files_are_refused_in_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("missing", "fifo", "link", ""):
        with pytest.raises(RecordingError) as caught:
            Reader(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(RecordingError):
        Reader("/dev/null")


LOOKS: dict[str, Callable[[Reader], object]] = {
    "snapshot": lambda reader: reader.snapshot(),
    "records": lambda reader: reader.records(),
    "cursor": lambda reader: reader.cursor(),
    "header": lambda reader: reader.header,
    "state": lambda reader: reader.state,
}


@pytest.mark.parametrize("left", [0, 4096])
@pytest.mark.parametrize("look", LOOKS)
def test_truncation_while_open_is_an_error_and_no_crash(look: str, left: int, whole: Path) -> None:
    """Looking at a page that is gone would end the process with SIGBUS."""
    reader = Reader(whole)
    os.truncate(whole, left)
    with pytest.raises(RecordingError, match="truncated while it was open"):
        LOOKS[look](reader)


def test_a_longer_file_is_still_a_recording(whole: Path) -> None:
    with whole.open("ab") as file:
        file.write(b"more")
    assert len(Reader(whole).snapshot().layers) == 3


def test_unknown_sections_and_record_types_are_skipped(probe: cases.Probe) -> None:
    """What a later writer adds does not stop this reader."""
    for _ in range(3):
        probe.record_ids(IDS)
    _, ring, _ = section(probe.path, 4)
    second = ring + 128 + 128
    (word,) = struct.unpack_from("<I", probe.path.read_bytes(), second)
    patched(probe.path, second, struct.pack("<I", word & ~0xFF | 2))
    records, cursor, lost = probe.reader.read()
    assert len(records) == 2
    assert (cursor, lost) == ((3,), 0)


def test_an_inconsistent_board_is_marked_in_flight(probe: cases.Probe) -> None:
    probe.record_ids(IDS)
    _, board, _ = section(probe.path, 3)
    patched(probe.path, board + 16 * 8, struct.pack("<Q", 1000))
    first, second = probe.snapshot().layers
    assert first.in_flight
    assert not second.in_flight
    assert first.counts[0] == 1000
