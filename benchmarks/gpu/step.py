"""What a step of the check is: commands to run, and an outcome."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .results import Results

PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")


@dataclass
class Outcome:
    """How a step ended.

    Attributes:
        state: `passed`, `failed`, `not there` (a tool or a device is missing) or `not run`.
        detail: One line.
        seconds: How long it took.
    """

    state: str
    detail: str
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Context:
    """What every step is given.

    Attributes:
        root: The checkout.
        state: Folder for what is kept between runs.
        key: What results belong to.
        dry: On the CPU, with stand-ins.
        effort: Rounds in units of the usual number.
    """

    root: Path
    state: Path
    key: str
    dry: bool
    effort: float

    @property
    def site(self) -> Path:
        """Where the package is installed for the steps that follow."""
        return self.state / "site"

    def figures(self, name: str) -> Results:
        """What a step measured."""
        return Results(self.state / f"{name}.json", self.key)

    def environment(self) -> dict[str, str]:
        """Of the processes that steps start: the package just built, and no other."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DODOCO_", "PYTEST_"))}
        kept.pop("TRITON_INTERPRET", None)
        paths = [str(self.site)] if (self.site / "dodoco_ext").is_dir() else []
        inherited = [p for p in kept.get("PYTHONPATH", "").split(os.pathsep) if p]
        paths += [p for p in inherited if Path(p).resolve() != self.root]
        kept |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        kept |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if self.dry:
            kept |= {"DODOCO_GPU_DRY": "1", "CUDA_VISIBLE_DEVICES": ""}
        if "DODOCO_COMMIT" in os.environ:
            kept["DODOCO_COMMIT"] = os.environ["DODOCO_COMMIT"]
        return kept

    def child(self, name: str) -> list[str]:
        """The command that runs a step's Python in a process of its own."""
        command = [sys.executable, str(self.root / "benchmarks" / "gpu" / "check.py")]
        command += ["--child", name, "--state", str(self.state), "--key", self.key]
        command += ["--effort", str(self.effort)]
        return [*command, "--dry"] if self.dry else command


Running = Generator[list[str], int, Outcome]
"""Yields commands, is sent the exit status of each, and returns the outcome; 124: time ran out."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: Its name on the command line.
        what: What it does, in a few words.
        limit_s: How long it may take; what was measured by then is kept.
        run: Yields its commands.
        needed: Whether the other steps are in vain without it.
    """

    name: str
    what: str
    limit_s: float
    run: Callable[[Context], Running]
    needed: bool = False


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, wherever that is."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else []
    return shutil.which(name, path=os.pathsep.join([*places, os.environ.get("PATH", ""), *PLACES]))
