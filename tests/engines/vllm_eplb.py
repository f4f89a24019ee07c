"""vLLM's load balancer on the CPU, its weights and processes left out: prints what was recorded as JSON.

Run by test_vllm_eplb_contract.py in the interpreter that has vLLM. `EplbState.rearrange()`, its policy, the commits
and `_move_to_workspace()` are vLLM's own; the groups, the moving of weights and the device's events are stand-ins.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.eplb import eplb_state as eplb
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from dodoco_ext.integrations.vllm_eplb import placement_spec, watch
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import Reader

LAYERS, EXPERTS, REDUNDANT, RANKS, WINDOW = 3, 8, 4, 4, 2
SLOTS = EXPERTS + REDUNDANT


class Model(torch.nn.Module):
    """What vLLM asks of a `MixtureOfExperts`; its layers are real, but for their weights."""

    num_moe_layers, num_expert_groups = LAYERS, 1
    num_logical_experts = num_routed_experts = EXPERTS
    num_redundant_experts, num_shared_experts = REDUNDANT, 0
    num_physical_experts, num_local_physical_experts = SLOTS, SLOTS // RANKS

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(_layer() for _ in range(LAYERS))
        self.moe_layers = list(self.layers)
        self.expert_weights = [[torch.zeros(1)]] * LAYERS

    def set_eplb_state(self, loads: Any, maps: Any, counts: Any) -> None:
        for index, layer in enumerate(self.moe_layers):
            layer.set_eplb_state(index, loads, maps, counts)


def _layer() -> torch.nn.Module:
    layer = MoERunner.__new__(MoERunner)
    torch.nn.Module.__init__(layer)
    layer.router = SimpleNamespace(eplb_state=eplb.EplbLayerState())
    layer.moe_config = SimpleNamespace(num_experts=SLOTS, num_local_experts=SLOTS // RANKS)
    return layer


class Event:
    def __init__(self, **_: Any) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, _: Any) -> float:
        return 0.0


def stand_in() -> None:
    """Four ranks of which this is the first, all with the same load."""
    group = SimpleNamespace(rank=lambda: 0, size=lambda: RANKS)
    eplb.get_ep_group = eplb.get_eplb_group = lambda: SimpleNamespace(device_group=group)
    eplb.all_reduce = lambda tensor, group: None
    eplb.get_node_count = lambda: 1
    eplb.create_eplb_communicator = lambda **_: None
    eplb.rearrange_expert_weights_inplace = lambda *_: None
    eplb.move_from_buffer = lambda **_: None
    eplb.torch = SimpleNamespace(**{**vars(torch), "Event": Event})


def main() -> None:
    stand_in()
    balancer = SimpleNamespace(
        use_async=False, window_size=WINDOW, step_interval=8, policy="default", communicator="none",
        log_balancedness=False,
    )  # fmt: skip
    config = SimpleNamespace(eplb_config=balancer, enable_elastic_ep=False, num_ubatches=0)
    state = eplb.EplbState(config, torch.device("cpu"))
    model = Model()
    key = SimpleNamespace(compute_hash=lambda: "model", model="model")
    state.add_model(model, key)
    names = [LayerSpec(f"layers.{i}", EXPERTS, 2) for i in range(LAYERS)]
    recorder = Recorder(names, placements=placement_spec(model))
    undo = watch(model, SimpleNamespace(layers=names, recorder=recorder))
    held = state.model_states["model"]
    committed = [held.physical_to_logical_map.tolist()]

    # All layers at once: expert 5 is the busiest.
    held.expert_load_window[:, :, 5] = 100
    held.expert_load_window[:, :, :5] = 1
    state.rearrange()
    committed.append(held.physical_to_logical_map.tolist())

    # In the background: a layer a step.
    for layer in (0, 2):
        new = held.physical_to_logical_map[layer].flip(0).clone()
        held.pending_result = SimpleNamespace(
            layer_idx=layer,
            new_physical_to_logical_map=new,
            transfer_metadata=None,
            consumed_event=Event(),
        )
        eplb._move_to_workspace(model_state=held, ep_rank=0)
        committed.append(held.physical_to_logical_map.tolist())
    undo()
    state.rearrange()

    placements = Reader(recorder.path).placements()
    recorded = [
        [
            [placement.version, placement.num_ranks, placement.experts.tolist()]
            for placement in layer.kept
        ]
        for layer in placements.layers
    ]
    faults = Reader(recorder.path).header["num_faults"]
    json.dump({"committed": committed, "recorded": recorded, "faults": faults}, sys.stdout)


main()
