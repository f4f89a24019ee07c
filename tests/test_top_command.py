"""`dodoco top` as a command: one picture in a pipe, errors of one line, starting in a blink."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import planted
from dodoco_ext.cli import EXIT_ERROR, EXIT_USAGE, run
from dodoco_ext.views.top import command

pytestmark = pytest.mark.timeout(60)

Capture = pytest.CaptureFixture[str]
LIMIT_S = 0.6  # of processor time; about half of it is numpy's and Textual's


def test_once_prints_one_picture(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    planted.recording(planted.layers(3, 16, 2), [40])
    assert run(["top", "--once"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("One rank, by expert: ")
    assert lines[1] == "(as if every expert were a rank)"
    assert "Ended, closed" in lines[3]
    table = lines[lines.index("") + 1 :]
    assert table[0].split()[:2] == ["layer", "gini"]
    assert [line.split()[0] for line in table[1:]] == ["0", "1", "2"]
    assert all(len(line) <= 80 for line in lines)


def test_once_of_a_live_recording_is_what_an_interval_brought(capsys: Capture) -> None:
    recording = planted.Planted(planted.layers(1, 16, 2))
    recording.route_all([40])
    assert run(["top", "--once", "--interval", "0.1"]) == 0
    assert "whole run" in capsys.readouterr().out


def test_once_without_a_recording_says_where_it_looked(capsys: Capture, recordings: Path) -> None:
    assert run(["top", "--once"]) == 0
    assert capsys.readouterr().out.strip() == f"No recording yet; looking in {recordings}."


def test_a_terminal_without_blocks_gets_other_characters() -> None:
    planted.recording(planted.layers(1, 16, 2), [40])
    done = subprocess.run(
        [sys.executable, "-m", "dodoco_ext", "top", "--once"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert done.stdout.isascii()


def test_a_pipe_is_told_to_use_once(capsys: Capture) -> None:
    assert run(["top"]) == EXIT_ERROR
    assert "use `dodoco top --once`" in capsys.readouterr().err


def test_without_textual_it_says_what_to_install(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_on_a_terminal", lambda: True)
    for name in [n for n in sys.modules if n.startswith("textual.") or n == "textual"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("app", "screens"):
        monkeypatch.delitem(sys.modules, f"dodoco_ext.views.top.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "textual", None)
    assert run(["top"]) == EXIT_ERROR
    assert capsys.readouterr().err == (
        "dodoco: error: textual is not installed: pip install 'dodoco-ext[top]' "
        "(`dodoco top --once` needs none)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--interval", "0"], EXIT_USAGE),
        (["--ep", "0"], EXIT_USAGE),
        (["--window", "5", "--interval", "10"], EXIT_ERROR),
    ],
)
def test_impossible_options_are_refused(arguments: list[str], code: int, capsys: Capture) -> None:
    assert run(["top", "--once", *arguments]) == code
    assert capsys.readouterr().err.startswith("dodoco: error: ")


def test_the_first_picture_comes_in_a_blink() -> None:
    planted.recording(planted.layers(4, 64, 4), [8])
    script = (
        "import asyncio\n"
        "from dodoco_ext.views.top.session import Session\n"
        "from dodoco_ext.views.top.app import TopApp\n"
        "async def main():\n"
        "    app = TopApp(Session(), None)\n"
        "    async with app.run_test(size=(80, 24)) as pilot:\n"
        "        assert app.frame.waiting == 'Looking for recordings ...'\n"
        "asyncio.run(main())\n"
        "import sys\n"
        "assert not {'torch', 'triton'} & set(sys.modules)\n"
    )
    pytest.importorskip("textual")
    best = min(cpu_seconds(script) for _ in range(3))
    assert best < LIMIT_S, f"{best:.3f} s of processor time, best of 3"


def cpu_seconds(script: str) -> float:
    """Processor time of a fresh interpreter."""
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime
