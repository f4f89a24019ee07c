"""`make gpu-check` without a GPU: steps, time limits, resumption, sanitizer reports, figures, the page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import gpu_check

pytest.importorskip("torch")
pytest.importorskip("triton")

runner, step, steps = (gpu_check.load(name) for name in ("runner", "step", "steps"))
results_of, report, sanitizer = (
    gpu_check.load(name) for name in ("results", "report", "sanitizer")
)
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


# --- results --------------------------------------------------------------------------------------


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


# --- compute-sanitizer ----------------------------------------------------------------------------


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


# --- kernels that only a GPU runs -----------------------------------------------------------------


def test_delays_are_before_every_meeting_of_programs(tmp_path: Path) -> None:
    from dodoco_ext.triton_kernels import build, route_stats
    from triton.backends.compiler import GPUTarget

    delays = gpu_check.load_file(gpu_check.ROOT / "tests" / "gpu" / "test_delays.py")
    source, number = delays.delayed_source(delays.shipped())
    assert number == len(re.findall(r"^ +_delay\(\)$", source, re.MULTILINE))
    assert re.search(r"_delay\(\)\n +ticket = tl\.atomic_add", source)
    module = delays.load(source, tmp_path / "delayed_route_stats.py")
    shared = next(v for v in build.variants(delays.E, delays.K, {0}) if v.shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route_stats, "observe", module.observe)
        compiled = build.compile_variant(shared, GPUTarget("cuda", 90, 32))
    assert compiled.asm["ptx"].count("nanosleep") >= 6
    assert "nanosleep" not in build.compile_variant(shared, GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_the_mutant_has_no_barrier_before_its_ticket() -> None:
    delays = gpu_check.load_file(gpu_check.ROOT / "tests" / "gpu" / "test_delays.py")
    mutant, removed = delays.without_barrier(delays.shipped())
    assert removed == 1
    assert mutant.count("tl.debug_barrier()") == delays.shipped().count("tl.debug_barrier()") - 1


INTERPRETED = """
import torch
from benchmarks.gpu.atomic_kernel import count_with_atomics, nothing
ids = torch.randint(-1, 62, (1000,), generator=torch.Generator().manual_seed(0))
counts = torch.zeros(60, dtype=torch.int64)
count_with_atomics[(4,)](ids, counts, ids.numel(), 60, BLOCK=256)
nothing[(1,)](counts)
valid = ids[(ids >= 0) & (ids < 60)]
assert torch.equal(counts, torch.bincount(valid, minlength=60)), counts
"""


def test_the_kernels_to_compare_with_count_and_compile(tmp_path: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    bootstrap = f"import runpy; runpy.run_path({str(gpu_check.CHECK)!r}, run_name='check')\n"
    command = [sys.executable, "-c", bootstrap + INTERPRETED]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = gpu_check.load("atomic_kernel")
    signature = {"ids": "*i64", "counts": "*i64", "num_ids": "i32", "num_experts": "i32"}
    source = ASTSource(
        kernels.count_with_atomics, {**signature, "BLOCK": "constexpr"}, constexprs={"BLOCK": 256}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "red" in compiled.asm["ptx"] or "atom" in compiled.asm["ptx"]
    empty = triton.compile(
        ASTSource(kernels.nothing, {"words": "*i64"}), target=GPUTarget("cuda", 90, 32)
    )
    assert "st.global" not in empty.asm["ptx"]


# --- figures --------------------------------------------------------------------------------------


def test_layers_that_fit() -> None:
    decode = gpu_check.load("decode")
    gib = 1 << 30
    # 48 layers of 1.16 GiB, and 1.16 GiB of embeddings: what the published model weighs in bfloat16.
    assert decode.layers_that_fit(decode.SHAPES, 57 * gib) == 48
    assert decode.layers_that_fit(decode.SHAPES, 30 * gib) == 24
    assert decode.layers_that_fit(decode.SHAPES, gib) < 1


def test_ids_of_a_token_are_distinct_and_skewed_as_said() -> None:
    contestants = gpu_check.load("contestants")
    for zipf in (False, True):
        ids = contestants.make_ids(4000, 64, 6, zipf=zipf, device="cpu")
        assert ids.shape == (4000, 6)
        assert all(len(set(row)) == 6 for row in ids.tolist())
        share = (ids < 8).sum().item() / ids.numel()
        assert share > 0.4 if zipf else 0.1 < share < 0.15


def test_a_dry_run_measures_every_figure_and_its_recordings_are_exact(tmp_path: Path) -> None:
    command = [sys.executable, str(gpu_check.CHECK), "--dry", "--effort", "0.1"]
    command += ["--out", str(tmp_path / "out"), "--state", str(tmp_path / "state")]
    command += ["--steps", "build,machine,memcheck,kernel,launch,decode"]
    environment = {**os.environ, "DODOCO_COMMIT": "abc123", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    figures = content["figures"]
    cells = [cell for cell in figures["kernel"].values() if isinstance(cell, dict)]
    assert len(cells) == 8
    assert all(cell["exact"] and not cell["left out"] for cell in cells)
    assert all(len(cell["seconds"]) == 6 for cell in cells)
    assert all(figures["decode"][f"batch {batch}"]["exact"] for batch in (1, 4))
    assert len(figures["launch"]) == 3
    markdown = (tmp_path / "out" / "gpu-check.md").read_text()
    assert "A dry run on the CPU" in markdown
    assert "WRONG" not in markdown
    for text in ("gpu-check.json", "gpu-check.md", "gpu-check.log"):
        assert str(tmp_path) not in (tmp_path / "out" / text).read_text() or text.endswith("log")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    with pytest.raises(SystemExit, match="dry run"):
        report.put_into(page, tmp_path / "out" / "gpu-check.json")
    content["dry"] = False
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps(content))
    report.put_into(page, stored)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("| 8, 2 | 8 | zipf |") == 1


def test_the_page_has_a_place_for_the_figures(tmp_path: Path) -> None:
    page = gpu_check.ROOT / "docs" / "overhead.md"
    text = page.read_text()
    assert text.count(report.BEGIN) == text.count(report.END) == 1
    assert "make gpu-check" in text
    empty = report.as_markdown({"environment": {}, "steps": {}, "figures": {}})
    assert empty.count(report.MISSING) == 4


# --- tests/gpu ------------------------------------------------------------------------------------


def _pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-rfs", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command,
        cwd=gpu_check.ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_all_are_skipped_with_the_reason() -> None:
    done = _pytest("tests/gpu", "-m", "gpu")
    assert done.returncode == 0, done.stdout
    assert "needs a CUDA GPU, and torch finds none" in done.stdout
    assert re.search(r"^\d{2,} skipped in", done.stdout, re.MULTILINE), done.stdout[-500:]


QUICK = [f"tests/gpu/test_{name}.py" for name in ("capture", "hot_path", "streams", "delays")]
LOSSY = """
from dodoco_ext import ops
kept = ops.route_ids
calls = 0

