"""A kernel as the machine runs it: SASS of `nvdisasm -g -c`, its control flow, and questions about paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]+)\*/\s+(?:@(?P<guard>!?U?P[T\d]+)\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_.]*)\s*(?P<operands>[^;]*);"
)
_LABEL = re.compile(r"^([.$][\w.$]*):")
_SECTION = re.compile(r"^\s*\.section\s+([^,\s]+)")
_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
_TARGET = re.compile(r"`\(([.$][\w.$]*)\)")
_CONVERGENCE = re.compile(r"\bB\d+\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: Its place in the code, in bytes.
        guard: The predicate it runs under ("P0", "!P1"), or "" if it always runs.
        opcode: With its modifiers, such as `MEMBAR.ALL.GPU`.
        operands: As printed.
        file: The source file it comes from, or "" if unknown.
        line: The line there, or 0.
        labels: Labels that stand before it.
    """

    address: int
    guard: str
    opcode: str
    operands: str
    file: str = ""
    line: int = 0
    labels: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    def has(self, modifier: str) -> bool:
        return modifier in self.opcode.split(".")[1:]

    def __str__(self) -> str:
        place = f" ({self.file.rsplit('/', 1)[-1]}:{self.line})" if self.line else ""
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:#06x} {guard}{self.opcode} {self.operands}".rstrip() + place


Select = Callable[[Instruction], bool]


