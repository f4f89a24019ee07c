"""The kernel's machine code, for every supported Triton and target, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

import costs
from farm import AMD_TARGET, CUDA_TARGETS, TRITONS, Compiled, compile_supported
from gates import GATES

TARGETS = (*CUDA_TARGETS, AMD_TARGET)
SHOWN = 20
# The first test waits for all compilers, on a machine that may have other work.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    return compile_supported(tmp_path_factory.mktemp("gates"))


def of_target(compiled: list[Compiled], triton: str, target: str) -> list[Compiled]:
    chosen = [of for of in compiled if (of.triton, of.target) == (triton, target)]
    assert chosen, f"nothing was compiled for {target} by Triton {triton}"
    return chosen


def report(failures: list[str]) -> str:
    hidden = len(failures) - SHOWN
    return "\n".join([*failures[:SHOWN], *([f"and {hidden} more"] if hidden > 0 else [])])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize("gate", GATES)
def test_machine_code_passes(compiled: list[Compiled], gate: str, triton: str, target: str) -> None:
    """What each gate asks for stands in gates.py."""
    failures = [
        f"{of.variant}: {line}"
        for of in of_target(compiled, triton, target)
        for line in GATES[gate](of)
    ]
    assert not failures, report(failures)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("triton", TRITONS)
def test_no_variant_costs_more_than_its_limit(
    compiled: list[Compiled], triton: str, target: str
) -> None:
    limits = costs.load_limits()
    failures = [
        f"{of.variant}: {line}"
        for of in of_target(compiled, triton, target)
        for line in costs.over_limit(of, limits)
    ]
    assert not failures, report([*failures, "if that is meant: make gates-accept"])


def test_every_limit_belongs_to_a_variant_and_every_variant_has_one(
    compiled: list[Compiled],
) -> None:
    stored = {
        (triton, target, variant)
        for triton, targets in costs.load_limits().items()
        for target, variants in targets.items()
        for variant in variants
    }
    assert stored == {(of.triton, of.target, of.variant) for of in compiled}
    assert len(stored) == len(compiled), "two variants have the same name"


def test_the_gates_see_both_paths_of_every_target(compiled: list[Compiled]) -> None:
    for target in CUDA_TARGETS:
        paths = {of.path for of in compiled if of.target == target}
        assert paths == {"alone", "shared"}


def test_the_document_shows_the_costs_that_are_stored() -> None:
    assert costs.documented() == costs.table(costs.load_limits()), "make gates-accept"


def test_limits_are_written_as_they_are_read() -> None:
    assert costs.LIMITS.read_text() == costs.dumped(costs.load_limits())


def test_the_installed_kernel_is_that_of_the_checkout() -> None:
    import dodoco_ext

    installed = Path(dodoco_ext.__file__).parent / "triton_kernels"
    for source in (costs.HERE.parents[1] / "triton_kernels").glob("*.py"):
        assert (installed / source.name).read_text() == source.read_text(), "make test installs it"
