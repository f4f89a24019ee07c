"""Each gate can fail: a kernel with the fault it is there for is found by it, and by no other gate.

A mutant is a copy of the package with one exact replacement in the kernel's sources, compiled as
the real one is. Its cost is looked at only where the cost is the fault: what a fault adds is paid for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import costs
from farm import Compiled, Task, Wanted, compile_tasks, copy_package
from gates import GATES

# Triton 3.9 has a barrier of its own before a ticket, so that no kernel can be without one.
TRITON = "3.8.0"
SHAPE = (128, 8)
# Of several warps also where it runs alone.
WIDE = (512, 10)
TARGET = "sm_90"


@dataclass(frozen=True)
class Mutant:
    """One fault: `old` becomes `new`, once, in one file of `triton_kernels/`; `gate` finds it.

    `also` is a further such pair.
    """

    name: str
    gate: str
    old: str
    new: str
    path: str = "alone"
    file: str = "route_stats.py"
    also: tuple[str, str] | None = None
    shape: tuple[int, int] = SHAPE


TICKET = 'ticket = tl.atomic_add(scratch, 1, sem="acq_rel", scope="gpu")'
FIRST_ADD = "tl.atomic_add(scratch + met"
BARRIER = "tl.debug_barrier()"

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
        "tl.store(_words(ring), head + 1)\n            tl.inline_asm_elementwise("
        "'fence.acq_rel.sys; mov.u32 $0, 0;', '=r', [], tl.int32, is_pure=False, pack=1)",
    ),
    Mutant(
        "divides in floating point",
        "approximation",
        "gini = numerator * _BINS >= lane.to(tl.int64) * (mass * E)",
        "gini = numerator.to(tl.float32) * _BINS / (mass * E).to(tl.float32) >= lane",
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
        f"{BARRIER}\n                {TICKET}",
        TICKET,
        "shared",
        # There, because shared memory that is used again may ask for one before the ticket, too.
        also=(FIRST_ADD, f"{BARRIER}\n                {FIRST_ADD}"),
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
        "ticket = tl.zeros([], tl.int32)\n                if first_row < real_rows:\n"
        f"                    {TICKET}",
        "shared",
    ),
    Mutant(
        "adds to the scratch though it runs alone",
        "ticket",
        "            last = True\n",
        "            last = True\n"
        "            tl.atomic_add(_narrow_words(tl.load(control + 8)), tokens, sem='relaxed')\n",
    ),
    Mutant(
        "looks up a bin when it adds to it",
        "state",
        "tl.store(totals + gini_row, old_gini + 1, mask=in_gini)",
        "tl.store(totals + gini_row, tl.load(totals + gini_row) + 1, mask=in_gini)",
        shape=WIDE,
    ),
    Mutant(
        "looks up the head when it needs it",
        "state",
        "lap = head.to(tl.uint64)",
        "head = tl.load(state + 2)\n            lap = head.to(tl.uint64)",
        shape=WIDE,
    ),
    Mutant(
        "sorts where few experts were chosen",
        "cost",
        "E, BLOCK_E, SHARED, CLOCK,",
        "E, BLOCK_E, True, CLOCK,",
    ),
    Mutant(
        "waits once more",
        "cost",
        "iteration += (layer",
        f"{BARRIER}\n    iteration += (layer",
    ),
]


def mutated(mutant: Mutant, folder: Path) -> Path:
    package = copy_package(folder)
    source = package / "dodoco_ext" / "triton_kernels" / mutant.file
    text = source.read_text()
    for old, new in [(mutant.old, mutant.new), *([mutant.also] if mutant.also else [])]:
        found = text.count(old)
        assert found == 1, f"{mutant.file} holds {found} times {old!r}: adapt this mutant"
        text = text.replace(old, new)
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
            (Wanted(*mutant.shape, paths=(mutant.path,), targets=(TARGET,)),),
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
