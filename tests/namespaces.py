"""Processes in mount and PID namespaces of their own, as containers have them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import dodoco_ext as dodoco

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="mounts and other users' processes need root; CI runs as root"
)
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("DODOCO_")},
    # The package and the tests' helpers, wherever such a process starts.
    "PYTHONPATH": os.pathsep.join(
        [str(Path(dodoco.__file__).parent.parent), str(Path(__file__).parent)]
    ),
    "PYTHONSAFEPATH": "1",
}


def inside(*command: str, setup: str = ":", pid: bool = False) -> list[str]:
    """The command line that runs `command` in new namespaces.

    Args:
        command: What to run there.
        setup: Shell commands that come first, such as mounts; nobody else sees what they do.
        pid: Also in a new PID namespace, as its process 1.
    """
    new = ["unshare", "--mount"]
    if pid:
        new += ["--pid", "--fork", "--mount-proc", "--kill-child"]
    return [*new, "sh", "-euc", setup + '\nexec "$@"', "sh", *command]


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *arguments)
