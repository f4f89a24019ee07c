"""Where recordings lie: whose the folder is, how big a file is, what names say."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cases
import dodoco_ext as dodoco
from dodoco_ext import _C, folders, settings
from dodoco_ext.errors import RecordingError
from dodoco_ext.recorder import LayerSpec, Recorder, Uncovered
from dodoco_ext.recording import Reader
from dodoco_ext.settings import SUFFIX, Settings
from namespaces import ENVIRONMENT, inside, needs_root, python


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_chosen_folder_is_shared_with_its_group(recordings: Path) -> None:
    mask = os.umask(0o077)
    try:
        probe = cases.Probe.open((4, 2))
    finally:
        os.umask(mask)
    assert mode_of(recordings) == 0o2750
    assert mode_of(probe.path) == 0o640
    probe.recorder.close()


def test_a_chosen_folder_that_exists_keeps_its_mode_and_may_be_a_link(recordings: Path) -> None:
    target = recordings.parent / "target"
    target.mkdir(mode=0o755)
    target.chmod(0o755)
    recordings.symlink_to(target)
    probe = cases.Probe.open((4, 2))
    assert mode_of(target) == 0o755
    assert [path.name for path in target.iterdir()] == [probe.path.name]
    probe.recorder.close()


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No DODOCO_DIR, and stand-ins for /dev/shm and /tmp; returns the preferred folder."""
    for name in ("shm", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("DODOCO_DIR")
    monkeypatch.setattr(settings, "SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(settings.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "shm" / f"dodoco-{os.getuid()}"


def test_the_default_folder_is_private(private: Path) -> None:
    each = Recorder([LayerSpec("a", 4, 2)])
    assert each.path.parent == private
    assert mode_of(private) == 0o700
    assert mode_of(each.path) == 0o600
    each.close()


@pytest.mark.parametrize("flaw", ["mode", "owner", "link", "file"])
def test_a_private_folder_that_is_not_ours_alone_is_not_used(
    flaw: str, private: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if flaw == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        private.symlink_to(tmp_path / "elsewhere")
    elif flaw == "file":
        private.write_text("")
    else:
        private.mkdir(mode=0o700)
    if flaw == "mode":
        private.chmod(0o770)
    if flaw == "owner":
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(private, 12345, -1)
    each = Recorder([LayerSpec("a", 4, 2)])
    assert each.path.parent == tmp_path / "tmp" / private.name
    assert str(private) in caplog.text
    each.close()
    with pytest.raises(RecordingError, match="remove it, or set DODOCO_DIR"):
        folders.prepare_directory(private, shared=False)


def test_where_no_folder_will_do_the_reasons_are_one_line(private: Path, tmp_path: Path) -> None:
    private.mkdir()
    private.chmod(0o777)
    (tmp_path / "tmp" / private.name).write_text("")
    with pytest.raises(RecordingError, match=r"mode 777.*is not a folder.*DODOCO_DIR") as caught:
        Recorder([LayerSpec("a", 4, 2)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("max_bytes", [0, 1, 4096, 20000])
def test_a_size_too_small_is_an_error_that_names_the_setting(
    max_bytes: int, recordings: Path
) -> None:
    with pytest.raises(RecordingError, match="DODOCO_MAX_BYTES") as caught:
        Recorder(
            [LayerSpec("a", 256, 2)] * 3,
            settings=Settings(directory=recordings, max_bytes=max_bytes),
        )
    assert "\n" not in str(caught.value)
    assert list(recordings.iterdir()) == []


@pytest.mark.parametrize("max_bytes", [1 << 16, 100_000, 1 << 20])
def test_a_recording_is_as_big_as_its_header_says_and_no_bigger_than_allowed(
    max_bytes: int,
) -> None:
    probe = cases.Probe.open((60, 6), (8, 2), max_bytes=max_bytes)
    size = probe.path.stat().st_size
    assert size == probe.reader.header["file_bytes"] <= max_bytes
    # All of it is reserved: recording can never run out of space.
    assert probe.path.stat().st_blocks * 512 >= size
    # The ring could not have been twice as long.
    assert probe.reader.num_slots == probe.recorder.num_slots
    assert size + probe.reader.num_slots * 128 > max_bytes
    probe.recorder.close()


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    taken = tmp_path / f"a{SUFFIX}"
    taken.write_text("mine")
    with pytest.raises(OSError, match="exists"):
        _C.RecordingWriter(str(taken), "{}", [(4, 2)])
    link = tmp_path / f"b{SUFFIX}"
    link.symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="exists"):
        _C.RecordingWriter(str(link), "{}", [(4, 2)])
    assert taken.read_text() == "mine"
    assert not (tmp_path / "target").exists()


def test_metadata_says_who_wrote_it() -> None:
    uncovered = [Uncovered("x", "why")]
    each = Recorder([LayerSpec("a", 4, 2)], uncovered=uncovered, labels={"model_name": "m"})
    metadata = Reader(each.path).metadata
    assert metadata["layers"] == [{"name": "a", "num_experts": 4, "top_k": 2}]
    assert metadata["uncovered"] == [{"name": "x", "reason": "why"}]
    assert metadata["labels"] == {"model_name": "m"}
    assert metadata["versions"]["dodoco-ext"] == dodoco.__version__
    assert json.dumps(metadata)
    each.close()


def test_names_tell_run_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RUN", "job-7"), ("RANK", "3"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(f"DODOCO_{name}", value)
    one, other = Recorder([LayerSpec("a", 4, 2)]), Recorder([LayerSpec("a", 4, 2)])
    assert one.path.name.startswith("job-7.r00003.")
    assert one.path != other.path
    header = Reader(one.path).header
    assert (header["rank"], header["world_size"]) == (3, 8)
    one.close()
    other.close()


# --- other processes ----------------------------------------------------------------------------

RECORD = """
import json, os, stat, sys
import cases, numpy as np
from dodoco_ext import settings
from dodoco_ext.errors import RecordingError
from pathlib import Path
uid, mask, base = int(sys.argv[1]), int(sys.argv[2], 8), Path(sys.argv[3])
settings.SHARED_MEMORY = base / "shm"
settings.tempfile.tempdir = str(base / "tmp")
cases.Probe.open  # everything is imported: as another user it could not be
os.setgroups([]); os.setgid(uid); os.setuid(uid); os.umask(mask)
try:
    probe = cases.Probe.open((4, 2))
except RecordingError as error:
    print(json.dumps({"error": str(error)}), flush=True)
    sys.exit()
assert probe.record_ids(np.array([[0, 1]])) == 0
assert probe.snapshot().layers[0].passes == 1
def mode(path):
    return f"{stat.S_IMODE(path.stat().st_mode):o}"
print(json.dumps({
    "path": str(probe.path), "pid": os.getpid(), "mode": mode(probe.path),
    "folder": mode(probe.path.parent),
}), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter and write to, as /dev/shm and /tmp are."""
    with tempfile.TemporaryDirectory(prefix="dodoco-test-", dir="/dev/shm") as name:
        for folder in (Path(name), Path(name) / "shm", Path(name) / "tmp"):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o1777)
        yield Path(name)


def record_as(
    uid: int, mask: int, base: Path, wrapped: bool = False, **environment: str
) -> dict[str, Any]:
    """Records in another process, as a user and under a umask; says what came of it."""
    command = python(RECORD, str(uid), f"{mask:o}", str(base))
    done = subprocess.run(
        inside(*command, pid=True) if wrapped else command,
        env={**ENVIRONMENT, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


USER = 23001


@needs_root
@pytest.mark.parametrize("mask", [0o777, 0o277, 0o077, 0o022, 0])
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_modes_are_the_same_under_any_umask(shared: bool, mask: int, open_folder: Path) -> None:
    """As a user for whom they matter: root may do what no mode allows."""
    chosen = {"DODOCO_DIR": str(open_folder / "chosen")} if shared else {}
    found = record_as(USER, mask, open_folder, **chosen)
    folder = open_folder / "chosen" if shared else open_folder / "shm" / f"dodoco-{USER}"
    assert Path(found["path"]).parent == folder
    assert (found["folder"], found["mode"]) == (("2750", "640") if shared else ("700", "600"))


@needs_root
def test_another_users_folder_is_neither_used_nor_touched(open_folder: Path) -> None:
    """Whoever came first in /dev/shm cannot read what others record, nor stop them."""
    taken = open_folder / "shm" / f"dodoco-{USER}"
    taken.mkdir(mode=0o777)
    taken.chmod(0o777)
    found = record_as(USER, 0o022, open_folder)
    assert Path(found["path"]).parent == open_folder / "tmp" / f"dodoco-{USER}"
    assert list(taken.iterdir()) == []


@needs_root
def test_processes_of_the_same_number_do_not_get_in_each_others_way(recordings: Path) -> None:
    """Each is process 1 of a container, of the same run and rank, and sees the same folder."""
    environment = {"DODOCO_DIR": str(recordings), "DODOCO_RUN": "job", "DODOCO_RANK": "0"}
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                subprocess.Popen(
                    inside(*python(RECORD, "0", "022", str(recordings)), pid=True),
                    env={**ENVIRONMENT, **environment},
                    stdin=subprocess.PIPE,  # closed on leaving, which ends the process
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(4)
        ]
        found = [json.loads(child.stdout.readline()) for child in children if child.stdout]
        assert [each["pid"] for each in found] == [1] * 4
        readers = [Reader(each["path"]) for each in found]
        assert len({reader.path for reader in readers}) == len({r.uuid for r in readers}) == 4
        for reader in readers:
            assert reader.path.name.startswith("job.r00000.")
            assert reader.state == "live"
            assert reader.snapshot().layers[0].passes == 1
        children[0].communicate(timeout=60)
        # The one that ended is not mistaken for one that goes on under its number.
        assert [reader.state for reader in readers] == ["closed", "live", "live", "live"]


NO_FLOCK = """
#include <errno.h>
extern "C" int flock(int, int) { errno = ENOLCK; return -1; }
"""


@pytest.fixture
def without_locks(tmp_path: Path) -> dict[str, str]:
    """The environment of a process to which every file system is one that knows no flock."""
    source, library = tmp_path / "noflock.cpp", tmp_path / "noflock.so"
    source.write_text(NO_FLOCK)
    compiler = os.environ.get("CXX") or shutil.which("g++") or sysconfig.get_config_var("CXX")
    command = [*str(compiler).split(), "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(library)}


@needs_root
def test_where_locks_are_refused_nothing_is_recorded(
    recordings: Path, without_locks: dict[str, str]
) -> None:
    """A recording without a lock would look dead while it is live, and be pruned."""
    found = record_as(0, 0o022, recordings, DODOCO_DIR=str(recordings), **without_locks)
    assert "No locks available" in found["error"]
    assert "Set DODOCO_DIR" in found["error"]
    assert list(recordings.iterdir()) == []


def test_where_locks_are_refused_no_recording_is_called_live(
    tmp_path: Path, without_locks: dict[str, str]
) -> None:
    """Such as one that was copied to a network file system."""
    path = tmp_path / "copied.dodoco"
    writer = _C.RecordingWriter(str(path), '{"layers": [{"name": "a"}]}', [(4, 2)])
    image = path.read_bytes()
    writer.close()
    path.write_bytes(image)
    code = "import sys; from dodoco_ext.recording import Reader; print(Reader(sys.argv[1]).state)"
    done = subprocess.run(
        python(code, str(path)),
        env={**ENVIRONMENT, **without_locks},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "dead\n"
