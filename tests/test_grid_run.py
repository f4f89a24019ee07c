"""`dodoco observe --preset grid` as a process: same bytes whatever happens to it, no finished cell lost."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.command import observe
from dodoco_ext.observatory.grid.cells import read
from dodoco_ext.observatory.grid.pool import Queue
from dodoco_ext.observatory.grid.results import read_json
from dodoco_ext.observatory.grid.worker import Task
from grid_cases import command, observe_grid
from namespaces import inside, needs_root

pytest.importorskip("transformers")
CELLS = 6
WITHIN_S = 120


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder, made by one process."""
    folder = tmp_path_factory.mktemp("grid")
    out = folder / "out"
    done = observe_grid(folder, out, "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cells") == CELLS
    return out


def numbers_of(folder: Path) -> dict[str, Any]:
    return dict(read_json(folder)["numbers"])


def cells_in(folder: Path) -> list[Path]:
    return sorted((folder / "cells").glob("*.npz"))


def copied(finished: Path, to: Path) -> Path:
    """The cells of a finished grid in another folder."""
    (to / "cells").mkdir(parents=True)
    for path in cells_in(finished):
        (to / "cells" / path.name).write_bytes(path.read_bytes())
    return to


def started(folder: Path, out: Path) -> subprocess.Popen[str]:
    """The command in a session of its own, so that all of it can be signalled.

    What a shell runs in the background ignores Ctrl-C, and so would all that it starts.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command(folder, out, "--jobs", "2"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for_cells(out: Path, number: int) -> None:
    give_up = time.monotonic() + WITHIN_S
    while not len(cells_in(out)) >= number:
        assert time.monotonic() < give_up, "no cell was finished"
        time.sleep(0.01)


def is_there(group: int) -> bool:
    """Whether a process group has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_cell_is_there_at_equal_tokens(finished: Path) -> None:
    numbers = numbers_of(finished)
    pairs = {(cell["model"], cell["condition"]) for cell in numbers["cells"]}
    assert pairs == {
        (m, c)
        for m in ("zoo:mla", "zoo:gqa")
        for c in ("uniform mock", "shuffled fox.txt", "fox.txt")
    }
    assert {cell["num_tokens"] for cell in numbers["cells"]} == {2 * 16 * 16}
    assert len(cells_in(finished)) == CELLS
    assert len(numbers["batch_scans"]) == CELLS
    assert len(numbers["ratios"]) == 2 * 2
    assert len(numbers["gaps"]) == 2
    for cell in numbers["cells"]:
        assert cell["ep_scan"]["model"] == cell["model"]
        assert len(cell["layers"]) == 4
        assert cell["ranks"]["max_over_mean"] >= 1


