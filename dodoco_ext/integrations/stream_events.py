"""Being told when the current stream waits for an event of DeepEP's (`deep_ep.utils.EventOverlap`).

An instance gets a class of ours, derived from its own, until it is waited for. It refers to what is to be
done, and nothing refers to it: an event that nobody waits for goes away when its owner lets go of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

_END = "_dodoco_end"


def when_waited(event: Any, end: Callable[[], None]) -> bool:
    """Calls `end` once, when `current_stream_wait()` or the event's `with` block is over.

    Several may be told of one event; a copy of it counts as the same.

    Returns:
        False: nothing tells when this object is waited for, and it is as it was.
    """
    if not hasattr(type(event), "current_stream_wait"):
        return False
    told = vars(event).get(_END) if hasattr(event, "__dict__") else None
    if told:
        told.append(end)
        return True
    try:
        event.__class__ = _watched(type(event))  # type: ignore[arg-type]
    except TypeError:  # of C++, or with slots
        return False
    setattr(event, _END, [end])
    return True


@cache
def _watched(own: Any) -> Any:
    class Watched(own):  # type: ignore[misc]
        def current_stream_wait(self, *args: Any, **kwargs: Any) -> Any:
            answer = own.current_stream_wait(self, *args, **kwargs)
            _ended(self, own)
            return answer

        if hasattr(own, "__exit__"):

            def __exit__(self, *error: Any) -> Any:
                answer = own.__exit__(self, *error)
                _ended(self, own)
                return answer

    Watched.__name__, Watched.__qualname__ = own.__name__, own.__qualname__
    Watched.__module__ = own.__module__
    return Watched


def _ended(event: Any, own: Any) -> None:
    event.__class__ = own
    told = vars(event).pop(_END, [])
    ends, told[:] = [*told], []
    for end in ends:
        end()
