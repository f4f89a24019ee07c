"""compute-sanitizer over small cases, after it has shown on planted faults that it looks."""

from __future__ import annotations

import re
from pathlib import Path

from .step import Context, Outcome, Running, find_tool

OURS = re.compile(r"\bobserve\b|\bread_clock\b|dodoco_ext")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
PLANTED = {"memcheck": "planted_out_of_bounds", "racecheck": "planted_race"}


def run(tool: str, context: Context) -> Running:
    """Runs planted faults, the cases by themselves, and the cases under the tool."""
    sanitizer, nvcc = find_tool("compute-sanitizer"), find_tool("nvcc")
    if sanitizer is None:
        return Outcome("not there", "this machine has no compute-sanitizer")
    code = yield context.child("workload")  # also compiles the kernels, which the tool would slow
    if code:
        return Outcome("failed", f"the cases fail without the tool (exit {code}): see the log")
    if missing := context.figures("workload").values.get("not there"):
        return Outcome("not there", str(missing))
    shown = "no nvcc to plant a fault with"
    if nvcc is not None:
        program = context.state / "planted"
        source = context.root / "benchmarks" / "gpu" / "planted.cu"
        code = yield [nvcc, "-arch=native", "-lineinfo", "-o", str(program), str(source)]
        if code:
            code = yield [nvcc, "-lineinfo", "-o", str(program), str(source)]
        if code:
            return Outcome("failed", f"planted.cu does not compile (exit {code}): see the log")
        log = context.state / f"{tool}-planted.txt"
        yield under(sanitizer, tool, log, [str(program), tool])
        # The exit status is the program's own, which a fault may end.
        found = reports(log)
        if not any(PLANTED[tool] in report for report in found):
            return Outcome("failed", f"{tool} did not report the planted fault: it does not look")
        shown = "the planted fault was found"
    log = context.state / f"{tool}-cases.txt"
    # Each tensor an allocation of its own: a read past its end is a read past an allocation.
    own = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    code = yield [*own, *under(sanitizer, tool, log, context.child("workload"))]
    found = reports(log)
    if code == 124:
        return Outcome("failed", "time ran out")
    if summary(log) is None:
        return Outcome("failed", f"{tool} ended without a summary (exit {code}): see the log")
    ours = [report for report in found if OURS.search(report)]
    if ours:
        return Outcome("failed", f"{len(ours)} reports in our kernels: {_first_line(ours[0])}")
    if code:
        return Outcome("failed", f"the cases failed under {tool} (exit {code}): see the log")
    others = f"; {len(found)} in other code: {_first_line(found[0])}" if found else ""
    return Outcome("passed", f"{shown}; no report in our kernels{others}")


def under(sanitizer: str, tool: str, log: Path, command: list[str]) -> list[str]:
    """A command run under a tool, whose report goes to a file."""
    log.unlink(missing_ok=True)
    return [sanitizer, "--tool", tool, "--log-file", str(log), *command]


def summary(log: Path) -> int | None:
    """Errors that the tool counted; None where it did not come to its end."""
    counts = SUMMARY.findall(_text(log))
    return int(counts[-1]) if counts else None


def reports(log: Path) -> list[str]:
    """The blocks in which the tool reports something, without the summary."""
    blocks = re.split(r"^=+ *$", _text(log), flags=re.MULTILINE)
    # A block begins with what is wrong; lines of the tool about itself do not.
    cleaned = [re.sub(r"^=+ ?", "", block, flags=re.MULTILINE).strip() for block in blocks]
    return [
        block
        for block in cleaned
        if block and not re.match(r"COMPUTE-SANITIZER\Z|(ERROR|RACECHECK|LEAK) SUMMARY", block)
    ]


def _text(log: Path) -> str:
    try:
        text = log.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return re.sub(r"^=+ COMPUTE-SANITIZER *$", "=========", text, flags=re.MULTILINE)


def _first_line(report: str) -> str:
    return report.partition("\n")[0][:160]
