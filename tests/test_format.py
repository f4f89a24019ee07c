"""The format is what docs/recording-format.md says, to every reader of it, and stays readable."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import described
import transfer_cases
from dodoco_ext import _C
from dodoco_ext.recording import RECORD_DTYPE
from dodoco_ext.transfers import TRANSFER_DTYPE
from format_reader import FormatReader

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PACKAGE = str(Path(_C.__file__).parent.parent)
DOCUMENT = (ROOT / "docs" / "recording-format.md").read_text()
HEADER_FILE = (ROOT / "csrc" / "format.h").read_text()
GOLDEN = sorted((TESTS / "golden").glob("v*/*.dodoco"))


# --- golden recordings -------------------------------------------------------------------------


def test_every_version_has_its_golden_recordings() -> None:
    kinds = {"closed", "two-lanes-lapped", "dead", "epoch-wraps"}
    for version in range(1, _C.format_version + 1):
        assert kinds <= {path.stem for path in GOLDEN if path.parent.name == f"v{version}"}
    assert {path.stem for path in (TESTS / "golden").glob("v*/*.json")} == {p.stem for p in GOLDEN}


@pytest.mark.parametrize("read", [described.by_reader, described.by_format])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_golden_recording_reads_as_what_it_was(
    path: Path, read: Callable[[Path], described.Described]
) -> None:
    expected = json.loads(path.with_suffix(".json").read_text())
    found = read(path)
    for name in expected:
        assert found[name] == expected[name], name
    assert found.keys() == expected.keys()


# --- the reader that follows the document ------------------------------------------------------


class Writing:
    """A recording of any number of lanes and layers; passes go through the production path."""

    def __init__(
        self,
        path: Path,
        layers: list[tuple[int, int]],
        lanes: int,
        max_bytes: int,
        ranks: int = 0,
        num_slots: int = 0,
    ) -> None:
        self.path, self.layers, self.ranks, self.num_slots = path, layers, ranks, num_slots
        metadata: dict[str, object] = {
            "layers": [{"name": f"layers.{i}"} for i in range(len(layers))]
        }
        if ranks:
            metadata["group"] = {"ranks": [*range(ranks)], "index": 0, "name": "ep"}
        self.writer = _C.RecordingWriter(
            str(path),
            json.dumps(metadata),
            layers,
            num_lanes=lanes,
            max_bytes=max_bytes,
            group_size=ranks,
            num_slots=num_slots,
            kept_placements=3 if num_slots else 0,
        )
        self.sites = np.zeros((lanes, len(layers), 8), np.uint64)
        for lane, layer in np.ndindex(lanes, len(layers)):
            self.writer.bind_site(self.sites[lane, layer].ctypes.data, lane, layer)

    def record(self, rng: np.random.Generator) -> bool:
        """Records a pass or a transfer of any kind; whether it was counted."""
        lane, layer = (int(rng.integers(n)) for n in self.sites.shape[:2])
        if self.num_slots and rng.random() < 0.1:
            slots = rng.integers(0, self.layers[layer][0], rng.integers(self.num_slots + 1))
            slots |= rng.integers(0, 7, len(slots)) << 16
            slots[rng.random(len(slots)) < 0.1] = _C.EMPTY_SLOT
            version = self.writer.record_placement([(layer, 7, slots.astype(np.uint32))])
            assert version >= 0
            for each in range(len(self.sites)):
                self.writer.lane(each).map_version = version
        if self.ranks and rng.random() < 0.5:
            (sent,) = transfer_cases.of_every_kind(self.ranks, 1, int(rng.integers(1 << 30)))
            flags = sent.backward << 16 | sent.recompute << 17 | (not sent.timed) << 18
            iteration = _C.push_transfer(
                self.writer.lane(lane).address, sent.op | flags, layer, sent.iteration, 1,
                sent.begin_ns, sent.end_ns, sent.bytes_per_row, sent.send, sent.receive, sent.experts,
            )  # fmt: skip
            assert iteration >= 0
            return True
        E, k = self.layers[layer]
        T = int(rng.integers(0, 40))
        site = self.sites[lane, layer].ctypes.data
        self.writer.lane(lane).microbatch = int(rng.integers(1 << 16))
        if rng.random() < 0.3:
            chosen = rng.random((T, E)) < 0.5
            result = _C.route_map(site, chosen.ctypes.data, False, T, E, E, 1, False)
        else:
            dtype = rng.choice([np.int16, np.int32, np.int64])
            ids = rng.integers(-2, E + 1, (T, k)).astype(dtype)
            again = bool(rng.random() < 0.1)
            result = _C.route_ids(site, ids.ctypes.data, ids.itemsize, T, k, k, 1, again)
        assert result >= 0
        return result == 0

    def ring(self, lane: int) -> int:
        """Where the ring's header begins."""
        return FormatReader(self.path).places[4, lane][0]

    def patch(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)


