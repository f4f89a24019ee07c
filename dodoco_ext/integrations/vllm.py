"""Records the routing of a model that vLLM has loaded, from inside the process that runs it.

vLLM's routers call one function with the logical expert ids of a pass, before a load balancer maps
them to replicas (`BaseRouter.set_capture_fn`). `attach_loaded()` puts the recorder's op there. What
it is called with before, such as vLLM's own capturer, goes on being called.

Nothing that ran before counts: attached after vLLM's warm-up, warm-up is no traffic. Code that was
compiled before does not call the recorder: attach before compilation, or run eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from dodoco_ext import ops
from dodoco_ext.counters import Snapshot
from dodoco_ext.errors import NothingToObserve
from dodoco_ext.integrations.places import place_of
from dodoco_ext.recorder import LayerSpec, Recorder, Uncovered
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings

Capture = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class MoELayer:
    """A layer whose router hands out the expert ids.

    Attributes:
        name: Qualified name of its `MoERunner`.
        router: vLLM's `BaseRouter`.
        place: Where it runs: `cpu`, or `cuda:N`.
        num_experts: Logical experts.
        top_k: Experts a token is sent to.
    """

    name: str
    router: Any
    place: str
    num_experts: int
    top_k: int


def find_layers(model: torch.nn.Module) -> tuple[list[MoELayer], list[Uncovered]]:
    """The MoE layers of a model of vLLM: those to observe, and those that cannot be, in order.

    Args:
        model: As loaded by vLLM (0.32 or later).
    """
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    layers, uncovered = [], []
    for name, module in model.named_modules():
        if not isinstance(module, MoERunner):
            continue
        router = module.router
        if module.is_monolithic:
            kernel = type(module.routed_experts.quant_method).__name__
            reason = f"the kernel of its {kernel} chooses the experts itself"
            uncovered.append(Uncovered(name, reason))
        elif not isinstance(router, BaseRouter):
            reason = f"{type(router).__name__} hands out no expert ids"
            uncovered.append(Uncovered(name, reason))
        else:
            # The router itself counts the replicas of a load balancer as experts.
            num_experts = int(module.moe_config.num_logical_experts)
            layers.append(MoELayer(name, router, place_of(module), num_experts, int(router.top_k)))
    return layers, uncovered


class LoadedModelAttachment:
    """The recorder in a loaded model's routers. Made by `attach_loaded()`; a context manager.

    Attributes:
        path: The recording's file.
        layers: The observed layers, in the order in which the model registers them.
        uncovered: MoE layers that are not observed, with the reason.
        reader: A reader of the recording; it goes on working after `detach()`.
    """

    def __init__(self, layers: list[MoELayer], recorder: Recorder) -> None:
        self.path: Path = recorder.path
        self.layers = recorder.layers
        self.reader = Reader(recorder.path)
        self._recorder = recorder
        self._installed: list[tuple[Any, Capture, Capture | None]] = []
        self._sites: list[int] = []
        refused = []
        for index, layer in enumerate(layers):
            if reason := recorder.refused.get(layer.place):
                refused.append(Uncovered(layer.name, reason))
                continue
            site = ops.make_site(recorder, index, layer.place)
            before = layer.router.capture_fn
            capture = _capture(site, before)
            layer.router.set_capture_fn(capture)
            self._installed.append((layer.router, capture, before))
            self._sites.append(site.data_ptr())
        self.uncovered = (*recorder.uncovered, *refused)

    def snapshot(self) -> Snapshot:
        """The exact counters of every layer as they are now."""
        return self.reader.snapshot()

    @property
    def enabled(self) -> bool:
        """Whether passes are counted; turned off, a pass only advances the iteration."""
        return bool(self._recorder.get("enabled"))

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._recorder.set("enabled", int(value))

    @property
    def record_every(self) -> int:
        """Iterations between ring records; the board counts every pass regardless."""
        return self._recorder.get("record_every")

    @record_every.setter
    def record_every(self, value: int) -> None:
        self._recorder.set("record_every", value)

    def detach(self) -> None:
        """Takes the recorder out of every router and closes the recording. Idempotent."""
        for router, capture, before in self._installed:
            # Somebody who came later and calls ours keeps it: without its site it records nothing.
            if router.capture_fn is capture:
                router.set_capture_fn(before)
        for address in self._sites:
            ops.release_site(address)
        self._installed.clear()
        self._sites.clear()
        self._recorder.close()

    def __enter__(self) -> LoadedModelAttachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()


def attach_loaded(
    model: torch.nn.Module,
    *,
    labels: Mapping[str, str] | None = None,
    settings: Settings | None = None,
) -> LoadedModelAttachment:
    """Starts recording the routing of a model that vLLM loaded in this process.

    Args:
        model: What `LLM.apply_model()` or a worker's model runner gives.
        labels: Text to find the recording by.
        settings: Where and how to record; by default what `DODOCO_*` says.

    Raises:
        NothingToObserve: No layer hands out its expert ids.
        RecordingError: The recording cannot be created.
    """
    layers, uncovered = find_layers(model)
    if not layers:
        parts = "; ".join(f"{part.name}: {part.reason}" for part in uncovered[:3])
        raise NothingToObserve(
            f"no MoE layer of {type(model).__name__} can be observed in vLLM: "
            + (parts or "it has none; give a mixture-of-experts model")
        )
    places = [layer.place for layer in layers]
    recorder = Recorder(
        [LayerSpec(layer.name, layer.num_experts, layer.top_k) for layer in layers],
        uncovered=uncovered,
        devices=tuple(dict.fromkeys(places)),
        forms={"ids"},
        labels=labels,
        settings=settings,
    )
    return LoadedModelAttachment(layers, recorder)


def _capture(site: torch.Tensor, before: Capture | None) -> Capture:
    def capture(ids: torch.Tensor) -> None:
        if before is not None:
            before(ids)
        # Both report what they cannot record, and neither raises.
        if is_dynamo_compiling() or not ops.direct_ids(ids, site):
            ops.route_ids(ids, site)

    return capture
