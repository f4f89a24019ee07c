"""A recording outlives its process, says truthfully who owns it, and is touched by nobody else."""

from __future__ import annotations

import os
import pkgutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import cases
import dodoco_ext as dodoco
from children import line_of, process, say
from dodoco_ext import _C
from dodoco_ext.errors import RecordingError
from dodoco_ext.recording import Reader

IDS = np.array([[0, 1], [1, 2]])


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


# How a process ends, how that looks from outside, and what state it leaves its recording in.
ENDS = {
    "the program ends": ("", 0, "closed"),
    "sys.exit": ("sys.exit(3)", 3, "closed"),
    "an exception": ("raise RuntimeError", 1, "closed"),
    "SIGINT": ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT, "closed"),
    "SIGTERM, handled": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); os.kill(os.getpid(), signal.SIGTERM)",
        7,
        "closed",
    ),
    "SIGTERM": ("signal.raise_signal(signal.SIGTERM)", -signal.SIGTERM, "dead"),
    "SIGHUP": ("signal.raise_signal(signal.SIGHUP)", -signal.SIGHUP, "dead"),
    "SIGSEGV": ("signal.raise_signal(signal.SIGSEGV)", -signal.SIGSEGV, "dead"),
    "abort": ("os.abort()", -signal.SIGABRT, "dead"),
    "os._exit": ("os._exit(5)", 5, "dead"),
    "exec": ("os.execv('/bin/true', ['true'])", 0, "dead"),
}


# Whoever started the tests may have them ignored, as nohup and a shell's & do.
USUAL_SIGNALS = """
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGSEGV, signal.SIGABRT):
    signal.signal(number, signal.SIG_DFL)
"""


@pytest.mark.parametrize("how", ENDS)
def test_however_a_process_ends_its_passes_are_kept(how: str) -> None:
    code, status, state = ENDS[how]
    end = f"{USUAL_SIGNALS}\nsys.stderr.close(); probe.record_ids(IDS); {code}"
    with process(end) as (child, path):
        assert child.wait() == status
        reader = dodoco.open(path)
        assert reader.state == state
        assert (reader.header["closed_unix_ns"] > 0) is (state == "closed")
        layer = reader.snapshot().layers[0]
        assert layer.counts.tolist() == [2, 4, 2, 0]
        assert not layer.in_flight
        assert len(reader.records()) == 2


@pytest.mark.parametrize("rows", [2, 100_000], ids=["small", "large"])
def test_the_interpreter_ends_while_a_thread_records(rows: int) -> None:
    """Large passes run without the interpreter lock: one may be under way at the very end."""
    for _ in range(3):
        with process(
            f"""
            ids = np.tile(IDS, ({rows} // 2, 1))
            def work():
                while True:
                    probe.record_ids(ids)
            threading.Thread(target=work, daemon=True).start()
            while probe.snapshot().layers[0].passes < 5:
                time.sleep(0.001)
            """
        ) as (child, path):
            assert child.wait() == 0
            reader = dodoco.open(path)
            assert reader.state == "closed"
            layer = reader.snapshot().layers[0]
            assert not layer.in_flight
            assert layer.counts.tolist() == [
                part * rows // 2 * (layer.passes - 1) + part for part in (1, 2, 1, 0)
            ]
            assert reader.cursor() == (layer.passes,)


def test_a_recording_deleted_under_its_writer_disturbs_nobody() -> None:
    """As start-up scripts of some serving stacks do, which clear all of /dev/shm."""
    with process(
        """
        import shutil
        sys.stdin.readline()
        shutil.rmtree(probe.path.parent)
        print(probe.record_ids(IDS), flush=True)
        again = cases.Probe.open((4, 2))
        again.record_ids(IDS)
        print(again.path, flush=True)
        sys.stdin.readline()
        probe.recorder.close()
        sys.stdin.readline()
        """
    ) as (child, path):
        reader = dodoco.open(path)
        say(child)
        assert line_of(child) == "0"
        assert reader.state == "live"
        assert reader.snapshot().layers[0].passes == 2
        again = dodoco.open(line_of(child))
        assert again.path.parent == path.parent
        assert again.snapshot().layers[0].passes == 1
        with pytest.raises(RecordingError, match="No such file") as caught:
            Reader(path)
        assert caught.value.state == "missing"
        say(child)
        while reader.state == "live":
            time.sleep(0.001)
        assert reader.state == "closed"
        assert len(reader.records()) == 2
        assert again.state == "live"
        say(child)
        assert child.wait() == 0
        assert again.state == "closed"


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
    pytest.importorskip("torch", reason="attach() needs torch")
    submodules = {module.name for module in pkgutil.iter_modules(dodoco.__path__)}
    assert not submodules & set(dodoco.__all__)
    assert callable(dodoco.attach)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dodoco.nonsense
