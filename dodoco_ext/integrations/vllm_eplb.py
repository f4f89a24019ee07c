"""Records where vLLM's load balancer (EPLB) puts experts: at the start and at each change.

vLLM changes its maps in two functions of `vllm.distributed.eplb.eplb_state`: `_commit_eplb_maps()`, all layers
at once, and `_commit_eplb_maps_for_layer()`, where weights are moved in the background, a layer a step. Both
have the new map on the host, so that recording it copies nothing from a device and waits for none.

`tests/engines/test_vllm_eplb_contract.py` holds the sources of 0.32 and 0.33 to what is relied on here.
EPLB needs several GPUs: it has been run here on the CPU, with stand-ins for groups and weights.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dodoco_ext import _C
from dodoco_ext.integrations.patch import Patch
from dodoco_ext.placement_spec import PlacementSpec
from dodoco_ext.recorder import LayerSpec, Recorder

log = logging.getLogger("dodoco")

Slots = NDArray[np.int64]

_watches: list[_Watch] = []
_patches: list[Patch] = []


class Recording(Protocol):
    """What `watch()` needs of an attachment."""

    @property
    def layers(self) -> Sequence[LayerSpec]:
        """The recorded layers, named after their `MoERunner`."""

    @property
    def recorder(self) -> Recorder:
        """The writer's side."""


def placement_spec(model: torch.nn.Module, kept: int = 4) -> PlacementSpec | None:
    """Room for the placements of a model that vLLM loaded; None where no load balancer moves experts.

    Args:
        model: As loaded, after `EplbState.add_model()`.
        kept: Placements kept of each layer.
    """
    slots = [int(state.expert_load_view.shape[0]) for _, _, state in _balanced(model)]
    return PlacementSpec(max(slots), kept) if slots else None


def watch(model: torch.nn.Module, attachment: Recording) -> Callable[[], None]:
    """Records where the experts of a model lie, now and whenever vLLM moves them.

    Never raises: what fails is logged once and counted as a fault of the recording.

    Args:
        model: The model that the attachment records, after `EplbState.add_model()`.
        attachment: Its recorder must have been given room: `Recorder(placements=placement_spec(model))`.

    Returns:
        Ends it. Idempotent.
    """
    made = _Watch(attachment)
    try:
        if not made.begin(model):
            return lambda: None
        if not _watches:
            _install()
        _watches.append(made)
    except Exception as error:  # telemetry never takes down its host
        made.fail(error)
        made.end()
    return made.end


def _balanced(model: torch.nn.Module) -> list[tuple[str, Any, Any]]:
    """Name, `MoERunner` and `EplbLayerState` of each layer whose experts may be moved."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    found = []
    for name, module in model.named_modules():
        if isinstance(module, MoERunner):
            state = getattr(module, "eplb_state", None)
            if state is not None and state.logical_to_physical_map is not None:
                found.append((name, module, state))
    return found


class _Watch:
    """The placements of one model, and the recording they go to."""

    def __init__(self, attachment: Recording) -> None:
        self._attachment = attachment
        self._indexes: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
        self._latest: dict[int, Slots] = {}
        self._failed = False

    def begin(self, model: torch.nn.Module) -> bool:
        """Records how experts lie now; whether there is anything to watch."""
        layers = _balanced(model)
        if not layers:
            return False
        recorder = self._attachment.recorder
        if recorder.placements is None:
            log.warning("the recording has no room for placements: vLLM's are not recorded")
            return False
        numbers = {x.name: i for i, x in enumerate(self._attachment.layers) if x.routed}
        slots, local = {}, set()
        for name, layer, state in layers:
            if name not in numbers:
                continue
            self._indexes[layer] = numbers[name]
            num_slots = int(layer.moe_config.num_experts)
            slots[numbers[name]] = _slots_of(state.logical_to_physical_map, num_slots)
            local.add(int(layer.moe_config.num_local_experts))
        if not slots:
            return False
        if len(local) != 1:
            raise ValueError(f"layers have {sorted(local)} experts a rank")
        self._record(slots, local.pop())
        return True

    def committed(self, state: Any, maps: Mapping[int, torch.Tensor]) -> None:
        """Records the physical-to-logical maps [P] that vLLM put in force for a model's layers."""
        try:
            layers = state.model.moe_layers
            slots = {}
            for number, new_map in maps.items():
                index = self._indexes.get(layers[number])
                if index is not None:
                    slots[index] = new_map.detach().cpu().numpy().astype(np.int64)
            if slots:
                self._record(slots, int(state.model.num_local_physical_experts))
        except Exception as error:  # telemetry never takes down its host
            self.fail(error)

    def _record(self, slots: dict[int, Slots], per_rank: int) -> None:
        changed = {
            index: each
            for index, each in slots.items()
            if not np.array_equal(each, self._latest.get(index, ()))
        }
        if not changed:
            return
        sizes = {len(each) for each in changed.values()}
        if len(sizes) != 1 or min(sizes) % per_rank:
            raise ValueError(f"{sorted(sizes)} physical experts with {per_rank} a rank")
        self._attachment.recorder.record_placement(changed, sizes.pop() // per_rank)
        self._latest.update(changed)

    def fail(self, error: Exception) -> None:
        """Says once what kept a placement from being recorded."""
        self._attachment.recorder.add_fault(_C.Fault.INTERNAL)
        if not self._failed:
            self._failed = True
            log.error("a placement is not recorded: %s: %s", type(error).__name__, error)

    def end(self) -> None:
        """Stops recording; vLLM's functions are as they were after the last one."""
        if self in _watches:
            _watches.remove(self)
        if not _watches:
            while _patches:
                _patches.pop().undo()


def _slots_of(logical_to_physical: torch.Tensor, num_slots: int) -> Slots:
    """The logical expert in each slot, [P], from vLLM's map [E, slots of an expert]; -1: none."""
    table = logical_to_physical.detach().cpu().numpy()
    slots = np.full(num_slots, -1, np.int64)
    experts, places = np.nonzero(table >= 0)
    slots[table[experts, places]] = experts
    return slots


def _install() -> None:
    from vllm.distributed.eplb import eplb_state

    def commit(module: Any, model_state: Any, new_physical_to_logical_map: torch.Tensor) -> None:
        of_all.call(module, model_state, new_physical_to_logical_map=new_physical_to_logical_map)
        _committed(model_state, dict(enumerate(new_physical_to_logical_map)))

    def commit_for_layer(
        module: Any, model_state: Any, new_physical_to_logical_map: torch.Tensor, layer: int
    ) -> None:
        of_layer.call(
            module,
            model_state,
            new_physical_to_logical_map=new_physical_to_logical_map,
            layer=layer,
        )
        _committed(model_state, {layer: new_physical_to_logical_map})

    of_all = Patch(eplb_state, "_commit_eplb_maps", commit)
    _patches.append(of_all)
    of_layer = Patch(eplb_state, "_commit_eplb_maps_for_layer", commit_for_layer)
    _patches.append(of_layer)


def _committed(state: Any, maps: Mapping[int, torch.Tensor]) -> None:
    for each in tuple(_watches):
        each.committed(state, maps)
