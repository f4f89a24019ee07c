"""The observing kernel leaves the bytes that the C++ writer leaves, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

CHECKS = ["ids", "maps"]


@pytest.mark.parametrize("check", CHECKS)
def test_the_interpreted_kernel_writes_what_the_cpp_writer_writes(check: str) -> None:
    # The interpreter is chosen when triton is imported, so it gets a process of its own.
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("twin_checks.py")), check],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"checked {check}\n"
