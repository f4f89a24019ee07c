"""What reading costs: the reader itself, and the writer that is being read from another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dodoco_ext import _C, ops
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import RECORD_DTYPE, Reader

from .figures import TOLERANCE, Figures
from .interleave import Contestant, Summary, calls_for, interleave
from .test_record_cost import Routing

SLOT_BYTES = 128
# Records a second, at least: out of the ring, and as a numpy array.
LIMITS = {"C++": 2e6, "numpy": 1e6}
SLOWDOWN_LIMIT = 0.01
BLOCK_S = 0.1  # the interval of the slower reader: it reads about once a block

# A reader as follow() and an exporter are: all new records and all counters, then it waits.
READER = """
import json, select, sys
from dodoco_ext.recording import Reader
path, interval_s = sys.argv[1], float(sys.argv[2])
reader = Reader(path)
cursor = reader.cursor()
done = {"polls": 0, "records": 0}
print("ready", flush=True)
while not select.select([sys.stdin], [], [], interval_s)[0]:
    records, cursor, _ = reader.read(cursor)
    reader.snapshot()
    done["polls"] += 1
    done["records"] += len(records)
print(json.dumps(done))
"""


class ReaderProcess:
    """A reader in a process of its own, stopped until it is let run."""

    def __init__(self, path: Path, interval_s: float) -> None:
        command = [sys.executable, "-P", "-c", READER, str(path), str(interval_s)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        self._running = True
        self.stop()

    def stop(self) -> None:
        """Returns once it stands still."""
        if self._running:
            self._process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)
        self._running = False

    def go(self) -> None:
        if not self._running:
            self._process.send_signal(signal.SIGCONT)
            os.waitid(os.P_PID, self._process.pid, os.WCONTINUED)
        self._running = True

    def end(self) -> dict[str, int]:
        """Ends it; returns how often it read, and how many records."""
        self.go()
        out, _ = self._process.communicate()
        assert self._process.returncode == 0
        done: dict[str, int] = json.loads(out)
        return done


@pytest.fixture
def routing(recordings: object) -> Iterator[Routing]:
    made = Routing(32, 128, 8)
    yield made
    made.close()


@pytest.mark.parametrize("num_lanes", [1, 8])
def test_a_record_is_read_fast(figures: Figures, recordings: Path, num_lanes: int) -> None:
    recorder = Recorder([LayerSpec("router", 128, 8)], lanes=num_lanes)
    site = ops.make_site(recorder, 0)
    ids = torch.arange(32 * 8).view(32, 8) % 128
    for lane in range(num_lanes):
        with recorder.use_lane(lane):
            for _ in range(recorder.num_slots):
                ops.route_ids(ids, site)
    num_records = num_lanes * recorder.num_slots
    in_cpp, in_numpy = _C.RecordingReader(str(recorder.path)), Reader(recorder.path)
    assert len(in_numpy.records()) == num_records
    timings = interleave(
        {
            # The body of ring() is C++; Python calls it once a lane.
            "C++": Contestant(lambda: [in_cpp.ring(lane, 0) for lane in range(num_lanes)]),
            "numpy": Contestant(in_numpy.records),
        },
        num_blocks=figures.blocks(300),
        block_s=5e-3,
    )
    table = figures.table(
        f"Reading a full recording of 8 MiB ({SLOT_BYTES} bytes a ROUTE record in the ring, "
        f"{RECORD_DTYPE.itemsize} in numpy, where lanes are merged by time), CPU time",
        (
            *("lanes", "records", "into", "ns a record (p20/p50/p80)", "interval of the median"),
            *("records a second", "limit"),
        ),
    )
    for way, records_a_second in LIMITS.items():
        cost = Summary.of(timings.seconds[way] / num_records)
        p20, p50, p80, low, high = (
            value * 1e9 for value in (cost.p20, cost.p50, cost.p80, cost.low, cost.high)
        )
        table.rows.append(
            (
                *(str(num_lanes), f"{num_records:,}", way),
                f"{p20:.1f} / {p50:.1f} / {p80:.1f}",
                f"{low:.1f} to {high:.1f}",
                f"{1e3 / p50:.1f} million, {SLOT_BYTES / p50:.2f} GB",
                f"{records_a_second * 1e-6:g} million",
            )
        )
        limit = 1 / records_a_second
        name = f"read/{num_lanes} lanes/{way}/seconds a record"
        figures.judge(name, cost, limit, slack=limit * (1 + TOLERANCE))
    recorder.close()
    ops.release_site(site.data_ptr())


def test_a_live_reader_costs_the_writer_nothing_measurable(
    figures: Figures, routing: Routing
) -> None:
    path = routing.recorder.path
    readers = {
        "10 times a second": ReaderProcess(path, 0.1),
        "without a pause": ReaderProcess(path, 0.0),
    }

    def only(name: str) -> Callable[[], None]:
        def switch() -> None:
            for other, reader in readers.items():
                if other != name:
                    reader.stop()
            if name in readers:
                readers[name].go()

        return switch

    calls = calls_for(routing.record, BLOCK_S)
    # The same twice: what the second differs by is the error of the method here and now.
    ways = ("no reader", *readers, "no reader again")
    num_blocks = figures.blocks(80)
    timings = interleave(
        {way: Contestant(routing.record, only(way)) for way in ways},
        num_blocks=num_blocks,
        calls=dict.fromkeys(ways, calls),
    )
    done = {name: reader.end() for name, reader in readers.items()}
    table = figures.table(
        "A writer that records without a pause (32 x 8 ids, 128 experts), read by another process: "
        "all new records and all counters; CPU time of the writer",
        ("reader", "a record, us", "slower by", "reads in 0.1 s"),
    )
    slowdown = {}
    for way in ways:
        cost = figures.add(f"writer/{way}/record", timings.time(way))
        slowdown[way] = timings.slowdown(way, "no reader")
        counts = done.get(way)
        polls = "-"
        if counts is not None:
            # A reader that slept through it would cost nothing indeed.
            assert counts["polls"] >= num_blocks // 2
            assert counts["records"] > 0
            polls = f"{counts['polls'] / num_blocks:.1f}"
        slower = f"{slowdown[way].p50:.2%} [{slowdown[way].low:.2%}, {slowdown[way].high:.2%}]"
        table.rows.append(
            (way, f"{cost.p50 * 1e6:.3f}", "-" if way == "no reader" else slower, polls)
        )
        if way != "no reader":
            figures.add(f"writer/{way}/slowdown", slowdown[way])
    figures.judge(
        "writer/10 times a second/slowdown",
        slowdown["10 times a second"],
        SLOWDOWN_LIMIT,
        slack=TOLERANCE,
    )
