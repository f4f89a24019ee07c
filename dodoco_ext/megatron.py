"""Megatron-Core: `dodoco_ext.megatron.attach(model)`, one line in a training script."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from dodoco_ext import attachment as base
from dodoco_ext.capture import Capture
from dodoco_ext.device import FORMS
from dodoco_ext.errors import InputError, NothingToObserve
from dodoco_ext.integrations import megatron_metrics as metrics
from dodoco_ext.integrations import megatron_routers as routers
from dodoco_ext.integrations import megatron_symbols as symbols
from dodoco_ext.integrations import places
from dodoco_ext.integrations.megatron import Found, MoELayer, find_layers
from dodoco_ext.integrations.megatron_dispatchers import (
    Clock,
    DispatcherProbe,
    group_of,
    is_probed,
)
from dodoco_ext.recorder import GroupSpec, LayerSpec, Recorder, Uncovered
from dodoco_ext.settings import Settings

log = logging.getLogger("dodoco")

__all__ = ["MegatronAttachment", "attach"]

_NO_LAYER = LayerSpec("no MoE layer on this pipeline stage", 1, 0, routed=False)
"""What the recording of a rank without MoE layers holds: a recording has a layer."""


class MegatronAttachment(base.Attachment):
    """Probes in the routers and dispatchers of a Megatron model. Made by `attach()`.

    Attributes:
        path: The recording's file.
        layers: The MoE layers of this rank; none on a pipeline stage without.
        uncovered: What is not observed, and why.
    """

    def __init__(self, found: Found, recorder: Recorder, capture: Capture | None) -> None:
        # Nothing here keeps the model alive.
        self._window: metrics.Window | None = None
        self._probes: list[DispatcherProbe] = []
        self._routers: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        super().__init__([layer.router for layer in found.layers] or [None], recorder)
        if not found.layers:
            self.layers = ()
        clock = Clock(recorder)
        try:
            for index, layer in enumerate(found.layers):
                self._probe(index, layer, recorder, capture, clock)
        except BaseException:
            self.detach()
            raise
        self._window = metrics.Window(self.reader, metrics.Shape.of(found))

    def _probe(
        self, index: int, layer: MoELayer, recorder: Recorder, capture: Capture | None, clock: Clock
    ) -> None:
        if layer.router is not None and layer.owner is not None:
            owner = weakref.ref(layer.owner)
            routers.before_each(layer.router.module, lambda: clock.follow(owner()))
            self._routers.add(layer.router.module)
        if layer.dispatcher is not None and capture is not None:
            probe = DispatcherProbe(layer.dispatcher, index, layer.owner, capture, recorder, clock)
            self._probes.append(probe)

    def log(
        self,
        writer: Any,
        iteration: int,
        *,
        reduce: Literal["group"] | None = None,
        group: dist.ProcessGroup | None = None,
        per_layer: bool = False,
    ) -> dict[str, float]:
        """Writes the balance of the routing since the last call: at the script's own log interval.

        Without `reduce` no rank talks to another: what is written is this rank's own shard, tagged `local`
        (`moe/local_gini_p90`). With it every rank of the group has to call, those without MoE layers
        and those without a writer too; tags then say `group`.

        Args:
            writer: TensorBoard's `SummaryWriter` (anything with `add_scalar`), a W&B run (anything
                with `log(values, step=)`), several of them in a list, or None.
            iteration: The step to write at.
            reduce: "group": one all-reduce of int64 [layers, experts] of the whole model.
            group: The ranks to add up; None: all.
            per_layer: Also write each layer, as `moe/local_gini_layer_3`; layers are numbered as in
                Megatron's own metrics.

        Returns:
            What was written; empty where no layer has counted anything.

        Raises:
            InputError: `reduce` is something else, or the model does not say how many layers it has.
        """
        if reduce not in (None, "group"):
            raise InputError(f"reduce={reduce!r}: give None for this rank alone, or 'group'")
        assert self._window is not None
        counts = self._window.advance()
        scope = "local"
        if reduce == "group":
            scope = "group"
            counts = metrics.reduced(counts, self._window.shape, group)
        values = metrics.summary(counts, scope, per_layer=per_layer)
        metrics.write(writer, values, iteration)
        return values

    def detach(self) -> None:
        """Takes every probe out and closes the recording, which stays readable. Idempotent."""
        for probe in self._probes:
            probe.undo()
        for router in self._routers:
            routers.before_each(router, None)
        self._probes.clear()
        self._routers.clear()
        super().detach()


def attach(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    *,
    labels: Mapping[str, str] | None = None,
    settings: Settings | None = None,
) -> MegatronAttachment:
    """Starts recording the routing and the AlltoAlls of a Megatron-Core model.

    Call it once on every rank, after the model is built and wrapped.

    Args:
        model: The model, or the list of its chunks on this rank (virtual pipeline stages).
        labels: Text to find the recording by, such as `{"model_name": "my-moe"}`.
        settings: Where and how to record; by default what `DODOCO_*` says.

    Returns:
        The attachment, already recording. On a pipeline stage without MoE layers one that records
        nothing, and says so in `uncovered`.

    Raises:
        NothingToObserve: The model has no MoE layer on any rank.
        InputError: The model is already attached to, or is no module.
        RecordingError: The recording cannot be created.
    """
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    for chunk in chunks:
        if not isinstance(chunk, torch.nn.Module):
            raise InputError(f"attach() takes modules, not {type(chunk).__name__}")
        base.claim(chunk)
    found = find_layers(chunks)
    if not found.layers and not found.num_experts:
        names = ", ".join(type(chunk).__name__ for chunk in chunks) or "an empty list"
        raise NothingToObserve(
            f"no MoE layer in {names}: looked for Megatron-Core's {symbols.LAYER.name}, and its "
            "configuration has no num_moe_experts; give a mixture-of-experts model"
        )
    for layer in found.layers:
        if layer.dispatcher is not None and is_probed(layer.dispatcher):
            raise InputError(f"{layer.name} is already attached to: detach() that first")
    found, group = _in_one_group(_observable(found))
    for part in found.uncovered:
        log.warning("not observed: %s: %s", part.name, part.reason)
    recorder = Recorder(
        [_spec(layer) for layer in found.layers] or [_NO_LAYER],
        uncovered=found.uncovered,
        devices=tuple(dict.fromkeys(places.place_of(x.module) for x in found.layers)) or ("cpu",),
        group=group,
        forms=_forms(found),
        labels=labels,
        settings=settings,
    )
    routed = any(layer.router is not None for layer in found.layers)
    capture = None if group is None else Capture(recorder, advances=not routed)
    attachment = MegatronAttachment(found, recorder, capture)
    base.forget_compiled_code()
    log.info("recording %d layers to %s", len(found.layers), recorder.path)
    return attachment


def _observable(found: Found) -> Found:
    """Without the routers that are where nothing can be recorded."""
    layers, uncovered = [], list(found.uncovered)
    for layer in found.layers:
        reason = places.why_not(layer.router) if layer.router is not None else ""
        if reason:
            uncovered.append(Uncovered(layer.name, reason))
        layers.append(replace(layer, router=None) if reason else layer)
    return replace(found, layers=tuple(layers), uncovered=tuple(uncovered))


def _in_one_group(found: Found) -> tuple[Found, GroupSpec | None]:
    """Keeps the dispatchers of one group of ranks: a recording has no more."""
    spec: GroupSpec | None = None
    layers, uncovered = [], list(found.uncovered)
    for layer in found.layers:
        if layer.dispatcher is not None:
            group, name = group_of(layer.dispatcher)
            own = GroupSpec(tuple(dist.get_process_group_ranks(group)), dist.get_rank(group), name)
            spec = spec or own
            if own.ranks != spec.ranks:
                reason = f"its group has ranks {list(own.ranks)}, and the first {list(spec.ranks)}"
                uncovered.append(Uncovered(layer.name, f"transfers: {reason}"))
                layer = replace(layer, dispatcher=None)
        layers.append(layer)
    return replace(found, layers=tuple(layers), uncovered=tuple(uncovered)), spec


def _spec(layer: MoELayer) -> LayerSpec:
    return LayerSpec(layer.name, layer.num_experts, layer.top_k, routed=layer.router is not None)


def _forms(found: Found) -> set[str]:
    """Forms to compile for on a device: what the routers there may return."""
    forms = {"map"}
    for layer in found.layers:
        if layer.router is None:
            continue
        if symbols.is_a(layer.router.module, symbols.INFERENCE_ROUTER):
            forms.add("ids")
        if getattr(layer.module.config, "moe_router_fusion", False):
            forms |= set(FORMS)
    return forms