@dataclass(frozen=True)
class Listing:
    """The instructions of one kernel, in the order of their addresses."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int] = field(repr=False)

    @cached_property
    def successors(self) -> list[tuple[int, ...]]:
        """Of each instruction the ones that a thread may run next."""
        found: list[set[int]] = [set() for _ in self.instructions]
        # BSYNC leads to where the BSSY that set its register said, so registers are part of a state.
        start: tuple[int, frozenset[tuple[str, int]]] = (0, frozenset())
        seen, stack = {start}, [start]
        while stack:
            index, registers = stack.pop()
            at = self.instructions[index]
            following = self._next(index, dict(registers))
            found[index].update(following)
            if at.name == "BSSY":
                name = self._convergence(at)
                kept = {pair for pair in registers if pair[0] != name}
                registers = frozenset({*kept, (name, self._target(at))})
            for after in following:
                if (after, registers) not in seen:
                    seen.add((after, registers))
                    stack.append((after, registers))
        return [tuple(sorted(following)) for following in found]

    def _target(self, at: Instruction) -> int:
        label = _TARGET.search(at.operands)
        if label is None:
            raise ValueError(f"{at}: a jump whose target is not printed")
        return self.labels[label[1]]

    @staticmethod
    def _convergence(at: Instruction) -> str:
        register = _CONVERGENCE.search(at.operands)
        if register is None:
            raise ValueError(f"{at}: no convergence register")
        return register[0]

    def _next(self, index: int, met: dict[str, int]) -> tuple[int, ...]:
        at = self.instructions[index]
        following = (index + 1,) if index + 1 < len(self.instructions) else ()
        if at.name in {"EXIT", "RET"}:
            return following if at.guard else ()
        if at.name in {"BRX", "BRXU", "JMP", "JMX", "JMXU"}:
            raise ValueError(f"{at}: a jump whose targets are not printed")
        if at.name == "CALL":  # ptxas also leaves loops by a call, for sm_80
            return (*following, self._target(at))
        if at.name == "BRA":
            # Besides the guard there may be a second predicate, as in `BRA P1, target`.
            always = not at.guard and at.operands.startswith("`")
            return (self._target(at),) if always else (*following, self._target(at))
        if at.name == "BSYNC":
            target = met[self._convergence(at)]
            return (target, *following) if at.guard else (target,)
        return following

    @cached_property
    def reachable(self) -> list[int]:
        """Instructions that can run: neither the padding nor the trap behind the code."""
        return sorted(self._walk([0], lambda at: False))

    def _walk(self, starts: Iterable[int], stop: Select) -> set[int]:
        seen: set[int] = set()
        stack = list(starts)
        while stack:
            index = stack.pop()
            if index in seen:
                continue
            seen.add(index)
            if not stop(self.instructions[index]):
                stack.extend(self.successors[index])
        return seen

    def where(self, select: Select) -> list[int]:
        return [index for index in self.reachable if select(self.instructions[index])]

    def reached(self, starts: Iterable[int], goal: Select, avoiding: Select) -> list[Instruction]:
        """Goals on some path that starts behind one of `starts` and passes none of `avoiding`."""
        begin = [after for index in starts for after in self.successors[index]]
        seen = self._walk(begin, avoiding)
        return [
            self.instructions[index] for index in sorted(seen) if goal(self.instructions[index])
        ]

    def out_of_order(
        self, starts: Iterable[int], steps: Sequence[Select], goal: Select, again: Select
    ) -> list[tuple[Instruction, int]]:
        """Goals that some path reaches before it has passed all `steps`, in their order.

        Args:
            starts: Where paths begin; the first instruction looked at is the one behind.
            steps: What has to be passed.
            goal: What has to come last; a path ends there.
            again: What makes a path begin from its first step again.

        Returns:
            The goals, each with the number of steps that had been passed.
        """
        seen: set[tuple[int, int]] = set()
        found: dict[int, int] = {}
        stack = [(after, 0) for index in starts for after in self.successors[index]]
        while stack:
            index, passed = stack.pop()
            if (index, passed) in seen:
                continue
            seen.add((index, passed))
            at = self.instructions[index]
            if goal(at):
                if passed < len(steps):
                    found[index] = min(passed, found.get(index, passed))
                continue
            if again(at):
                passed = 0
            elif passed < len(steps) and steps[passed](at):
                passed += 1
            stack.extend((after, passed) for after in self.successors[index])
        return [(self.instructions[index], passed) for index, passed in sorted(found.items())]

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """The body of each loop, that of an outer one with the inner; ascending by size."""
        before: dict[int, list[int]] = {}
        for index in self.reachable:
            for after in self.successors[index]:
                before.setdefault(after, []).append(index)
        bodies: dict[int, set[int]] = {}
        for source, header in self._back_edges():
            body = {header}
            stack = [source]
            while stack:
                index = stack.pop()
                if index not in body:
                    body.add(index)
                    stack.extend(before.get(index, []))
            bodies.setdefault(header, set()).update(body)
        return sorted((frozenset(body) for body in bodies.values()), key=len)

    def _back_edges(self) -> list[tuple[int, int]]:
        edges: list[tuple[int, int]] = []
        entered: set[int] = {0}
        on_path: set[int] = {0}
        stack = [(0, iter(self.successors[0]))]
        while stack:
            index, rest = stack[-1]
            after = next(rest, None)
            if after is None:
                stack.pop()
                on_path.discard(index)
            elif after in on_path:
                edges.append((index, after))
            elif after not in entered:
                entered.add(after)
                on_path.add(after)
                stack.append((after, iter(self.successors[after])))
        return edges


def parse(text: str, kernel: str) -> Listing:
    """Reads the code of one kernel.

    Args:
        text: What `nvdisasm -g -c` printed.
        kernel: The name of the kernel's function.

    Raises:
        ValueError: The listing holds no such kernel, or it branches in a way that is not printed.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    file, line, inside = "", 0, False
    for row in text.splitlines():
        if section := _SECTION.match(row):
            inside = section[1] == f".text.{kernel}"
        elif not inside:
            continue
        elif source := _LINE.search(row):
            file, line = source[1], int(source[2])
        elif label := _LABEL.match(row):
            waiting.append(label[1])
        elif found := _INSTRUCTION.match(row):
            labels.update(dict.fromkeys(waiting, len(instructions)))
            guard = "" if found["guard"] in (None, "PT", "UPT") else found["guard"]
            instructions.append(
                Instruction(
                    int(found["address"], 16),
                    guard,
                    found["opcode"],
                    found["operands"].strip(),
                    file,
                    line,
                    tuple(waiting),
                )
            )
            waiting = []
    if not instructions:
        raise ValueError(f"the listing holds no code of {kernel}")
    return Listing(tuple(instructions), labels)
