"""Makes the golden recordings of the present format version: .venv/bin/python tests/golden/make.py

Run it when a format version is new, never to make a failing test pass: a recording that was made once
must be read for ever, and as what it was. Ids, times and PIDs differ from run to run; what is read is
stored next to each recording, checked against the passes that were recorded.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import cases  # noqa: E402
import described  # noqa: E402
import transfer_cases  # noqa: E402
from dodoco_ext import _C, reference  # noqa: E402
from dodoco_ext.recording import Reader  # noqa: E402

LAYERS = [(4, 2), (9, 3)]
SLOTS = 64
FOLDER = HERE / f"v{_C.format_version}"


@dataclass
class Pass:
    """One pass to record: ids [T, k], or a routing map as bytes or as bits."""

    layer: int
    values: cases.Array
    form: str = "ids"
    lane: int = 0
    recomputed: bool = False
    microbatch: int = 0

    def record(self, writer: _C.RecordingWriter, site: cases.Array) -> None:
        writer.lane(self.lane).microbatch = self.microbatch
        address, data, shape = site.ctypes.data, self.values.ctypes.data, self.values.shape
        if self.form == "ids":
            size = self.values.itemsize
            strides = [stride // size for stride in self.values.strides]
            result = _C.route_ids(address, data, size, *shape, *strides, self.recomputed)
        else:
            packed = self.form == "bits"
            strides = list(self.values.strides)
            result = _C.route_map(address, data, packed, *shape, *strides, self.recomputed)
        assert result == int(self.recomputed)

    def expected(self) -> reference.ReferencePass:
        E, k = LAYERS[self.layer]
        if self.form == "ids":
            return reference.route_ids(self.values, E)
        return reference.route_map(self.values, E, k, packed=self.form == "bits")


def record(
    name: str, passes: list[Pass], *, lanes: int = 1, head: int = 0, kill: bool = False
) -> Path:
    """Records passes in a process of its own, which then closes the recording or is killed."""
    path = FOLDER / f"{name}.dodoco"
    path.unlink(missing_ok=True)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert status == (signal.SIGKILL if kill else 0), f"{name}: {status}"
        return path
    names = [f"layers.{i}.router" for i in range(len(LAYERS))]
    metadata = {
        "run": "golden",
        "lanes": ["host", *(f"host {lane}" for lane in range(1, lanes))],
        "layers": [
            {"name": name, "num_experts": E, "top_k": k}
            for name, (E, k) in zip(names, LAYERS, strict=True)
        ],
        "uncovered": [{"name": "layers.2", "reason": "a dense layer"}],
        "labels": {"model_name": "größer"},
    }
    writer = _C.RecordingWriter(
        str(path),
        json.dumps(metadata, ensure_ascii=False),
        LAYERS,
        num_lanes=lanes,
        max_bytes=(8 + 31 * lanes) << 10,
        rank=3,
        world_size=8,
    )
    assert writer.num_slots == SLOTS
    if head:
        patch(path, section(path, 4), head)
    sites = np.zeros((lanes, len(LAYERS), 8), np.uint64)
    for lane, layer in np.ndindex(lanes, len(LAYERS)):
        writer.bind_site(sites[lane, layer].ctypes.data, lane, layer)
    for one in passes:
        one.record(writer, sites[one.lane, one.layer])
    writer.add_fault(_C.Fault.BAD_SHAPE)
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    writer.close()
    os._exit(0)


def section(path: Path, kind: int) -> int:
    """Where the first section of a kind begins."""
    table = path.read_bytes()[248:2808]
    return next(s[2] for s in struct.iter_unpack("<IIQQQQ", table) if s[0] == kind)


def patch(path: Path, offset: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<Q", value))


def describe(path: Path, passes: list[Pass]) -> described.Described:
    """Reads the recording, holds it to its passes, and stores what was read."""
    path.chmod(0o644)
    found = described.by_reader(path)
    for index, layer in enumerate(found["layers"]):
        ours = [one.expected() for one in passes if one.layer == index and not one.recomputed]
        assert layer["passes"] == len(ours)
        for name in cases.COUNTERS:
            assert layer[name] == sum(getattr(one, name) for one in ours), name
        if not layer["in_flight"]:
            assert layer["counts"] == sum(one.counts for one in ours).tolist()
    for lane in range(found["header"]["num_lanes"]):
        kept = [row for row in found["records"] if row[described.RECORD.index("lane")] == lane]
        ours = [one for one in passes if one.lane == lane and not one.recomputed]
        assert len(kept) == min(len(ours), SLOTS)
        for row, one in zip(kept, ours[-len(kept) :], strict=True):
            read = dict(zip(described.RECORD, row, strict=True))
            assert (read["layer"], read["microbatch"]) == (one.layer, one.microbatch)
            for name in cases.COUNTERS + cases.STATISTICS:
                assert read[name] == getattr(one.expected(), name), name
    text = json.dumps({**found, "records": None}, indent=1, ensure_ascii=False)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in found["records"])
    text = text.replace('"records": null', f'"records": [\n{rows}\n ]')
    path.with_suffix(".json").write_text(text + "\n")
    print(f"{path.name}: {path.stat().st_size} bytes, {found['state']}, {len(passes)} passes")
    return found


def of_every_kind() -> None:
    rng = np.random.default_rng(1)
    passes = []
    for number, dtype in enumerate((np.int16, np.int32, np.int64)):
        for layer, (E, k) in enumerate(LAYERS):
            ids = rng.integers(0, E, (5 + 20 * number, k)).astype(dtype)
            ids[0, 0], ids[1, 1], ids[2] = E, -2, -1
            passes.append(Pass(layer, ids, microbatch=number))
            passes.append(Pass(layer, ids, recomputed=True))
    for form in ("bytes", "bits"):
        for layer, (E, k) in enumerate(LAYERS):
            chosen = np.argsort(rng.random((6, E)), axis=1) < k
            chosen[0, np.argmax(chosen[0])] = False  # dropped for capacity
            values = np.packbits(chosen, axis=1, bitorder="little") if form == "bits" else chosen
            passes.append(Pass(layer, values, form))
    passes.append(Pass(0, np.full((3, 2), -1)))
    passes.append(Pass(1, np.zeros((0, 3), np.int32)))
    describe(record("closed", passes), passes)


def two_lanes() -> None:
    """Lanes that do not take turns evenly, and lap: one several times."""
    passes = []
    for number in range(3 * SLOTS):
        lane = int(number % 3 == 0)
        passes.append(Pass(0, np.full((1 + number % 7, 2), number % 4), lane=lane))
        if number % 2 == 0:
            ids = np.arange(3 * (number % 5)).reshape(-1, 3) % 9
            passes.append(Pass(1, ids, lane=lane, microbatch=lane))
    found = describe(record("two-lanes-lapped", passes, lanes=2), passes)
    assert found["lost"] == len(passes) - 2 * SLOTS


def killed() -> None:
    """The owner is killed; the board is then as if it had happened in the middle of a pass."""
    passes = [Pass(n % 2, np.full((1 + n, 2 + n % 2), n % 4)) for n in range(20)]
    path = record("dead", passes, kill=True)
    board = section(path, 3)
    patch(path, board + 8 * 9, 11)  # passes started; 10 have ended
    patch(path, board + 8 * 16, sum(int(one.expected().counts[0]) for one in passes[::2]) + 3)
    found = describe(path, passes)
    assert found["state"] == "dead"
    assert [layer["in_flight"] for layer in found["layers"]] == [True, False]


def wrapped_epoch() -> None:
    """The first ten records have the last epoch, the others the first."""
    passes = [Pass(n % 2, np.full((1 + n, 2 + n % 2), n % 4)) for n in range(30)]
    head = (2**32 - 1) * SLOTS - 10
    found = describe(record("epoch-wraps", passes, head=head), passes)
    assert (found["lost"], found["cursor"]) == (head, [head + 30])


def with_transfers() -> None:
    """Transfers of every kind between 9 ranks, and passes between them, in a ring that laps."""
    path = FOLDER / "transfers.dodoco"
    path.unlink(missing_ok=True)
    metadata = {
        "run": "golden",
        "lanes": ["host", "host 1"],
        "layers": [{"name": f"layers.{i}", "num_experts": E} for i, (E, _) in enumerate(LAYERS)],
        "group": {"ranks": [*range(3, 12)], "index": 2, "name": "ep"},
    }
    writer = _C.RecordingWriter(
        str(path), json.dumps(metadata), LAYERS, num_lanes=2, max_bytes=72 << 10,
        rank=5, world_size=16, group_size=9, group_index=2,
    )  # fmt: skip
    site = np.zeros(8, np.uint64)
    writer.bind_site(site.ctypes.data, 0, 0)
    transfers = transfer_cases.of_every_kind(9, 90)
    for number, sent in enumerate(transfers):
        flags = sent.backward << 16 | sent.recompute << 17 | (not sent.timed) << 18
        flags |= (sent.unit == "token") << 19
        result = _C.push_transfer(
            writer.lane(number % 2).address, sent.op | flags, sent.layer, sent.iteration, 1,
            sent.begin_ns, sent.end_ns, sent.bytes_per_row, sent.send, sent.receive, sent.experts,
        )  # fmt: skip
        assert result >= 0
        if number % 5 == 0:
            Pass(0, np.full((3, 2), 1)).record(writer, site)
    writer.close()
    path.chmod(0o644)
    transfer_cases.assert_totals_are(Reader(path), transfers)
    found = described.by_reader(path)
    assert 40 < len(found["transfers"]) < 90
    assert found == described.by_format(path)
    path.with_suffix(".json").write_text(json.dumps(found) + "\n")


def with_placements() -> None:
    """Where experts lie, changed more often than is kept, between passes."""
    path = FOLDER / "placements.dodoco"
    path.unlink(missing_ok=True)
    names = [{"name": f"layers.{i}", "num_experts": E} for i, (E, _) in enumerate(LAYERS)]
    writer = _C.RecordingWriter(
        str(path), json.dumps({"layers": names, "run": "golden"}), LAYERS, max_bytes=48 << 10,
        num_slots=12, kept_placements=3,
    )  # fmt: skip
    site = np.zeros(8, np.uint64)
    writer.bind_site(site.ctypes.data, 0, 0)
    rng = np.random.default_rng(7)
    for number in range(8):
        changed = [0, 1] if number == 0 else [number % 4 // 3]
        maps = []
        for layer in changed:
            slots = rng.integers(0, LAYERS[layer][0], 12 - number % 3)
            slots |= rng.integers(0, 4, len(slots)) << 16
            slots[number] = _C.EMPTY_SLOT
            maps.append((layer, 4, slots.astype(np.uint32)))
        writer.lane(0).map_version = writer.record_placement(maps)
        Pass(0, rng.integers(0, 4, (5, 2))).record(writer, site)
    writer.add_fault(_C.Fault.BAD_SHAPE)
    writer.close()
    path.chmod(0o644)
    found = described.by_reader(path)
    assert [[entry[0] for entry in layer] for layer in found["placements"]] == [
        [4, 5, 6],
        [0, 3, 7],
    ]
    assert found == described.by_format(path)
    path.with_suffix(".json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    of_every_kind()
    two_lanes()
    killed()
    wrapped_epoch()
    with_transfers()
    with_placements()
