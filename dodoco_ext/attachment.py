"""`attach(model)`: probes at every MoE router of a model, writing into one recording."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MethodType, TracebackType
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from dodoco_ext import _C, ops
from dodoco_ext.errors import InputError, NothingToObserve
from dodoco_ext.integrations.transformers import Router, find_routers
from dodoco_ext.recorder import LayerSpec, Recorder, Uncovered
from dodoco_ext.recording import Reader, Snapshot
from dodoco_ext.settings import Settings

log = logging.getLogger("dodoco")

_SITE = "_dodoco_site"
_probes: set[Callable[..., None]] = set()
_forwards: set[Callable[..., Any]] = set()
_OPS = {
    "ids": (ops.direct_ids, ops.route_ids),
    "map": (ops.direct_map, ops.route_map),
    "bits": (ops.direct_bits, ops.route_bits),
}


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

    def __init__(self, routers: tuple[Router, ...], recorder: Recorder) -> None:
        self.path: Path = recorder.path
        self.layers = recorder.layers
        self.uncovered = recorder.uncovered
        self._recorder = recorder
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._releases: list[weakref.finalize[..., Any]] = []
        # Opened now: later, somebody may have removed the file.
        self._reader = Reader(recorder.path)
        self._thread = threading.local()
        try:
            for index, router in enumerate(routers):
                self._install(index, router)
        except BaseException:
            self.detach()
            raise

    def _install(self, index: int, router: Router) -> None:
        module = router.module
        site = ops.make_site(self._recorder, index)
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
        with self._recorder.use_lane(index) as lane:
            before = getattr(self._thread, "lane", None)
            self._thread.lane = lane
            try:
                yield
            finally:
                self._thread.lane = before

    def _own_lane(self) -> _C.Lane:
        lane: _C.Lane | None = getattr(self._thread, "lane", None)
        return lane or self._recorder.lane

    @property
    def enabled(self) -> bool:
        """Whether passes are counted. Turned off, a pass only advances the iteration."""
        return self._recorder.lane.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        for lane in self._recorder.lanes:
            lane.enabled = value

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
        value = self._own_lane().num_valid
        return None if value < 0 else value

    @num_valid.setter
    def num_valid(self, value: int | None) -> None:
        if value is not None and value < 0:
            raise InputError(f"num_valid={value}: give the number of real rows, or None for all")
        self._own_lane().num_valid = -1 if value is None else value

    @property
    def record_every(self) -> int:
        """Iterations between ring records; the board counts every pass regardless."""
        return self._recorder.lane.record_every

    @record_every.setter
    def record_every(self, value: int) -> None:
        if value < 1:
            raise InputError(f"record_every={value}: give 1 for every iteration, or more")
        for lane in self._recorder.lanes:
            lane.record_every = value

    @property
    def microbatch(self) -> int:
        """Micro-batch index written into the records of the next passes, 0 to 65535."""
        return self._own_lane().microbatch

    @microbatch.setter
    def microbatch(self, value: int) -> None:
        if not 0 <= value < 1 << 16:
            raise InputError(f"microbatch={value}: give 0 to 65535")
        self._own_lane().microbatch = value

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
    lanes: int = 1,
    labels: Mapping[str, str] | None = None,
    settings: Settings | None = None,
) -> Attachment:
    """Starts recording the routing of a model.

    Args:
        model: A transformers MoE model, or any module that contains one.
        lanes: Threads that run the model at the same time; see `Attachment.lane()`.
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
    for name, module in model.named_modules():
        if ops.is_bound(module.__dict__.get(_SITE)):
            raise InputError(f"{name or 'the model'} is already attached to: detach() that first")
        _remove_copied_probe(module)
    found = find_routers(model)
    uncovered = list(found.uncovered)
    routers = []
    for router in found.routers:
        device = _device_of(router.module)
        if device in ("cpu", "meta"):
            routers.append(router)
        else:
            reason = f"it is on {device}, and this build of dodoco-ext records on the CPU only"
            uncovered.append(Uncovered(router.name, reason))
    if not routers:
        raise NothingToObserve(_nothing_found(model, uncovered))
    for part in uncovered:
        log.warning("not observed: %s: %s", part.name, part.reason)
    layers = [LayerSpec(router.name, router.num_experts, router.top_k) for router in routers]
    recorder = Recorder(layers, uncovered=uncovered, lanes=lanes, labels=labels, settings=settings)
    attachment = Attachment(tuple(routers), recorder)
    _forget_compiled_code()
    log.info("recording %d layers to %s", len(layers), recorder.path)
    return attachment


def _remove_copied_probe(module: torch.nn.Module) -> None:
    """A copy of an attached model carries the original's site and hook along; both go."""
    if module.__dict__.pop(_SITE, None) is None:
        return
    if _is_our_forward(module):
        del module.__dict__["forward"]
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook in _probes]:
            del hooks[key]


def _device_of(module: torch.nn.Module) -> str:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device.type
    return "cpu"


def _nothing_found(model: torch.nn.Module, uncovered: list[Uncovered]) -> str:
    name = type(getattr(model, "_orig_mod", model)).__name__
    if uncovered:
        parts = "; ".join(f"{part.name}: {part.reason}" for part in uncovered[:3])
        return f"{name} routes, but nothing in it can be observed: {parts}"
    return (
        f"no MoE router in {name}: looked for the classes it registers under 'router_logits' and "
        "for experts called with top_k_index; give a mixture-of-experts model"
    )


def _forget_compiled_code() -> None:
    """Code compiled before the probes were there would run on without them, and record nothing."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or getattr(dynamo.convert_frame, "FRAME_COUNTER", 1) == 0:
        return  # nothing was compiled yet
    log.warning("code compiled by torch.compile is dropped, so that it is compiled with probes")
    dynamo.reset()
