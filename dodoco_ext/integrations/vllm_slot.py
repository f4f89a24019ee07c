"""The one slot of a router of vLLM for a function that gets the ids, shared with others who use it.

vLLM puts a capturer of its own there when it is asked to return the experts of each token, before or after
the recorder. Both are called then, and each pass is recorded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from dodoco_ext import ops
from dodoco_ext.integrations.patch import Patch

Capture = Callable[[torch.Tensor], None]
Select = Callable[[torch.Tensor], torch.Tensor]


class Slot:
    """A router's slot, with the recorder in it.

    Args:
        router: vLLM's `BaseRouter`.
        site: The site of its layer.
        select: Gives the rows to record of the ids of a pass, `[T, k]`; None: all.
    """

    def __init__(self, router: Any, site: torch.Tensor, select: Select | None = None) -> None:
        self._router = router
        self._site = site
        self._select = select
        self._passes = 0
        self._theirs: Capture | None = router.capture_fn
        self._ours = self._first(self._theirs)
        router.set_capture_fn(self._ours)
        self._patch = Patch(router, "set_capture_fn", self._set)

    def release(self) -> None:
        """Puts back what was there, or what somebody else has put there since. Idempotent."""
        self._patch.undo()
        if self._router.capture_fn is self._ours:
            self._router.set_capture_fn(self._theirs)

    def _first(self, before: Capture | None) -> Capture:
        def capture(ids: torch.Tensor) -> None:
            if before is not None:
                before(ids)
            self._record(ids)

        return capture

    def _set(self, router: Any, theirs: Capture | None) -> None:
        """What `router.set_capture_fn(theirs)` does now."""
        self._theirs = theirs
        self._ours = self._first(None) if theirs is None else self._together(theirs)
        router.capture_fn = self._ours

    def _together(self, theirs: Capture) -> Capture:
        def capture(ids: torch.Tensor) -> None:
            if is_dynamo_compiling():
                theirs(ids)
                self._record(ids)
                return
            passes = self._passes
            theirs(ids)
            if self._passes == passes:  # unless it calls what was there, and that was ours
                self._record(ids)

        return capture

    def _record(self, ids: torch.Tensor) -> None:
        if self._select is not None:
            ids = self._select(ids)
        # Both report what they cannot record, and neither raises.
        if is_dynamo_compiling():
            ops.route_ids(ids, self._site)
            return
        self._passes += 1
        if not ops.direct_ids(ids, self._site):
            ops.route_ids(ids, self._site)
