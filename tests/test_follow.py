"""Following a recording: nothing twice, nothing passed over, to the owner's end and over its restart."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import planted
from dodoco_ext.errors import InputError, RecordingError
from dodoco_ext.follow import Batch, follow
from dodoco_ext.settings import Settings
from runs import in_lanes

pytestmark = pytest.mark.timeout(60)

INTERVAL = 0.02
TIMEOUT_S = 30.0

# A process that records one pass of the tokens that each line of its input says, and answers. It closes
# its recording at the end of the input.
WRITER = """
import sys, planted
p = planted.Planted(planted.layers(1))
print(p.path, flush=True)
for line in sys.stdin:
    p.route(0, [[0, 1]] * int(line))
    print("done", flush=True)
p.close()
"""


class Writer:
    """A process that records, as `serve.py` of a run and rank."""

    def __init__(self, folder: Path, *, rank: int = 0, run: str | None = "job") -> None:
        paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        environment = {**os.environ, "DODOCO_DIR": str(folder), "PYTHONPATH": paths}
        environment |= {"DODOCO_RANK": str(rank), "DODOCO_WORLD_SIZE": "4"}
        environment |= {"DODOCO_RUN": run} if run else {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.path = Path(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def route(self, *sizes: int) -> None:
        assert self.process.stdin is not None
        for tokens in sizes:
            self.process.stdin.write(f"{tokens}\n")
            self.process.stdin.flush()
            assert self._answer() == "done"

    def close(self) -> None:
        self.process.communicate(timeout=TIMEOUT_S)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=TIMEOUT_S)


class Followed:
    """What a thread that follows a source has seen."""

    def __init__(self, source: object, **options: object) -> None:
        self.batches: list[Batch] = []
        self.error: Exception | None = None
        self.stop = threading.Event()
        self._new = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(source, options), daemon=True)
        self._thread.start()

    def _run(self, source: object, options: dict[str, object]) -> None:
        try:
            for batch in follow(source, interval=INTERVAL, stop=self.stop, **options):  # type: ignore[arg-type]
                with self._new:
                    self.batches.append(batch)
                    self._new.notify_all()
        except Exception as error:
            self.error = error

    @property
    def tokens(self) -> list[int]:
        return [int(t) for batch in list(self.batches) for t in batch.records["tokens"]]

    @property
    def ended(self) -> list[str]:
        return [batch.ended for batch in list(self.batches) if batch.ended]

    def wait_for(self, tokens: Sequence[int], ended: int = 0) -> None:
        """Until exactly these have come, and so many recordings have ended."""
        with self._new:
            there = self._new.wait_for(
                lambda: len(self.tokens) >= len(tokens) and len(self.ended) >= ended, TIMEOUT_S
            )
        assert self.tokens == list(tokens)
        assert there, f"{self.ended} ended"
        assert len(self.ended) == ended

    def finish(self) -> None:
        self.stop.set()
        self.join()

    def join(self) -> None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def following(source: object, **options: object) -> Iterator[Followed]:
    followed = Followed(source, **options)
    try:
        yield followed
    finally:
        followed.finish()


def test_records_come_as_they_are_written(recordings: Path) -> None:
    writer = Writer(recordings)
    writer.route(1, 2, 3)
    with following(writer.path) as followed:
        followed.wait_for([1, 2, 3])
        writer.route(4)
        followed.wait_for([1, 2, 3, 4])
        writer.route(5, 6)
        writer.close()
        followed.wait_for([1, 2, 3, 4, 5, 6], ended=1)
    assert followed.ended == ["closed"]
    assert followed.batches[-1].ended == "closed"


def test_without_restarts_it_ends_with_the_recording() -> None:
    path = planted.recording(planted.layers(1), [3, 4])
    batches = list(follow(path, restarts=False))
    assert [batch.ended for batch in batches] == ["closed"]
    assert batches[0].records["tokens"].tolist() == [3, 4]


def test_what_a_killed_owner_left_is_read(recordings: Path) -> None:
    """Everything is written between two looks: what is there when it dies must still come."""
    writer = Writer(recordings)
    generator = follow(writer.path, interval=INTERVAL, restarts=False)
    writer.route(1)
    assert next(generator).records["tokens"].tolist() == [1]
    writer.route(2, 3)
    writer.kill()
    rest = list(generator)
    assert [int(t) for batch in rest for t in batch.records["tokens"]] == [2, 3]
    assert [batch.ended for batch in rest] == ["dead"]


@pytest.mark.parametrize("end", ["close", "kill"])
def test_it_goes_on_after_a_restart(end: str, recordings: Path) -> None:
    first = Writer(recordings)
    with following("job") as followed:
        first.route(1, 2)
        followed.wait_for([1, 2])
        first.route(3)
        getattr(first, end)()
        second = Writer(recordings)
        second.route(4)
        followed.wait_for([1, 2, 3, 4], ended=1)
        getattr(second, end)()
        followed.wait_for([1, 2, 3, 4], ended=2)
        third = Writer(recordings)
        third.route(5)
        followed.wait_for([1, 2, 3, 4, 5], ended=2)
        third.close()
    seen = dict.fromkeys(batch.reader.path for batch in followed.batches)
    assert list(seen) == [first.path, second.path, third.path]
    assert followed.ended[:2] == [{"close": "closed", "kill": "dead"}[end]] * 2


def test_no_restart_is_skipped(recordings: Path) -> None:
    """Two restarts while nobody looked: both are read, in their order."""
    first = Writer(recordings)
    first.route(1)
    generator = follow("job", interval=INTERVAL)
    assert next(generator).records["tokens"].tolist() == [1]
    first.kill()
    for tokens in (2, 3):
        writer = Writer(recordings)
        writer.route(tokens)
        writer.close()
    found = [next(generator) for _ in range(3)]
    assert [batch.records["tokens"].tolist() for batch in found] == [[], [2], [3]]
    assert [batch.ended for batch in found] == ["dead", "closed", "closed"]


def test_others_are_not_taken_for_the_restarted_owner(recordings: Path) -> None:
    first = Writer(recordings, rank=1)
    older = Writer(recordings, rank=1)  # began while the first was alive
    first.route(1)
    with following(first.path) as followed:
        followed.wait_for([1])
        first.close()
        followed.wait_for([1], ended=1)
        others = [Writer(recordings, rank=0), Writer(recordings, rank=1, run="other"), older]
        for other in others:
            other.route(77)
        (recordings / "job.r00001.00.dodoco").write_bytes(b"\0" * 8192)
        time.sleep(10 * INTERVAL)
        followed.wait_for([1], ended=1)
        successor = Writer(recordings, rank=1)
        successor.route(2)
        followed.wait_for([1, 2], ended=1)
    for each in (*others, successor):
        each.close()


def test_runs_without_a_name_follow_each_other(
    recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recording(run: str, tokens: int, program: str) -> None:
        monkeypatch.setattr(sys, "argv", [program])
        settings = Settings(recordings, run=run)
        made = planted.Planted(planted.layers(1), settings=settings)
        made.route(0, [[0, 1]] * tokens)
        made.close()

    recording("20261124-101500", 1, "serve.py")
    with following(recordings) as followed:
        followed.wait_for([1], ended=1)
        recording("20261124-101501", 66, "other.py")
        recording("job", 77, "serve.py")
        recording("20261124-101502", 2, "serve.py")
        followed.wait_for([1, 2], ended=2)


@pytest.mark.parametrize("source", ["job", "folder", "file", None])
def test_what_does_not_exist_yet_is_waited_for(source: str | None, recordings: Path) -> None:
    file = recordings / "later.dodoco"
    with following({"folder": recordings, "file": file}.get(source or "", source)) as followed:
        time.sleep(5 * INTERVAL)
        assert followed.batches == []
        recordings.mkdir(exist_ok=True)
        (recordings / "job.r00000.00.dodoco").write_bytes(b"")  # being created
        writer = Writer(recordings)
        if source == "file":
            writer.path.rename(file)
        writer.route(1)
        followed.wait_for([1])
        writer.close()


def test_a_file_that_never_will_be_a_recording_is_an_error(tmp_path: Path) -> None:
    other = tmp_path / "notes"
    other.write_text("no recording" * 1000)
    with pytest.raises(RecordingError, match="is not a DODOCO recording"):
        next(follow(other))


def test_a_pruned_file_is_read_to_its_end(recordings: Path) -> None:
    writer = Writer(recordings)
    writer.route(1)
    with following("job") as followed:
        followed.wait_for([1])
        writer.path.unlink()
        writer.route(2)
        followed.wait_for([1, 2])
        writer.route(3)
        writer.close()
        followed.wait_for([1, 2, 3], ended=1)
        successor = Writer(recordings)
        successor.route(4)
        followed.wait_for([1, 2, 3, 4], ended=1)
        successor.close()


def test_a_file_that_is_cut_ends_with_its_reason(recordings: Path) -> None:
    made = planted.Planted(planted.layers(1), settings=Settings(recordings, run="job"))
    made.route(0, [[0, 1]])
    generator = follow("job", interval=INTERVAL)
    assert len(next(generator).records) == 1
    made.close()
    os.truncate(made.path, 8192)
    last = next(generator)
    assert (last.ended, len(last.records)) == ("truncated", 0)
    assert str(made.path) in last.problem
    again = planted.Planted(planted.layers(1), settings=Settings(recordings, run="job"))
    again.route(0, [[0, 1]] * 2)
    assert next(generator).records["tokens"].tolist() == [2]
    again.close()


def test_lost_records_are_counted(recordings: Path) -> None:
    settings = Settings(recordings, max_bytes=1 << 16, run="job")
    made = planted.Planted(planted.layers(1), settings=settings)
    slots = made.recorder.num_slots
    made.route_all([1] * (slots + 7))
    generator = follow("job", interval=INTERVAL, restarts=False)
    first = next(generator)
    assert (len(first.records), first.lost) == (slots, 7)
    made.route_all([2] * (slots + 5))
    second = next(generator)
    assert (len(second.records), second.lost) == (slots, 5)
    made.close()
    assert [(len(b.records), b.lost, b.ended) for b in generator] == [(0, 0, "closed")]


def test_all_lanes_are_followed(recordings: Path) -> None:
    path = in_lanes(0, [(0, 1), (1, 2), (0, 3), (1, 4)], lanes=2)
    (batch,) = follow(path, restarts=False)
    tokens = {lane: batch.records["tokens"][batch.records["lane"] == lane] for lane in (0, 1)}
    assert {lane: each.tolist() for lane, each in tokens.items()} == {0: [1, 3], 1: [2, 4]}


def test_what_was_written_before_stop_still_comes(recordings: Path) -> None:
    made = planted.Planted(planted.layers(1), settings=Settings(recordings, run="job"))
    stop = threading.Event()
    generator = follow("job", interval=60, stop=stop)
    made.route(0, [[0, 1]])
    assert len(next(generator).records) == 1
    made.route(0, [[0, 1]] * 2)
    stop.set()
    assert [b.records["tokens"].tolist() for b in generator] == [[2]]
    made.close()


def test_stop_wakes_it_from_any_wait(recordings: Path) -> None:
    """A minute between two looks: waiting for a source, for records and for a restart end at once."""
    made = planted.Planted(planted.layers(1), settings=Settings(recordings, run="job"))
    closed = planted.recording(planted.layers(1))
    for source in ("nothing", made.path, closed):
        stop = threading.Event()
        thread = threading.Thread(
            target=lambda s=source, e=stop: list(follow(s, interval=60, stop=e))
        )
        thread.start()
        time.sleep(0.1)
        stop.set()
        thread.join(10)
        assert not thread.is_alive(), source
    made.close()


def test_waiting_costs_next_to_nothing(recordings: Path) -> None:
    made = planted.Planted(planted.layers(1), settings=Settings(recordings, run="job"))
    with following("job"):
        time.sleep(0.2)
        began, cpu = time.monotonic(), time.process_time()
        time.sleep(1.0)
        share = (time.process_time() - cpu) / (time.monotonic() - began)
    made.close()
    assert share < 0.2, f"{share:.0%} of a processor at {1 / INTERVAL:.0f} looks a second"


def test_no_record_comes_twice_or_is_passed_over_under_load(recordings: Path) -> None:
    """A writer at full speed in another thread, with a ring large enough that nothing is lost."""
    made = planted.Planted(
        planted.layers(1), settings=Settings(recordings, max_bytes=8 << 20, run="job")
    )
    number = 20_000
    assert made.recorder.num_slots > number
    ids = np.zeros((1, 2), np.int64)
    ids[0, 1] = 1

    def write() -> None:
        for _ in range(number):
            made.route(0, ids)
        made.close()

    thread = threading.Thread(target=write)
    thread.start()
    batches = list(follow("job", interval=0.001, restarts=False))
    thread.join()
    assert len(batches) > 2
    iterations = np.concatenate([batch.records["iteration"] for batch in batches])
    np.testing.assert_array_equal(iterations, np.arange(number))
    assert sum(batch.lost for batch in batches) == 0


@pytest.mark.parametrize("interval", [0, -1, float("nan")])
def test_an_interval_must_be_positive(interval: float) -> None:
    with pytest.raises(InputError, match="interval="):
        follow(interval=interval)
