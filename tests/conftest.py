"""Fixtures of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own for recordings; nothing touches those of the user."""
    folder = tmp_path / "recordings"
    for name in ("DODOCO_RUN", "DODOCO_RANK", "DODOCO_WORLD_SIZE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DODOCO_DIR", str(folder))
    return folder
