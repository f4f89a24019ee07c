"""A recording outlives its process, says truthfully who owns it, and is touched by nobody else."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import cases
import dodoco_ext as dodoco
from dodoco_ext import _C
from dodoco_ext.recording import Reader

IDS = np.array([[0, 1], [1, 2]])
START = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
import cases
IDS = np.array([[0, 1], [1, 2]])
probe = cases.Probe.open((4, 2))
probe.record_ids(IDS)
print(probe.path, flush=True)
"""


@contextlib.contextmanager
def process(code: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A Python process that records one pass, says where, and runs `code`; killed at the end."""
    script = START + textwrap.dedent(code)
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            yield child, Path(child.stdout.readline().strip())
        finally:
            child.kill()


def line_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def say(child: subprocess.Popen[str], text: str = "") -> None:
    assert child.stdin is not None
    child.stdin.write(text + "\n")
    child.stdin.flush()


def test_a_recording_is_live_until_it_is_closed() -> None:
    probe = cases.Probe.open((4, 2))
    probe.record_ids(IDS)
    assert probe.reader.state == "live"
    assert probe.reader.header["closed_unix_ns"] == 0
    assert probe.reader.header["owner_pid"] == os.getpid()
    probe.recorder.close()
    probe.recorder.close()
    assert probe.recorder.closed
    assert probe.reader.state == "closed"
    assert probe.reader.header["closed_unix_ns"] >= probe.reader.header["created_unix_ns"]
    assert Reader(probe.path).snapshot().layers[0].passes == 1


def test_another_process_sees_it_live_and_moving() -> None:
    with process(
        "sys.stdin.readline(); probe.record_ids(IDS); print('done', flush=True)\n"
        "sys.stdin.readline()"
    ) as (child, path):
        reader = dodoco.open(path)
        assert reader.state == "live"
        assert reader.snapshot().layers[0].passes == 1
        say(child)
        assert line_of(child) == "done"
        assert reader.snapshot().layers[0].passes == 2
        assert dodoco.open(child.pid).path == path


def test_a_killed_process_leaves_a_dead_and_readable_recording() -> None:
    with process("time.sleep(60)") as (child, path):
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        reader = dodoco.open(path)
        assert reader.state == "dead"
        layer = reader.snapshot().layers[0]
        assert layer.counts.tolist() == [1, 2, 1, 0]
        assert not layer.in_flight
        assert len(reader.records()) == 1


def test_leaving_the_interpreter_closes_the_recording() -> None:
    with process("") as (child, path):
        assert child.wait() == 0
        assert dodoco.open(path).state == "closed"


def test_an_exception_closes_the_recording() -> None:
    with process("sys.stderr.close(); raise SystemExit(3)") as (child, path):
        assert child.wait() == 3
        assert dodoco.open(path).state == "closed"


def test_a_forked_child_writes_nothing_and_ends_nothing() -> None:
    with process(
        """
        pid = os.fork()
        if pid == 0:
            print("child", probe.record_ids(IDS), flush=True)
            probe.recorder.add_fault(cases._C.Fault.INTERNAL)
            sys.exit(0)  # runs finalizers, as a worker's orderly end does
        os.waitpid(pid, 0)
        print("parent", probe.record_ids(IDS), flush=True)
        sys.stdin.readline()
        """
    ) as (child, path):
        assert line_of(child) == "child 1"
        assert line_of(child) == "parent 0"
        reader = dodoco.open(path)
        assert reader.state == "live"
        assert reader.snapshot().layers[0].passes == 2
        assert reader.header["num_faults"] == 0
        say(child)
        assert child.wait() == 0
        assert reader.state == "closed"


def test_a_forked_child_may_close_explicitly_without_ending_its_parents_recording() -> None:
    with process(
        """
        pid = os.fork()
        if pid == 0:
            probe.recorder.close()
            os._exit(0)
        os.waitpid(pid, 0)
        print(probe.record_ids(IDS), flush=True)
        sys.stdin.readline()
        """
    ) as (child, path):
        assert line_of(child) == "0"
        reader = dodoco.open(path)
        assert reader.state == "live"
        assert reader.snapshot().layers[0].passes == 2


def test_a_surviving_child_does_not_keep_its_dead_parents_recording_alive() -> None:
    with process(
        """
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
        print(pid, flush=True)
        time.sleep(60)
        """
    ) as (child, path):
        orphan = int(line_of(child))
        try:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            os.kill(orphan, 0)  # it lives
            assert dodoco.open(path).state == "dead"
        finally:
            os.kill(orphan, signal.SIGKILL)


def test_a_forked_child_may_record_on_its_own() -> None:
    with process(
        """
        pid = os.fork()
        if pid == 0:
            own = cases.Probe.open((4, 2))
            own.record_ids(IDS)
            own.record_ids(IDS)
            own.recorder.close()
            print(own.path, flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        """
    ) as (child, path):
        own = Path(line_of(child))
        child.wait()
        assert own != path
        assert dodoco.open(own).snapshot().layers[0].passes == 2
        assert dodoco.open(path).snapshot().layers[0].passes == 1


def test_a_program_started_by_the_owner_does_not_inherit_the_lock() -> None:
    with process(
        """
        import subprocess
        sleeper = subprocess.Popen(["sleep", "60"], close_fds=False)
        print(sleeper.pid, flush=True)
        time.sleep(60)
        """
    ) as (child, path):
        sleeper = int(line_of(child))
        try:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            assert dodoco.open(path).state == "dead"
        finally:
            os.kill(sleeper, signal.SIGKILL)


def test_two_threads_lose_nothing() -> None:
    probe = cases.Probe.open((64, 4), (8, 2))
    rng = np.random.default_rng(0)
    # Large passes run without the interpreter lock, small ones with it.
    large, small = rng.integers(0, 64, (6000, 4)), rng.integers(0, 8, (3, 2))
    rounds = 200
    barrier = threading.Barrier(3)
    snapshots = []

    def work(ids: cases.Array, layer: int) -> None:
        barrier.wait()
        for _ in range(rounds):
            probe.record_ids(ids, layer)

    threads = [
        threading.Thread(target=work, args=(large, 0)),
        threading.Thread(target=work, args=(large, 0)),
        threading.Thread(target=work, args=(small, 1)),
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        snapshots.append(probe.snapshot())
    for thread in threads:
        thread.join()
    first, second = probe.snapshot().layers
    np.testing.assert_array_equal(
        first.counts, np.bincount(large.ravel(), minlength=64) * 2 * rounds
    )
    np.testing.assert_array_equal(second.counts, np.bincount(small.ravel(), minlength=8) * rounds)
    assert (first.passes, second.passes) == (2 * rounds, rounds)
    records, _, lost = probe.reader.read()
    assert len(records) + lost == 3 * rounds
    # What a reader saw meanwhile was consistent, or marked.
    for snapshot in snapshots:
        for layer in snapshot.layers:
            assert layer.in_flight or int(layer.counts.sum()) == layer.assignments
    probe.recorder.close()


def test_closing_while_another_thread_records() -> None:
    ids = np.random.default_rng(0).integers(0, 64, (6000, 4))
    for _ in range(5):
        probe = cases.Probe.open((64, 4))
        results: list[int] = []

        def work(probe: cases.Probe = probe, results: list[int] = results) -> None:
            while not results or results[-1] == 0:
                results.append(probe.record_ids(ids))

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.02)
        probe.recorder.close()
        thread.join()
        assert results[-1] == 1
        assert probe.snapshot().layers[0].passes == len(results) - 1


def test_sites_of_a_recorder_that_was_dropped_record_nothing() -> None:
    probe = cases.Probe.open((4, 2))
    sites, path = probe.sites, probe.path
    ids = IDS
    strides = [stride // 8 for stride in ids.strides]
    del probe
    assert Reader(path).state == "closed"
    assert _C.route_ids(sites[0].ctypes.data, ids.ctypes.data, 8, *ids.shape, *strides, False) == 1


LIGHT = """
import sys
{imports}
heavy = {{"torch", "triton", "transformers", "pandas", "pyarrow", "matplotlib", "scipy"}}
print(sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import dodoco_ext",
        "import dodoco_ext.recording",
        "import dodoco_ext.sources",
        "import dodoco_ext.metrics, dodoco_ext.nulls, dodoco_ext.reference",
        "import dodoco_ext; dodoco_ext.open; dodoco_ext.Reader; dodoco_ext.Snapshot",
        "import dodoco_ext.recorder",
    ],
)
def test_the_reading_side_loads_nothing_heavy(imports: str) -> None:
    script = LIGHT.format(imports=imports)
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_submodule_can_replace_a_public_name() -> None:
    """Importing the submodule `attach` would put it in place of a function of that name."""
    submodules = {module.name for module in pkgutil.iter_modules(dodoco.__path__)}
    assert not submodules & set(dodoco.__all__)
    assert callable(dodoco.attach)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dodoco.nonsense
