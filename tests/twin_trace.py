"""What an interpreted kernel does to memory, in order, and what must hold for it on a GPU.

The interpreter runs a program's steps one after another; on a GPU its warps drift apart between
barriers. So accesses to one word of which one is a store need a barrier in between, whichever
threads make them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from triton.runtime.interpreter import interpreter_builder

_STARTED, _PASSES = 9, 0


@dataclass(frozen=True)
class Event:
    """A load, store, atomic, barrier or fault of one program; addresses of what was touched."""

    program: int
    kind: str
    addresses: frozenset[int] = frozenset()


@contextmanager
def tracing() -> Iterator[list[Event]]:
    """Collects the events of the kernels that are interpreted meanwhile."""
    events: list[Event] = []
    builder: Any = interpreter_builder

    def note(kind: str, pointers: Any = None, mask: Any = None) -> None:
        addresses = [] if pointers is None else pointers.data[mask.data.astype(bool)]
        touched = frozenset(int(address) for address in np.ravel(addresses))
        events.append(Event(builder.grid_idx[0], kind, touched))

    def load(pointers: Any, mask: Any, *rest: Any) -> Any:
        note("load", pointers, mask)
        return originals["create_masked_load"](pointers, mask, *rest)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("store", pointers, mask)
        return originals["create_masked_store"](pointers, value, mask, *rest)

    def atomic(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("atomic", pointers, mask)
        return originals["create_atomic_rmw"](operation, pointers, value, mask, *rest)

    def barrier() -> Any:
        note("barrier")
        return originals["create_barrier"]()

    def histogram(data: Any, bins: int, mask: Any) -> Any:
        # The interpreter leaves out what a GPU adds somewhere.
        counted = data.data[mask.data.astype(bool)]
        if counted.size and not 0 <= counted.min() <= counted.max() < bins:
            events.append(Event(builder.grid_idx[0], "histogram out of range"))
        return originals["create_histogram"](data, bins, mask)

    patches = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic,
        "create_barrier": barrier,
        "create_histogram": histogram,
    }
    originals = {name: getattr(builder, name) for name in patches}
    for name, patch in patches.items():
        setattr(builder, name, patch)
    try:
        yield events
    finally:
        for name in patches:
            delattr(builder, name)


def _phases(events: list[Event]) -> Iterator[list[Event]]:
    """Runs of events of one program without a barrier in between."""
    for program in sorted({event.program for event in events}):
        phase: list[Event] = []
        for event in events:
            if event.program != program:
                continue
            if event.kind == "barrier":
                yield phase
                phase = []
            else:
                phase.append(event)
        yield phase


def assert_apart(events: list[Event]) -> None:
    """No word is stored and touched otherwise without a barrier in between; nothing is undefined."""
    assert {event.kind for event in events} <= {"load", "store", "atomic", "barrier"}
    for phase in _phases(events):
        for first, second in combinations(phase, 2):
            if first.kind == second.kind == "load":
                continue
            both = first.addresses & second.addresses
            assert not both, f"{first.kind} and {second.kind} of {sorted(both)} in one phase"


def assert_published_in_order(events: list[Event], block: int) -> None:
    """The board's passes started are stored before all else of the block, its passes after."""
    phases = [
        {
            (address - block) // 8
            for event in phase
            if event.kind == "store"
            for address in event.addresses
            if block <= address < block + (16 + 64 + 1280) * 8
        }
        for phase in _phases(events)
    ]
    first, *between, last = [words for words in phases if words]
    assert first == {_STARTED}
    assert last == {_PASSES}
    assert not {_STARTED, _PASSES} & set().union(*between)


def assert_released(events: list[Event], scratch: int, programs: int) -> None:
    """Every program draws one ticket, in a phase that holds nothing before it; the last one goes on."""
    tickets = [event for event in events if event.kind == "atomic" and scratch in event.addresses]
    assert len(tickets) == programs
    for phase in _phases(events):
        drawn = [event for event in phase if event in tickets]
        assert not drawn or (phase.index(drawn[0]), len(drawn)) == (0, 1)
