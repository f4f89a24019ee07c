"""Replacing a method in one object, so that it can be taken back without a trace."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

_MISSING = object()


class Patch:
    """A method of one object, replaced in that object alone.

    Other objects of the class are untouched, and so is the class. What replaces the method is bound to
    the object as methods are, so a deep copy of the object calls it with the copy. The object is not
    kept alive.

    Args:
        owner: The object; it needs a `__dict__`.
        name: The method.
        function: Called as the method, `function(owner, *args, **kwargs)`.

    Raises:
        AttributeError: The object has no such method.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        getattr(owner, name)
        self._owner = weakref.ref(owner)
        self._name = name
        self._function = function
        self._before = vars(owner).get(name, _MISSING)
        vars(owner)[name] = MethodType(function, owner)

    def call(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        """Does what `owner` would do without the patch."""
        if self._before is not _MISSING:
            return self._before(*args, **kwargs)
        return getattr(type(owner), self._name)(owner, *args, **kwargs)

    def undo(self) -> None:
        """Restores exactly what was there, if what is there now is still ours. Idempotent."""
        owner = self._owner()
        if owner is None:
            return
        held = vars(owner)
        ours = held.get(self._name)
        if getattr(ours, "__func__", None) is not self._function:
            return  # somebody has wrapped it since, and goes on calling what passes through
        if self._before is _MISSING:
            del held[self._name]
        else:
            held[self._name] = self._before
