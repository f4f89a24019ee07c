"""`attach(model)`: probes at every MoE router of a model, writing into one recording."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MethodType, TracebackType
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from dodoco_ext import _C, ops
from dodoco_ext.counters import Snapshot
from dodoco_ext.errors import InputError, NothingToObserve
from dodoco_ext.integrations.places import place_of, why_not
from dodoco_ext.integrations.transformers import Router, find_routers
from dodoco_ext.recorder import GroupSpec, LayerSpec, Recorder, Uncovered
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings

log = logging.getLogger("dodoco")

_SITE = "_dodoco_site"
_probes: set[Callable[..., None]] = set()
_forwards: set[Callable[..., Any]] = set()
_OPS: dict[str, tuple[Callable[..., bool], Callable[..., None]]] = {
    "ids": (ops.direct_ids, ops.route_ids),
    "map": (ops.direct_map, ops.route_map),
    "bits": (ops.direct_bits, ops.route_bits),
}


def _form_of(decision: torch.Tensor) -> str:
    return {torch.bool: "map", torch.uint8: "bits"}.get(decision.dtype, "ids")


# A router whose form may change from call to call: the dtype tells.
_OPS["auto"] = (
    lambda decision, site: _OPS[_form_of(decision)][0](decision, site),
    lambda decision, site: _OPS[_form_of(decision)][1](decision, site),
)


@cache
def _make_probe(extract: Callable[..., torch.Tensor], form: str) -> Callable[..., None]:
    """One function per kind of router, shared by its layers, so that compilers see one code.

    It serves as a forward hook and, without an output, as a forward pre-hook. It returns None: a
    hook that returned something would replace the router's input or output.
    """
    direct, record = _OPS[form]

    def probe(module: torch.nn.Module, args: Any, output: Any = None) -> None:
        try:
            decision = extract(module, args, output)
            if is_dynamo_compiling() or not direct(decision, module._dodoco_site):
                record(decision, module._dodoco_site)
        except Exception as error:  # telemetry never takes down its host
            _probe_failed(module, error)

    _probes.add(probe)
    return probe


@cache
def _make_forward(probe: Callable[..., None]) -> Callable[..., Any]:
    """A `forward` that ends with the probe; shared by the layers of a kind, as the probe is.

    A hook would do the same for more: it makes torch leave its fast path for calling modules.
    """

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = type(self).forward(self, *args, **kwargs)
        probe(self, args, output)
        return output

    _forwards.add(forward)
    return forward


def _probe_failed(module: torch.nn.Module, error: Exception) -> None:
    site = getattr(module, _SITE, None)
    if site is None:
        return  # detached by another thread while this one was in the router
    if torch.compiler.is_compiling():
        ops.extraction_failed(site)
    else:
        ops.report_fault(site, _C.Fault.INTERNAL, repr(error))


def _is_our_forward(module: torch.nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) in _forwards


class Attachment:
    """Probes in a model and the recording they write to. Made by `attach()`; a context manager.

    Attributes:
        path: The recording's file.
        layers: The observed layers, in the order in which the model registers them.
        uncovered: Parts of the model that route and are not observed, with the reason.
    """

    def __init__(self, routers: Sequence[Router | None], recorder: Recorder) -> None:
        # One a layer of the recording; None: its router is not observed.
        self.path: Path = recorder.path
        self.layers = recorder.layers
        refused = recorder.refused
        self.uncovered = (
            *recorder.uncovered,
            *(
                Uncovered(r.name, refused[p])
                for r in routers
                if r is not None and (p := place_of(r.module)) in refused
            ),
        )
        self._recorder = recorder
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._releases: list[weakref.finalize[..., Any]] = []
        # Opened now: later, somebody may have removed the file.
        self._reader = Reader(recorder.path)
        self._thread = threading.local()
        try:
            for index, router in enumerate(routers):
                if router is not None:
                    self._install(index, router)
        except BaseException:
            self.detach()
            raise

    def _install(self, index: int, router: Router) -> None:
        module = router.module
        place = place_of(module)
        if place in self._recorder.refused:
            return
        site = ops.make_site(self._recorder, index, place)
        setattr(module, _SITE, site)
        self._modules.add(module)
        # Nobody has to keep the attachment: the recording lives as long as the model does.
        release = weakref.finalize(module, ops.release_site, site.data_ptr())
        release.atexit = False
        self._releases.append(release)
        probe = _make_probe(router.extract, router.form)
        if router.hook == "forward_pre":
            self._handles.append(module.register_forward_pre_hook(probe))
        elif "forward" in module.__dict__ or module._forward_hooks:
            # Somebody else has a say in what the router returns: observe what is left at the end.
            self._handles.append(module.register_forward_hook(probe))
        else:
            module.__dict__["forward"] = MethodType(_make_forward(probe), module)

    @property
    def recorder(self) -> Recorder:
        """The writer's side, for what records beside the probes, such as `capture_alltoall()`."""
        return self._recorder

    @property
    def reader(self) -> Reader:
        """A reader of the recording; it goes on working after `detach()`."""
        return self._reader

    def snapshot(self) -> Snapshot:
        """The exact counters of every layer as they are now."""
        return self.reader.snapshot()

    @contextlib.contextmanager
    def lane(self, index: int) -> Iterator[None]:
        """Sends what the calling thread runs inside through a lane of its own.

        For threads that run the model at the same time, as overlapped micro-batches do; ask for the
        lanes with `attach(model, lanes=N)`. `num_valid` and `microbatch` are those of the calling
        thread's lane.

        Raises:
            InputError: There is no such lane.
        """
        with self._recorder.use_lane(index):
            before = self._own_lane()
            self._thread.lane = index
            try:
                yield
            finally:
                self._thread.lane = before

    def _own_lane(self) -> int | None:
        lane: int | None = getattr(self._thread, "lane", None)
        return lane

    def _set(self, name: str, value: int, lane: int | None = None) -> None:
        try:
            self._recorder.set(name, value, lane)
        except RuntimeError as error:
            raise InputError(f"{name} cannot be set now: {error}") from None

    @property
    def enabled(self) -> bool:
        """Whether passes are counted. Turned off, a pass only advances the iteration.

        On a device, this and the settings below take effect in the order of the current stream, also
        for graphs that it replays afterwards. None can be set while the stream is being captured.
        """
        return bool(self._recorder.get("enabled"))

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._set("enabled", int(value))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what runs inside, such as warm-up: it is not traffic."""
        before = self.enabled
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = before

    @property
    def num_valid(self) -> int | None:
        """Rows of the next passes that are real; the rest is counted as padding. None: all."""
        value = self._recorder.get("num_valid", self._own_lane())
        return None if value < 0 else value

    @num_valid.setter
    def num_valid(self, value: int | None) -> None:
        if value is not None and value < 0:
            raise InputError(f"num_valid={value}: give the number of real rows, or None for all")
        self._set("num_valid", -1 if value is None else value, self._own_lane())

    @property
    def record_every(self) -> int:
        """Iterations between ring records; the board counts every pass regardless."""
        return self._recorder.get("record_every")

    @record_every.setter
    def record_every(self, value: int) -> None:
        if value < 1:
            raise InputError(f"record_every={value}: give 1 for every iteration, or more")
        self._set("record_every", value)

    @property
    def microbatch(self) -> int:
        """Micro-batch index written into the records of the next passes, 0 to 65535."""
        return self._recorder.get("microbatch", self._own_lane())

    @microbatch.setter
    def microbatch(self, value: int) -> None:
        if not 0 <= value < 1 << 16:
            raise InputError(f"microbatch={value}: give 0 to 65535")
        self._set("microbatch", value, self._own_lane())

    def detach(self) -> None:
        """Removes every probe and closes the recording, which stays readable. Idempotent."""
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            module.__dict__.pop(_SITE, None)
            if _is_our_forward(module):
                del module.__dict__["forward"]
        for release in self._releases:
            release()
        self._handles.clear()
        self._modules.clear()
        self._releases.clear()
        self._recorder.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()


def attach(
    model: torch.nn.Module,
    *,
    lanes: int | None = None,
    group: GroupSpec | None = None,
    labels: Mapping[str, str] | None = None,
    settings: Settings | None = None,
) -> Attachment:
    """Starts recording the routing of a model.

    Args:
        model: A transformers MoE model, or any module that contains one.
        lanes: Threads that run the model at the same time; see `Attachment.lane()`. On a device:
            streams that do, the one that captures it into graphs included. Each stream takes a lane
            when it first runs the model; graphs that are replayed at the same time must be captured
            on streams of their own. None: one thread, two streams.
        group: The expert-parallel ranks, as `group_spec(process_group)` gives them: then transfers
            between them can be recorded beside the routing, by `capture_alltoall(attachment=...)`.
        labels: Text to find the recording by, such as `{"model_name": "my-moe"}`.
        settings: Where and how to record; by default what `DODOCO_*` says.

    Returns:
        The attachment, already recording. Leaving its context, or `detach()`, ends it.

    Raises:
        NothingToObserve: No router was found, or none that this build can observe.
        InputError: The model is already attached to, or the number of lanes is impossible.
        RecordingError: The recording cannot be created.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"attach() takes a torch.nn.Module, not {type(model).__name__}")
    claim(model)
    found = find_routers(model)
    uncovered = list(found.uncovered)
    routers = []
    for router in found.routers:
        if reason := why_not(router):
            uncovered.append(Uncovered(router.name, reason))
        else:
            routers.append(router)
    if not routers:
        raise NothingToObserve(_nothing_found(model, uncovered))
    for part in uncovered:
        log.warning("not observed: %s: %s", part.name, part.reason)
    layers = [LayerSpec(router.name, router.num_experts, router.top_k) for router in routers]
    places = [place_of(router.module) for router in routers]
    recorder = Recorder(
        layers,
        uncovered=uncovered,
        lanes=lanes,
        devices=tuple(dict.fromkeys(places)),
        group=group,
        forms={r.form for r, place in zip(routers, places, strict=True) if place != "cpu"},
        labels=labels,
        settings=settings,
    )
    attachment = Attachment(routers, recorder)
    forget_compiled_code()
    log.info("recording %d layers to %s", len(layers), recorder.path)
    return attachment


