"""The lanes of a recording on one CUDA device: arena, kernels, settings, sites.

What this module imports is light: torch is there when a model is on a device, Triton compiles the
kernels when a device is set up, and neither is needed to record on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from dodoco_ext import _C

if TYPE_CHECKING:
    import torch

    from dodoco_ext.capture import Transfer

log = logging.getLogger("dodoco")

MAX_EXPERTS = 1024
"""Most experts of a layer that the kernel counts."""

NOT_STAMPED = 0xFFFFFFFF
"""The slot of a transfer whose begin no device has stamped."""

FORMS = {"ids": 0, "map": 1, "bits": 2}
"""Forms in which a router's choice arrives, by the number that kernels know them by."""


class Device:
    """Lanes of one CUDA device, ready to record: every kernel is compiled and loaded.

    Args:
        writer: The recording.
        name: The device, such as `cuda:0`.
        first_lane: The first of its lanes in the recording.
        num_lanes: Its lanes: streams that record at the same time.
        shapes: `(num_experts, top_k)` of each layer.
        forms: Forms of choice to compile for; keys of `FORMS`.

    Raises:
        OSError: The driver refused something; nothing is left behind.
        ImportError: Triton is not installed.
        RuntimeError: A kernel could not be compiled.
    """

    def __init__(
        self,
        writer: _C.RecordingWriter,
        name: str,
        first_lane: int,
        num_lanes: int,
        shapes: Sequence[tuple[int, int]],
        forms: Collection[str],
    ) -> None:
        self.name = name
        self.index = int(name.removeprefix("cuda:"))
        capability = _C.device_capability(self.index)
        # Compiled before anything is pinned: the capability is all that compiling needs.
        from dodoco_ext.triton_kernels import build

        kernels = build.compile_kernels(set(shapes), {FORMS[form] for form in forms}, capability)
        clock = build.compile_clock(capability)
        self._lanes = _C.DeviceLanes(writer, self.index, first_lane, num_lanes)
        self._has_transfers = False
        self._begun_in = [0] * _C.TRANSFERS_AT_ONCE  # streams, by the slot of a transfer's begin
        try:
            for kernel in kernels:
                self._lanes.add_kernel(
                    kernel.form,
                    kernel.id_bytes,
                    kernel.shared,
                    kernel.num_experts,
                    kernel.block_k,
                    kernel.rows_per_program,
                    kernel.max_programs,
                    kernel.max_rows,
                    kernel.name,
                    kernel.num_warps,
                    kernel.shared_bytes,
                    kernel.code,
                )
            self._lanes.calibrate_clock(*clock)
        except BaseException:
            self.close()
            raise

    def site(self, layer: int) -> torch.Tensor:
        """The site of a layer: int64 [8] in the arena, which torch neither owns nor frees."""
        import torch

        with torch.inference_mode(False):
            return torch.as_tensor(_ArenaWords(self._lanes.site_address(layer)), device=self.name)

    def use_lane(self, lane: int) -> _C.DeviceLaneChoice:
        """Sends what the calling thread launches through a lane while the result is alive."""
        return _C.DeviceLaneChoice(self._lanes, lane)

    def set(self, name: str, value: int, lane: int | None = None) -> None:
        """Changes a setting in the order of the current stream; logs it if the driver refuses.

        Args:
            name: One of the lane's settings, such as `num_valid`.
            value: Its new value.
            lane: One of the device's lanes; None: all.

        Raises:
            RuntimeError: The stream is capturing: a graph would set the value at each replay.
        """
        stream = self._stream()
        try:
            for each in range(self._lanes.num_lanes) if lane is None else (lane,):
                self._lanes.set(each, name, value, stream)
        except OSError as error:  # the device is in an error state, and the host will hear of it
            log.error("%s=%d is not in effect on %s: %s", name, value, self.name, error)

    def add_transfers(self) -> None:
        """Makes the device able to record transfers. Idempotent; logs what keeps it from that."""
        if self._has_transfers:
            return
        code = _C.transfer_code()
        try:
            if not code:
                raise OSError("this build has no CUDA code: build it where nvcc is, DODOCO_CUDA=1")
            self._lanes.add_transfers(code)
            self._has_transfers = True
        except OSError as error:
            log.error("transfers with counts on %s are not recorded: %s", self.name, error)

    def begin_transfer(self, slot: int) -> int:
        """Stamps a begin in the current stream. Returns a result; negative: refused."""
        stream = self._begun_in[slot] = self._stream()
        return self._lanes.begin_transfer(slot, stream)

    def end_transfer(
        self, kind: int, transfer: Transfer, advances: int, bytes_per_row: int, counts: Any
    ) -> int:
        """Records a transfer in the current stream. Returns a result; negative: refused.

        A begin that was stamped in another stream is in that one's lane: such a transfer has no duration.

        Args:
            kind: Type and flags.
            transfer: What `begin_transfer()` stamped.
            advances: Whether it may start an iteration.
            bytes_per_row: Bytes of one row.
            counts: Rows sent, received and received for each expert, each on the device or the host.

        Raises:
            ValueError: Counts are of a type that is not read.
        """
        sent, received, experts = (_counts_for(each) for each in counts)
        stream, slot = self._stream(), transfer.slot
        if slot != NOT_STAMPED and self._begun_in[slot] != stream:
            slot, kind = NOT_STAMPED, kind | _C.FLAG_UNTIMED
        return self._lanes.end_transfer(
            kind,
            transfer.layer,
            transfer.iteration,
            bool(advances),
            slot,
            transfer.begin_ns,
            bytes_per_row,
            sent,
            received,
            experts,
            stream,
        )

    def _stream(self) -> int:
        import torch

        return torch.cuda.current_stream(self.index).cuda_stream

    def get(self, name: str, lane: int = 0) -> int:
        """The value last set."""
        return self._lanes.get(lane, name)

    def close(self) -> None:
        """Waits for what was launched, then lets go of the recording and the arena.

        After a capture both stay mapped for the life of the process, switched off: a graph that is
        replayed later finds them so.
        """
        try:
            self._lanes.close()
        except OSError as error:
            # The device is in no state to wait for: nothing is taken from under it.
            log.warning("the recorder's memory on %s is kept: %s", self.name, error)


def _counts_for(counts: Any) -> list[int] | tuple[int, int, int, bool]:
    """Counts as the launch takes them: where they lie on the device, or the numbers themselves."""
    if counts is None:
        return []
    if not getattr(counts, "is_cuda", False):
        return [int(count) for count in counts]
    if counts.dim() != 1 or counts.element_size() not in (4, 8) or counts.is_floating_point():
        raise ValueError(
            f"{counts.dtype} {list(counts.shape)}: give one row of 4- or 8-byte integers"
        )
    is_wide = counts.element_size() == 8
    return counts.data_ptr(), counts.numel(), counts.stride(0), is_wide


class _ArenaWords:
    """Eight words at a device address, as torch takes them without a copy."""

    def __init__(self, address: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (_C.SITE_BYTES // 8,),
            "typestr": "<i8",
            "data": (address, False),
            "version": 3,
        }
