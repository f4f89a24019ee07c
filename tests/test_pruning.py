"""Which recordings are removed, by a new recorder of the same rank or on request, and which never."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

import dodoco_ext as dodoco
from dodoco_ext import _C
from dodoco_ext.pruning import KEPT_PER_RANK, prune
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import Reader
from dodoco_ext.settings import SUFFIX


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


def make_ranks(folder: Path, *, ranks: int = 3, each: int = 4) -> dict[int, list[Path]]:
    """Dead recordings of several ranks, the oldest of each first."""
    folder.mkdir()
    return {
        rank: [
            make_dead(folder, f"run.r{rank:05d}.{rank}{i}{SUFFIX}", 1000 - i) for i in range(each)
        ]
        for rank in range(ranks)
    }


@pytest.mark.parametrize("keep", [0, 1, 2, 9])
def test_on_request_each_rank_keeps_its_latest(keep: int, recordings: Path) -> None:
    of_rank = make_ranks(recordings)
    removed = prune(recordings, keep=keep)
    expected = {path for paths in of_rank.values() for path in paths[: max(4 - keep, 0)]}
    assert len(removed) == len(set(removed))
    assert set(removed) == expected
    assert set(recordings.iterdir()) == {p for ps in of_rank.values() for p in ps} - expected


def test_on_request_only_one_rank_is_pruned(recordings: Path) -> None:
    of_rank = make_ranks(recordings)
    assert set(prune(recordings, 1)) == set(of_rank[1][:2])
    assert set(recordings.iterdir()) == {*of_rank[0], *of_rank[1][2:], *of_rank[2]}


def test_a_missing_folder_has_nothing_to_prune(recordings: Path) -> None:
    assert prune(recordings) == []
    assert not recordings.exists()


def test_what_lives_stays_even_if_none_is_to_be_kept(recordings: Path) -> None:
    live = Recorder([LayerSpec("a", 4, 2)])
    closed = Recorder([LayerSpec("a", 4, 2)])
    closed.close()
    for each in (live, closed):
        os.utime(each.path, (0, 0))
    assert prune(recordings, keep=0) == [closed.path]
    assert Reader(live.path).state == "live"
    live.close()
    assert prune(recordings, keep=0) == [live.path]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_files_are_removed(kind: str, recordings: Path, tmp_path: Path) -> None:
    recordings.mkdir()
    target = make_dead(tmp_path, f"run.r00000.aa{SUFFIX}", 1000)
    odd = recordings / f"run.r00000.bb{SUFFIX}"
    if kind == "link":
        odd.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.mkdir()
    os.utime(odd, (0, 0), follow_symlinks=False)
    assert prune(recordings, keep=0) == []
    Recorder([LayerSpec("a", 4, 2)]).close()
    assert target.exists()
    assert os.path.lexists(odd)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away; CI runs as root")
def test_another_users_recordings_stay(recordings: Path) -> None:
    of_rank = make_ranks(recordings, ranks=1)
    os.chown(of_rank[0][0], 23001, -1)
    assert set(prune(recordings, keep=0)) == set(of_rank[0][1:])
    assert of_rank[0][0].exists()


def test_what_was_never_finished_goes_once_it_is_old(recordings: Path) -> None:
    """A process killed while it created its recording leaves a file that nobody can use."""
    recordings.mkdir()
    old, new = (recordings / f"run.r00000.{name}{SUFFIX}" for name in ("aa", "bb"))
    for path, age in ((old, 1000), (new, 0)):
        path.write_bytes(bytes(1 << 16))
        os.utime(path, (time.time() - age,) * 2)
    assert prune(recordings, keep=0) == [old]
    assert new.exists()


def test_many_may_prune_at_once(recordings: Path) -> None:
    """Ranks of a job that start together; every file is removed once, and by none that fails."""
    of_rank = make_ranks(recordings, each=40)
    barrier, removed, failed = threading.Barrier(4), [], []

    def work() -> None:
        barrier.wait()
        try:
            removed.extend(prune(recordings))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    left = {path for paths in of_rank.values() for path in paths[-KEPT_PER_RANK:]}
    assert set(recordings.iterdir()) == left
    assert set(removed) == {p for ps in of_rank.values() for p in ps} - left


def test_a_reader_goes_on_with_a_recording_that_is_pruned(recordings: Path) -> None:
    of_rank = make_ranks(recordings, ranks=1)
    reader = dodoco.open(of_rank[0][0])
    assert of_rank[0][0] in prune(recordings)
    assert reader.state == "dead"
    assert len(reader.snapshot().layers) == 1
