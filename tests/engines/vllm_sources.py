"""Where vLLM is, and what is in its files: of the release that is installed, and of those read from wheels.

vLLM may live in an environment of its own: `VLLM_PYTHON` names that environment's interpreter.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

from dodoco_ext.vllm_versions import EXECUTED


def vllm_python() -> str:
    """The interpreter that has vLLM."""
    if python := os.environ.get("VLLM_PYTHON"):
        return python
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here: set VLLM_PYTHON to the interpreter that has it")
    return sys.executable


@cache
def installed() -> Path:
    """The package's folder."""
    code = "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations[0])"
    found = subprocess.check_output([vllm_python(), "-P", "-c", code], text=True, timeout=60)
    return Path(found.strip().splitlines()[-1])


@cache
def source_of(release: str, file: str) -> str:
    """A file of vLLM: of the release that is installed, or out of a wheel in `VLLM_WHEELS`."""
    if release == EXECUTED:
        return (installed() / file).read_text()
    home = os.environ.get("VLLM_WHEELS", "")
    found = sorted(Path(home).glob(f"vllm-{release}-*.whl")) if home else []
    if not found:
        pytest.skip(f"no wheel of vllm {release} in VLLM_WHEELS: run make engines online")
    with zipfile.ZipFile(found[0]) as wheel:
        return wheel.read(f"vllm/{file}").decode()


@cache
def tree_of(release: str, file: str) -> ast.Module:
    """The same, parsed."""
    return ast.parse(source_of(release, file))
