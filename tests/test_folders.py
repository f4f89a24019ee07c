"""Where recordings lie: whose the folder is, how big a file is, what is pruned, what names say."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest

import cases
import dodoco_ext as dodoco
from dodoco_ext import _C, recorder, settings
from dodoco_ext.errors import RecordingError
from dodoco_ext.recorder import KEPT_PER_RANK, SUFFIX, LayerSpec, Recorder
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings


def make_dead(folder: Path, name: str, age_s: float) -> Path:
    """A recording as a killed process leaves it: live by its header, locked by nobody."""
    path = folder / name
    writer = _C.RecordingWriter(
        str(path), '{"layers": [{"name": "a"}]}', [(4, 2)], max_bytes=1 << 16
    )
    image = path.read_bytes()
    writer.close()
    path.unlink()
    path.write_bytes(image)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_pruning_keeps_the_last_dead_ones_of_a_rank_and_whatever_is_not_its_own(
    recordings: Path,
) -> None:
    recordings.mkdir()
    dead = [make_dead(recordings, f"run{i}.r00000.0{i}{SUFFIX}", 1000 - i) for i in range(5)]
    assert Reader(dead[0]).state == "dead"
    other_rank = [make_dead(recordings, f"run{i}.r00001.0{i}{SUFFIX}", 2000) for i in range(5)]
    newborn = make_dead(recordings, f"new.r00000.ff{SUFFIX}", 0)
    foreign = [recordings / "notes.txt", recordings / f"notes{SUFFIX}", recordings / "a.r00000.00"]
    for path in foreign:
        path.write_text("not yours")
        os.utime(path, (0, 0))
    folder = recordings / f"folder.r00000.00{SUFFIX}"
    folder.mkdir()
    live = Recorder([LayerSpec("a", 4, 2)])
    os.utime(live.path, (0, 0))
    again = Recorder([LayerSpec("a", 4, 2)])
    left = set(recordings.iterdir())
    assert left == {
        *dead[-KEPT_PER_RANK:],
        *other_rank,
        newborn,
        *foreign,
        folder,
        live.path,
        again.path,
    }
    live.close()
    again.close()


def test_pruning_counts_closed_recordings_too(recordings: Path) -> None:
    paths = []
    for age in (30, 20, 10, 0):
        each = Recorder([LayerSpec("a", 4, 2)])
        each.close()
        os.utime(each.path, (time.time() - age,) * 2)
        paths.append(each.path)
    # The last one was made before it was closed itself: two older ones stayed with it.
    assert set(recordings.iterdir()) == set(paths[1:])


def test_readers_delete_nothing(recordings: Path) -> None:
    recordings.mkdir()
    dead = [make_dead(recordings, f"run.r00000.0{i}{SUFFIX}", 1000 + i) for i in range(4)]
    for path in dead:
        dodoco.open(path).snapshot()
    dodoco.open(recordings)
    assert set(recordings.iterdir()) == set(dead)


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
        recorder.prepare_directory(private, shared=False)


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
    uncovered = [recorder.Uncovered("x", "why")]
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
