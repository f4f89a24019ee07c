"""Writer and reader with different rights, as a server and its sidecar in containers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from namespaces import ENVIRONMENT, inside, needs_root, python

pytestmark = needs_root
SERVER, SIDECAR, SHARED_GROUP = 23001, 23002, 23003
TRUE_IDS = "os.setgroups(groups); os.setgid(uid); os.setuid(uid)"

# Both import all they need first: as another user they could not read what only root may.
WRITER = f"""
import os, sys, time
import numpy as np
import cases
uid, groups = int(sys.argv[1]), [int(group) for group in sys.argv[2].split(",")]
{TRUE_IDS}
probe = cases.Probe.open((4, 2))
probe.record_ids(np.array([[0, 1], [1, 2]]))
print(probe.path, os.getpid(), flush=True)
for _ in sys.stdin:
    probe.record_ids(np.array([[0, 1], [1, 2]]))
    print("recorded", flush=True)
"""
READER = f"""
import os, sys
import dodoco_ext as dodoco
from dodoco_ext.errors import RecordingError
dodoco.open, dodoco.Reader
path, uid, groups = sys.argv[1], int(sys.argv[2]), [int(group) for group in sys.argv[3].split(",")]
{TRUE_IDS}
try:
    reader = dodoco.open(path)
except RecordingError as error:
    print("refused", error.state, error, flush=True)
    sys.exit()
print("opened", reader.header["owner_pid"], os.getpid(), flush=True)
for _ in sys.stdin:
    counts = reader.snapshot().layers[0].counts.tolist()
    again = dodoco.open(path)
    assert again.uuid == reader.uuid and again.state == reader.state
    print(reader.state, counts, len(reader.records()), flush=True)
"""


class Talker:
    """A child process that is told and asked one line at a time."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.child = child

    def line(self) -> str:
        assert self.child.stdout is not None
        return self.child.stdout.readline().strip()

    def ask(self) -> str:
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        return self.line()


@contextlib.contextmanager
def talking(command: list[str], **environment: str) -> Iterator[Talker]:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env={**ENVIRONMENT, **environment}, stdin=pipe, stdout=pipe, text=True
    ) as child:
        try:
            yield Talker(child)
        finally:
            child.kill()


def first_child(talker: Talker) -> int:
    """Process 1 of a PID namespace, by the number that it has outside."""
    pid = talker.child.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@pytest.fixture
def volume() -> Iterator[Path]:
    """A volume in memory that two containers share, as an `emptyDir` with an `fsGroup`."""
    folder = Path(tempfile.mkdtemp(prefix="dodoco-test-", dir="/dev/shm"))
    os.chown(folder, 0, SHARED_GROUP)
    folder.chmod(0o2777)
    yield folder
    shutil.rmtree(folder)


class Sidecar(NamedTuple):
    """How the reader differs from the writer."""

    uid: int = SERVER
    pid: bool = False
    read_only: bool = False


SIDECARS = {
    "same": Sidecar(),
    "uid": Sidecar(uid=SIDECAR),
    "pid namespace": Sidecar(pid=True),
    "read-only mount": Sidecar(read_only=True),
    "all": Sidecar(uid=SIDECAR, pid=True, read_only=True),
}


@contextlib.contextmanager
def server(volume: Path, **how: bool) -> Iterator[tuple[Talker, Path]]:
    """A process that records into the volume, and its recording."""
    code = python(WRITER, str(SERVER), str(SHARED_GROUP))
    with talking(inside(*code, **how), DODOCO_DIR=str(volume / "dodoco")) as talker:
        path, pid = talker.line().rsplit(" ", 1)
        assert not how.get("pid") or pid == "1"
        yield talker, Path(path)


def sidecar(path: Path, volume: Path, kind: Sidecar, mount: Path) -> list[str]:
    """The command of a reader of a recording in a volume, which it sees at `mount`."""
    setup = f"mount --bind '{volume}' '{mount}'"
    if kind.read_only:
        setup += (
            f"; mount -o remount,bind,ro '{mount}'; touch '{mount}/x' 2> /dev/null && exit 1 || :"
        )
    seen = mount / path.relative_to(volume)
    code = python(READER, str(seen), str(kind.uid), str(SHARED_GROUP))
    return inside(*code, setup=setup, pid=kind.pid)


@pytest.fixture
def mount() -> Iterator[Path]:
    """Where the reader sees the volume; like it, not below a folder that others may not enter."""
    with tempfile.TemporaryDirectory(prefix="dodoco-test-", dir="/dev/shm") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("kind", SIDECARS)
@pytest.mark.parametrize("contained", [False, True], ids=["server", "server in a container"])
def test_a_sidecar_sees_live_then_dead(
    kind: str, contained: bool, volume: Path, mount: Path
) -> None:
    with server(volume, pid=contained) as (writer, path):
        assert path.stat().st_mode & 0o7777 == 0o640
        assert path.parent.stat().st_mode & 0o7777 == 0o2750
        assert (path.stat().st_uid, path.stat().st_gid) == (SERVER, SHARED_GROUP)
        with talking(sidecar(path, volume, SIDECARS[kind], mount)) as reader:
            opened, owner, own = reader.line().split()
            assert opened == "opened"
            if contained and SIDECARS[kind].pid:
                assert owner == own == "1", "the owner's PID is the reader's own: it says nothing"
            assert reader.ask() == "live [1, 2, 1, 0] 1"
            assert writer.ask() == "recorded"
            assert reader.ask() == "live [2, 4, 2, 0] 2"
            os.kill(writer.child.pid if not contained else first_child(writer), signal.SIGKILL)
            writer.child.wait()
            assert reader.ask() == "dead [2, 4, 2, 0] 2"


def test_the_volume_itself_may_be_the_folder(volume: Path, mount: Path) -> None:
    """It keeps the mode it has, and its group reads what lies in it."""
    code = python(WRITER, str(SERVER), str(SERVER))
    with talking(inside(*code), DODOCO_DIR=str(volume)) as writer:
        path = Path(writer.line().rsplit(" ", 1)[0])
        assert path.parent == volume
        assert volume.stat().st_mode & 0o7777 == 0o2777
        assert (path.stat().st_mode & 0o7777, path.stat().st_gid) == (0o640, SHARED_GROUP)
        with talking(sidecar(path, volume, SIDECARS["all"], mount)) as reader:
            assert reader.line().startswith("opened")
            assert reader.ask() == "live [1, 2, 1, 0] 1"


@pytest.mark.parametrize("what", ["file", "folder", "file in an open folder"])
def test_a_user_outside_the_group_is_refused_and_told_why(what: str, volume: Path) -> None:
    with server(volume) as (_, path):
        if "open" in what:
            path.parent.chmod(0o755)
        source = path.parent if what == "folder" else path
        code = python(READER, str(source), str(SIDECAR), str(SIDECAR))
        done = subprocess.run(
            code, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused unreadable")
    assert str(source) in done.stdout
    assert "Permission denied" in done.stdout
    assert done.stdout.count("\n") == 1
