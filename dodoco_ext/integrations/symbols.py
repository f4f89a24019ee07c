"""What is relied on of a class of an engine: its name, its methods, its attributes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Symbol:
    """A class of an engine, or with an empty name the functions of a file.

    Attributes:
        file: Where it is defined, below the folder that the engine's table names.
        name: Its name.
        methods: Methods taken or called, with the parameters that are relied on, in their order.
        attributes: Attributes of its objects that are read.
    """

    file: str
    name: str
    methods: tuple[tuple[str, tuple[str, ...]], ...] = ()
    attributes: tuple[str, ...] = ()
