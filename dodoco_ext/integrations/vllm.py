"""Records the routing of a model that vLLM has loaded, from inside the process that runs it.

vLLM's routers call one function with the logical expert ids of a pass, before a load balancer maps
them to replicas (`BaseRouter.set_capture_fn`). `attach_loaded()` puts the recorder's op there. What
it is called with before, such as vLLM's own capturer, goes on being called.

Nothing that ran before counts: attached after vLLM's warm-up, warm-up is no traffic. Code that was
compiled before does not call the recorder: attach before compilation, or run eagerly. In servers the
plugin does (`vllm_plugin`), and says which passes are traffic (`vllm_serving`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dodoco_ext import ops
from dodoco_ext.counters import Snapshot
from dodoco_ext.errors import NothingToObserve
from dodoco_ext.integrations.places import place_of, why_not_there
from dodoco_ext.integrations.vllm_eplb import placement_spec
from dodoco_ext.integrations.vllm_slot import Select, Slot
from dodoco_ext.recorder import GroupSpec, LayerSpec, Recorder, Uncovered
from dodoco_ext.recording import Reader
from dodoco_ext.settings import Settings


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

    layers: list[MoELayer] = []
    uncovered: list[Uncovered] = []
    for name, module in model.named_modules():
        if not isinstance(module, MoERunner):
            if "capture_fn" in vars(module):  # which vLLM asks such kernels for
                reason = f"{type(module).__name__} is a kernel that chooses the experts itself"
                uncovered.append(Uncovered(name, reason))
            continue
        router = module.router
        # The router itself counts the replicas of a load balancer as experts.
        num_experts = int(module.moe_config.num_logical_experts)
        if module.is_monolithic:
            kernel = type(module.routed_experts.quant_method).__name__
            reason = f"the kernel of its {kernel} chooses the experts itself"
            uncovered.append(Uncovered(name, reason))
        elif not isinstance(router, BaseRouter):
            reason = f"{type(router).__name__} hands out no expert ids"
            uncovered.append(Uncovered(name, reason))
        elif reason := why_not_there(module, num_experts):
            uncovered.append(Uncovered(name, reason))
        else:
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

    def __init__(
        self, layers: list[MoELayer], recorder: Recorder, select: Select | None = None
    ) -> None:
        self.path: Path = recorder.path
        self.layers = recorder.layers
        self.reader = Reader(recorder.path)
        self._recorder = recorder
        self._num_valid = -1
        self._slots: list[Slot] = []
        self._sites: list[int] = []
        refused = []
        for index, layer in enumerate(layers):
            if reason := recorder.refused.get(layer.place):
                refused.append(Uncovered(layer.name, reason))
                continue
            site = ops.make_site(recorder, index, layer.place)
            self._slots.append(Slot(layer.router, site, select))
            self._sites.append(site.data_ptr())
        self.uncovered = (*recorder.uncovered, *refused)

    @property
    def num_covered(self) -> int:
        """Layers that are observed."""
        return len(self._sites)

    @property
    def recorder(self) -> Recorder:
        """The writer's side, for what records beside the routers."""
        return self._recorder

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

    def count(self, num_valid: int | None) -> None:
        """Counts what runs from now on as traffic, until `enabled` is set to False.

        On a device both take effect in the order of the current stream, as the passes do.

        Args:
            num_valid: Rows of each pass that are real; the rest is counted as padding. None: all.
        """
        valid = -1 if num_valid is None else num_valid
        if valid != self._num_valid:
            self._num_valid = -2  # unknown, if that fails half-way
            self._recorder.set("num_valid", valid)
            self._num_valid = valid
        self._recorder.set("enabled", 1)

    @property
    def record_every(self) -> int:
        """Iterations between ring records; the board counts every pass regardless."""
        return self._recorder.get("record_every")

    @record_every.setter
    def record_every(self, value: int) -> None:
        self._recorder.set("record_every", value)

    def detach(self) -> None:
        """Takes the recorder out of every router and closes the recording. Idempotent."""
        for slot in self._slots:
            slot.release()
        for address in self._sites:
            ops.release_site(address)
        self._slots.clear()
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
    even_if_none: bool = False,
    enabled: bool = True,
    select: Select | None = None,
    group: GroupSpec | None = None,
    labels: Mapping[str, str] | None = None,
    settings: Settings | None = None,
) -> LoadedModelAttachment:
    """Starts recording the routing of a model that vLLM loaded in this process.

    Args:
        model: What `LLM.apply_model()` or a worker's model runner gives.
        even_if_none: Whether a model is recorded of whose MoE layers none can be observed: then the
            recording says so.
        enabled: Whether passes count from now on; if not, those after `count()` do.
        select: Gives the rows to record of the ids of a pass, `[T, k]`; None: all.
        group: The expert-parallel ranks.
        labels: Text to find the recording by.
        settings: Where and how to record; by default what `DODOCO_*` says.

    Raises:
        NothingToObserve: No layer hands out its expert ids.
        RecordingError: The recording cannot be created.
    """
    layers, uncovered = find_layers(model)
    if not layers and not (uncovered and even_if_none):
        parts = "; ".join(f"{part.name}: {part.reason}" for part in uncovered[:3])
        raise NothingToObserve(
            f"no MoE layer of {type(model).__name__} can be observed in vLLM: "
            + (parts or "it has none; give a mixture-of-experts model")
        )
    specs = [LayerSpec(layer.name, layer.num_experts, layer.top_k) for layer in layers]
    recorder = Recorder(
        specs or [LayerSpec(part.name, 1, 0, routed=False) for part in uncovered],
        uncovered=uncovered,
        devices=tuple(dict.fromkeys(layer.place for layer in layers)) or ("cpu",),
        group=group,
        forms={"ids"},
        placements=placement_spec(model),
        labels=labels,
        settings=settings,
    )
    if not enabled:
        recorder.set("enabled", 0)
    return LoadedModelAttachment(layers, recorder, select)