def claim(model: torch.nn.Module) -> None:
    """Makes sure that nothing in a model is attached to, and that no probe was copied with it.

    Raises:
        InputError: Something is.
    """
    for name, module in model.named_modules():
        if ops.is_bound(module.__dict__.get(_SITE)):
            raise InputError(f"{name or 'the model'} is already attached to: detach() that first")
        _remove_copied_probe(module)


def _remove_copied_probe(module: torch.nn.Module) -> None:
    """A copy of an attached model carries the original's site and hook along; both go."""
    if module.__dict__.pop(_SITE, None) is None:
        return
    if _is_our_forward(module):
        del module.__dict__["forward"]
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook in _probes]:
            del hooks[key]


def _nothing_found(model: torch.nn.Module, uncovered: list[Uncovered]) -> str:
    name = type(getattr(model, "_orig_mod", model)).__name__
    if uncovered:
        parts = "; ".join(f"{part.name}: {part.reason}" for part in uncovered[:3])
        return f"{name} routes, but nothing in it can be observed: {parts}"
    return (
        f"no MoE router in {name}: looked for the classes it registers under 'router_logits' and "
        "for experts called with top_k_index; give a mixture-of-experts model"
    )


def forget_compiled_code() -> None:
    """Code compiled before the probes were there would run on without them, and record nothing."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or getattr(dynamo.convert_frame, "FRAME_COUNTER", 1) == 0:
        return  # nothing was compiled yet
    log.warning("code compiled by torch.compile is dropped, so that it is compiled with probes")
    dynamo.reset()
