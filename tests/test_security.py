"""What SECURITY.md says and no other test holds: what is stored, and what a member of the group can do."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import cases
import dodoco_ext as dodoco
import planted
from dodoco_ext import pruning
from dodoco_ext.recording import Reader
from namespaces import ENVIRONMENT, needs_root, python

MEMBER, GROUP = 23002, 23003


# --- what is stored -----------------------------------------------------------------------------


def test_counts_and_names_are_stored_and_nothing_else() -> None:
    """No section of per-token ids or per-pass counts, and no key of the metadata beyond these."""
    path = planted.recording(planted.layers(2), labels={"model_name": "m"})
    data = path.read_bytes()
    (num_sections,) = struct.unpack_from("<I", data, 28)
    kinds = {struct.unpack_from("<I", data, 248 + 40 * i)[0] for i in range(num_sections)}
    assert kinds == {1, 2, 3, 4}, "metadata, layers, board, ring"
    metadata = Reader(path).metadata
    assert set(metadata) == {
        *("run", "lanes", "layers", "uncovered", "labels", "backend", "record_every", "program"),
        *("host", "versions"),
    }
    assert set(metadata["versions"]) <= {"dodoco-ext", "python", "torch"}


def test_neither_arguments_nor_environment_are_stored(tmp_path: Path) -> None:
    program = tmp_path / "serve.py"
    program.write_text("import planted\nprint(planted.recording(planted.layers(1)))\n")
    done = subprocess.run(
        [sys.executable, str(program), "--api-key", "first-secret"],
        env={**ENVIRONMENT, "TOKEN": "second-secret", "DODOCO_DIR": str(tmp_path / "recordings")},
        capture_output=True,
        text=True,
        check=True,
    )
    path = Path(done.stdout.strip())
    assert Reader(path).metadata["program"] == "serve.py"
    data = path.read_bytes()
    assert b"secret" not in data
    assert os.fsencode(tmp_path) not in data


def test_which_token_went_where_is_not_stored() -> None:
    """Tokens in another order within their pass leave the same bytes, but for the times."""
    rng = np.random.default_rng(0)
    layer = planted.layers(1, 64, 6)[0]
    passes = [planted.random_ids(rng, tokens, layer, skew=2) for tokens in (1, 7, 32, 500)]
    kept = []
    for shuffle in (False, True):
        each = planted.Planted([layer])
        for ids in passes:
            each.route(0, rng.permutation(ids) if shuffle else ids)
        reader = Reader(each.close())
        records = reader.records()
        names = [name for name in records.dtype.names or () if name != "time_ns"]
        (counted,) = reader.snapshot().layers
        kept.append(
            (records[names].tolist(), counted.counts.tolist(), counted.gini_histogram.tolist())
        )
    assert kept[0] == kept[1]


def test_who_reads_between_two_passes_sees_the_counts_of_the_pass_between() -> None:
    """The limit of the above, which SECURITY.md names: for a single token they are its experts."""
    probe = cases.Probe.open((64, 2))
    probe.record_ids(np.array([[1, 2], [3, 4]]))
    before = probe.snapshot()
    probe.record_ids(np.array([[17, 42]]))
    difference = (probe.snapshot() - before).layers[0]
    assert np.flatnonzero(difference.counts).tolist() == [17, 42]
    probe.recorder.close()


# --- a member of the group ----------------------------------------------------------------------

AS_MEMBER = f"""
import contextlib, fcntl, mmap, os, sys, time
from pathlib import Path
path = Path(sys.argv[1])
os.setgroups([{GROUP}]); os.setgid({GROUP}); os.setuid({MEMBER})
def refused(what, *arguments):
    try:
        what(*arguments)
    except PermissionError:
        return
    sys.exit(f"{{what}} was not refused")
"""
TRY_ALL = """
refused(os.open, path, os.O_RDWR)
refused(os.truncate, path, 0)
refused(os.chmod, path, 0o666)
refused(os.utime, path)
refused(os.unlink, path)
refused(os.rename, path, path.with_name("other.dodoco"))
refused(os.symlink, "/etc/passwd", path.with_name("link.dodoco"))
refused(os.mkdir, path.with_name("folder"))
with open(path, "rb") as file:
    refused(mmap.mmap, file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    for lock in (fcntl.LOCK_SH, fcntl.LOCK_EX):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, lock | fcntl.LOCK_NB)
            sys.exit("the lock of a live recording was given away")
print("refused", flush=True)
"""
HOLD = """
file = open(path, "rb")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""
SNATCH = """
held = {}
print("ready", flush=True)
while True:
    for name in set(os.listdir(path)) - set(held):
        with contextlib.suppress(OSError):
            descriptor = os.open(path / name, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held[name] = descriptor
            except BlockingIOError:
                os.close(descriptor)
"""


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of recordings that belongs to the group, where its members can come to."""
    base = Path(tempfile.mkdtemp(prefix="dodoco-test-", dir="/dev/shm"))
    base.chmod(0o2755)
    os.chown(base, 0, GROUP)
    base.chmod(0o2755)
    monkeypatch.setenv("DODOCO_DIR", str(base / "recordings"))
    yield base / "recordings"
    shutil.rmtree(base)


def member(code: str, path: Path) -> subprocess.Popen[str]:
    command = python(AS_MEMBER + code, str(path))
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@needs_root
def test_a_member_of_the_group_can_change_nothing(shared: Path) -> None:
    probe = cases.Probe.open((4, 2))
    assert (probe.path.stat().st_gid, shared.stat().st_gid) == (GROUP, GROUP)
    with member(TRY_ALL, probe.path) as process:
        assert said(process) == "refused"
    assert process.returncode == 0
    assert list(shared.iterdir()) == [probe.path]
    assert probe.reader.state == "live"
    probe.recorder.close()


@needs_root
def test_a_member_of_the_group_can_make_the_dead_look_alive(shared: Path) -> None:
    """What is left to it: a lock needs no more than the right to read. Nothing else changes."""
    path = planted.dead_recording(shared)
    before = Reader(path).snapshot().counts
    os.utime(path, (0, 0))
    with member(HOLD, path) as process:
        assert said(process) == "held"
        assert Reader(path).state == "live"
        assert pruning.prune(shared, keep=0) == []
        assert [a.tolist() for a in dodoco.open(path).snapshot().counts] == [
            b.tolist() for b in before
        ]
        process.send_signal(signal.SIGKILL)
    assert Reader(path).state == "dead"
    assert pruning.prune(shared, keep=0) == [path]


@needs_root
def test_nobody_prunes_for_another_user(shared: Path) -> None:
    """Root may remove anything, and still leaves to others what is theirs."""
    path = planted.recording(planted.layers(1))
    os.chown(path, MEMBER, GROUP)
    assert pruning.prune(shared, keep=0) == []
    os.chown(path, os.getuid(), GROUP)
    assert pruning.prune(shared, keep=0) == [path]


@needs_root
def test_a_member_of_the_group_cannot_hinder_a_recording(shared: Path) -> None:
    """A new file is closed to the group until its owner holds the lock."""
    shared.mkdir(mode=0o2750)
    shared.chmod(0o2750)
    with member(SNATCH, shared) as process:
        assert said(process) == "ready"
        for _ in range(100):
            probe = cases.Probe.open((4, 2))
            probe.record_ids(np.array([[1, 2]]))
            assert Reader(probe.path).state == "live"
            probe.recorder.close()
            assert Reader(probe.path).state == "closed"
        # It did get at locks: those of closed recordings, which then cannot be told from live ones.
        assert len(list(shared.iterdir())) > pruning.KEPT_PER_RANK + 1
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
