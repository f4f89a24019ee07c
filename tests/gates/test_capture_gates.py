"""The machine code of csrc/capture.cu, as nvcc makes it: held as the kernel's is, without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from farm import CUDA_TARGETS, Compiled, site_of
from gates import no_approximation, no_spill, no_system_fence
from listing import Instruction

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = ("dodoco_transfer_begin", "dodoco_transfer_end", "dodoco_transfer_end_constants")
# Bundled with Triton: nvcc's own disassembler is not in every toolkit.
TOOLS = "triton/backends/nvidia/bin"
# Instructions that can run and registers, by target and kernel, as measured with nvcc 13.0 and some room.
LIMITS = {
    "dodoco_transfer_begin": (24, 24),
    "dodoco_transfer_end": (700, 40),
    "dodoco_transfer_end_constants": (780, 40),
}


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        pytest.skip("no nvcc: the CUDA code of this checkout cannot be compiled here")
    return found


def compile_kernels(source: Path, target: str, folder: Path) -> dict[str, Compiled]:
    """Each kernel of capture.cu, disassembled."""
    folder.mkdir()
    options = ["-std=c++17", "-O3", "-DNDEBUG", "-Werror", "all-warnings"]
    options += ["--expt-relaxed-constexpr", "-lineinfo", f"-arch={target}"]
    inputs = str(source / "capture.cu")
    for form in ("cubin", "ptx"):
        command = [nvcc(), *options, f"-{form}", inputs, "-o", str(folder / f"k.{form}")]
        subprocess.run(command, check=True, capture_output=True)
    tools = site_of("3.8.0") / TOOLS
    usage, code = (
        subprocess.run(
            [str(tools / tool), *arguments, str(folder / "k.cubin")],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for tool, *arguments in (("cuobjdump", "-res-usage"), ("nvdisasm", "-g", "-c"))
    )
    compiled = {}
    for kernel in KERNELS:
        line = re.search(rf"Function {kernel}:\s*\n\s*(.*)", usage)
        assert line is not None, usage
        compiled[kernel] = Compiled(
            triton="",
            target=target,
            kind="transfer",
            path="alone",
            num_experts=0,
            top_k=0,
            kernel=kernel,
            num_warps=8,
            shared_bytes=0,
            code=code,
            resources={name: int(size) for name, size in re.findall(r"(\w+):(\d+)", line[1])},
            ptx=(folder / "k.ptx").read_text(),
            source=(source / "capture.h").read_text(),
        )
    return compiled


def state_in_order(of: Compiled) -> list[str]:
    """What a launch leaves for the next is read before a barrier and stored after it."""
    if of.kernel == "dodoco_transfer_begin":
        return []
    lines = list(enumerate(of.source.splitlines(), 1))
    read = {number for number, line in lines if re.search(r"= place\.state->\w+;", line)}
    written = {number for number, line in lines if re.search(r"place\.state->\w+ =", line)}

    def is_of(at: Instruction, numbers: set[int]) -> bool:
        return at.file.endswith("/capture.h") and at.line in numbers

    loads = of.listing.where(lambda at: at.name in {"LDG", "LD"} and is_of(at, read))

    def is_store(at: Instruction) -> bool:
        return at.name in {"STG", "ST"} and is_of(at, written)

    if not loads or not of.listing.where(is_store):
        return ["no load or no store of the lane's state was found"]
    early = of.listing.reached(loads, is_store, lambda at: at.name == "BAR" and not at.guard)
    return [f"no barrier between the loads of the state and {at}" for at in early]


GATES = {
    "spill": no_spill,
    "system-fence": no_system_fence,
    "approximation": no_approximation,
    "state": state_in_order,
}


@pytest.fixture(scope="module", params=CUDA_TARGETS)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Compiled]:
    return compile_kernels(CSRC, request.param, tmp_path_factory.mktemp("capture") / "out")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_machine_code_passes(compiled: dict[str, Compiled], kernel: str, gate: str) -> None:
    assert GATES[gate](compiled[kernel]) == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_costs_no_more_than_its_limit(compiled: dict[str, Compiled], kernel: str) -> None:
    of = compiled[kernel]
    instructions, registers = LIMITS[kernel]
    found = len(of.listing.reachable), of.resources["REG"]
    print(f"{of.target} {kernel}: {found[0]} instructions, {found[1]} registers")
    assert found[0] <= instructions
    assert found[1] <= registers


@dataclass(frozen=True)
class Mutant:
    name: str
    gate: str
    old: str
    new: str


MUTANTS = [
    Mutant(
        "keeps an array that no register can be",
        "spill",
        "std::uint64_t sent = 0, received = 0;",
        "volatile std::uint64_t kept[4] = {}; kept[thread & 3] = head;\n"
        "std::uint64_t sent = kept[0] & 0, received = 0;",
    ),
    Mutant(
        "fences the system behind a record",
        "system-fence",
        "store(place.ring, head + num_slots);",
        "store(place.ring, head + num_slots);\n#ifdef __CUDA_ARCH__\n__threadfence_system();\n#endif\n",
    ),
    Mutant(
        "divides by the interval",
        "approximation",
        "(iteration & mask) == 0 && iteration * inverse <= limit",
        "iteration % (mask + inverse + limit) == 0",
    ),
    Mutant(
        "stores what others still read",
        "state",
        "  team.meet();  // all have read what thread 0 is about to change\n",
        "",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_gate_finds_its_fault_and_no_other_does(mutant: Mutant, tmp_path: Path) -> None:
    source = tmp_path / "csrc"
    shutil.copytree(CSRC, source)
    header = source / "capture.h"
    text = header.read_text()
    assert mutant.old in text, "capture.h has changed: adapt this mutant"
    header.write_text(text.replace(mutant.old, mutant.new))
    made = compile_kernels(source, "sm_90", tmp_path / "out")
    found = {gate for gate, check in GATES.items() if check(made["dodoco_transfer_end"])}
    assert found == {mutant.gate}
