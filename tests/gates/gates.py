"""What the kernel's machine code has to satisfy. A gate returns what it found, one line each.

Every gate looks at one compiled variant. None needs a GPU, and none looks at cost: costs.py does.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from farm import Compiled
from listing import Instruction, Listing

# Triton names the system's scope for shared memory too, where it means nothing.
_SYSTEM_PTX = re.compile(
    r"^.*\b(?:membar\.sys|fence\.[\w.]*sys|(?:atom|red)(?![\w.]*\.shared)\.[\w.]*\bsys\b).*$", re.M
)
# Both bits on a cache operation, or the second on an atomic, mean the whole system.
_SYSTEM_AMD = re.compile(
    r"^\s*(?:buffer_(?:wbl2|inv)\b(?=.*\bsc0\b)|(?:global|flat|buffer)_atomic).*\bsc1\b.*$", re.M
)
_ATOMIC_AMD = re.compile(r"^\s*(?:global|flat|buffer)_atomic.*$", re.M)
_DIVISION_PTX = re.compile(r"^.*\b(?:div|rem|rcp|sqrt|rsqrt|ex2|lg2)\.[a-z].*$", re.M)
_FLOATING_AMD = re.compile(
    r"^\s*v_(?:rcp|rsq|sqrt|div|cvt_f|fma_f|fmac_f|mul_f|add_f|trunc_f)\w*.*$", re.M
)
_SCRATCH_AMD = re.compile(r"^\s*scratch_(?:load|store)\w*.*$", re.M)
# Scalar registers are spilled into lanes of vector registers: that touches no memory.
_AMD_ZERO = ("private_segment_fixed_size", "vgpr_spill_count")
# What a pass finds and leaves for the next, by the names that the kernel's source has for them.
_KEPT = {"alone": ("state", "totals"), "shared": ("state", "totals", "scratch")}
# HFMA2 and FSEL are left out: ptxas moves and selects integers with them.
_FLOATING = {"MUFU", "FCHK", "FADD", "FMUL", "FFMA", "DADD", "DMUL", "DFMA"}
_CONVERSIONS = {"I2F", "I2FP", "F2I", "F2F", "F2FP", "F2IP", "FRND"}


def _is_barrier(at: Instruction) -> bool:
    return at.name == "BAR" and not at.guard


def _is_atomic(at: Instruction) -> bool:
    """An atomic on global memory whose old value is used: only the ticket is one."""
    return at.name in {"ATOM", "ATOMG"}


def _is_reduction(at: Instruction) -> bool:
    """An atomic on global memory whose old value is not used: an add to the scratch."""
    return at.name in {"RED", "REDG"}


def _is_exit(at: Instruction) -> bool:
    return at.name == "EXIT"


def _is_global_load(at: Instruction) -> bool:
    return at.name in {"LDG", "LD"}


def _is_fence(at: Instruction) -> bool:
    return at.name in {"MEMBAR", "FENCE"} and not at.has("CTA")


def no_spill(of: Compiled) -> list[str]:
    """No stack, no register spilled: both are memory that every pass would wait for."""
    if not of.is_cuda:
        found = [line.strip() for line in _SCRATCH_AMD.findall(of.code)]
        for key in _AMD_ZERO:
            values = re.findall(rf"\.{key}:\s+(\d+)", of.code)
            if not values:
                found.append(f"{key} is not in the listing")
            found += [f"{key} is {value}" for value in values if int(value)]
        return found
    found = []
    for key in ("STACK", "LOCAL"):
        if key not in of.resources:
            found.append(f"{key} is not in what cuobjdump prints")
        elif of.resources[key]:
            found.append(f"{key} is {of.resources[key]} bytes")
    local = of.listing.where(lambda at: at.name in {"STL", "LDL"})
    if local:
        found.append(f"{len(local)} accesses to local memory, first {_at(of.listing, local[0])}")
    return found


def no_system_fence(of: Compiled) -> list[str]:
    """No fence or atomic of system scope: on Hopper each waits for the host's memory."""
    if not of.is_cuda:
        return [line.strip() for line in _SYSTEM_AMD.findall(of.code)]
    kinds = {"MEMBAR", "FENCE", "ATOM", "ATOMG", "RED", "REDG"}
    found = [
        _at(of.listing, index)
        for index in of.listing.where(lambda at: at.name in kinds and at.has("SYS"))
    ]
    return found + [line.strip() for line in _SYSTEM_PTX.findall(of.ptx)]


def no_approximation(of: Compiled) -> list[str]:
    """No division and no floating point: a GPU's are approximate, and integer division is made of them."""
    if not of.is_cuda:
        return [line.strip() for line in _FLOATING_AMD.findall(of.code)]
    names = _FLOATING | _CONVERSIONS
    found = [_at(of.listing, index) for index in of.listing.where(lambda at: at.name in names)]
    return found + [line.strip() for line in _DIVISION_PTX.findall(of.ptx)]


