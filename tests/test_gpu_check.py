"""`make gpu-check` without a GPU: steps, time limits, resumption."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

import gpu_check

runner, step, results_of = (gpu_check.load(name) for name in ("runner", "step", "results"))


def test_results_are_on_disk_as_soon_as_they_are_put(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cells.json"
    results = results_of.Results(path, "commit a")
    results.put("x", {"p50": 1.5})
    assert results_of.Results(path, "commit a").values == {"x": {"p50": 1.5}}
    assert "x" in results_of.Results(path, "commit a")
    results.forget("x")
    assert results_of.Results(path, "commit a").values == {}
    assert [file.name for file in path.parent.iterdir()] == ["cells.json"]


def test_results_of_another_commit_or_of_a_torn_file_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    results_of.Results(path, "commit a").put("x", 1)
    assert results_of.Results(path, "commit b").values == {}
    for torn in ("", '{"key": "commit a", "val', "[]"):
        path.write_text(torn)
        assert results_of.Results(path, "commit a").values == {}


# --- the runner -----------------------------------------------------------------------------------


class Check:
    """A check whose steps are shell commands."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.steps = folder, dict[str, Any]()
        monkeypatch.setattr(runner, "STEPS", self.steps)
        monkeypatch.setattr(gpu_check.check().steps, "STEPS", self.steps)
        monkeypatch.setattr(runner, "gpu_name", lambda: self.gpu)
        monkeypatch.setenv("DODOCO_COMMIT", "abc123")
        self.gpu = "GPU 1"

    def add(self, name: str, command: str, *, limit_s: float = 30, needed: bool = False) -> None:
        def run(context: Any) -> Any:
            code = yield ["bash", "-c", command]
            return step.Outcome("failed" if code else "passed", f"exit {code}")

        self.steps[name] = step.Step(name, f"runs {name}", limit_s, run, needed)

    def run(self, *options: str) -> int:
        out, state = self.folder / "out", self.folder / "state"
        return int(
            gpu_check.check().main(["--out", str(out), "--state", str(state), *options, "--dry"])
        )

    @property
    def content(self) -> Any:
        return json.loads((self.folder / "out" / "gpu-check.json").read_text())

    def states(self) -> dict[str, str]:
        return {name: outcome["state"] for name, outcome in self.content["steps"].items()}


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.chdir(tmp_path)
    return Check(tmp_path, monkeypatch)


def test_steps_run_in_order_and_their_output_is_in_the_log(check: Check) -> None:
    check.add("first", "echo one in $PWD; echo commit $DODOCO_COMMIT")
    check.add("second", "echo two >&2")
    assert check.run() == 0
    assert check.states() == {"first": "passed", "second": "passed"}
    log = (check.folder / "out" / "gpu-check.log").read_text()
    assert "one in .\n" in log, "paths of the machine stay there"
    assert "commit abc123" in log
    assert log.index("one") < log.index("two")
    assert check.content["environment"]["commit"] == "abc123"
    assert "| second | passed |" in (check.folder / "out" / "gpu-check.md").read_text()


def test_a_failed_step_costs_no_other_and_is_run_again(check: Check) -> None:
    check.add("fails", "test -e fixed")
    check.add("counts", "echo x >> runs")
    os.chdir(check.folder)
    runs = check.folder / "runs"
    check.add("fails", f"test -e {check.folder}/fixed")
    check.add("counts", f"echo x >> {runs}")
    assert check.run() == 1
    assert check.states() == {"fails": "failed", "counts": "passed"}
    (check.folder / "fixed").touch()
    assert check.run() == 0
    assert check.states() == {"fails": "passed", "counts": "passed"}
    assert runs.read_text() == "x\n", "what passed is not run again"
    assert check.run("--again") == 0
    assert runs.read_text() == "x\nx\n"


@pytest.mark.parametrize("change", ["commit", "sources", "gpu"])
def test_what_passed_is_run_again_for_another_commit_source_or_gpu(
    check: Check, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    runs = check.folder / "runs"
    check.add("counts", f"echo x >> {runs}")
    assert check.run() == 0
    if change == "commit":
        monkeypatch.setenv("DODOCO_COMMIT", "def456")
    elif change == "sources":
        monkeypatch.setattr(runner, "digest", lambda root: "another")
    else:
        check.gpu = "GPU 2"
    assert check.run() == 0
    assert runs.read_text() == "x\nx\n"


def test_nothing_goes_on_without_a_step_that_all_need(check: Check) -> None:
    check.add("build", "exit 3", needed=True)
    check.add("tests", "true")
    assert check.run() == 1
    assert check.states() == {"build": "failed"}


def test_a_step_that_takes_too_long_is_ended_with_all_it_started(check: Check) -> None:
    pid = check.folder / "pid"
    check.add("hangs", f"sleep 60 & echo $! > {pid}; sleep 60", limit_s=1)
    check.add("next", "true")
    began = time.monotonic()
    assert check.run() == 1
    assert time.monotonic() - began < 20
    assert check.states() == {"hangs": "failed", "next": "passed"}
    assert check.content["steps"]["hangs"]["detail"] == "exit 124"
    deadline = time.monotonic() + 10
    while _runs(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(pid.read_text()))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_no_step_begins_when_time_is_up(
    check: Check, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "describe", lambda: {"commit": None})
    check.add("late", "true")
    arguments = gpu_check.check().parse(
        ["--out", str(check.folder / "out"), "--state", str(check.folder / "s"), "--seconds", "5"]
    )
    assert runner.run(arguments, gpu_check.ROOT) == 1
    assert check.states() == {"late": "not run"}
    assert "run the same command again" in capsys.readouterr().out


def test_unknown_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.check().parse(["--steps", "build,tset"])
    assert "no step tset: choose from build, machine, tests" in capsys.readouterr().err
