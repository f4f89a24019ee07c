"""Listings are read as nvdisasm prints them, and paths are the ones that threads can take."""

from __future__ import annotations

import pytest

from listing import Instruction, Listing, parse


def listing(*rows: str) -> Listing:
    """A listing of the given rows: labels end with a colon, the rest are instructions."""
    lines = ['\t.section\t.text.kernel,"ax",@progbits']
    address = 0
    for row in rows:
        if row.endswith(":") or row.startswith("//"):
            lines.append(row)
        else:
            guard, _, rest = row.rpartition("> ")
            lines.append(f"        /*{address:04x}*/  {'@' + guard if guard else '    '} {rest} ;")
            address += 16
    return parse("\n".join(lines), "kernel")


def is_(name: str):
    return lambda at: at.name == name


def test_an_instruction_is_read_with_its_guard_its_line_and_its_labels() -> None:
    read = listing(
        '//## File "/somewhere/route_stats.py", line 12',
        ".L_x_0:",
        "!P3> LDG.E.64 R2, [R4.64+0x10]",
    )
    assert read.instructions == (
        Instruction(
            0, "!P3", "LDG.E.64", "R2, [R4.64+0x10]", "/somewhere/route_stats.py", 12, (".L_x_0",)
        ),
    )
    assert (read.instructions[0].name, read.instructions[0].has("64")) == ("LDG", True)
    assert read.labels == {".L_x_0": 0}


def test_padding_and_the_trap_behind_the_code_cannot_run() -> None:
    read = listing("MOV R1, R2", "EXIT", ".L_x_1:", "BRA `(.L_x_1)", "NOP", "NOP")
    assert read.reachable == [0, 1]
    assert read.loops == []


def test_loops_are_measured_the_outer_with_the_inner() -> None:
    read = listing(
        "MOV R1, R2",
        ".L_outer:",
        "IADD3 R1, R1, R1",
        ".L_inner:",
        "IADD3 R2, R2, R2",
        "P0> BRA `(.L_inner)",
        "P1> BRA `(.L_outer)",
        "EXIT",
    )
    assert read.loops == [frozenset({2, 3}), frozenset({1, 2, 3, 4})]


def test_a_convergence_point_leads_to_where_its_own_region_ends() -> None:
    """B0 is used twice: the second BSYNC must not lead to the end of the first region."""
    read = listing(
        *("BSSY B0, `(.L_end_a)", "P0> BRA `(.L_skip_a)", "MOV R0, R0"),
        *(".L_skip_a:", "BSYNC B0", ".L_end_a:"),
        *("BSSY B0, `(.L_end_b)", "P0> BRA `(.L_skip_b)", "MOV R1, R1"),
        *(".L_skip_b:", "BSYNC B0", ".L_end_b:", "EXIT"),
    )
    assert read.successors[3] == (4,)
    assert read.successors[7] == (8,)
    assert read.loops == []


def test_a_path_around_a_step_is_found() -> None:
    read = listing(
        *("RED.E [R0], R1", "P0> BRA `(.L_around)", "BAR.SYNC 0x0"),
        *(".L_around:", "MEMBAR.ALL.GPU", "ATOM.E R2, [R3], R4", "EXIT"),
    )
    steps = (is_("BAR"), is_("MEMBAR"))
    found = read.out_of_order([0], steps, is_("ATOM"), is_("RED"))
    assert [(at.name, passed) for at, passed in found] == [("ATOM", 0)]
    assert [at.name for at in read.reached([0], is_("ATOM"), is_("BAR"))] == ["ATOM"]
    assert read.reached([0], is_("ATOM"), is_("MEMBAR")) == []


def test_steps_count_in_their_order_only() -> None:
    in_order = ("RED.E [R0], R1", "BAR.SYNC 0x0", "MEMBAR.ALL.GPU", "ATOM.E R2, [R3], R4", "EXIT")
    steps = (is_("BAR"), is_("MEMBAR"))
    assert listing(*in_order).out_of_order([0], steps, is_("ATOM"), is_("RED")) == []
    swapped = (in_order[0], in_order[2], in_order[1], *in_order[3:])
    found = listing(*swapped).out_of_order([0], steps, is_("ATOM"), is_("RED"))
    assert [passed for _, passed in found] == [1]


def test_what_makes_a_path_begin_again_does() -> None:
    read = listing(
        "RED.E [R0], R1",
        "BAR.SYNC 0x0",
        "RED.E [R0], R1",
        "MEMBAR.ALL.GPU",
        "ATOM.E R2, [R3], R4",
        "EXIT",
    )
    found = read.out_of_order([0], (is_("BAR"), is_("MEMBAR")), is_("ATOM"), is_("RED"))
    assert [passed for _, passed in found] == [0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("BRX R4 -0x20", "EXIT"), "whose targets are not printed"),
        (("BRA 0x100", "EXIT"), "whose target is not printed"),
    ],
)
def test_a_jump_to_nowhere_known_is_an_error(rows: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listing(*rows).successors  # noqa: B018


def test_a_listing_without_the_kernel_is_an_error() -> None:
    with pytest.raises(ValueError, match="no code of kernel"):
        parse('\t.section\t.text.other,"ax"\n        /*0000*/  EXIT ;\n', "kernel")
