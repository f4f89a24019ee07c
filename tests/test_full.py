"""Small, full and read-only file systems: a clear message, another folder, and never a SIGBUS."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from namespaces import ENVIRONMENT, inside, needs_root, python

pytestmark = needs_root
KIB, MIB = 1 << 10, 1 << 20

# Records while it can, and says how it went; the file system may be full from the start or filled
# by `fill()` meanwhile.
START = """
import contextlib, json, os, sys
from pathlib import Path
import numpy as np
import cases
from dodoco_ext import _C
from dodoco_ext.errors import RecordingError
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings

def fill(folder):
    "Takes all space there is, to the last byte."
    with contextlib.suppress(OSError), open(os.path.join(folder, "filler"), "ab", 0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))

def probe(*layers):
    "As `attach()` opens a recording, with the environment's settings."
    specs = [LayerSpec(f"layers.{i}", E, k) for i, (E, k) in enumerate(layers)]
    recorder = Recorder(specs)
    sites = [np.zeros(_C.SITE_BYTES // 8, np.uint64) for _ in layers]
    for index, site in enumerate(sites):
        recorder.bind(index, site, site.ctypes.data)
    return cases.Probe(recorder, sites, Reader(recorder.path))

def record(probe, passes):
    "Passes of every layer, more than the ring holds if there are enough."
    rng = np.random.default_rng(0)
    expected = [np.zeros(layer.num_experts, np.uint64) for layer in probe.recorder.layers]
    for _ in range(passes):
        for index, layer in enumerate(probe.recorder.layers):
            ids = rng.integers(0, layer.num_experts, (5, layer.top_k or 1))
            assert probe.record_ids(ids, index) == 0
            expected[index] += np.bincount(ids.ravel(), minlength=layer.num_experts).astype("u8")
    return expected

def exact(probe, expected):
    found = [layer.counts for layer in probe.snapshot().layers]
    return all((a == b).all() for a, b in zip(found, expected, strict=True))

def say(**what):
    print(json.dumps(what), flush=True)

SMALL, LARGE = [(8, 2)], [(256, 8)] * 58
"""


def run(code: str, *, setup: str, tmp: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """Runs `code` where `setup` has been done: (what it said, its warnings)."""
    tmp.mkdir(exist_ok=True)
    done = subprocess.run(
        inside(*python(START + code), setup=setup),
        env={**ENVIRONMENT, "TMPDIR": str(tmp), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout), done.stderr


def mounted(options: str, then: str = ":") -> str:
    return f"mount -t tmpfs -o {options} tmpfs /dev/shm; {then}"


def assert_told_that_it_is_small(warnings: str, times: int = 1) -> None:
    """One line a recording: it has less than the settings allow, why, and what to do."""
    lines = warnings.splitlines()
    assert len(lines) == times
    for line in lines:
        assert "a tenth of what is free in /dev/shm/dodoco-0" in line
        assert "DODOCO_MAX_BYTES" in line


# --- small --------------------------------------------------------------------------------------

RECORD_IN_FULL = """
opened = probe(*{layers})
expected = record(opened, {passes})
records, _, lost = opened.reader.read()
opened.recorder.close()
say(
    path=str(opened.path), exact=exact(opened, expected), size=opened.path.stat().st_size,
    records=len(records), lost=lost, slots=opened.reader.num_slots,
)
"""


@pytest.mark.parametrize("layers", ["SMALL", "LARGE"])
def test_in_64_mib_a_recording_takes_a_tenth_of_what_is_free(layers: str, tmp_path: Path) -> None:
    code = RECORD_IN_FULL.format(layers=layers, passes=2000)
    found, warnings = run(code, setup=mounted("size=64m"), tmp=tmp_path / "tmp")
    assert found["path"].startswith("/dev/shm/dodoco-0/")
    assert found["exact"]
    assert 3 * MIB < found["size"] <= 6.4 * MIB
    assert found["records"] + found["lost"] == 2000 * (58 if layers == "LARGE" else 1)
    assert_told_that_it_is_small(warnings)


def test_in_64_mib_sixteen_ranks_find_room(tmp_path: Path) -> None:
    code = """
opened = [probe(*LARGE) for _ in range(16)]
expected = [record(each, 20) for each in opened]
say(
    folders=sorted({str(each.path.parent) for each in opened}),
    exact=all(map(exact, opened, expected)),
    slots=[each.reader.num_slots for each in opened],
    free=__import__("shutil").disk_usage("/dev/shm").free,
)
"""
    found, warnings = run(code, setup=mounted("size=64m"), tmp=tmp_path / "tmp")
    assert found["folders"] == ["/dev/shm/dodoco-0"]
    assert found["exact"]
    assert found["free"] > 10 * MIB, "nine tenths of what was free are left to others each time"
    assert min(found["slots"]) >= 2048
    assert_told_that_it_is_small(warnings, 16)


def test_in_1_mib_a_small_model_records_and_a_large_one_goes_elsewhere(tmp_path: Path) -> None:
    code = RECORD_IN_FULL.format(layers="SMALL", passes=500)
    found, warnings = run(code, setup=mounted("size=1m"), tmp=tmp_path / "tmp")
    assert found["path"].startswith("/dev/shm/dodoco-0/")
    assert found["exact"]
    assert found["size"] <= 104 * KIB
    assert_told_that_it_is_small(warnings)
    code = RECORD_IN_FULL.format(layers="LARGE", passes=50)
    found, warnings = run(code, setup=mounted("size=1m"), tmp=tmp_path / "tmp")
    assert_went_elsewhere(found, warnings, tmp_path / "tmp", "the recording needs at least")


# --- full ---------------------------------------------------------------------------------------


def assert_went_elsewhere(found: dict[str, Any], warnings: str, tmp: Path, why: str) -> None:
    """Recorded in the other folder, exactly, with one line that says so and why."""
    assert found["path"].startswith(str(tmp / "dodoco-0"))
    assert found["exact"]
    assert warnings.count("\n") == 1
    assert f"recording to {tmp}/dodoco-0, because /dev/shm/dodoco-0: " in warnings
    assert why in warnings


FULL = {
    "full": (mounted("size=1m", "cat /dev/zero > /dev/shm/filler 2> /dev/null || :"), "free space"),
    "no inodes": (mounted("size=64m,nr_inodes=1"), "No space left on device"),
    "no inode for a file": (mounted("size=64m,nr_inodes=2"), "No space left on device"),
    "read-only": (mounted("size=64m,ro"), "Read-only file system"),
    "missing": ("mount -t tmpfs -o size=1m tmpfs /dev", "No such file or directory"),
    "not writable": (mounted("size=64m", "mount --bind /proc/sys /dev/shm"), ""),
}


@pytest.mark.parametrize("how", FULL)
def test_where_shared_memory_takes_nothing_recording_goes_elsewhere(
    how: str, tmp_path: Path
) -> None:
    setup, why = FULL[how]
    code = RECORD_IN_FULL.format(layers="LARGE", passes=50)
    found, warnings = run(code, setup=setup, tmp=tmp_path / "tmp")
    assert_went_elsewhere(found, warnings, tmp_path / "tmp", why)
    assert found["size"] > 3 * MIB


# As a container with a read-only root has it: nowhere may a file be made.
READ_ONLY = """
for folder in / /tmp /var/tmp; do
  mount --bind $folder $folder
  mount -o remount,bind,ro $folder
done
cd /proc
"""


@pytest.mark.parametrize("chosen", [False, True], ids=["default", "DODOCO_DIR"])
def test_on_a_read_only_system_the_error_is_one_line(chosen: bool, tmp_path: Path) -> None:
    code = """
try:
    probe(*SMALL)
except RecordingError as error:
    say(error=str(error), state=error.state)
"""
    setup = mounted("size=1m,ro", READ_ONLY)
    environment = {"DODOCO_DIR": "/dev/shm/chosen"} if chosen else {}
    found, _ = run(code, setup=setup, tmp=tmp_path / "tmp", **environment)
    folder = "/dev/shm/chosen" if chosen else "/dev/shm/dodoco-0"
    assert found["error"].startswith(f"cannot create a recording: {folder}: ")
    assert "Read-only file system" in found["error"]
    assert "Set DODOCO_DIR" in found["error"]
    assert "\n" not in found["error"]
    assert found["state"] == ""


def test_on_a_read_only_system_shared_memory_is_enough(tmp_path: Path) -> None:
    code = RECORD_IN_FULL.format(layers="SMALL", passes=50)
    found, warnings = run(code, setup=mounted("size=64m", READ_ONLY), tmp=tmp_path / "tmp")
    assert found["path"].startswith("/dev/shm/dodoco-0/")
    assert found["exact"]
    assert_told_that_it_is_small(warnings)


@pytest.mark.parametrize("layers", ["SMALL", "LARGE"])
def test_a_chosen_folder_that_is_full_is_an_error(layers: str, tmp_path: Path) -> None:
    """No other folder is tried: whoever reads looks in the chosen one."""
    code = f"""
try:
    probe(*{layers})
except RecordingError as error:
    say(error=str(error), left=os.listdir("/dev/shm/chosen"))
"""
    setup = mounted("size=1m", "mkdir /dev/shm/chosen; cat /dev/zero > /dev/shm/x 2>&- || :")
    found, _ = run(code, setup=setup, tmp=tmp_path / "tmp", DODOCO_DIR="/dev/shm/chosen")
    assert found["error"].startswith("cannot create a recording: /dev/shm/chosen: ")
    assert "free space" in found["error"]
    assert found["left"] == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_recording_that_does_not_fit_after_all_leaves_nothing(tmp_path: Path) -> None:
    """Another process was faster: free space was there when it was asked for."""
    code = """
for size in (2 << 20, (1 << 20) + (64 << 10)):
    try:
        _C.RecordingWriter("/dev/shm/a.dodoco", "{}", [(8, 2)], max_bytes=size)
    except OSError as error:
        say(error=str(error), left=os.listdir("/dev/shm")) if size == 2 << 20 else None
"""
    found, _ = run(code, setup=mounted("size=1m"), tmp=tmp_path / "tmp")
    assert "No space left on device" in found["error"]
    assert found["left"] == []


# --- full later ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["shared memory", "fallback"])
def test_a_file_system_that_fills_up_later_disturbs_no_recording(
    where: str, tmp_path: Path
) -> None:
    """All space was taken at the start, so that not one page is missing later."""
    code = """
opened = probe(*LARGE)
parent = opened.path.parent.parent
fill(parent)
try:
    (parent / "one more").write_bytes(bytes(1 << 13))
    full = False
except OSError:
    full = True
expected = record(opened, 300)
before = exact(opened, expected)
opened.recorder.close()
say(
    path=str(opened.path), full=full, exact=before and exact(opened, expected),
    slots=opened.reader.num_slots, records=len(opened.reader.records()),
    state=Reader(opened.path).state,
)
"""
    tmp = tmp_path / "tmp"
    setup = mounted("size=20m")
    if where == "fallback":
        tmp.mkdir()
        setup = f"mount -t tmpfs -o size=20m tmpfs '{tmp}'; mount -t tmpfs -o ro tmpfs /dev/shm"
    found, _ = run(code, setup=setup, tmp=tmp)
    assert found["path"].startswith(str(tmp) if where == "fallback" else "/dev/shm/")
    assert found["full"]
    assert found["exact"]
    assert found["records"] == found["slots"] < 300 * 58, "the whole ring was written to"
    assert found["state"] == "closed"


def test_the_next_recording_after_it_filled_up_goes_elsewhere(tmp_path: Path) -> None:
    code = """
first = probe(*SMALL)
fill("/dev/shm")
second = probe(*SMALL)
expected = [record(first, 10), record(second, 20)]
say(
    paths=[str(first.path), str(second.path)],
    exact=exact(first, expected[0]) and exact(second, expected[1]),
)
"""
    found, warnings = run(code, setup=mounted("size=8m"), tmp=tmp_path / "tmp")
    assert found["paths"][0].startswith("/dev/shm/dodoco-0/")
    assert found["paths"][1].startswith(str(tmp_path / "tmp" / "dodoco-0"))
    assert found["exact"]
    small, elsewhere = warnings.splitlines()
    assert_told_that_it_is_small(small)
    assert "because /dev/shm/dodoco-0: the recording needs at least" in elsewhere


# --- what doctor says ---------------------------------------------------------------------------


def doctor(setup: str, tmp: Path, **environment: str) -> tuple[int, dict[str, Any]]:
    """`dodoco doctor --json` in such a place: (exit status, what it printed)."""
    tmp.mkdir(exist_ok=True)
    code = "from dodoco_ext.cli import main; main()"
    done = subprocess.run(
        inside(*python(code, "doctor", "--json"), setup=setup),
        env={**ENVIRONMENT, "TMPDIR": str(tmp), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode in (0, 1), f"exit status {done.returncode}\n{done.stderr}"
    return done.returncode, json.loads(done.stdout)


def checks(found: dict[str, Any], name: str) -> list[dict[str, str]]:
    return [check for check in found["checks"] if check["name"] == name]


# The doctor makes no folder, so that one free inode looks to it like room for a recording.
@pytest.mark.parametrize("how", ["64 MiB", *(how for how in FULL if how != "no inode for a file")])
def test_doctor_explains_such_a_place(how: str, tmp_path: Path) -> None:
    setup = mounted("size=64m") if how == "64 MiB" else FULL[how][0]
    status, found = doctor(setup, tmp_path / "tmp")
    assert (status, found["can_record"]) == (0, True)
    (place,) = checks(found, "/dev/shm/dodoco-0")
    fallback = checks(found, str(tmp_path / "tmp" / "dodoco-0"))
    if how == "64 MiB":
        assert place["status"] == "ok"
        assert fallback == []
        (small,) = checks(found, "/dev/shm")
        assert "only 64" in small["value"]
        assert "--shm-size" in small["advice"]
    else:
        assert place["status"] == "warning"
        assert place["advice"]
        assert len(fallback) == 1
    assert len(checks(found, "trial recording")) == 1


def test_doctor_explains_a_chosen_folder_that_is_full(tmp_path: Path) -> None:
    setup = mounted("size=1m", "mkdir /dev/shm/chosen; cat /dev/zero > /dev/shm/x 2>&- || :")
    status, found = doctor(setup, tmp_path / "tmp", DODOCO_DIR="/dev/shm/chosen")
    assert (status, found["can_record"]) == (1, False)
    (place,) = checks(found, "/dev/shm/chosen")
    assert place["status"] == "error"
    assert "free space" in place["advice"]


def test_doctor_explains_a_read_only_system(tmp_path: Path) -> None:
    status, found = doctor(mounted("size=1m,ro", READ_ONLY), tmp_path / "tmp")
    assert (status, found["can_record"]) == (1, False)
    (place,) = checks(found, "/dev/shm/dodoco-0")
    assert place["status"] == "error"
    assert place["advice"]
