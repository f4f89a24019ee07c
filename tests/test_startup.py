"""What starts must start in a blink: no heavy module, little processor time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import planted

HEAVY = {
    *("torch", "triton", "transformers", "tokenizers", "safetensors", "datasets"),
    *("pandas", "pyarrow", "matplotlib", "jinja2", "scipy", "prometheus_client", "textual"),
}
OURS = {
    "dodoco_ext.attachment",
    "dodoco_ext.integrations",
    "dodoco_ext.observatory",
    "dodoco_ext.ops",
    "dodoco_ext.recorder",
    "dodoco_ext.triton_kernels",
}
LIMIT_S = 0.3
COMMANDS = {
    "show": ["show"],
    "show --json": ["show", "--json"],
    "show --list": ["show", "--list", "."],
    "top --help": ["top", "--help"],
    "--help": ["--help"],
    "--version": ["--version"],
}


@pytest.fixture(autouse=True)
def _some_recordings(recordings: Path) -> None:
    for labels in ({"model_name": "one"}, {"model_name": "two"}):
        planted.recording(planted.layers(4, 64, 4), [8], labels=labels)


def modules_after(script: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after a script."""
    script += "\nimport sys\nprint('\\n' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def cpu_seconds(arguments: list[str]) -> float:
    """Processor time of a fresh interpreter, user and system: other load does not count."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = modules_after("import dodoco_ext")
    assert "dodoco_ext" in loaded
    assert loaded & (HEAVY | OURS | {"numpy", "rich", "click"}) == set()


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_command_loads_nothing_heavy(arguments: list[str]) -> None:
    loaded = modules_after(f"from dodoco_ext.cli import run\nassert run({arguments!r}) == 0")
    assert loaded & (HEAVY | OURS) == set()


def test_a_summary_and_the_doctor_load_neither_torch_nor_a_writer() -> None:
    script = (
        "from dodoco_ext.cli import run\nassert run(['show', '--latest']) == 0\nrun(['doctor'])"
    )
    assert modules_after(script) & (HEAVY | OURS) == set()


def test_json_needs_no_tables() -> None:
    loaded = modules_after("from dodoco_ext.cli import run\nassert run(['show', '--json']) == 0")
    assert "rich" not in loaded


@pytest.mark.parametrize(
    "arguments",
    [["-c", "import dodoco_ext"], *(["-m", "dodoco_ext", *c] for c in COMMANDS.values())],
    ids=["import dodoco_ext", *COMMANDS.keys()],
)
def test_it_starts_in_a_blink(arguments: list[str]) -> None:
    best = min(cpu_seconds(arguments) for _ in range(5))
    assert best < LIMIT_S, f"{best:.3f} s of processor time, best of 5"