def test_the_table_holds_what_the_numbers_hold(finished: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(finished / "cells.parquet").to_pylist()
    numbers = numbers_of(finished)
    assert len(rows) == CELLS * (1 + 4)
    for row in rows:
        cell = next(
            c
            for c in numbers["cells"]
            if (c["model"], c["condition"]) == (row["model"], row["condition"])
        )
        figures = cell if row["layer"] < 0 else cell["layers"][row["layer"]]
        assert row["expert_gini"] == figures["experts"]["gini"]
        assert (
            row["rank_max_over_mean_interval_low"] == figures["ranks"]["max_over_mean_interval"][0]
        )


def test_no_machine_path_and_no_host_in_the_results(finished: Path) -> None:
    text = (finished / "grid.json").read_text()
    assert str(finished.parent) not in text
    assert os.uname().nodename not in text


def test_two_processes_give_the_same_bytes_of_numbers(finished: Path, tmp_path: Path) -> None:
    done = observe_grid(tmp_path, tmp_path / "out", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "out")["numbers_sha256"] == read_json(finished)["numbers_sha256"]
    for path in cells_in(finished):
        assert read(path).sha256 == read(tmp_path / "out" / "cells" / path.name).sha256


def test_another_seed_feeds_other_data(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = observe_grid(tmp_path, copied(finished, out), "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("was made with another data, seed; it was made again") == CELLS
    ours, theirs = numbers_of(out)["cells"], numbers_of(finished)["cells"]
    assert all(a["sha256"] != b["sha256"] for a, b in zip(ours, theirs, strict=True))


def test_killed_it_goes_on_to_the_same_numbers_and_names_a_corrupt_cell(
    finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = started(tmp_path, out)
    try:
        wait_for_cells(out, 2)
    finally:
        process.kill()  # its workers are left to themselves
    assert process.stderr is not None
    process.stderr.read()  # ends once they have ended
    process.wait(WITHIN_S)
    assert not (out / "grid.json").exists()
    victim, *others = cells_in(out)
    kept = {path: path.stat().st_mtime_ns for path in others}
    victim.write_bytes(victim.read_bytes()[:-100])
    done = observe_grid(tmp_path, out)
    assert done.returncode == 0, done.stderr
    assert f"{victim.name} is damaged" in done.stderr
    assert done.stderr.count("(kept)") == len(kept) >= 1
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert read_json(out)["numbers_sha256"] == read_json(finished)["numbers_sha256"]
    assert [path.name for path in (out / "cells").iterdir() if path.suffix != ".npz"] == []


def test_interrupted_it_says_how_to_go_on_and_leaves_no_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(tmp_path, out)
    wait_for_cells(out, 1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait(WITHIN_S) == 130
    assert "finished cells are kept, the same command goes on" in said
    assert "Traceback" not in said
    give_up = time.monotonic() + WITHIN_S
    while is_there(process.pid):
        assert time.monotonic() < give_up, "a process was left"
        time.sleep(0.1)


@needs_root
def test_a_full_disk_loses_no_finished_cell(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    script = (
        'code=0; "$@" || code=$?; echo "first $code $(ls cells | wc -l)" >&2; '
        'mount -o remount,size=8m "$PWD"; exec "$@"'
    )
    both = ["sh", "-uc", f'cd "{out}"; {script}', "sh", *command(tmp_path, out, "--jobs", "1")]
    done = subprocess.run(
        inside(*both, setup=f'mount -t tmpfs -o size=40k tmpfs "{out}"'),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no space left in" in done.stderr
    first = next(line for line in done.stderr.splitlines() if line.startswith("first"))
    status, kept = (int(word) for word in first.split()[1:])
    assert status == 1
    assert 1 <= kept < CELLS
    assert done.stderr.count("(kept)") == kept


def test_a_second_grid_keeps_out_of_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    descriptor = os.open(tmp_path / "cells", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        result = CliRunner().invoke(observe, ["--preset", "grid", "--out", str(tmp_path)])
    finally:
        os.close(descriptor)
    assert isinstance(result.exception, InputError), result.output
    assert "another grid is being observed into" in str(result.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model", "zoo:mla", "--seeds", "2", "--data", "builtin:code"],
            "--seeds is for --preset",
        ),
        (["--model", "zoo:mla", "--model", "zoo:gqa", "--data", "builtin:code"], "several models"),
    ],
)
def test_what_makes_a_grid_needs_the_preset(options: list[str], message: str) -> None:
    result = CliRunner().invoke(observe, options)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-batches", "2", "--batch-size", "2", "--seeds", "1"], "too few for a scan"),
        (["--model", "zoo:mla", "--model", "zoo:mla"], "two models are called 'zoo:mla'"),
        (["--data", "packaged:bulgarian", "--num-batches", "900"], "give a longer text"),
    ],
)
def test_a_grid_that_cannot_be_is_one_line(
    options: list[str], message: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(observe, ["--preset", "grid", "--out", str(tmp_path), *options])
    assert isinstance(result.exception, InputError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_folder_without_a_grid_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no grid\.json in .*: make it with dodoco observe"):
        read_json(tmp_path)


def test_changed_numbers_are_noticed(finished: Path, tmp_path: Path) -> None:
    text = (finished / "grid.json").read_text()
    (tmp_path / "grid.json").write_text(text.replace('"seed": 0', '"seed": 7'))
    with pytest.raises(InputError, match="does not match its digest"):
        read_json(tmp_path)


def test_a_worker_stays_with_its_model_and_then_helps_where_most_is_left() -> None:
    queue = Queue(num_models=3, num_conditions=2)
    first, second = queue.next(None), queue.next(None)
    assert (first, second) == (Task(0, 0), Task(1, 0))
    assert queue.next(0) == Task(0, 1)
    assert queue.next(0) == Task(2, 0), "nobody is at the third model"
    assert queue.next(1) == Task(1, 1)
    assert queue.next(1) == Task(2, 1)
    assert queue.next(2) is None
