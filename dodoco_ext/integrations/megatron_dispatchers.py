"""Probes at Megatron's token dispatchers: what each AlltoAll carried, and how long it took.

A dispatcher is a plain object of each layer. `token_dispatch` and `token_combine` are replaced in the
object; nothing is patched in a class, for schedules may have bound its functions already.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.compiler import is_dynamo_compiling

from dodoco_ext import _C
from dodoco_ext.capture import COMBINE, DISPATCH, Capture, Transfer
from dodoco_ext.recorder import Recorder

from . import megatron_symbols as symbols
from .megatron_counts import COUNTS, Rows
from .megatron_origins import Origin, Origins, in_backward
from .patch import Patch

log = logging.getLogger("dodoco")

_probes: weakref.WeakKeyDictionary[Any, DispatcherProbe] = weakref.WeakKeyDictionary()


class Clock:
    """The micro-batch that is being run, as far as Megatron's schedules say.

    Written into the host's lane when it changes, and into those of devices.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.microbatch = 0

    def follow(self, layer: Any) -> None:
        """Takes the index that the schedule has left at a transformer layer, if there is one."""
        index = getattr(layer, "current_microbatch", None)
        if type(index) is int and index != self.microbatch and 0 <= index < 1 << 16:
            self.set(index)

    def set(self, index: int) -> None:
        """Makes `index` that of the records to come."""
        if index != self.microbatch:
            self._recorder.set("microbatch", index)
            self.microbatch = index


@dataclass(slots=True)
class _Pass:
    """A transfer under way in a forward method."""

    transfer: Transfer
    recompute: bool
    origin: Origin | None


