"""The twins see faults: each of many, planted in a copy of the kernel, fails a check."""

from __future__ import annotations

import pytest

from interpreted import interpret

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")


def test_every_planted_fault_is_found() -> None:
    told = interpret("planted_kernels.py").splitlines()
    assert [line for line in told if not line.startswith("found: ")] == []
    assert len(told) > 30
