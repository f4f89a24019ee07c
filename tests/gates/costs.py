"""The static cost of each variant against a stored limit, and the table of it in docs/kernel.md.

A GPU would show a slower kernel; without one, its instructions and barriers do. Compilers are
pinned, so a cost changes only with the kernel: `make gates-accept` stores what it is now.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from farm import AMD_TARGET, BUILD, CUDA_TARGETS, TRITONS, Compiled, compile_supported
from gates import GATES

HERE = Path(__file__).resolve().parent
LIMITS = HERE / "limits.json"
DOCUMENT = HERE.parents[1] / "docs" / "kernel.md"
BEGIN, END = "<!-- costs: begin -->", "<!-- costs: end -->"
TABLE_TRITON = "3.8.0"
# Instructions may grow by this much without a new limit; barriers and loops may not grow at all.
SLACK = 0.02

_AMD_INSTRUCTION = re.compile(r"^\t([a-z]\w+)(?:\s|$)", re.M)
_AMD_FIELD = r"\.{}:\s+(\d+)"

Limits = dict[str, dict[str, dict[str, dict[str, int]]]]


@dataclass(frozen=True)
class Cost:
    """What one variant costs, whatever it reads.

    Attributes:
        registers: Of a thread.
        shared_bytes: Shared memory of a program.
        instructions: That can run.
        barriers: Among them, that wait for all warps of a program.
        loops: Loops.
        loop_instructions: Instructions in the bodies of all loops.
        loop_barriers: Barriers there.
    """

    registers: int
    shared_bytes: int
    instructions: int
    barriers: int
    loops: int
    loop_instructions: int
    loop_barriers: int


def cost_of(of: Compiled) -> Cost:
    if of.is_cuda:
        listing = of.listing
        barriers = set(listing.where(lambda at: at.name == "BAR"))
        in_loops = set().union(*listing.loops)
        return Cost(
            of.resources["REG"],
            of.shared_bytes,
            len(listing.reachable),
            len(barriers),
            len(listing.loops),
            len(in_loops),
            len(barriers & in_loops),
        )
    code, _, description = of.code.partition(".Lfunc_end")
    names = [name for name in _AMD_INSTRUCTION.findall(code) if not name.startswith("p2align")]
    registers = re.search(_AMD_FIELD.format("vgpr_count"), description)
    if registers is None:
        raise ValueError(f"{of}: the listing names no registers")
    loops = code.count("Loop Header")
    return Cost(
        int(registers[1]), of.shared_bytes, len(names), names.count("s_barrier"), loops, 0, 0
    )


def over_limit(of: Compiled, limits: Limits) -> list[str]:
    """What costs more than its limit, one line each."""
    stored = limits.get(of.triton, {}).get(of.target, {}).get(of.variant)
    if stored is None:
        return ["no limit is stored: make gates-accept"]
    cost = asdict(cost_of(of))
    found = []
    for name, limit in stored.items():
        allowed = int(limit * (1 + SLACK)) if "instructions" in name else limit
        # A register more costs nothing before the next step of the hardware's allocation.
        if name == "registers":
            allowed = (limit + 7) // 8 * 8
        if cost[name] > allowed:
            found.append(f"{cost[name]} {name.replace('_', ' ')}, the limit is {allowed}")
    return found


def load_limits() -> Limits:
    return json.loads(LIMITS.read_text())


def limits_of(compiled: Iterable[Compiled]) -> Limits:
    limits: Limits = {}
    for of in compiled:
        limits.setdefault(of.triton, {}).setdefault(of.target, {})[of.variant] = asdict(cost_of(of))
    return limits


def _ordered(name: str) -> tuple[str, str, int]:
    kind, path, experts, _ = name.split("-")
    return path, kind, int(experts[1:])


def dumped(limits: Limits) -> str:
    """As JSON with one variant a line, so that a change of the kernel is a readable diff."""
    blocks = []
    for triton, targets in sorted(limits.items()):
        inner = []
        for target, variants in sorted(targets.items()):
            rows = [
                f"   {json.dumps(name)}: {json.dumps(variants[name])}"
                for name in sorted(variants, key=_ordered)
            ]
            inner.append(f"  {json.dumps(target)}: {{\n" + ",\n".join(rows) + "\n  }")
        blocks.append(f" {json.dumps(triton)}: {{\n" + ",\n".join(inner) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


_COLUMNS = ("registers", "shared memory", "instructions (in loops)", "barriers (in loops)")


def table(limits: Limits) -> str:
    """Markdown: what each variant costs on sm_90, and one of them under every Triton and target."""
    of_variant = limits[TABLE_TRITON]["sm_90"]
    rows = [(f"`{name}`", of_variant[name]) for name in sorted(of_variant, key=_ordered)]
    over_all = [
        (f"`{target}` | {triton} | {path}", limits[triton][target][name])
        for target in (*CUDA_TARGETS, AMD_TARGET)
        for triton in TRITONS
        for path in ("alone", "shared")
        if (name := f"ids32-{path}-E128-k8") in limits[triton][target]
    ]
    return (
        f"Triton {TABLE_TRITON}, `sm_90`:\n\n{_rows(('variant',), rows)}\n"
        "int32 ids, 128 experts, k = 8, everywhere:\n\n"
        f"{_rows(('target', 'Triton', 'path'), over_all)}"
    )


def _rows(heads: tuple[str, ...], rows: list[tuple[str, dict[str, int]]]) -> str:
    columns = (*heads, *_COLUMNS)
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    for head, cost in rows:
        # AMD's assembly says where a loop begins, not where it ends.
        unknown = cost["loops"] > 0 and cost["loop_instructions"] == 0
        instructions = "?" if unknown else f"{cost['loop_instructions']:,}"
        barriers = "?" if unknown else f"{cost['loop_barriers']}"
        lines.append(
            f"| {head} | {cost['registers']} | {cost['shared_bytes']:,} B "
            f"| {cost['instructions']:,} ({instructions}) | {cost['barriers']} ({barriers}) |"
        )
    return "\n".join(lines) + "\n"


def documented() -> str:
    """The table as it stands in docs/kernel.md."""
    text = DOCUMENT.read_text()
    return text.split(BEGIN)[1].split(END)[0].strip() + "\n"


def accept() -> int:
    """Stores what the kernel costs now, if it passes the gates. Returns the exit status."""
    compiled = compile_supported(BUILD / "accept")
    failures = [
        f"{gate}: {of}: {line}"
        for of in compiled
        for gate, found in GATES.items()
        for line in found(of)
    ]
    if failures:
        print("\n".join(failures), file=sys.stderr)
        return 1
    limits = limits_of(compiled)
    LIMITS.write_text(dumped(limits))
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(limits)}{END}{after}")
    print(
        f"{len(compiled)} variants: {LIMITS.name} and docs/{DOCUMENT.name} are as the kernel is now"
    )
    return 0


if __name__ == "__main__":
    sys.exit(accept())
