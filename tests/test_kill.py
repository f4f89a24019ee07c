"""SIGKILL at random moments: what is left opens, and holds what was written, whole passes all."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from bisect import bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import cases
import dodoco_ext as dodoco
import toy
from dodoco_ext import _C, reference
from dodoco_ext.errors import RecordingError
from dodoco_ext.recording import RECORD_DTYPE, Reader
from dodoco_ext.reference import ReferencePass
from writer_process import LANES, LAYERS, PERIOD, make_pass

Words = NDArray[np.uint64]
HERE = Path(__file__).parent
PASSES, TOKENS, ASSIGNMENTS, PADDED, RECORDED, LAST_TIME, STARTED = 0, 1, 2, 3, 7, 8, 9
# A ring that laps within milliseconds, and a recording that takes some time to create.
SMALL, LARGE = 400_000, 16 << 20
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(dodoco.__file__).parent.parent), str(HERE)]),
    "PYTHONSAFEPATH": "1",
}


# --- what must be in a recording ----------------------------------------------------------------


class Expected:
    """The board blocks and records of one layer in one lane, by the number of the pass."""

    def __init__(self, lane: int, layer: int) -> None:
        shape = LAYERS[layer]
        size_rows = _C.SIZE_CLASSES * (_C.GINI_BINS + _C.MAX_MEAN_BINS)
        words = _C.BOARD_WORDS + shape.num_experts + size_rows
        blocks = np.zeros((PERIOD + 1, words), np.uint64)
        self.records = np.zeros(PERIOD, RECORD_DTYPE)
        unused = shape.num_experts - shape.top_k
        gini_bin = _C.GINI_BINS * unused // shape.num_experts
        mean_bin = bisect_right(_C.MAX_MEAN_BOUNDS, shape.num_experts / shape.top_k) - 1
        for number in range(PERIOD):
            each = make_pass(lane, layer, number)
            block, record = blocks[number + 1], self.records[number]
            assignments, padded = each.tokens * shape.top_k, each.padding * shape.top_k
            block[[PASSES, RECORDED, STARTED]] = 1
            block[[TOKENS, ASSIGNMENTS, PADDED]] = each.tokens, assignments, padded
            block[[_C.BOARD_WORDS + expert for expert in each.experts]] = each.tokens
            if each.tokens:
                row = each.tokens.bit_length() - 1
                ginis, means = block[-size_rows:].reshape(2, _C.SIZE_CLASSES, -1)
                ginis[row, gini_bin] = means[row, mean_bin] = 1
            record["type"], record["lane"], record["layer"] = 1, lane, layer
            record["tokens"] = record["max_count"] = each.tokens
            record["assignments"], record["padded"] = assignments, padded
            record["unused_experts"] = unused if each.tokens else shape.num_experts
            record["gini_numerator"] = shape.top_k * unused * each.tokens
        self._sums = blocks.cumsum(axis=0, dtype=np.uint64)

    def block(self, passes: int) -> Words:
        """After so many passes."""
        laps, rest = divmod(passes, PERIOD)
        return self._sums[PERIOD] * np.uint64(laps) + self._sums[rest]


EXPECTED = [[Expected(lane, layer) for layer in range(len(LAYERS))] for lane in range(LANES)]


def assert_records_are(data: bytes, lane: int, start: int, end: int, kept: int) -> None:
    """Records of a lane from the positions `start` to `end`, each once and as it was written.

    What is missing was overwritten: it lies before `kept`, the oldest position that the ring held
    afterwards. A writer that laps the reader may leave such a gap anywhere.
    """
    records = np.frombuffer(data, RECORD_DTYPE)
    layers = records["layer"].astype(np.int64)
    positions = records["iteration"].astype(np.int64) * len(LAYERS) + layers
    missing = np.setdiff1d(np.arange(start, end), positions)
    assert (np.diff(positions) > 0).all()
    assert len(missing) == end - start - len(records), "a record of another position"
    assert (missing < kept).all(), "a record that was still there is missing"
    assert (np.diff(records["time_ns"].astype(np.int64)) >= 0).all()
    for layer in range(len(LAYERS)):
        mine = records[layers == layer].copy()
        expected = EXPECTED[lane][layer].records[mine["iteration"] % PERIOD]
        mine["iteration"] = mine["time_ns"] = 0
        np.testing.assert_array_equal(mine, expected)


class Watch:
    """Reads a recording again and again, and holds each reading to the one before."""

    def __init__(self, path: Path) -> None:
        self.file = _C.RecordingReader(str(path))
        self.last = [[np.zeros(0, np.uint64) for _ in LAYERS] for _ in range(LANES)]
        self.next = [0] * LANES
        self.accepted = 0

    def read(self) -> list[list[bool]]:
        """Returns which layers of each lane are in flight."""
        in_flight = [[self._board(lane, layer) for layer in range(3)] for lane in range(LANES)]
        for lane in range(LANES):
            head = self.file.head(lane)
            data, following, lost, unknown = self.file.ring(lane, self.next[lane])
            accepted = len(data) // RECORD_DTYPE.itemsize
            assert head <= following
            assert accepted + lost == following - self.next[lane]
            assert unknown == 0
            # The slot of the position `head` may be half overwritten.
            kept = self.file.head(lane) + 1 - self.file.num_slots(lane)
            assert_records_are(data, lane, self.next[lane], following, kept)
            self.next[lane] = following
            self.accepted += accepted
        return in_flight

    def _board(self, lane: int, layer: int) -> bool:
        words, consistent = self.file.board(lane, layer)
        if self.last[lane][layer].size:
            assert (words >= self.last[lane][layer]).all(), "a counter went back"
        self.last[lane][layer] = words.copy()
        if consistent:
            expected = EXPECTED[lane][layer].block(int(words[PASSES]))
            words[LAST_TIME] = 0
            np.testing.assert_array_equal(words, expected)
        return not consistent

    def assert_left_whole(self) -> int:
        """After the end: at most one partial pass a lane. Returns how many there are."""
        in_flight = self.read()
        for lane, flags in enumerate(in_flight):
            assert sum(flags) <= 1, f"lane {lane}: {flags}"
            passes = []
            for layer, words in enumerate(self.last[lane]):
                expected = EXPECTED[lane][layer]
                passes.append(int(words[PASSES]))
                before, after = (expected.block(passes[-1] + more) for more in (0, flags[layer]))
                counters = np.delete(words, LAST_TIME)
                assert (counters >= np.delete(before, LAST_TIME)).all()
                assert (counters <= np.delete(after, LAST_TIME)).all()
            # Layers take turns, so the partial pass is the one that was due.
            total = sum(passes)
            assert passes == [len(range(layer, total, 3)) for layer in range(3)]
            assert not any(flags) or flags[total % 3]
            # A pass goes to the board first and then to the ring.
            assert sum(passes) - self.file.head(lane) in (0, 1)
        return sum(map(sum, in_flight))


# --- the small writer ---------------------------------------------------------------------------


def life(path: Path, seed: int) -> Counter[str]:
    """One writer, killed at a moment that the seed chooses; says what was left."""
    rng = random.Random(seed)
    early = seed % 3 == 0
    found: Counter[str] = Counter()
    arguments = [str(HERE / "writer_process.py"), str(path), str(LARGE if early else SMALL)]
    # Without `site`: only what is needed, in a few milliseconds.
    with subprocess.Popen([sys.executable, "-S", *arguments], env=ENVIRONMENT) as child:
        watch = None
        try:
            if seed % 9 == 0:  # while it starts
                time.sleep(rng.uniform(0, 0.08))
            elif early:  # while it creates the file, or soon after
                while not path.exists():
                    time.sleep(0.0001)
                time.sleep(rng.uniform(0, 0.015))
            else:
                watch = Watch(wait_for_a_pass(child, path))
                end = time.monotonic() + rng.uniform(0, 0.05)
                while time.monotonic() < end or found["reads"] < 2:
                    watch.read()
                    found["reads"] += 1
            assert child.poll() is None, "the writer ended by itself"
        finally:
            child.kill()
    assert child.returncode == -signal.SIGKILL
    try:
        reader = Reader(path)
    except RecordingError as error:
        assert early
        found[error.state] += 1
        path.unlink(missing_ok=True)
        return found
    assert reader.state == "dead"
    found["opened"] += 1
    watch = watch or Watch(path)
    found["partial"] += watch.assert_left_whole()
    found["records"] += watch.accepted
    snapshot = reader.snapshot()
    assert sum(layer.in_flight for layer in snapshot.layers) <= LANES
    assert len(reader.records()) <= LANES * reader.num_slots
    path.unlink()
    return found


def wait_for_a_pass(child: subprocess.Popen[bytes], path: Path) -> Path:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and child.poll() is None:
        with suppress(RecordingError):
            if any(Reader(path).cursor()):
                return path
        time.sleep(0.001)
    raise AssertionError(f"the writer recorded nothing; its exit status is {child.poll()}")


def test_195_writers_killed_at_random_moments(tmp_path: Path) -> None:
    kills = 195
    with ThreadPoolExecutor(4) as pool:
        paths = [tmp_path / f"killed{seed}.dodoco" for seed in range(kills)]
        found = sum(pool.map(life, paths, range(kills)), Counter())
    print(dict(found))
    assert found["opened"] + found["missing"] + found["unfinished"] == kills
    assert found["opened"] >= 130
    assert found["reads"] >= 260
    assert found["records"] > 10_000
    assert found["partial"] > 0, "no kill hit a pass: the test shows nothing"
    assert found["unfinished"] > 0, "no kill hit a creation: the test shows nothing"


# --- a model ------------------------------------------------------------------------------------

MODEL = """
import torch
import toy
from dodoco_ext import attach
from test_kill import MODEL_SHAPE, model_passes