class DispatcherProbe:
    """Records the transfers of one dispatcher.

    Args:
        dispatcher: An object of a class that `why_not()` has nothing against.
        layer: Index of the layer in the recording.
        owner: The transformer layer it is in, where schedules leave the micro-batch's index; or None.
        capture: Where transfers go.
        recorder: The recording, for faults.
        clock: The recording's micro-batch.
    """

    def __init__(
        self,
        dispatcher: Any,
        layer: int,
        owner: Any,
        capture: Capture,
        recorder: Recorder,
        clock: Clock,
    ) -> None:
        self.layer = layer
        self.capture = capture
        self.clock = clock
        self._owner = (lambda: None) if owner is None else weakref.ref(owner)
        self._recorder = recorder
        self._origins = {DISPATCH: Origins(), COMBINE: Origins()}
        self.counts = next(COUNTS[s.name]() for s in _OBSERVED if symbols.is_a(dispatcher, s))
        self._failed = False
        self.patches: dict[str, Patch] = {}
        _probes[dispatcher] = self
        for name, function in (*self.counts.methods, *_METHODS):
            self.patches[name] = Patch(dispatcher, name, _replacement(name, function))

    def undo(self) -> None:
        """Takes the probe out of its dispatcher. Idempotent."""
        for patch in reversed(self.patches.values()):
            patch.undo()
        self._failed = True  # for wrappers of others that still call ours

    @property
    def is_on(self) -> bool:
        """Whether it records; a fault of its own turns it off."""
        return not self._failed

    def run(
        self, op: int, dispatcher: Any, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Runs a forward method and records its transfer; the method's result and errors are its own."""
        under_way = self._guarded(self._begin, op, dispatcher, args, kwargs)
        result = call(*args, **kwargs)
        if under_way is not None:
            self._guarded(self._end, op, dispatcher, under_way, result)
        return result

    def _begin(self, op: int, dispatcher: Any, args: Any, kwargs: Any) -> _Pass | None:
        recompute = in_backward()
        origin = self._origins[op].find() if recompute else None
        if recompute and origin is None:
            self._recorder.add_fault(_C.Fault.UNATTRIBUTED)
            return None
        if origin is not None:
            self._to(origin)
        else:
            self.clock.follow(self._owner())
        tensors = (*args, *kwargs.values())
        device = self.counts.before(op, dispatcher, tensors)
        transfer = self.capture.begin(
            self.layer,
            op,
            recompute=recompute,
            iteration=None if origin is None else _known(origin.iteration),
            device=device,
        )
        return _Pass(transfer, recompute, origin)

    def _end(self, op: int, dispatcher: Any, under_way: _Pass, result: Any) -> None:
        rows = self.counts.after(op, dispatcher)
        if rows is None:
            return
        iteration = self._record(under_way.transfer, rows)
        origin = under_way.origin or Origin(iteration, self.clock.microbatch)
        if not under_way.recompute:
            self._origins[op].note(origin)
        node = self.counts.node(result[0] if isinstance(result, tuple) else result)
        if node is not None:
            way_back = _WayBack(self, op, rows.back(), origin)
            node.register_prehook(way_back.begin)
            node.register_hook(way_back.end)

    def _record(self, transfer: Transfer, rows: Rows) -> int:
        return self.capture.end(
            transfer,
            rows.send,
            rows.receive,
            experts=rows.experts,
            bytes_per_row=rows.bytes_per_row,
            unit=rows.unit,
            timed=rows.timed or transfer.device is not None,
        )

    def _to(self, origin: Origin) -> None:
        # On devices each change would be a launch in the middle of a backward pass.
        if not self._recorder.devices:
            self.clock.set(origin.microbatch)

    def _guarded(self, action: Callable[..., Any], *args: Any) -> Any:
        if self._failed:
            return None
        try:
            return action(*args)
        except Exception as error:  # telemetry never takes down its host
            self._failed = True
            self._recorder.add_fault(_C.Fault.INTERNAL)
            name = self._recorder.layers[self.layer].name
            log.error("telemetry fault INTERNAL at %s: %r; its transfers are now off", name, error)
            return None


class _WayBack:
    """Stamps the backward of one transfer: hooks before and after its node, which change nothing."""

    def __init__(self, probe: DispatcherProbe, op: int, rows: Rows, origin: Origin) -> None:
        self._probe = probe
        self._op = op
        self._rows = rows
        self._origin = origin
        self._transfer: Transfer | None = None

    def begin(self, gradients: Any) -> None:
        self._transfer = self._probe._guarded(self._begin)

    def _begin(self) -> Transfer:
        probe = self._probe
        probe._to(self._origin)
        return probe.capture.begin(
            probe.layer,
            self._op,
            backward=True,
            iteration=_known(self._origin.iteration),
            device=self._rows.device,
        )

    def end(self, inputs: Any, outputs: Any) -> None:
        if self._transfer is not None:
            self._probe._guarded(self._probe._record, self._transfer, self._rows)
            self._transfer = None


def _known(iteration: int) -> int | None:
    """None for an iteration that only the device knows: the lane's present one."""
    return iteration if iteration >= 0 else None


def _token_dispatch(probe: DispatcherProbe, owner: Any, call: Any, args: Any, kwargs: Any) -> Any:
    return probe.run(DISPATCH, owner, call, args, kwargs)


def _token_combine(probe: DispatcherProbe, owner: Any, call: Any, args: Any, kwargs: Any) -> Any:
    return probe.run(COMBINE, owner, call, args, kwargs)


_METHODS = (("token_dispatch", _token_dispatch), ("token_combine", _token_combine))
_OBSERVED = (symbols.ALLTOALL, symbols.ALLGATHER, symbols.FLEX)


def _replacement(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What takes the place of a method; in a copy of its object it does what the class does."""

    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        probe = _probes.get(self)
        if probe is None:
            return getattr(type(self), name)(self, *args, **kwargs)
        patch = probe.patches[name]
        if not probe.is_on or is_dynamo_compiling():
            return patch.call(self, *args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            return patch.call(self, *args, **kwargs)

        return function(probe, self, call, args, kwargs)

    return replacement


def is_probed(dispatcher: Any) -> bool:
    """Whether a recording is taking the transfers of this dispatcher."""
    probe = _probes.get(dispatcher)
    return probe is not None and probe.is_on


def why_not(dispatcher: Any) -> str:
    """Why the transfers of a dispatcher cannot be recorded; "" if they can."""
    if symbols.is_a(dispatcher, symbols.FLEX):
        manager = dispatcher._comm_manager
        if not symbols.is_a(manager, symbols.DEEPEP):
            return (
                f"{type(manager).__name__} keeps to itself how many rows go to and come from each rank; "
                "the router tells which experts are chosen"
            )
    elif not any(symbols.is_a(dispatcher, symbol) for symbol in _OBSERVED):
        return f"a {type(dispatcher).__name__}: its counts are not known"
    return ""


def group_of(dispatcher: Any) -> tuple[Any, str]:
    """The process group that a dispatcher's transfers are in, and what to call it."""
    if symbols.is_a(dispatcher, symbols.ALLTOALL):
        return dispatcher.ep_group, "ep"
    return dispatcher.tp_ep_group, "tp_ep" if dispatcher.tp_size > 1 else "ep"
