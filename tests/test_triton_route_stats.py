"""The observing kernel leaves the bytes that the C++ writer leaves, in Triton's interpreter."""

from __future__ import annotations

import pytest

from interpreted import interpret

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

CHECKS = (
    "few_passes", "ids", "maps", "sequences", "laps", "sampling", "bins", "switched_off", "marks",
    "nothing_beyond_the_tensor", "order",
)  # fmt: skip


def test_the_interpreted_kernel_writes_what_the_cpp_writer_writes() -> None:
    """One process for all checks: most of the time of a short one goes into imports."""
    assert interpret("twin_checks.py", *CHECKS).split() == list(CHECKS)