def ticket_in_order(of: Compiled) -> list[str]:
    """Programs meet as they must: adds, barrier, fence, ticket, invalidation, barrier, loads.

    Without the first barrier the ticket of one warp goes out before the adds of another; without
    the second, a warp reads the counts before the ticket is drawn. A program that runs alone has
    neither ticket nor fence.
    """
    if not of.is_cuda:
        needless = _ATOMIC_AMD.findall(of.code) if of.path == "alone" else []
        return [f"a program that runs alone needs no {line.strip()}" for line in needless]
    listing = of.listing
    adds, tickets = listing.where(_is_reduction), listing.where(_is_atomic)
    if of.path == "alone":
        return [
            f"a program that runs alone needs no {_at(listing, index)}"
            for index in [*adds, *tickets, *listing.where(_is_fence)]
            if not listing.instructions[index].has("SYS")  # another gate's
        ]
    if not adds or not tickets:
        return [f"{len(adds)} adds to the scratch and {len(tickets)} tickets: none may be missing"]
    return [*_before_ticket(listing, adds), *_behind_ticket(listing, tickets, adds)]


def _before_ticket(listing: Listing, adds: list[int]) -> list[str]:
    missing = ("barrier", "fence of gpu scope behind the barrier")
    found = []
    guards = {listing.instructions[index].guard for index in listing.where(_is_atomic)}

    def fence(at: Instruction) -> bool:
        # Under another guard than the ticket's it may be left out where the ticket is drawn.
        return _is_fence(at) and at.guard in {"", *guards}

    steps = (_is_barrier, fence)
    for ticket, passed in listing.out_of_order(adds, steps, _is_atomic, _is_reduction):
        found.append(f"no {missing[passed]} between the adds and the ticket {ticket}")
    return found


def _behind_ticket(listing: Listing, tickets: list[int], adds: list[int]) -> list[str]:
    missing = ("invalidation of the L1 cache", "barrier behind the invalidation")
    found = []
    guards = {listing.instructions[index].guard for index in tickets}

    def invalidation(at: Instruction) -> bool:
        return at.name == "CCTL" and at.has("IVALL") and at.guard in {"", *guards}

    steps = (invalidation, _is_barrier)
    early = listing.out_of_order(tickets, steps, _is_global_load, _is_atomic)
    for load, passed in early:
        found.append(f"no {missing[passed]} between the ticket and {load}")
    # The barrier that hands the ticket to all warps stands where the ticket does: a path around
    # it is a program that draws no ticket, and whose adds nobody collects.
    handed = {
        listing.instructions[index].address
        for index in listing.where(_is_barrier)
        if _follows(listing, tickets, index)
    }
    around = listing.reached(adds, _is_exit, lambda at: at.address in handed)
    found += [f"a program may add to the scratch and end at {at} without a ticket" for at in around]
    return found


def _follows(listing: Listing, tickets: list[int], barrier: int) -> bool:
    address = listing.instructions[barrier].address
    return bool(listing.reached(tickets, lambda at: at.address == address, _is_barrier))


def state_in_order(of: Compiled) -> list[str]:
    """What one pass leaves for the next is read before a barrier and stored after it.

    Each warp reads for itself and one thread stores: without a barrier in between, a late warp
    finds the next pass's head and writes its part of the record into the next slot. One warp
    alone cannot be late: its threads read and store in the order of the program.
    """
    if not of.is_cuda or of.num_warps == 1:
        return []
    return [line for name in _KEPT[of.path] for line in _stored_early(of, name)]


def _stored_early(of: Compiled, name: str) -> list[str]:
    loaded, stored = (_lines_of(of.source, verb, name) for verb in ("load", "store"))
    # Triton >= 3.8 emits a load as two lines of assembly, and the second is the load.
    loaded |= {line + 1 for line in loaded}

    def is_load(at: Instruction) -> bool:
        return _is_global_load(at) and _is_of(at, loaded)

    def is_store(at: Instruction) -> bool:
        return at.name in {"STG", "ST"} and _is_of(at, stored)

    loads, stores = of.listing.where(is_load), of.listing.where(is_store)
    if not loads or not stores:
        return [f"{len(loads)} loads and {len(stores)} stores of {name}: none may be missing"]
    early = of.listing.reached(loads, is_store, _is_barrier)
    return [f"no barrier between the loads of {name} and its {at}" for at in early]


def _lines_of(source: str, verb: str, name: str) -> set[int]:
    found = re.finditer(rf"\btl\.{verb}\(\s*{name}\b", source)
    return {source.count("\n", 0, match.start()) + 1 for match in found}


def _is_of(at: Instruction, lines: set[int]) -> bool:
    return at.line in lines and at.file.endswith("/route_stats.py")


def _at(listing: Listing, index: int) -> str:
    return str(listing.instructions[index])


GATES: dict[str, Callable[[Compiled], list[str]]] = {
    "spill": no_spill,
    "system-fence": no_system_fence,
    "approximation": no_approximation,
    "ticket": ticket_in_order,
    "state": state_in_order,
}
