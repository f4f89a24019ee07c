"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures of a module or a session are made before a test's own folder is set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DODOCO_DIR", str(tmp_path_factory.mktemp("recordings")))
        # Programs that tests start import the installed package, not the checkout they start in.
        patch.setenv("PYTHONSAFEPATH", "1")
        yield


@pytest.fixture(autouse=True)
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own for recordings; nothing touches those of the user."""
    folder = tmp_path / "recordings"
    for name in ("DODOCO_RUN", "DODOCO_RANK", "DODOCO_WORLD_SIZE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DODOCO_DIR", str(folder))
    return folder
