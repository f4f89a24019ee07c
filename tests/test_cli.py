"""The command line as a whole: exit codes, errors of one line, help, pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import planted
from dodoco_ext import __version__, cli
from dodoco_ext.errors import InputError
from dodoco_ext.views import listing

Capture = pytest.CaptureFixture[str]


def one_line(capsys: Capture) -> str:
    """The error on stderr: one line, with nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dodoco: error: ")
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    return captured.err


def break_show(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(listing, "print_listing", fail)


def test_version(capsys: Capture) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"dodoco, version {__version__}\n"


def test_help_lists_every_command_and_imports_none(capsys: Capture) -> None:
    before = set(sys.modules)
    assert cli.run(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("show", "doctor", "observe", "Examples:", "Exit codes:"):
        assert name in out
    assert not {m for m in set(sys.modules) - before if m.startswith("dodoco_ext.observatory")}


@pytest.mark.parametrize("command", ["show", "doctor", "observe"])
def test_each_command_has_help_with_examples(command: str, capsys: Capture) -> None:
    assert cli.run([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples:" in out
    assert f"  dodoco {command}" in out


def test_without_a_command_it_says_what_there_is(capsys: Capture) -> None:
    assert cli.run([]) == cli.EXIT_USAGE
    captured = capsys.readouterr()
    assert "Commands:" in captured.out + captured.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["shwo"], "shwo"),
        (["show", "--nonsense"], "--nonsense"),
        (["show", "--ep", "0", "--latest"], "--ep"),
        (["show", "--ep", "8"], "give SOURCE or --latest"),
        (["show", "--experts"], "give SOURCE or --latest"),
        (["show", "x", "--latest"], "not both"),
        (["show", "--list", "--latest"], "not both"),
        (["show", "--list", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_line(
    arguments: list[str], named: str, capsys: Capture
) -> None:
    assert cli.run(arguments) == cli.EXIT_USAGE
    message = one_line(capsys)
    assert named in message
    assert "--help`" in message


@pytest.mark.parametrize("source", ["no-such-run", "/no/such/file.dodoco", "999999999"])
def test_a_source_that_means_nothing(source: str, recordings: Path, capsys: Capture) -> None:
    assert cli.run(["show", source]) == cli.EXIT_ERROR
    message = one_line(capsys)
    assert source in message
    assert str(recordings) in message


def test_a_file_that_is_no_recording(tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("not a recording" * 1000)
    assert cli.run(["show", str(other)]) == cli.EXIT_ERROR
    assert "is not a DODOCO recording" in one_line(capsys)


def test_a_bad_setting(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("DODOCO_MAX_BYTES", "many")
    assert cli.run(["show"]) == cli.EXIT_ERROR
    assert "DODOCO_MAX_BYTES='many'" in one_line(capsys)


def test_an_error_of_ours_is_one_printable_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    break_show(monkeypatch, InputError("first\n  second \x1b[31mred\x1b[0m"))
    assert cli.run(["show"]) == cli.EXIT_ERROR
    assert one_line(capsys) == "dodoco: error: first second ?[31mred?[0m\n"


def test_an_unexpected_error_says_how_to_get_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    break_show(monkeypatch, RuntimeError("boom"))
    assert cli.run(["show"]) == cli.EXIT_ERROR
    message = one_line(capsys)
    assert "RuntimeError: boom" in message
    assert "`dodoco show --debug`" in message


@pytest.mark.parametrize("arguments", [["--debug", "show"], ["show", "--debug"]])
def test_debug_prints_the_traceback(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    break_show(monkeypatch, RuntimeError("boom"))
    assert cli.run(arguments) == cli.EXIT_ERROR
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_debug_from_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("DODOCO_DEBUG", "1")
    break_show(monkeypatch, RuntimeError("boom"))
    assert cli.run(["show"]) == cli.EXIT_ERROR
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    break_show(monkeypatch, KeyboardInterrupt())
    assert cli.run(["show"]) == cli.EXIT_INTERRUPTED
    # click first ends the line on which a terminal shows ^C.
    assert capsys.readouterr().err == "\ndodoco: error: interrupted\n"


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("torch", "install the torch that fits this machine"),
        ("transformers", "pip install 'dodoco-ext[transformers]'"),
        ("prometheus_client", "pip install 'dodoco-ext[prometheus]'"),
        ("something_else", "pip install something_else"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    missing: str, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=f"{missing}.part")

    monkeypatch.setattr(cli, "import_module", fail)
    assert cli.run(["observe"]) == cli.EXIT_ERROR
    message = one_line(capsys)
    assert f"{missing} is not installed" in message
    assert remedy in message


def test_a_reader_that_leaves_early_is_no_error(recordings: Path) -> None:
    planted.recording(planted.layers(2))
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "dodoco_ext", "show", "--latest"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert done.returncode == cli.EXIT_PIPE
    assert done.stderr == b""


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_output_in_a_pipe_has_no_colours(extra: list[str], recordings: Path) -> None:
    path = planted.recording(planted.layers(2))
    command = [sys.executable, "-m", "dodoco_ext", "show", str(path), *extra]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout
    assert b"\x1b" not in done.stdout
