"""What is in the files of Megatron-Core's releases, read out of wheels in `MEGATRON_WHEELS`."""

from __future__ import annotations

import ast
import os
import zipfile
from functools import cache
from pathlib import Path

import pytest


def wheel_of(release: str) -> Path:
    home = os.environ.get("MEGATRON_WHEELS", "")
    if not home:
        pytest.skip("no wheels of megatron-core: set MEGATRON_WHEELS, as make engines does")
    found = sorted(Path(home).glob(f"megatron_core-{release}-*.whl"))
    if not found:
        pytest.fail(f"no wheel of megatron-core {release} in MEGATRON_WHEELS: run make engines")
    return found[0]


@cache
def tree_of(release: str, file: str) -> ast.Module:
    with zipfile.ZipFile(wheel_of(release)) as wheel:
        return ast.parse(wheel.read(f"megatron/core/{file}"))
