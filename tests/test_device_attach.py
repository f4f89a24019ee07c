"""A model on a device is recorded exactly: the whole path, with a fake driver and interpreted kernels."""

from __future__ import annotations

import pytest

from interpreted import interpret

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

CHECKS = ("counts", "settings", "placements", "recomputation", "lanes", "captures")


def test_a_model_on_a_device_is_recorded() -> None:
    """One process for all checks: most of the time goes into imports."""
    assert interpret("device_attach_checks.py", *CHECKS).split() == list(CHECKS)