torch.set_num_threads(1)
model = toy.ToyModel(**MODEL_SHAPE)
attachment = attach(model)
print(attachment.path, flush=True)
with torch.no_grad():
    while True:
        for tokens in model_passes():
            model(tokens)
"""
MODEL_SHAPE = {"num_layers": 3, "num_experts": 64, "top_k": 8}


def model_passes() -> list[torch.Tensor]:
    return [toy.some_tokens((4, 16 + seed), seed) for seed in range(8)]


@pytest.fixture(scope="module")
def planted_passes() -> list[list[ReferencePass]]:
    """What a model records in each layer, pass after pass."""
    model = toy.ToyModel(**MODEL_SHAPE)
    return [
        [reference.route_ids(model.ids(tokens)[layer], 64) for tokens in model_passes()]
        for layer in range(3)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_a_model_killed_at_a_random_moment(
    seed: int, planted_passes: list[list[ReferencePass]]
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MODEL], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            reader = Reader(child.stdout.readline().strip())
            assert reader.state == "live"
            snapshots = [reader.snapshot()]
            end = time.monotonic() + random.Random(seed).uniform(0.01, 0.3)
            while time.monotonic() < end or len(snapshots) < 2:
                snapshots.append(reader.snapshot())
        finally:
            child.kill()
    assert reader.state == "dead"
    snapshots.append(Reader(reader.path).snapshot())
    for earlier, later in pairwise(snapshots):
        for before, after in zip(earlier.layers, later.layers, strict=True):
            assert (after.counts >= before.counts).all()
            assert after.passes >= before.passes
            assert after.assignments >= before.assignments
    layers = snapshots[-1].layers
    assert sum(layer.in_flight for layer in layers) <= 1
    whole = []
    for layer, cycle in zip(layers, planted_passes, strict=True):
        sums = np.cumsum([np.zeros(64, np.int64)] + [each.counts for each in cycle], axis=0)
        laps, rest = divmod(layer.passes, len(cycle))
        counts = sums[-1] * laps + sums[rest]
        assert (layer.counts >= counts).all()
        assert (layer.counts <= counts + (cycle[rest].counts if layer.in_flight else 0)).all()
        whole.append(layer.passes)
    assert whole == [len(range(layer, sum(whole), 3)) for layer in range(3)]
    records, cursor, lost = reader.read()
    assert len(records) + lost == cursor[0]
    assert sum(whole) - cursor[0] in (0, 1)
    for record in records[:: max(1, len(records) // 200)]:
        cycle = planted_passes[record["layer"]]
        cases.assert_record_is(record, cycle[record["iteration"] % len(cycle)])
