"""Recording transfers: when an AlltoAll began and ended, and how many rows went where."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from dodoco_ext import _C
from dodoco_ext.device import NOT_STAMPED
from dodoco_ext.errors import InputError
from dodoco_ext.recorder import Recorder
from dodoco_ext.transfers import COMBINE, DISPATCH, UNITS

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    RowCounts: TypeAlias = Sequence[int] | NDArray[Any] | torch.Tensor

log = logging.getLogger("dodoco")

_push = _C.push_transfer
_now = time.monotonic_ns
_FLAGS = {unit: _C.FLAG_TOKENS if unit == "token" else 0 for unit in UNITS}
_FAULTS = {  # of results
    -2: _C.Fault.BAD_SHAPE,
    -3: _C.Fault.TOO_LARGE,
    -4: _C.Fault.INTERNAL,
    -5: _C.Fault.NO_LANE,
    -6: _C.Fault.DEVICE_ERROR,
}
_UNTIMED = _C.FLAG_UNTIMED


class Transfer:
    """A transfer under way. Made by `Capture.begin()`.

    Attributes:
        layer: Index of the layer.
        type: DISPATCH or COMBINE, with flags.
        iteration: The iteration it belongs to; -1: the lane's.
        begin_ns: When it began, by the host's monotonic clock.
        device: Where it is stamped; None: on the host.
    """

    __slots__ = ("begin_ns", "device", "iteration", "layer", "slot", "type")

    def __init__(self, layer: int, type: int, iteration: int, device: str | None) -> None:  # noqa: A002
        self.layer = layer
        self.type = type
        self.iteration = iteration
        self.device = device
        self.slot = NOT_STAMPED
        self.begin_ns = _now()


class Capture:
    """Writes the transfers of one recording. Never raises for what goes wrong with telemetry.

    Args:
        recorder: The open recording; it must have a group.
        advances: Whether a forward DISPATCH of a layer that does not come after the last one starts the
            next iteration. For recordings whose routers are not observed; elsewhere routers do that.

    Raises:
        InputError: The recording names no group.
    """

    def __init__(self, recorder: Recorder, *, advances: bool) -> None:
        if recorder.group is None:
            raise InputError("this recording names no group: make it with group=GroupSpec(...)")
        self._recorder = recorder
        self._lane = recorder.lane.address
        self._advances = int(advances)
        self._slots = itertools.cycle(range(_C.TRANSFERS_AT_ONCE))
        self._logged: set[_C.Fault] = set()
        for device in recorder.devices.values():
            device.add_transfers()

    def begin(
        self,
        layer: int,
        op: int,
        *,
        backward: bool = False,
        recompute: bool = False,
        iteration: int | None = None,
        device: str | None = None,
    ) -> Transfer:
        """Stamps the begin of a transfer.

        Args:
            layer: Index of the layer in the recording.
            op: DISPATCH or COMBINE.
            backward: Whether it is part of the backward pass.
            recompute: Whether it repeats a forward pass.
            iteration: What `end()` returned for the forward transfer that this one belongs to; None:
                the lane's present iteration.
            device: Stamp it there, in the order of the current stream (one node), as `cuda:0`; at most 16
                such may be under way in a stream. None: by the host's clock.
        """
        kind = op | (_C.FLAG_BACKWARD if backward else 0) | (_C.FLAG_RECOMPUTE if recompute else 0)
        transfer = Transfer(layer, kind, -1 if iteration is None else iteration, device)
        if device is not None and device in self._recorder.devices:
            transfer.slot = next(self._slots)
            self._settle(self._recorder.devices[device].begin_transfer(transfer.slot))
        return transfer

    def end(
        self,
        transfer: Transfer,
        send: RowCounts,
        receive: RowCounts,
        *,
        experts: RowCounts | None = None,
        bytes_per_row: int = 0,
        unit: str = "assignment",
        timed: bool = True,
    ) -> int:
        """Records a transfer, where its result is awaited.

        Counts are integers on the host (a list, a tuple, an array, a tensor), or a tensor of 4- or 8-byte
        integers on the transfer's device, which the host never reads.

        Args:
            transfer: From `begin()`.
            send: Rows to each rank of the group, [ranks].
            receive: Rows from each rank of the group, [ranks].
            experts: Rows received for each local expert, [local experts].
            bytes_per_row: Bytes of one row: hidden size times width, and scales where they travel along.
            unit: What a row is: an `assignment` (a token with two experts on a rank is two rows), or a
                `token` (it is one).
            timed: Whether begin and end are those of the transfer, and not of its enqueueing.

        Returns:
            The iteration recorded; -1 where it is known on the device alone, or nothing was recorded.
        """
        kind = transfer.type | _FLAGS[unit] | (0 if timed else _C.FLAG_UNTIMED)
        device = transfer.device or _device_of(send, receive, experts)
        if device is None:
            return self._push(
                transfer, kind, bytes_per_row, _plain(send), _plain(receive), _plain(experts)
            )
        found = self._recorder.devices.get(device)
        if found is None:
            self._fault(_C.Fault.UNSUPPORTED_DEVICE, f"nothing is recorded on {device}")
            return -1
        try:
            result = found.end_transfer(
                kind, transfer, self._advances, bytes_per_row, (send, receive, experts)
            )
        except Exception as error:  # telemetry never takes down its host
            self._fault(_C.Fault.BAD_SHAPE, f"counts of a transfer: {error}")
            return -1
        self._settle(result)
        return -1

    def push(
        self,
        layer: int,
        op: int,
        send: RowCounts,
        receive: RowCounts,
        begin_ns: int,
        end_ns: int,
        *,
        backward: bool = False,
        recompute: bool = False,
        iteration: int = -1,
        experts: RowCounts | None = None,
        bytes_per_row: int = 0,
        unit: str = "assignment",
        timed: bool = True,
    ) -> int:
        """Records a transfer whose counts and stamps (`time.monotonic_ns()`) the host has.

        `begin()` and `end()` in one call; arguments and result as there.
        """
        if backward:
            op |= _C.FLAG_BACKWARD
        if recompute:
            op |= _C.FLAG_RECOMPUTE
        if unit != "assignment":
            op |= _FLAGS[unit]
        if not timed:
            op |= _UNTIMED
        try:
            result: int = _push(
                self._lane, op, layer, iteration, self._advances, begin_ns, end_ns,
                bytes_per_row, send, receive, experts,
            )  # fmt: skip
        except Exception as error:  # telemetry never takes down its host
            self._fault(_C.Fault.BAD_SHAPE, f"counts of a transfer: {error}")
            return -1
        return result if result >= -1 else self._refused(result)

    def under_way(
        self,
        layer: int,
        op: int,
        send: RowCounts,
        receive: RowCounts,
        begin_ns: int,
        *,
        backward: bool = False,
        recompute: bool = False,
        iteration: int = -1,
        bytes_per_row: int = 0,
    ) -> Callable[[bool], int]:
        """The first half of `push()`, for the time in which a transfer runs.

        Returns:
            The second half, to be called at the transfer's end with `timed`; it returns what `push()` does. It runs
            between that end and whoever waits for it: hence it does as little as can be.
        """
        if backward:
            op |= _C.FLAG_BACKWARD
        if recompute:
            op |= _C.FLAG_RECOMPUTE
        lane, advances = self._lane, self._advances

        def end(timed: bool) -> int:
            try:
                result: int = _push(
                    lane, op if timed else op | _UNTIMED, layer, iteration, advances, begin_ns,
                    _now(), bytes_per_row, send, receive, None,
                )  # fmt: skip
            except Exception as error:  # telemetry never takes down its host
                self._fault(_C.Fault.BAD_SHAPE, f"counts of a transfer: {error}")
                return -1
            return result if result >= -1 else self._refused(result)

        return end

    def _push(self, transfer: Transfer, kind: int, bytes_per_row: int, *counts: Any) -> int:
        end_ns = _now()
        send, receive, experts = counts
        return self.push(
            transfer.layer, kind, send, receive, transfer.begin_ns, end_ns,
            iteration=transfer.iteration, experts=experts, bytes_per_row=bytes_per_row,
        )  # fmt: skip

    def _refused(self, result: int) -> int:
        self._settle(result + 1)
        return -1

    def _settle(self, result: int) -> None:
        if result < 0:
            size = len(self._recorder.group.ranks) if self._recorder.group else 0
            self._fault(_FAULTS[result], f"a transfer in a group of {size} ranks was not recorded")

    def _fault(self, fault: _C.Fault, detail: str) -> None:
        self._recorder.add_fault(fault)
        if fault not in self._logged:
            self._logged.add(fault)
            log.error("telemetry fault %s: %s", fault.name, detail)


def _device_of(*counts: Any) -> str | None:
    """The device of the first tensor that is on one."""
    for each in counts:
        if getattr(each, "is_cuda", False):
            return str(each.device)
    return None


def _plain(counts: Any) -> Any:
    """A tensor of the host as the array that shares its memory; anything else as it is."""
    return counts.numpy() if hasattr(counts, "data_ptr") else counts


__all__ = ["COMBINE", "DISPATCH", "Capture", "Transfer"]
