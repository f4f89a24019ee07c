"""Cells on disk: whole or not there, and never another grid's."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from dodoco_ext.observatory.grid import cells
from grid_cases import planted

CELL = planted(None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / cells.file_name("zoo:mla", "uniform mock")
    cells.write(CELL, path)
    return path


def test_a_cell_comes_back(path: Path) -> None:
    found = cells.read_wanted(path, CELL.key)
    assert np.array_equal(found.counts, CELL.counts)
    assert np.array_equal(found.losses, CELL.losses)
    assert (found.top_k, found.layer_names, found.key) == (CELL.top_k, CELL.layer_names, CELL.key)
    assert path.name == "zoo-mla--uniform-mock.npz"


def test_same_numbers_make_the_same_bytes(path: Path, tmp_path: Path) -> None:
    cells.write(CELL, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


def test_a_truncated_cell_is_damaged(path: Path) -> None:
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:length])
        with pytest.raises(cells.BadCellError, match=r"zoo-mla--uniform-mock.npz is damaged"):
            cells.read(path)


def test_a_flipped_byte_never_changes_a_number(path: Path) -> None:
    """Bytes that a reader of the archive ignores may change; numbers may not."""
    whole, refused = bytearray(path.read_bytes()), 0
    for position in np.linspace(0, len(whole) - 1, 200).astype(int):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            found = cells.read(path)
        except cells.BadCellError:
            refused += 1
        else:
            assert found.sha256 == CELL.sha256
    assert refused > 150


def test_numbers_that_do_not_match_their_digest_are_damaged(path: Path) -> None:
    with np.load(path) as archive:
        meta, counts, losses = archive["meta"], archive["counts"], archive["losses"]
    np.savez_compressed(path, meta=meta, counts=counts + 1, losses=losses)
    with pytest.raises(cells.BadCellError, match="digest"):
        cells.read(path)


@pytest.mark.parametrize("what", ["model", "seed", "shape"])
def test_a_cell_of_another_grid_is_named(path: Path, what: str) -> None:
    with pytest.raises(cells.BadCellError, match=f"made with another {what}$"):
        cells.read_wanted(path, {**CELL.key, what: "other"})


def test_a_cell_that_cannot_be_written_leaves_the_old_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        cells.write(planted(np.linspace(0, 1, 32)), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_names_that_look_alike_do_not_share_a_file() -> None:
    names = {cells.file_name("m", name) for name in ("a/b", "a?b", "a b", "x" * 70, "x" * 71)}
    assert len(names) == 5