CASES: dict[str, tuple[list[tuple[int, int]], int, int, int, int]] = {
    "one lane, one layer": ([(1, 1)], 1, 1 << 16, 0, 0),
    "no pass": ([(4, 2)], 2, 1 << 16, 0, 0),
    "lapped": ([(8, 2), (60, 4)], 1, 1 << 16, 0, 0),
    "lanes and layers": ([(4, 2), (9, 3), (160, 8)], 3, 1 << 19, 0, 0),
    "sixteen lanes, lapped": ([(2, 1), (384, 1)], 16, 1 << 20, 0, 0),
    "transfers, lapped": ([(8, 2), (60, 4)], 2, 1 << 17, 5, 0),
    "long transfers": ([(8, 2)], 1, 1 << 18, 70, 0),
    "placements": ([(8, 2), (60, 4)], 2, 1 << 17, 5, 16),
}


@pytest.mark.parametrize("wrap", [False, True], ids=["", "epoch-wraps"])
@pytest.mark.parametrize("name", CASES)
def test_two_readers_read_the_same(name: str, wrap: bool, tmp_path: Path) -> None:
    layers, lanes, max_bytes, ranks, num_slots = CASES[name]
    writing = Writing(tmp_path / "a.dodoco", layers, lanes, max_bytes, ranks, num_slots)
    slots = writing.writer.num_slots
    if wrap:
        for lane in range(lanes):
            head = (2**32 - 1) * slots - 1 - 7 * lane
            writing.patch(writing.ring(lane), struct.pack("<Q", head))
    passes = {"no pass": 0, "lapped": 3 * slots, "transfers, lapped": 4 * slots}.get(
        name, lanes * slots
    )
    rng = np.random.default_rng(passes)
    for number in range(passes):
        writing.record(rng)
        if number in (0, passes // 2):
            assert described.by_format(writing.path) == described.by_reader(writing.path)
    live = described.by_reader(writing.path)
    assert live["state"] == "live"
    assert described.by_format(writing.path) == live
    writing.writer.close()
    closed = described.by_reader(writing.path)
    assert closed["state"] == "closed"
    assert (len(closed["records"]) > 0) == (passes > 0)
    assert described.by_format(writing.path) == closed


KILLED = """
import os, signal, sys
import numpy as np
import test_format
writing = test_format.Writing(
    test_format.Path(sys.argv[1]), [(8, 2), (60, 4)], 2, 1 << 17, num_slots=70
)
rng = np.random.default_rng(5)
for _ in range(300):
    writing.record(rng)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_two_readers_read_the_same_of_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "dead.dodoco"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), PACKAGE])}
    child = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    dead = described.by_reader(path)
    assert dead["state"] == "dead"
    assert len(dead["records"]) > 0
    assert described.by_format(path) == dead


@pytest.mark.parametrize("closed", [False, True], ids=["live", "closed"])
@pytest.mark.parametrize(
    ("lap", "outcome"),
    [
        (-2, "never written"),
        (-1, "earlier"),
        (1, "later"),
        (2**31 - 3, "later"),
        (2**31, "earlier"),
    ],
)
def test_a_slot_of_another_lap(lap: int, outcome: str, closed: bool, tmp_path: Path) -> None:
    """A later one is lost at once; any other ends the reading, or is lost where nobody can write."""
    writing = Writing(tmp_path / "a.dodoco", [(4, 1)], 1, 1 << 16)
    slots = writing.writer.num_slots
    rng = np.random.default_rng(0)
    written = 0
    while written < 2 * slots:
        written += writing.record(rng)
    epoch = 0 if outcome == "never written" else (2 + lap - 1) % 0xFFFFFFFF + 1
    torn = writing.ring(0) + 128 + 5 * 128 + 7 * 8 + 4
    writing.patch(torn, struct.pack("<I", epoch))
    if closed:
        writing.writer.close()
    found = described.by_reader(writing.path)
    assert described.by_format(writing.path) == found
    if outcome == "later" or closed:
        assert (len(found["records"]), found["lost"]) == (slots - 1, slots + 1)
    else:
        assert (len(found["records"]), found["lost"]) == (5, slots)
        assert found["cursor"] == [slots + 5]


def test_the_reader_of_the_document_is_short_and_stands_alone() -> None:
    source = (TESTS / "format_reader.py").read_text()
    assert len(source.splitlines()) <= 110
    imports = re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE)
    assert set(imports) <= set(sys.stdlib_module_names)


# --- the document and csrc/format.h ------------------------------------------------------------

SIZES = {"u8": 1, "u32": 4, "u64": 8}


def constants() -> dict[str, int]:
    """`constexpr` numbers of the header file, by name."""
    found: dict[str, int] = {}
    for name, value in re.findall(r"constexpr std::uint\d+_t (k\w+) =\s+([^;]+);", HEADER_FILE):
        plain = re.sub(r"std::uint\d+_t\{(\d+)\}|\b(\d+)u\b", r"\1\2", value)
        found[name] = eval(plain, {}, found)
    return found


def enumerators(enum: str) -> dict[str, int]:
    body = re.search(rf"enum (?:class )?{enum} .*?{{(.*?)\n}};", HEADER_FILE, re.DOTALL)
    assert body is not None, enum
    return {name: int(value) for name, value in re.findall(r"(k\w+) = (\d+)", body[1])}


def fields(struct_name: str) -> list[tuple[int, str, str]]:
    """(offset, type, name) of a struct; none of ours needs padding, and the compiler checks that."""
    body = re.search(rf"struct {struct_name} {{(.*?)\n}};", HEADER_FILE, re.DOTALL)
    assert body is not None, struct_name
    found, offset = [], 0
    for kind, name, count in re.findall(
        r"^ *(?:std::)?(\w+)\s+(\w+)(?:\[(\w+)\])?;", body[1], re.MULTILINE
    ):
        bytes_ = 40 if kind == "Section" else SIZES["u" + kind[4:-2]]
        assert offset % min(bytes_, 8) == 0
        if count:
            number = int(count) if count.isdigit() else constants()[count]
            each = "40 bytes" if kind == "Section" else f"u{8 * bytes_}"
            kind = f"{number} bytes" if bytes_ == 1 else f"{number} x {each}"
            bytes_ *= number
        else:
            kind = f"u{8 * bytes_}"
        found.append((offset, kind, name))
        offset += bytes_
    return found


def rows(heading: str, column: str) -> list[list[str]]:
    """The cells of the table below a heading whose first column has this name."""
    text = DOCUMENT[DOCUMENT.index(heading) :]
    lines = text[text.index(f"| {column} |") :].splitlines()[2:]
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    assert table, heading
    return table


@pytest.mark.parametrize(
    ("heading", "struct_name"),
    [("## Header", "FileHeader"), ("## Sections", "Section"), ("### Layer table", "LayerEntry")],
)
def test_the_tables_of_fields_equal_the_header_file(heading: str, struct_name: str) -> None:
    documented = [(int(offset), kind, name) for offset, kind, name, _ in rows(heading, "offset")]
    assert documented == fields(struct_name)


@pytest.mark.parametrize(
    ("heading", "enum"),
    [
        ("## Board", "BoardWord"),
        ("## Ring", "RouteWord"),
        ("### Transfers", "TransferWord"),
        ("## Traffic", "TrafficWord"),
        ("## Placement", "PlacementWord"),
    ],
)
def test_the_tables_of_words_equal_the_header_file(heading: str, enum: str) -> None:
    table = {row[1]: int(row[0]) for row in rows(heading, "word") if row[1]}
    assert table == enumerators(enum)


def test_the_kinds_of_sections_equal_the_header_file() -> None:
    documented = [int(n) for row in rows("## Sections", "kind") for n in row[0].split(",")]
    assert documented == list(enumerators("SectionKind").values())


def test_the_numbers_of_the_document_equal_the_header_file() -> None:
    known = constants()
    said = " ".join(DOCUMENT.split())
    magic = known["kFileMagic"].to_bytes(8, "little")
    assert magic.hex(" ").upper() in said
    numbers = {
        "kFormatVersion": "Format version {}.",
        "kHeaderBytes": "`header_bytes` = {} bytes",
        "kMaxSections": "in use, at most {}",
        "kMaxLayers": "`num_layers` | 1 to {}",
        "kMaxLanes": "`num_lanes` | 1 to {}",
        "kMaxExperts": "| E, 1 to {}",
        "kSectionAlignment": "a multiple of {}",
        "kSizeClasses": "Two histograms follow, {} x 32",
        "kGiniBins": "follow, 20 x {}",
        "kMaxMeanBins": "follow, 20 x {}",
        "kSlotWords": "of 128 bytes: {} words",
        "kMaxRanks": "`num_ranks` is 1 to {}",
        "kCountsInFirstSlot": "1 slot where n is at most {}",
        "kCountsInNextSlots": "else 1 + (n - 3) / {} of them",
        "kMaxRecordSlots": "rounded up, at most {}",
        "kMaxSlots": "`num_slots` is 1 to {}",
        "kMaxKept": "`kept` is 2 to {}",
        "kFaultCounters": "{} x u64 | `faults`",
    }
    for name, sentence in numbers.items():
        assert sentence.format(known[name]) in said, name
    assert known["kMaxFileBytes"] == 4 << 30
    assert "at most 4 GiB" in said
    assert known["kMaxMetadataBytes"] == 16 << 20
    assert "a metadata section of at most 16 MiB" in said
    assert known["kEpochs"] == 2**32 - 1
    assert "mod (2^32 - 1) + 1" in said
    histograms = known["kSizeClasses"] * (known["kGiniBins"] + known["kMaxMeanBins"])
    assert f"16 + (E rounded up to a multiple of 8) + {histograms} words" in said
    bounds = re.search(r"kMaxMeanEighths\[\w+\] = \{([^}]*)\}", HEADER_FILE)
    assert bounds is not None
    assert f"in eighths, {' '.join(re.findall(r'[0-9]+', bounds[1]))}." in said
    (meaning,) = [row[3] for row in rows("## Header", "offset") if row[2] == "last_fault"]
    faults = re.findall(r"(\d+) \w+", meaning)
    assert [int(number) for number in faults] == list(enumerators("Fault").values())


def test_every_state_of_a_file_is_documented() -> None:
    table = {name for row in rows("## What a file can be", "name") for name in row[0].split(", ")}
    named = set(
        re.findall(r'return "(\w+)";', (ROOT / "csrc" / "recording_reader.cpp").read_text())
    )
    assert named >= {"creating", "unfinished", "damaged"}
    assert table == named | {"live", "closed", "dead"}


@pytest.mark.parametrize(
    ("dtype", "struct_name"),
    [(RECORD_DTYPE, "RouteRecord"), (TRANSFER_DTYPE, "TransferRecord")],
    ids=["route", "transfer"],
)
def test_the_dtype_of_records_equals_the_header_file(
    dtype: np.dtype[np.void], struct_name: str
) -> None:
    """What a dtype mirrors has the order and the widths that C++ writes."""
    source = (ROOT / "csrc" / "recording_reader.h").read_text()
    body = re.search(rf"struct {struct_name} {{(.*?)\n}};", source, re.DOTALL)
    assert body is not None
    members = [
        (name, int(bits))
        for bits, names in re.findall(r"std::uint(\d+)_t ([\w, ]+);", body[1])
        for name in names.split(", ")
    ]
    assert members == [(name, dtype[name].itemsize * 8) for name in dtype.names or ()]
