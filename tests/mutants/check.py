"""Holds the `_C` that is first on the path to the reference; raises AssertionError where it errs.

Run by test_mutants.py in a process of its own, without torch.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np

import cases
import transfer_cases
from dodoco_ext import _C, reference
from dodoco_ext.capture import Capture
from dodoco_ext.counters import MAX_OVER_MEAN_BOUNDS
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings


def check_ids() -> None:
    for row in cases.id_rows():
        if row["T"] > 4096 or (row["T"] == 4096 and row["E"] > 160):
            continue
        ids, num_valid = cases.make_ids(row)
        probe = cases.Probe.open((row["E"], row["k"]))
        probe.set_num_valid(num_valid)
        expected = reference.route_ids(ids, row["E"], num_valid)
        assert probe.record_ids(ids) == 0, row
        cases.assert_layer_is(probe.snapshot().layers[0], expected)
        cases.assert_record_is(probe.reader.records()[0], expected)
        probe.recorder.close()


def check_maps() -> None:
    for row in cases.map_rows():
        if row["T"] > 4096 or (row["T"] == 4096 and row["E"] > 160):
            continue
        routing_map, num_valid = cases.make_map(row)
        packed = row["form"] == "bits"
        probe = cases.Probe.open((row["E"], row["k"]))
        probe.set_num_valid(num_valid)
        expected = reference.route_map(routing_map, row["E"], row["k"], num_valid, packed=packed)
        assert probe.record_map(routing_map, packed=packed) == 0, row
        cases.assert_layer_is(probe.snapshot().layers[0], expected)
        cases.assert_record_is(probe.reader.records()[0], expected)
        probe.recorder.close()


def check_statistics() -> None:
    """Several passes of one recording: what the last one left behind would show in the next."""
    passes = [[0], [7], [5, 3], [9, 1, 0], [1, 0, 0, 0], [2, 2, 2, 2], [40, 1, 0, 7], [3, 3, 0]]
    probe = cases.Probe.open(*[(E, 1) for E in range(1, 5)])
    for counts in passes:
        E, total = len(counts), sum(counts)
        before = probe.snapshot()
        ids = np.repeat(np.arange(E), counts).reshape(-1, 1)
        wrong = np.array([[-1], [E]])
        assert probe.record_ids(np.concatenate([ids, wrong]), E - 1) == 0
        record = probe.reader.records()[-1]
        assert record["gini_numerator"] == sum(abs(a - b) for a, b in combinations(counts, 2))
        assert (record["max_count"], record["unused_experts"]) == (max(counts), counts.count(0))
        assert (record["padded"], record["invalid"], record["tokens"]) == (1, 1, total + 1)
        window = (probe.snapshot() - before).layers[E - 1]
        assert window.counts.tolist() == counts
        assert window.passes == window.recorded_passes == 1
        if total == 0:
            assert window.gini_histogram.sum() == 0
            continue
        size = (total + 1).bit_length() - 1
        gini_bin = min(int(record["gini_numerator"]) * 32 // (E * total), 31)
        max_bin = max(
            b for b, low in enumerate(MAX_OVER_MEAN_BOUNDS) if E * max(counts) >= low * total
        )
        assert window.gini_histogram[size, gini_bin] == 1
        assert window.max_over_mean_histogram[size, max_bin] == 1
    probe.recorder.close()


def check_passes() -> None:
    """Iterations, gates, recomputation, refusals."""
    ids = np.array([[0, 1]])
    probe = cases.Probe.open((4, 2), (4, 2))
    for layer in (0, 1, 1):
        assert probe.record_ids(ids, layer) == 0
    probe.recorder.lane.enabled = False
    assert probe.record_ids(ids, 0) == 1
    probe.recorder.lane.enabled = True
    assert probe.record_ids(ids, 1, recomputed=True) == 1
    assert probe.record_ids(ids, 0) == 0
    assert probe.record_ids(np.zeros((1, 5), np.int64), 1) < 0
    copied = probe.sites[0].copy()
    site, probe.sites[0] = probe.sites[0], copied
    assert probe.record_ids(ids, 0) < 0
    probe.sites[0] = site
    probe.recorder.lane.record_every = 4
    for _ in range(4):
        assert probe.record_ids(ids, 0) == 0
    assert probe.reader.records()["iteration"].tolist() == [0, 0, 1, 3, 4]
    first, second = probe.snapshot().layers
    assert (first.passes, second.passes, second.recomputed) == (6, 2, 1)
    assert first.assignments == int(first.counts.sum()) == 12
    assert not first.in_flight
    probe.recorder.close()


def check_ring() -> None:
    probe = cases.Probe.open((4, 1), max_bytes=48 << 10)
    slots = probe.reader.num_slots
    for number in range(2 * slots + 3):
        probe.record_ids(np.full((number, 1), 1, np.int16))
    records, _, lost = probe.reader.read()
    assert lost == slots + 3
    assert records["tokens"].tolist() == list(range(slots + 3, 2 * slots + 3))
    probe.recorder.close()


def check_wrap() -> None:
    """A ring whose epochs wrap from 2^32 - 1 to 1 loses nothing and invents nothing."""
    probe = cases.Probe.open((4, 2), max_bytes=40000)
    slots = probe.reader.num_slots
    start = ((1 << 32) - 3) * slots + 5
    image = probe.path.read_bytes()
    table = [struct.unpack_from("<IIQ", image, 248 + 40 * i) for i in range(64)]
    ring = next(offset for kind, _, offset in table if kind == 4)
    with probe.path.open("r+b") as file:
        file.seek(ring)
        file.write(struct.pack("<Q", start))
    cursor = probe.reader.cursor()
    assert cursor == (start,)
    assert len(probe.reader.records()) == 0  # never written, whatever the head says
    for passes in range(1, 4 * slots):
        assert probe.record_ids(np.zeros((passes, 1), np.int64)) == 0
        records, cursor, lost = probe.reader.read(cursor)
        assert (records["tokens"].tolist(), lost) == ([passes], 0)
    kept = probe.reader.records()["tokens"]
    assert kept.tolist() == list(range(3 * slots, 4 * slots))
    probe.recorder.close()


def check_transfers() -> None:
    """Transfers of every kind in a ring that laps, read now and then; a group of 40 has long records."""
    for ranks, max_bytes in ((3, 40000), (40, 80000)):
        settings = Settings(directory=Path(tempfile.mkdtemp()) / "r", max_bytes=max_bytes)
        recorder = transfer_cases.open_recorder(settings, ranks)
        capture, reader = Capture(recorder, advances=True), Reader(recorder.path)
        slots, cursor, moved = reader.num_slots, reader.cursor(), 0
        transfers = transfer_cases.of_every_kind(ranks, 3 * slots)
        for number, sent in enumerate(transfers, 1):
            iteration = transfer_cases.push(capture, sent)
            assert iteration == transfer_cases.iterations(transfers[:number])[-1]
            if number % 17 == 0 or number > 3 * slots - 5:
                found = reader.transfers(cursor)
                counts = 2 * ranks + found.records["num_experts"].astype(int)
                moved += found.lost + int((1 + -(-np.maximum(counts - 3, 0) // 15)).sum())
                cursor = found.next_cursor
                assert moved == cursor[0] == reader.cursor()[0]
            if number % 50 == 0:
                transfer_cases.assert_records_are(reader, transfers[:number])
                transfer_cases.assert_totals_are(reader, transfers[:number])
        found = reader.transfers()
        counts = 2 * ranks + found.records["num_experts"].astype(int)
        whole = int((1 + -(-np.maximum(counts - 3, 0) // 15)).sum())
        assert found.lost + whole == cursor[0]
        assert whole > slots - 13, "at most one record is cut"
        # Arrays whose halves would be other numbers.
        wide = np.arange(1, ranks + 1, dtype=np.int64)
        assert capture.push(0, 2, wide, wide, 0, 1) >= 0
        last = np.argmax(reader.transfers().records["sequence"])
        assert reader.transfers().sent[last].tolist() == wide.tolist()
        recorder.close()


def check_placements() -> None:
    """Placements of which the last three are kept, with the counts of both lanes; faults by reason."""
    path = Path(tempfile.mkdtemp()) / "placed.dodoco"
    writer = _C.RecordingWriter(
        str(path), '{"layers": [{"name": "a"}]}', [(4, 2)], num_lanes=2, max_bytes=1 << 18,
        num_slots=6, kept_placements=3,
    )  # fmt: skip
    sites = np.zeros((2, 8), np.uint64)
    for lane in range(2):
        writer.bind_site(sites[lane].ctypes.data, lane, 0)
    ids = np.array([[0, 1], [0, 3]])
    made = []
    for number in range(8):
        site = sites[number % 2].ctypes.data
        assert _C.route_ids(site, ids.ctypes.data, ids.itemsize, 2, 2, 2, 1, False) == 0
        slots = np.arange(number % 5 + 1, dtype=np.uint32) % 4 | np.uint32(number % 3 << 16)
        assert writer.record_placement([(0, 3, slots)]) == number
        counts = [2 * (number + 1), number + 1, 0, number + 1]
        made.append((number, slots.tolist(), counts))
        reader = _C.RecordingReader(str(path))
        found, lost = reader.placements(0)
        read = [(version, slots.tolist(), counts.tolist()) for version, *_, counts, slots in found]
        assert read == made[-3:]
        assert (lost, reader.placements_recorded()) == (max(number - 2, 0), number + 1)
    image = path.read_bytes()
    table = [struct.unpack_from("<IIQ", image, 248 + 40 * i) for i in range(64)]
    (section,) = [offset for kind, _, offset in table if kind == 5]
    (size,) = struct.unpack_from("<Q", image, section + 16)
    with path.open("r+b") as file:  # a word of the latest one is of the next lap
        file.seek(section + 128 + 7 % 3 * size + 9 * 8 + 4)
        file.write(struct.pack("<I", 7 // 3 + 2))
    assert [entry[0] for entry in _C.RecordingReader(str(path)).placements(0)[0]] == [5, 6]
    writer.add_fault(_C.Fault.BAD_SHAPE)
    writer.add_fault(_C.Fault.NO_LANE)
    faults = _C.RecordingReader(str(path)).header()["faults"]
    assert {number: count for number, count in enumerate(faults) if count} == {2: 1, 8: 1}
    writer.close()


if __name__ == "__main__":
    assert Path(_C.__file__).parent == Path(sys.argv[1]), "the mutant is not what was imported"
    for check in (
        check_passes, check_statistics, check_ring, check_wrap, check_transfers, check_placements, check_ids,
        check_maps,
    ):  # fmt: skip
        check()
    print("all equal")
