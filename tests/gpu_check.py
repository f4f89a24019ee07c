"""The modules of benchmarks/gpu as tests import them, and what stands in for its tools."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHECK = ROOT / "benchmarks" / "gpu" / "check.py"


def check() -> Any:
    """`check.py`, which makes the folder importable as `benchmarks.gpu`."""
    if "benchmarks.gpu.check" not in sys.modules:
        spec = importlib.util.spec_from_file_location("dodoco_gpu_check", CHECK)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["benchmarks.gpu.check"] = module
    return sys.modules["benchmarks.gpu.check"]


def load(name: str) -> Any:
    """A module of `benchmarks/gpu`."""
    check()
    return importlib.import_module(f"benchmarks.gpu.{name}")


def load_file(path: Path) -> ModuleType:
    """A file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def put_tool(folder: Path, name: str, script: str) -> None:
    """A shell script that stands in for a tool."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def with_tools(folder: Path) -> str:
    """PATH with the stand-ins first."""
    return f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
