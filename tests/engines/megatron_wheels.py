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
    found = sorted(Path(home).glob(f"megatron_core-{release}-*.whl")) if home else []
    if not found:
        pytest.skip(
            f"no wheel of megatron-core {release} in MEGATRON_WHEELS: run make engines online"
        )
    return found[0]


@cache
def tree_of(release: str, file: str) -> ast.Module:
    with zipfile.ZipFile(wheel_of(release)) as wheel:
        return ast.parse(wheel.read(f"megatron/core/{file}"))
