"""What a GPU runs, as far as it can be proven without one: dry runs, kernels compiled, figures reported."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_check

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

report = gpu_check.load("report")


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
    # Without an empty part, which would be the checkout's own folder.
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    done = _pytest(*QUICK[2:], "-p", "lossy_plugin", DODOCO_GPU_DRY="1", PYTHONPATH=path)
    assert done.returncode == 1, done.stdout[-3000:]
    for name in (
        "test_streams_at_once_lose_nothing[2]",
        "test_totals_are_exact_whatever_the_order",
    ):
        assert re.search(rf"FAILED .*{re.escape(name)}", done.stdout), done.stdout[-3000:]


# --- the stand-in for torch.cuda ------------------------------------------------------------------


def test_a_captured_graph_runs_again_and_not_while_it_is_captured() -> None:
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
