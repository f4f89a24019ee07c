"""A job of several processes that is SIGKILLed: what one command says of it, from the archive."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.timeout(240)
HERE = Path(__file__).parent
PROCESSES = 2
STOPS = 25
WAIT_S = 60.0


def dodoco(*arguments: object) -> list[str]:
    start = "import sys; from dodoco_ext.cli import run; sys.exit(run(sys.argv[1:]))"
    return [sys.executable, "-c", start, *map(str, arguments)]


def until(true: Any) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


@contextlib.contextmanager
def training(folder: Path, archive: Path) -> Iterator[subprocess.Popen[str]]:
    """`dodoco run --archive ARCHIVE -- torchrun ...`, stuck in iteration STOPS."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", PROCESSES]
    torchrun += ["--standalone", "--monitor-interval", 0.1]
    line = dodoco(
        *("run", "--archive", archive, "--run", "training", "--grace", 20, "--"),
        *(*torchrun, HERE / "training_job.py", folder, STOPS),
    )
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    environ.pop("DODOCO_DIR", None)
    with subprocess.Popen(line, env=environ, stderr=subprocess.PIPE, text=True) as job:
        left: list[int] = []
        try:
            until(lambda: job.poll() is not None or left.extend(children(job.pid)) or left)
            until(lambda: (folder / "stopped").exists() or job.poll() is not None)
            assert job.poll() is None, job.communicate()[1]
            time.sleep(0.5)
            yield job
        finally:
            for pid in (*left, *workers(folder)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            job.kill()


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("*.pid"))]


def check(archive: Path) -> dict[str, Any]:
    """What `dodoco show ARCHIVE --last 30s` says, as JSON; it must be the truth."""
    done = subprocess.run(
        dodoco("show", archive, "--last", "30s", "--json"),
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_S,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["run"], found["world_size"]) == ("training", PROCESSES)
    (stood,) = found["stood"]
    assert stood["at"] is None
    after = stood["after"]
    assert (after["iteration"], after["layer"], after["op"]) == (
        STOPS,
        "model.layers.1.mlp",
        "dispatch",
    )
    hot = found["hottest_experts"][0]
    assert (hot["expert"], hot["rank"], hot["scope"]) == ("3", 3 // (8 // PROCESSES), "window")
    assert sum(step["transfers"] for step in found["steps"]) == PROCESSES * (STOPS * 6 + 3)
    assert [rank["last"]["iteration"] for rank in found["ranks"]] == [STOPS] * PROCESSES
    return found


def test_the_whole_job_is_killed(tmp_path: Path) -> None:
    folder, archive = tmp_path / "job", tmp_path / "archive"
    folder.mkdir()
    with training(folder, archive) as job:
        (torchrun,) = children(job.pid)
        for pid in (torchrun, *workers(folder)):
            os.kill(pid, signal.SIGKILL)
        assert job.wait(WAIT_S) == 128 + signal.SIGKILL
        assert job.stderr is not None
        assert f"{PROCESSES} recordings in {archive}" in job.stderr.read()
    found = check(archive)
    assert [rank["state"] for rank in found["ranks"]] == ["dead"] * PROCESSES
    shown = subprocess.run(
        dodoco("show", archive, "--last", "30s"),
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_S,
    ).stdout
    assert f"STOOD AFTER iteration {STOPS}, layer model.layers.1.mlp, dispatch" in shown
    assert "hottest expert 3 of model.layers." in shown


def test_one_rank_is_killed_and_the_launcher_ends_the_others(tmp_path: Path) -> None:
    folder, archive = tmp_path / "job", tmp_path / "archive"
    folder.mkdir()
    with training(folder, archive) as job:
        os.kill(workers(folder)[1], signal.SIGKILL)
        assert job.wait(WAIT_S) == 1  # torchrun's own
    check(archive)


def test_the_scheduler_ends_the_job(tmp_path: Path) -> None:
    folder, archive = tmp_path / "job", tmp_path / "archive"
    folder.mkdir()
    with training(folder, archive) as job:
        job.send_signal(signal.SIGTERM)
        assert job.wait(WAIT_S) != 0
    check(archive)


def test_the_supervisor_is_killed_too_and_the_next_one_archives(tmp_path: Path) -> None:
    folder, archive = tmp_path / "job", tmp_path / "archive"
    folder.mkdir()
    with training(folder, archive) as job:
        (torchrun,) = children(job.pid)
        for pid in (job.pid, torchrun, *workers(folder)):
            os.kill(pid, signal.SIGKILL)
        job.wait(WAIT_S)
    environ = {**os.environ}
    environ.pop("DODOCO_DIR", None)
    until(
        lambda: (
            subprocess.run(
                dodoco("run", "--archive", tmp_path / "next"),
                env=environ,
                check=True,
                timeout=WAIT_S,
            )
            and len(list(archive.glob("*.dodoco"))) == PROCESSES
        )
    )
    check(archive)
