"""Each gate can fail: a kernel with the fault it is there for is found by it, and by no other gate.

A mutant is a copy of the package with one exact replacement in the kernel's sources, compiled as
the real one is. Its cost is looked at only where the cost is the fault: what a fault adds is paid for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import costs
from farm import Compiled, Task, Wanted, compile_tasks, copy_package
from gates import GATES

# Triton 3.9 has a barrier of its own before a ticket, so that no kernel can be without one.
TRITON = "3.8.0"
# Several warps in either path: one warp alone needs no barrier.
SHAPE = (256, 8)
TARGET = "sm_90"


@dataclass(frozen=True)
class Mutant:
    """One fault in one file of `triton_kernels/`; `gate` finds it.

    `old`, which begins a line, becomes `new`; `also` is a further such pair. They are written without the
    indentation that they have in the file.
    """

    name: str
    gate: str
    old: str
    new: str
    path: str = "alone"
    file: str = "route_stats.py"
    also: tuple[str, str] | None = None


TICKET = 'ticket = tl.atomic_add(scratch, 1, sem="acq_rel", scope="gpu")'
FIRST_ADD = "tl.atomic_add(scratch + met"
STEP = "iteration += (layer"
BARRIER = "tl.debug_barrier()"
SYSTEM_FENCE = (
    "tl.inline_asm_elementwise("
    "'fence.acq_rel.sys; mov.u32 $0, 0;', '=r', [], tl.int32, is_pure=False, pack=1)"
)

MUTANTS = [
    Mutant(
        "keeps too few registers",
        "spill",
        "_MAX_REGISTERS = 128",
        "_MAX_REGISTERS = 24",
        file="build.py",
    ),
    Mutant(
        "draws its ticket from the whole system",
        "system-fence",
        TICKET,
        TICKET.replace('"gpu"', '"sys"'),
        "shared",
    ),
    Mutant(
        "fences the system behind a record",
        "system-fence",
        "tl.store(_words(ring), head + 1)",
        f"tl.store(_words(ring), head + 1)\n{SYSTEM_FENCE}",
    ),
    Mutant(
        "divides in floating point",
        "approximation",
        "lap = head.to(tl.uint64)",
        "lap = (head.to(tl.float32) / 3).to(tl.uint64)",
    ),
    Mutant(
        "divides integers",
        "approximation",
        "index = head & ((tl.full([], 1, tl.int64) << log2_slots) - 1)",
        "index = head % (tl.full([], 1, tl.int64) << log2_slots)",
    ),
    Mutant(
        "draws its ticket before all warps have added",
        "ticket",
        f"{BARRIER}\n{TICKET}",
        TICKET,
        "shared",
        # There, because shared memory that is used again may ask for one before the ticket, too.
        also=(FIRST_ADD, f"{BARRIER}\n{FIRST_ADD}"),
    ),
    Mutant(
        "draws its ticket without a fence",
        "ticket",
        TICKET,
        TICKET.replace("acq_rel", "relaxed"),
        "shared",
    ),
    Mutant(
        "releases its adds and does not acquire those of others",
        "ticket",
        TICKET,
        TICKET.replace("acq_rel", "release"),
        "shared",
    ),
    Mutant(
        "draws no ticket where it has no rows",
        "ticket",
        TICKET,
        f"ticket = tl.zeros([], tl.int32)\nif first_row < real_rows:\n    {TICKET}",
        "shared",
    ),
    Mutant(
        "adds atomically though it runs alone",
        "ticket",
        STEP,
        f"tl.atomic_add(totals + 15, 1, sem='relaxed')\n{STEP}",
    ),
    Mutant(
        "stores totals while warps load them",
        "state",
        f"# What follows stores: no warp may still have to load.\n{BARRIER}",
        "",
    ),
    Mutant(
        "looks up the head when it needs it",
        "state",
        "lap = head.to(tl.uint64)",
        "head = tl.load(state + 2)\nlap = head.to(tl.uint64)",
    ),
    Mutant(
        "sorts counts without need",
        "cost",
        STEP,
        f"iteration += (tl.sum(tl.sort(counts)) >> 31).to(tl.int64)\n{STEP}",
    ),
    Mutant("waits once more", "cost", STEP, f"{BARRIER}\n{STEP}"),
]


def replaced(text: str, old: str, new: str, file: str) -> str:
    """The text with one replacement, whose lines are indented as the first one that is replaced."""
    pattern = "^( *)" + r"\n *".join(re.escape(line) for line in old.splitlines())
    found = len(re.findall(pattern, text, re.M))
    assert found == 1, f"{file} holds {found} times {old!r}: adapt this mutant"
    return re.sub(
        pattern,
        lambda match: "\n".join(match[1] + line for line in new.splitlines()),
        text,
        flags=re.M,
    )


def mutated(mutant: Mutant, folder: Path) -> Path:
    package = copy_package(folder)
    source = package / "dodoco_ext" / "triton_kernels" / mutant.file
    text = replaced(source.read_text(), mutant.old, mutant.new, mutant.file)
    if mutant.also:
        text = replaced(text, *mutant.also, mutant.file)
    source.write_text(text)
    return package


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    """Each mutant, compiled in the path that its fault lies in."""
    folder = tmp_path_factory.mktemp("mutants")
    tasks = [
        Task(
            TRITON,
            mutated(mutant, folder / f"package{number}"),
            (Wanted(*SHAPE, paths=(mutant.path,), targets=(TARGET,)),),
        )
        for number, mutant in enumerate(MUTANTS)
    ]
    made = compile_tasks(tasks, folder)
    return {mutant.name: of for mutant, of in zip(MUTANTS, made, strict=True)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mutant_is_found_by_its_gate_and_by_no_other(
    mutant: Mutant, compiled: dict[str, Compiled]
) -> None:
    of = compiled[mutant.name]
    found = {gate: lines for gate, look in GATES.items() if (lines := look(of))}
    over = costs.over_limit(of, costs.load_limits())
    if mutant.gate == "cost":
        assert not found
        assert over, f"not found: a kernel that {mutant.name}"
    else:
        assert set(found) == {mutant.gate}, found


def test_every_gate_has_a_mutant() -> None:
    assert {mutant.gate for mutant in MUTANTS} == {*GATES, "cost"}
