"""`make gpu-check` under compute-sanitizer, with stand-ins for the tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpu_check

runner, step, sanitizer = (gpu_check.load(name) for name in ("runner", "step", "sanitizer"))

PLANTED_LOG = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at planted_out_of_bounds(int *, int)+0x60 in planted.cu:11
=========     by thread (128,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""
CLEAN_LOG = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
OTHERS_LOG = """\
========= COMPUTE-SANITIZER
========= Program hit CUDA_ERROR_INVALID_VALUE (error 1) on CUDA API call to cuPointerGetAttribute.
=========     Saved host backtrace up to driver entry point at error
=========
========= ERROR SUMMARY: 1 error
"""
OURS_LOG = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at observe+0x1510 in route_stats.py:208
=========     and Read access at observe+0x1620 in route_stats.py:230 [32 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
RACE_LOG = OURS_LOG.replace("observe", "planted_race(int *)")


class Sanitized:
    """The sanitizer's step with stand-ins for its tools."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.tools = folder, folder / "tools"
        self._monkeypatch = monkeypatch
        self.context = step.Context(gpu_check.ROOT, folder, "key", True, 0.1)
        monkeypatch.setattr(step, "PLACES", ())
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        monkeypatch.delenv("CUDA_HOME", raising=False)

    def install(self, cases_log: str, planted_log: str, nvcc: bool = True, status: int = 0) -> None:
        (self.folder / "cases.log").write_text(cases_log)
        (self.folder / "planted.log").write_text(planted_log)
        choose = f'case "$*" in *check.py*) log=cases; rc={status};; *) log=planted; rc=0;; esac'
        write = f'test -s "{self.folder}/$log.log" && cp "{self.folder}/$log.log" "$4"'
        gpu_check.put_tool(self.tools, "compute-sanitizer", f"{choose}\n{write}\nexit $rc")
        if nvcc:
            gpu_check.put_tool(self.tools, "nvcc", "exit 0")
        self._monkeypatch.setenv("PATH", f"{self.tools}:/usr/bin:/bin")

    def run(self, tool: str = "memcheck") -> Any:
        """The step's outcome; the cases themselves are taken to pass."""
        running = sanitizer.run(tool, self.context)
        try:
            command = next(running)
            while True:
                if command[0] == sys.executable:
                    code = 0
                else:
                    code = runner.start(command, self.context, self.folder / "log", 20)
                command = running.send(code)
        except StopIteration as end:
            return end.value


@pytest.fixture
def sanitized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sanitized:
    return Sanitized(tmp_path, monkeypatch)


def test_a_missing_sanitizer_is_said(sanitized: Sanitized) -> None:
    outcome = sanitized.run()
    assert (outcome.state, outcome.detail) == (
        "not there",
        "this machine has no compute-sanitizer",
    )


@pytest.mark.parametrize(("tool", "planted"), [("memcheck", PLANTED_LOG), ("racecheck", RACE_LOG)])
def test_a_clean_run_passes_once_the_planted_fault_was_found(
    sanitized: Sanitized, tool: str, planted: str
) -> None:
    sanitized.install(CLEAN_LOG, planted)
    outcome = sanitized.run(tool)
    assert outcome.state == "passed"
    assert outcome.detail == "the planted fault was found; no report in our kernels"


def test_a_tool_that_misses_the_planted_fault_is_not_believed(sanitized: Sanitized) -> None:
    sanitized.install(CLEAN_LOG, CLEAN_LOG)
    outcome = sanitized.run()
    assert outcome.state == "failed"
    assert "did not report the planted fault" in outcome.detail


def test_a_report_in_our_kernels_fails(sanitized: Sanitized) -> None:
    sanitized.install(OURS_LOG, RACE_LOG)
    outcome = sanitized.run("racecheck")
    assert outcome.state == "failed"
    assert "1 reports in our kernels: Error: Race reported between Write" in outcome.detail


def test_a_report_elsewhere_is_told_and_does_not_fail(sanitized: Sanitized) -> None:
    sanitized.install(OTHERS_LOG, PLANTED_LOG)
    outcome = sanitized.run()
    assert outcome.state == "passed"
    assert "1 in other code: Program hit CUDA_ERROR_INVALID_VALUE" in outcome.detail


@pytest.mark.parametrize(("log", "status"), [("", 1), (PLANTED_LOG.rpartition("=========")[0], 0)])
def test_a_tool_that_breaks_off_is_a_failure(sanitized: Sanitized, log: str, status: int) -> None:
    sanitized.install(log, PLANTED_LOG, status=status)
    assert "without a summary" in sanitized.run().detail


def test_cases_that_fail_under_the_tool_are_a_failure(sanitized: Sanitized) -> None:
    sanitized.install(CLEAN_LOG, PLANTED_LOG, status=1)
    assert sanitized.run().state == "failed"


def test_without_nvcc_the_outcome_says_that_nothing_was_planted(sanitized: Sanitized) -> None:
    sanitized.install(CLEAN_LOG, "", nvcc=False)
    outcome = sanitized.run()
    assert outcome.state == "passed"
    assert outcome.detail.startswith("no nvcc to plant a fault with")


def test_the_planted_program_compiles(tmp_path: Path) -> None:
    nvcc = step.find_tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    source = gpu_check.ROOT / "benchmarks" / "gpu" / "planted.cu"
    program = tmp_path / "planted.ptx"
    command = [nvcc, "-ptx", "-arch=sm_90", "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cuda_runtime.h" in done.stderr:
        pytest.skip("nvcc without its headers")
    assert done.returncode == 0, done.stderr
    for kernel in sanitizer.PLANTED.values():
        assert kernel in program.read_text()
