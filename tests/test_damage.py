"""What is no recording, or no longer a whole one, is refused in one line and never a crash."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import cases
from dodoco_ext import _C
from dodoco_ext.errors import RecordingError
from dodoco_ext.recording import RECORD_DTYPE, Reader

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


def with_layer(entry: int, field: int, value: int) -> Callable[[Path], None]:
    """Changes one field of an entry of the layer table: 8 board offset, 16 bytes of the block."""
    return lambda path: patched(
        path, section(path, 2)[1] + 32 * entry + field, struct.pack("<Q", value)
    )


# What is done to a recording, what the refusal says, and as what state.
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "empty": (lambda path: path.write_bytes(b""), "never finished", "unfinished"),
    "zeros": (lambda path: path.write_bytes(bytes(8192)), "never finished", "unfinished"),
    "creating": (lambda path: patched(path, 24, bytes(4)), "never finished", "unfinished"),
    "text": (lambda path: path.write_text("hello\n" * 2000), "not a DODOCO", "foreign"),
    "a word": (lambda path: path.write_text("hi"), "not a DODOCO", "foreign"),
    "magic": (lambda path: patched(path, 0, b"X"), "not a DODOCO", "foreign"),
    "version": (lambda path: patched(path, 8, b"\2\0\0\0"), "version 2.*matching", "version"),
    "short": (lambda path: os.truncate(path, 4095), "4095 bytes, too short", "truncated"),
    "truncated": (
        lambda path: os.truncate(path, path.stat().st_size - 1),
        "is truncated",
        "truncated",
    ),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), "is truncated", "truncated"),
} | {
    name: (change, complaint, "damaged")
    for name, (change, complaint) in {
        "state": (lambda path: patched(path, 24, b"\7"), "unknown state 7"),
        "header": (lambda path: patched(path, 12, b"\1"), "impossible header"),
        "sections": (lambda path: patched(path, 28, b"\xff\xff"), "impossible header"),
        "above 4 GiB": (lambda path: patched(path, 16, b"\1\0\0\0\1"), "impossible header"),
        "layers": (lambda path: patched(path, 68, bytes(4)), "number of lanes or layers"),
        "lanes": (lambda path: patched(path, 72, b"\x11"), "number of lanes or layers"),
        "offset": (with_section(3, 8, 1 << 40), "lies outside the file"),
        "overflow": (with_section(3, 8, (1 << 64) - 64), "lies outside the file"),
        "size": (with_section(4, 16, 1 << 40), "lies outside the file"),
        "misaligned": (with_section(4, 8, 4097), "lies outside the file"),
        "in the header": (with_section(4, 8, 64), "lies outside the file"),
        "one section in another": (with_section(3, 8, 4096), "sections overlap"),
        "ring count": (with_section(4, 24, 3), "impossible ring"),
        "ring size": (with_section(4, 24, 1 << 40), "impossible ring"),
        "no slots": (with_section(4, 24, 0), "impossible ring"),
        "layer count": (with_section(2, 24, 2), "impossible layer table"),
        "board's lane": (
            lambda path: patched(path, section(path, 3)[0] + 4, b"\1"),
            "board of an unknown lane",
        ),
        "ring's lane": (
            lambda path: patched(path, section(path, 4)[0] + 4, b"\1"),
            "impossible ring",
        ),
        "no board": (
            lambda path: patched(path, section(path, 3)[0], b"\x63"),
            "no board or no ring",
        ),
        "no metadata": (
            lambda path: patched(path, section(path, 1)[0], b"\x63"),
            "section is missing",
        ),
        "layer": (lambda path: patched(path, section(path, 2)[1], bytes(4)), "impossible layer"),
        "shared block": (with_layer(1, 8, 0), "impossible layer"),
        "overlapping": (with_layer(1, 8, 10432 - 8), "impossible layer"),
        "block outside": (with_layer(2, 8, 1 << 63), "impossible layer"),
        "endless block": (with_layer(2, 16, (1 << 64) - 8), "impossible layer"),
        "small block": (with_layer(2, 16, 64), "impossible layer"),
        "json": (with_metadata(b"{"), "unreadable metadata"),
        "utf-8": (with_metadata(b"\xff\xfe"), "unreadable metadata"),
        "no object": (with_metadata(b"3"), "unreadable metadata"),
        "no layers": (with_metadata(b"{}"), "unreadable metadata"),
        "no names": (with_metadata(b'{"layers": [1]}'), "unreadable metadata"),
        "layers is a name": (with_metadata(b'{"layers": "abc"}'), "unreadable metadata"),
        "layers is a number": (with_metadata(b'{"layers": 3}'), "unreadable metadata"),
        "fewer layers": (with_metadata(b'{"layers": []}'), "layer table disagree"),
        "deep json": (with_metadata(b"[" * 20000), "unreadable metadata"),
        "long number": (with_metadata(b"1" * 20000), "unreadable metadata"),
        "long float": (with_metadata(b"1e" + b"9" * 19000), "unreadable metadata"),
        "nan": (with_metadata(b"NaN"), "unreadable metadata"),
    }.items()
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
    change, complaint, state = DAMAGES[damage]
    change(whole)
    with pytest.raises(RecordingError, match=complaint) as caught:
        Reader(whole)
    assert "\n" not in str(caught.value)
    assert str(whole) in str(caught.value)
    assert caught.value.state == state


def test_what_its_creator_still_holds_is_being_created(tmp_path: Path) -> None:
    path = tmp_path / "new.dodoco"
    for content in (b"", bytes(8192)):
        path.write_bytes(content)
        with path.open("rb") as creator:
            fcntl.flock(creator, fcntl.LOCK_EX)
            with pytest.raises(RecordingError, match="still being created: try again") as caught:
                Reader(path)
            assert caught.value.state == "creating"
        with pytest.raises(RecordingError, match="never finished") as caught:
            Reader(path)
        assert caught.value.state == "unfinished"


def test_other_things_than_files_are_refused_in_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    states = {"missing": "missing", "fifo": "foreign", "link": "foreign", "": "foreign"}
    for name, state in states.items():
        with pytest.raises(RecordingError) as caught:
            Reader(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert caught.value.state == state
    with pytest.raises(RecordingError):
        Reader("/dev/null")


METADATA = {
    "empty names": [{"name": ""}] * 3,
    "no strings": [{"name": 3}, {"name": None}, {"name": [{}]}],
    "control": [{"name": "\0\n\x1b[31m"}, {"name": "\u202e"}, {"name": "\ud800"}],
    "long": [{"name": "x" * 5000}] * 3,
    "more": [{"name": "a", "num_experts": -1, "top_k": "two", "": {}}] * 3,
}


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("name", METADATA)
def test_odd_metadata_stops_no_reader(name: str, ascii_only: bool, whole: Path) -> None:
    odd = {"layers": METADATA[name], "labels": 7, "uncovered": None, "lanes": {}, "run": []}
    text = json.dumps(odd, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    with_metadata(text)(whole)
    assert [layer.passes for layer in Reader(whole).snapshot().layers] == [0, 0, 0]


def damaged(image: bytes, rng: np.random.Generator) -> bytearray:
    """The image with a few changes: bytes, fields of header and tables, stretches, its length."""
    bytes_ = bytearray(image)
    sections = [struct.unpack_from("<IIQQQQ", image, SECTIONS + 40 * i) for i in range(6)]
    for _ in range(rng.integers(1, 4)):
        kind, value = rng.integers(6), int(rng.integers(0, 1 << 64, dtype=np.uint64))
        value = [value, value >> int(rng.integers(64)), 0, (1 << 64) - 1][rng.integers(4)]
        if kind == 0:
            at = int(rng.integers(len(image)))
        elif kind == 1:
            at = 4 * int(rng.integers(26))
        elif kind == 2:
            at = SECTIONS + 4 * int(rng.integers(60))
        else:
            # The beginning of a section: the JSON, a layer, a counter, a head or a slot.
            at = sections[rng.integers(len(sections))][2] + 4 * int(rng.integers(64))
        size = int(rng.choice([1, 4, 8]))
        if at + size <= len(image):
            bytes_[at : at + size] = struct.pack("<Q", value)[:size]
    if rng.random() < 0.1:
        del bytes_[int(rng.integers(len(image))) :]
    return bytes_


def test_random_damage_is_data_or_an_error(tmp_path: Path) -> None:
    """Through Python, 2000 of them; tests/cpp/recording_damage.cpp does ten thousands."""
    seed = 20261124
    rng = np.random.default_rng(seed)
    image = (Path(__file__).parent / "golden" / "v1" / "two-lanes-lapped.dodoco").read_bytes()
    path = tmp_path / "damaged.dodoco"
    read, refusals = 0, []
    for number in range(2000):
        path.write_bytes(damaged(image, rng))
        start = time.monotonic()
        try:
            reader = Reader(path)
            assert len(reader.snapshot().to_rows()) == len(reader.snapshot().layers)
            assert reader.state in ("live", "closed", "dead")
            records, cursor, _ = reader.read()
            assert records.dtype == RECORD_DTYPE
            reader.read(cursor)
            reader.read(tuple(int(n) for n in rng.integers(0, 1 << 63, len(cursor))))
            read += 1
        except RecordingError as error:
            refusals.append(error)
        assert time.monotonic() - start < 10, f"damage {number} of seed {seed} takes for ever"
    assert min(read, len(refusals)) > 200
    for error in refusals:
        assert error.state
        assert "\n" not in str(error)


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
