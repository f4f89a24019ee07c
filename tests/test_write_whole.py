"""Files of the observatory: whole or not there, and nothing beside them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.grid.results import Numbers
from dodoco_ext.observatory.page.write import write_page
from dodoco_ext.observatory.whole import write_whole
from page_cases import WHOLE, planted_numbers, write_grid


def full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return planted_numbers(WHOLE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.json"
    path.write_text("former")
    return path


def test_the_former_file_stays_until_the_new_one_is_whole(path: Path) -> None:
    with write_whole(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "former"
    assert files_in(path.parent) == {path.name: b"new"}


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
def test_a_failure_while_writing_leaves_the_former_file_and_no_partial(
    path: Path, error: type[BaseException]
) -> None:
    def fail() -> None:
        with write_whole(path) as partial:
            partial.write_text("ne")
            raise error

    with pytest.raises(error):
        fail()
    assert files_in(path.parent) == {path.name: b"former"}


def test_a_disk_that_is_full_when_synchronised_leaves_the_former_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), write_whole(path) as partial:
        partial.write_text("new")
    assert files_in(path.parent) == {path.name: b"former"}


def test_a_failure_before_the_first_byte_is_the_one_that_is_told(path: Path) -> None:
    with pytest.raises(ValueError, match="no numbers"), write_whole(path):
        raise ValueError("no numbers")
    assert files_in(path.parent) == {path.name: b"former"}


@pytest.mark.parametrize("what", ["html", "figures", "latex"])
def test_a_report_that_cannot_be_written_leaves_the_former_one(
    tmp_path: Path, numbers: Numbers, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    results = write_grid(tmp_path / "grid", numbers)
    for path in write_page(results, only=[what]):
        path.write_text("former")
    before = files_in(results)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space"):
        write_page(results, only=[what])
    assert files_in(results) == before