def lossy(ids, site):
    global calls
    calls += 1
    if calls % 100:
        kept(ids, site)

ops.route_ids = lossy
"""


def test_their_logic_holds_on_the_cpu() -> None:
    done = _pytest(*QUICK, DODOCO_GPU_DRY="1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_they_fail_for_an_op_that_loses_a_pass_in_a_hundred(tmp_path: Path) -> None:
    (tmp_path / "lossy_plugin.py").write_text(LOSSY)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = _pytest(*QUICK[2:], "-p", "lossy_plugin", DODOCO_GPU_DRY="1", PYTHONPATH=path)
    assert done.returncode == 1, done.stdout[-3000:]
    for name in (
        "test_streams_at_once_lose_nothing[2]",
        "test_totals_are_exact_whatever_the_order",
    ):
        assert re.search(rf"FAILED .*{re.escape(name)}", done.stdout), done.stdout[-3000:]


# --- the stand-in for torch.cuda ------------------------------------------------------------------


def test_a_captured_graph_runs_again_and_not_while_it_is_captured() -> None:
    import torch

    stand_in = gpu_check.load("stand_in")
    data, total = torch.ones(3), torch.zeros(3)
    graph = stand_in.CUDAGraph()
    with stand_in.graph(graph):
        doubled = data * 2
        total += doubled
    assert total.tolist() == [0, 0, 0]
    data.fill_(5)
    graph.replay()
    graph.replay()
    assert doubled.tolist() == [10, 10, 10]
    assert total.tolist() == [20, 20, 20]


def test_what_waits_is_refused_while_capturing_and_in_debug_mode() -> None:
    import torch

    stand_in = gpu_check.load("stand_in")
    with pytest.raises(RuntimeError, match="capturing"), stand_in.graph(stand_in.CUDAGraph()):
        torch.ones(1).item()
    stand_in.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1).item()
    finally:
        stand_in.set_sync_debug_mode("default")
    assert torch.ones(1).item() == 1


STAND_INS = {
    *("current_stream", "stream", "device", "device_count", "synchronize", "_sleep", "graph"),
    *("graph_pool_handle", "memory_stats", "mem_get_info", "empty_cache", "set_sync_debug_mode"),
    *("Stream", "Event", "CUDAGraph"),
}


def test_the_stand_in_is_called_as_torch_cuda_is() -> None:
    import inspect

    import torch

    stand_in = gpu_check.load("stand_in")
    used = set[str]()
    for folder in ("benchmarks/gpu", "tests/gpu"):
        for path in (gpu_check.ROOT / folder).glob("*.py"):
            used |= set(re.findall(r"\bcuda\.(\w+)\(", path.read_text()))
    # What is asked for before the stand-in is chosen, or of a GPU that must be there.
    used -= {"is_available", "get_device_properties", "set_device"}
    assert used <= STAND_INS, "each is imitated, and compared with torch below"
    for name in STAND_INS:
        ours, theirs = getattr(stand_in, name), getattr(torch.cuda, name)
        if inspect.isclass(ours):
            for method in set(vars(ours)) - {"__module__", "__doc__", "__dict__", "__weakref__"}:
                assert method in ("calls", "cuda_stream") or hasattr(theirs, method), method
        else:
            names = list(inspect.signature(ours).parameters)
            assert names == list(inspect.signature(theirs).parameters)[: len(names)], name
