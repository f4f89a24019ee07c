"""SOURCE means the same everywhere: a file, a folder, a PID, a name, a run, or the latest."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cases
import dodoco_ext as dodoco
from dodoco_ext.errors import RecordingError
from dodoco_ext.sources import find, resolve


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three recordings of this process, oldest first, of the runs old, new and new."""
    paths = []
    for age, run in ((30, "old"), (20, "new"), (10, "new")):
        monkeypatch.setenv("DODOCO_RUN", run)
        probe = cases.Probe.open((4, 2))
        probe.recorder.close()
        os.utime(probe.path, (time.time() - age,) * 2)
        paths.append(probe.path)
    return paths


def test_a_file_is_itself(three: list[Path]) -> None:
    for path in three:
        assert resolve(path) == resolve(str(path)) == path


def test_a_file_may_have_any_name(three: list[Path], tmp_path: Path) -> None:
    moved = three[0].rename(tmp_path / "kept for later")
    assert dodoco.open(moved).path == moved


def test_nothing_and_a_folder_mean_the_latest(three: list[Path], recordings: Path) -> None:
    assert resolve(None) == resolve(recordings) == resolve(str(recordings)) == three[-1]


def test_a_run_means_its_latest_and_a_name_means_the_one(three: list[Path]) -> None:
    assert resolve("old") == three[0]
    assert resolve("new") == three[2]
    assert resolve(three[1].name) == three[1]


def test_a_pid_means_what_that_process_recorded_last(three: list[Path]) -> None:
    assert resolve(os.getpid()) == resolve(str(os.getpid())) == three[-1]


def test_a_run_may_have_a_number_for_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a job of Slurm's has; a process of that number comes first."""
    monkeypatch.setenv("DODOCO_RUN", "4194305")
    probe = cases.Probe.open((4, 2))
    assert resolve("4194305") == resolve(4194305) == probe.path
    probe.recorder.close()


def test_a_file_comes_before_a_pid(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(three[0].parent)
    renamed = three[0].rename(three[0].with_name(str(os.getpid())))
    assert resolve(str(os.getpid())).resolve() == renamed


def test_broken_recordings_are_passed_over_and_listed(three: list[Path], recordings: Path) -> None:
    broken = recordings / "zzz.r00000.00.dodoco"
    broken.write_text("nothing")
    assert resolve(None) == three[-1]
    first, *rest = find()
    assert first.path == broken
    assert first.reader is None
    assert "not a DODOCO recording" in first.problem
    assert [each.path for each in rest] == three[::-1]
    assert all(each.reader is not None for each in rest)


def test_where_all_are_broken_the_reason_is_given(recordings: Path) -> None:
    recordings.mkdir()
    (recordings / "zzz.r00000.00.dodoco").write_text("nothing")
    with pytest.raises(RecordingError, match="not a DODOCO recording"):
        resolve(None)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (None, "there is no recording yet"),
        ("nonsense", "nonsense is neither a file nor a recording nor a run"),
        ("no/such/file.dodoco", "neither a file"),
        (1, "no recording of process 1"),
        ("4194305", "no recording of process 4194305"),
    ],
)
def test_what_is_not_found_is_one_line_that_says_where_was_looked(
    source: str | int | None, complaint: str, recordings: Path
) -> None:
    with pytest.raises(RecordingError, match=complaint) as caught:
        resolve(source)
    message = str(caught.value)
    assert str(recordings) in message
    assert "attach()" in message
    assert "\n" not in message


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordingError, match=r"empty holds no recording \(looked in .*empty\)"):
        resolve(tmp_path / "empty")


def test_a_missing_folder_holds_nothing(recordings: Path) -> None:
    assert find() == []
    assert find((recordings / "none",)) == []


def test_a_forbidden_folder_is_named_unless_another_one_helps(
    three: list[Path],
    recordings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """tests/test_containers.py does it for real, with one folder."""
    forbidden, list_folder = tmp_path / "forbidden", Path.iterdir

    def refuse(folder: Path) -> Iterator[Path]:
        if folder == forbidden:
            raise PermissionError(errno.EACCES, "Permission denied")
        return list_folder(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(RecordingError, match="Permission denied: read it as its owner") as caught:
        find((forbidden,))
    assert caught.value.state == "unreadable"
    assert [each.path for each in find((forbidden, recordings))] == three[::-1]
    assert str(forbidden) in caplog.text
