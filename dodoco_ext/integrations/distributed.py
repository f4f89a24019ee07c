"""`capture_alltoall(group)`: the AlltoAlls of an expert-parallel group, as torch.distributed runs them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from dodoco_ext import _C
from dodoco_ext.capture import COMBINE, DISPATCH, Capture
from dodoco_ext.errors import InputError
from dodoco_ext.recorder import GroupSpec, LayerSpec, Recorder
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings

from . import collectives
from .attribution import Attribution, Call
from .blocks import Blocks, blocks_of

if TYPE_CHECKING:
    from .deepep import BufferProbe

log = logging.getLogger("dodoco")

_now = time.monotonic_ns


class Attached(Protocol):
    """What `capture_alltoall` asks of an attachment whose recording it joins."""

    @property
    def recorder(self) -> Recorder:
        """The open recording."""


class AlltoAllCapture:
    """Records the AlltoAlls of one group. Made by `capture_alltoall()`; a context manager.

    Attributes:
        path: The recording's file.
        layers: The layers that transfers are recorded of.
        passed_over: Calls on the group that were not recorded, by reason: `control` (integers, or
            single numbers and no rows), `outside` (of every layer's scope), `extra` (more than one
            call in the scope of one transfer), `async_finish` (of DeepEP: nobody waited
            for the event that such a call returned; counted at the end), `low latency` (without counters
            of ours), `unattributed` (a backward or recomputed call that fits no forward one;
            also a fault in the recording).
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        recorder: Recorder,
        *,
        owns: bool,
        modules: Sequence[torch.nn.Module] = (),
        ordered: bool,
    ) -> None:
        self.path: Path = recorder.path
        self.layers = recorder.layers
        self.passed_over: Counter[str] = Counter()
        self.group = group
        self._recorder = recorder
        self._owns = owns
        self._reader = Reader(recorder.path)
        self.writer = Capture(recorder, advances=owns)
        self.attribution = Attribution(len(self.layers), ordered)
        self._logged: set[str] = set()
        self._buffers: list[BufferProbe] = []
        if not collectives.listen(group, self):
            raise InputError("this group is captured already: close() that capture first")
        self._blocks = Blocks(modules, self.attribution.scopes)

    @property
    def reader(self) -> Reader:
        """A reader of the recording; it goes on working after `close()`."""
        return self._reader

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """What the calling thread sends inside belongs to that layer: dispatch and combine in turn.

        Raises:
            InputError: There is no such layer.
        """
        with self.attribution.scopes.enter(self._checked(index)):
            yield

    @contextlib.contextmanager
    def dispatch(self, layer: int | None = None) -> Iterator[None]:
        """The first transfer of rows inside is a dispatch, of that layer or of the enclosing scope's.

        Raises:
            InputError: There is no such layer, or none was named.
        """
        with self.attribution.scopes.enter(self._checked(layer), DISPATCH):
            yield

    @contextlib.contextmanager
    def combine(self, layer: int | None = None) -> Iterator[None]:
        """The first transfer of rows inside is a combine; otherwise as `dispatch()`."""
        with self.attribution.scopes.enter(self._checked(layer), COMBINE):
            yield

    def restart(self) -> None:
        """Where calls are placed by their order: the thread's next one is the first layer's dispatch.

        For loops that leave an iteration half-way, after an error or an early exit.
        """
        self.attribution.order.calls = 0

    def observe_buffer(
        self, buffer: object, *, num_local_experts: int | None = None, device: str | None = None
    ) -> BufferProbe:
        """Records the dispatches and combines of a DeepEP `Buffer`; see docs/alltoall.md.

        Args:
            buffer: The instance. Its methods are replaced in the instance and put back exactly.
            num_local_experts: Experts of this rank: then low-latency dispatches get counters of ours, made
                now, where the caller passes none. None: they are left alone.
            device: Where those counters are, as `cuda:0`; by default the current CUDA device.

        Raises:
            InputError: The object has not the methods of DeepEP's Buffer.
        """
        from .deepep import BufferProbe

        probe = BufferProbe(self, buffer, num_local_experts, device)
        self._buffers.append(probe)
        return probe

    def _checked(self, layer: int | None) -> int:
        index = self.attribution.scopes.current_layer() if layer is None else layer
        if index is None:
            raise InputError("which layer? Name it, or call this inside layer(index)")
        if not 0 <= index < len(self.layers):
            raise InputError(
                f"layer {index}: this recording has {len(self.layers)}, numbered from 0"
            )
        return index

    # --- What collectives asks; nothing here may raise. ------------------------------------------

    def before(
        self,
        sent: Sequence[int],
        received: Sequence[int],
        rows: torch.Tensor,
        like: torch.Tensor,
        begin_ns: int | None = None,
    ) -> collectives.Done | None:
        """Places a call whose splits the host has; see `collectives.Listener`."""
        try:
            dtype, shape = rows.dtype, rows.shape
            if len(shape) < 2 or not (dtype.is_floating_point or dtype.is_complex):
                # Not rows of hidden states, but the counts that precede them.
                self.passed_over["control"] += 1
                return None
            call = self._place((sent, received), dtype.itemsize * prod(shape[1:]))
            if call is None:
                return None
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                return self._stamped_on(str(like.device), call, lambda: (sent, received, None))
            return self._stamped_here(call, sent, received, begin_ns or _now())
        except Exception as error:  # telemetry never takes down its host
            self.failed(error)
            return None

    def before_on_device(
        self, rows: torch.Tensor, read: collectives.ReadSplits
    ) -> collectives.Done | None:
        """Places a call whose splits lie in tensors; see `collectives.Listener`."""
        try:
            call = self._place(None, rows.dtype.itemsize * prod(rows.shape[1:]))
            if call is None:
                return None
            return self._stamped_on(str(rows.device) if rows.is_cuda else None, call, read)
        except Exception as error:  # telemetry never takes down its host
            self.failed(error)
            return None

    def _place(
        self, splits: tuple[Sequence[int], Sequence[int]] | None, bytes_per_row: int
    ) -> Call | None:
        call = self.attribution.place(splits, bytes_per_row)
        if call is None:
            self.unattributed()
        elif call.layer < 0:
            self.passed_over["extra" if call.op else "outside"] += 1
            return None
        return call

    def _stamped_here(
        self, call: Call, sent: Sequence[int], received: Sequence[int], begin_ns: int
    ) -> collectives.Done:
        end = self.writer.under_way(
            call.layer,
            call.op,
            sent,
            received,
            begin_ns,
            backward=call.backward,
            recompute=call.recompute,
            iteration=-1 if call.iteration is None else call.iteration,
            bytes_per_row=call.row_bytes,
        )
        if call.iteration is not None:
            return end

        def done(timed: bool) -> None:
            iteration = end(timed)
            if iteration >= 0:
                call.iteration = iteration

        return done

    def _stamped_on(
        self, device: str | None, call: Call, read: Callable[[], tuple[Any, Any, Any]]
    ) -> collectives.Done:
        transfer = self.writer.begin(
            call.layer,
            call.op,
            backward=call.backward,
            recompute=call.recompute,
            iteration=call.iteration,
            device=device,
        )

        def done(timed: bool) -> None:
            try:
                send, receive, experts = read()
                iteration = self.writer.end(
                    transfer,
                    send,
                    receive,
                    experts=experts,
                    bytes_per_row=call.row_bytes,
                    timed=timed,
                )
                if call.iteration is None and iteration >= 0:
                    call.iteration = iteration
            except Exception as error:  # telemetry never takes down its host
                self.failed(error)

        return done

    def unattributed(self) -> None:
        """Counts a call that moved rows of a layer that nobody can name."""
        self.passed_over["unattributed"] += 1
        self._recorder.add_fault(_C.Fault.UNATTRIBUTED)
        self._log_once(
            "a backward or recomputed AlltoAll fits no forward one and is not recorded: "
            "give capture_alltoall() the MoE modules, or enter layer() inside what is recomputed"
        )

    def failed(self, error: Exception) -> None:
        """Counts what must not happen."""
        self._recorder.add_fault(_C.Fault.INTERNAL)
        self._log_once(f"telemetry fault INTERNAL: {error!r}")

    def _log_once(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            log.error("%s", message)

    def close(self) -> None:
        """Ends the capture and puts everything back; a recording of its own ends too. Idempotent.

        Calls that nobody has waited for by now are recorded without a duration.
        """
        collectives.end_unfinished(self)
        collectives.stop_listening(self)
        self._blocks.restore()
        for buffer in self._buffers:
            buffer.restore()
        self._buffers.clear()
        if self._owns:
            self._recorder.close()

    def __enter__(self) -> AlltoAllCapture:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def group_spec(group: dist.ProcessGroup | None = None, name: str = "ep") -> GroupSpec:
    """What a recording says about a process group.

    Raises:
        InputError: torch.distributed is not initialised, or this rank is not in the group.
    """
    group = _initialised(group)
    return GroupSpec(tuple(dist.get_process_group_ranks(group)), dist.get_rank(group), name)


def _initialised(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise InputError("torch.distributed is not initialised: call init_process_group() first")
    group = dist.group.WORLD if group is None else group
    if group is None or dist.get_rank(group) < 0:
        raise InputError("this rank is not in the group: capture on the ranks that are")
    return group


def capture_alltoall(
    group: dist.ProcessGroup | None = None,
    *,
    layers: int | Sequence[str] | None = None,
    model: torch.nn.Module | None = None,
    modules: Mapping[str, torch.nn.Module] | Sequence[torch.nn.Module] | None = None,
    attachment: Attached | None = None,
    num_experts: int | None = None,
    lanes: int | None = None,
    labels: Mapping[str, str] | None = None,
    settings: Settings | None = None,
) -> AlltoAllCapture:
    """Starts recording the AlltoAlls of a group; other groups and other collectives are untouched.

    Give one of `model`, `modules` and `layers`: what a transfer belongs to is the MoE module that its
    thread is in. With `layers` alone, it is the scope (`capture.layer(i)`), or else the order of calls: one
    layer's dispatch and combine after the other.

    Args:
        group: The expert-parallel group; by default all ranks.
        layers: Number of MoE layers that an iteration runs, or their names in that order.
        model: A model whose MoE blocks `attach()` would find.
        modules: The MoE modules in the order in which they run, by name or without.
        attachment: `attach(model, group=group)`: write into its recording, whose layers are then those
            meant here. By default a recording of its own is made.
        num_experts: Experts of a layer, if known; written into the recording.
        lanes: Threads that run the model at the same time; see `Recorder.use_lane()`.
        labels: Text to find the recording by.
        settings: Where and how to record; by default what `DODOCO_*` says.

    Returns:
        The capture, already recording. Leaving its context, or `close()`, ends it.

    Raises:
        InputError: The arguments do not say which layers there are, or contradict the attachment.
        NothingToObserve: The model has no MoE block.
        RecordingError: The recording cannot be created.
    """
    group = _initialised(group)
    spec = group_spec(group)
    named = blocks_of(layers, model, modules, attachment.recorder.layers if attachment else None)
    found = tuple(module for module in named.values() if module is not None)
    if attachment is not None:
        recorder = attachment.recorder
        if recorder.group is None or recorder.group.ranks != spec.ranks:
            ranks = None if recorder.group is None else recorder.group.ranks
            raise InputError(
                f"the attachment records transfers between {ranks}, and this group is {spec.ranks}: "
                "attach(model, group=...) with the group to capture"
            )
        return AlltoAllCapture(group, recorder, owns=False, modules=found, ordered=not found)
    recorder = Recorder(
        [LayerSpec(name, num_experts or 1, 0, routed=False) for name in named],
        lanes=lanes,
        devices=("cpu", f"cuda:{torch.cuda.current_device()}")
        if torch.cuda.is_available()
        else ("cpu",),
        group=spec,
        forms=(),
        labels=labels,
        settings=settings,
    )
    try:
        capture = AlltoAllCapture(group, recorder, owns=True, modules=found, ordered=not found)
    except BaseException:
        recorder.close()
        raise
    log.info("recording the AlltoAlls of %d layers to %s", len(named), recorder.path)
    return capture
