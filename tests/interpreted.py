"""Programs beside the tests, in a process of their own in which Triton interprets kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dodoco_ext


def interpret(program: str, *arguments: str) -> str:
    """Runs a program of this folder; returns what it printed."""
    here, package = Path(__file__).parent, Path(dodoco_ext.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, str(here / program), *arguments],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join([str(here), str(package)]),
            # Tensors hold addresses and nothing else: torch's threads would only wait.
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
