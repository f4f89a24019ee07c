"""The exporter as a sidecar: another uid, another PID namespace, a read-only mount, a server that is killed."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from exposed import parsed
from namespaces import inside, needs_root, python
from test_containers import SHARED_GROUP, SIDECARS, TRUE_IDS, first_child, server, talking, volume

pytestmark = needs_root
__all__ = ["volume"]

# Imports all it needs first: as another user it could not read what only root may. Prints one scrape for every
# line, its end marked.
EXPORTER = f"""
import os, sys
from pathlib import Path
from dodoco_ext.views.exporter.collect import registry_of
from dodoco_ext.views.exporter.render import render
from dodoco_ext.views.exporter.state import State
folder, uid, groups = sys.argv[1], int(sys.argv[2]), [int(group) for group in sys.argv[3].split(",")]
{TRUE_IDS}
state = State([Path(folder)])
registry = registry_of(state)
for _ in sys.stdin:
    print(render(registry).decode() + (state.problem() or "end"), flush=True)
"""


@pytest.fixture
def mount() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dodoco-test-", dir="/dev/shm") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("kind", SIDECARS)
def test_a_sidecar_says_up_then_down_then_follows_the_restart(
    kind: str, volume: Path, mount: Path
) -> None:
    how = SIDECARS[kind]
    setup = f"mount --bind '{volume}' '{mount}'"
    if how.read_only:
        setup += f"; mount -o remount,bind,ro '{mount}'"
    code = python(EXPORTER, str(mount / "dodoco"), str(how.uid), str(SHARED_GROUP))
    with talking(inside(*code, setup=setup, pid=how.pid)) as exporter:

        def scrape() -> tuple[dict[str, float], dict[str, float]]:
            text = [exporter.ask()]
            while (line := exporter.line()) != "end":
                text.append(line)
            seen = parsed("\n".join(text) + "\n")
            return seen.by("rank", "recorder_up"), seen.by("rank", "tokens_total")

        assert scrape() == ({}, {}), "nothing is there yet"
        with server(volume, pid=True) as (writer, _):
            assert scrape() == ({"0": 1}, {"0": 2})
            assert writer.ask() == "recorded"
            assert scrape() == ({"0": 1}, {"0": 4})
            os.kill(first_child(writer), signal.SIGKILL)
            writer.child.wait()
            assert scrape() == ({"0": 0}, {"0": 4})
        with server(volume, pid=True):
            assert scrape() == ({"0": 1}, {"0": 2})
