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

# Neither the oldest nor the newest: Triton 3.9 puts a barrier before a ticket by itself.
TRITON = "3.8.0"
SHAPE = (128, 8)
TARGET = "sm_90"


@dataclass(frozen=True)
class Mutant:
    """One fault: `old` becomes `new`, once, in one file of `triton_kernels/`; `gate` finds it."""

    name: str
    gate: str
    old: str
    new: str
    path: str = "alone"
    file: str = "route_stats.py"


MUTANTS: list[Mutant] = []


def mutated(mutant: Mutant, folder: Path) -> Path:
    package = copy_package(folder)
    source = package / "dodoco_ext" / "triton_kernels" / mutant.file
    text = source.read_text()
    found = text.count(mutant.old)
    assert found == 1, f"{mutant.file} holds {found} times {mutant.old!r}: adapt this mutant"
    source.write_text(text.replace(mutant.old, mutant.new))
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
