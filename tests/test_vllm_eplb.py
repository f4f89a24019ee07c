"""Placements of vLLM's load balancer, with stand-ins that have the names and signatures of 0.32."""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from collections.abc import Collection, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dodoco_ext.integrations.vllm_eplb import placement_spec, watch
from dodoco_ext.placement_spec import PlacementSpec
from dodoco_ext.placements import Placements
from dodoco_ext.recorder import LayerSpec, Recorder
from dodoco_ext.recording import Reader

EXPERTS, SLOTS, PER_RANK, LAYERS = 4, 6, 3, 3
FIRST = [0, 1, 2, 3, 0, 1]  # as vLLM begins: the experts, then replicas of the first ones
EPLB = "vllm.distributed.eplb.eplb_state"
RUNNER = "vllm.model_executor.layers.fused_moe.runner.moe_runner"


_open: list[Attached] = []


class MoERunner(torch.nn.Module):
    def __init__(self, balanced: bool = True) -> None:
        super().__init__()
        self.moe_config = SimpleNamespace(num_experts=SLOTS, num_local_experts=PER_RANK)
        table = torch.full((EXPERTS, 5), -1)
        for slot, expert in enumerate(FIRST):
            table[expert, int((table[expert] >= 0).sum())] = slot
        self.eplb_state = (
            SimpleNamespace(logical_to_physical_map=table, expert_load_view=torch.zeros(SLOTS))
            if balanced
            else None
        )


class Model(torch.nn.Module):
    """As a `MixtureOfExperts`, which the language model of a larger one may be."""

    num_local_physical_experts = PER_RANK

    def __init__(self, layers: int = LAYERS, balanced: bool = True) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(MoERunner(balanced) for _ in range(layers))

    @property
    def moe_layers(self) -> list[torch.nn.Module]:
        return list(self.layers)


@pytest.fixture(autouse=True)
def eplb_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's module; its functions put maps into `model_state.committed`."""

    def _commit_eplb_maps(model_state: Any, new_physical_to_logical_map: torch.Tensor) -> None:
        model_state.committed.append(new_physical_to_logical_map.tolist())

    def _commit_eplb_maps_for_layer(
        model_state: Any, new_physical_to_logical_map: torch.Tensor, layer: int
    ) -> None:
        model_state.committed.append((layer, new_physical_to_logical_map.tolist()))

    for name in {".".join(f.split(".")[:n]) for f in (EPLB, RUNNER) for n in range(1, 7)}:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module, runner = ModuleType(EPLB), ModuleType(RUNNER)
    vars(module).update(
        _commit_eplb_maps=_commit_eplb_maps, _commit_eplb_maps_for_layer=_commit_eplb_maps_for_layer
    )
    vars(runner).update(MoERunner=MoERunner)
    monkeypatch.setitem(sys.modules, RUNNER, runner)
    monkeypatch.setitem(sys.modules, EPLB, module)
    monkeypatch.setattr(sys.modules["vllm.distributed.eplb"], "eplb_state", module, raising=False)
    yield module
    while _open:
        _open.pop().undo()


class Attached:
    """What the plugin hands over: the recorded layers and the recorder."""

    def __init__(
        self,
        model: torch.nn.Module,
        room: PlacementSpec | None,
        layers: int = LAYERS,
        unrouted: Collection[int] = (),
    ) -> None:
        self.layers = tuple(
            LayerSpec(f"layers.{i}", EXPERTS, 2, routed=i not in unrouted) for i in range(layers)
        )
        self.recorder = Recorder(self.layers, placements=room)
        self.undo = watch(model, self)
        _open.append(self)
        self.state = SimpleNamespace(model=model, committed=[])

    @property
    def placements(self) -> Placements:
        found = Reader(self.recorder.path).placements()
        assert found is not None
        return found

    def experts(self, layer: int) -> list[list[int]]:
        return [placement.experts.tolist() for placement in self.placements.layers[layer].kept]


def attached(model: torch.nn.Module | None = None) -> Attached:
    model = model or Model()
    return Attached(model, placement_spec(model))


def maps(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_room_is_that_of_all_slots_and_none_without_a_balancer() -> None:
    assert placement_spec(Model()) == PlacementSpec(SLOTS, 4)
    assert placement_spec(Model(balanced=False)) is None


def test_the_arrangement_at_the_start_is_version_0() -> None:
    made = attached()
    assert made.placements.changes == 0
    for layer in made.placements.layers:
        (placement,) = layer.kept
        assert (placement.version, placement.num_ranks) == (0, SLOTS // PER_RANK)
        assert placement.experts.tolist() == FIRST
        assert placement.ranks.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_rearrangement_of_all_layers_is_one_change_of_those_that_differ(eplb_state: Any) -> None:
    made = attached()
    new = maps([3, 2, 1, 0, 3, 2], FIRST, [1, 1, 2, 3, 0, 1])
    eplb_state._commit_eplb_maps(made.state, new_physical_to_logical_map=new)
    assert made.state.committed == [new.tolist()], "vLLM's own function was called, once"
    assert made.placements.changes == 1
    assert made.experts(0) == [FIRST, [3, 2, 1, 0, 3, 2]]
    assert made.experts(1) == [FIRST]
    assert made.recorder.get("map_version") == 1
    eplb_state._commit_eplb_maps(made.state, new)
    assert made.placements.changes == 1, "the same arrangement again is no change"


def test_in_the_background_each_layer_is_a_change(eplb_state: Any) -> None:
    made = attached()
    for layer in range(LAYERS):
        new = torch.tensor([3, 2, 1, 0, layer, 2])
        eplb_state._commit_eplb_maps_for_layer(
            made.state, new_physical_to_logical_map=new, layer=layer
        )
    assert [layer for layer, _ in made.state.committed] == [0, 1, 2]
    assert made.placements.changes == LAYERS
    assert [layer.current.version for layer in made.placements.layers if layer.current] == [1, 2, 3]
    assert made.experts(2)[-1] == [3, 2, 1, 0, 2, 2]


def test_more_or_fewer_ranks_after_scaling(eplb_state: Any) -> None:
    made = attached()
    eplb_state._commit_eplb_maps(made.state, maps(*[[3, 2, 1]] * LAYERS))
    current = made.placements.layers[0].current
    assert current is not None
    assert (current.num_ranks, current.ranks.tolist()) == (1, [0, 0, 0])


def test_another_model_s_maps_are_not_this_one_s(eplb_state: Any) -> None:
    made, draft = attached(), attached(Model())
    eplb_state._commit_eplb_maps(draft.state, maps(*[[3, 2, 1, 0, 3, 2]] * LAYERS))
    assert (made.placements.changes, draft.placements.changes) == (0, 1)


def test_layers_that_are_not_recorded_are_left_out(eplb_state: Any) -> None:
    model = Model()
    made = Attached(model, placement_spec(model), layers=2)
    eplb_state._commit_eplb_maps(made.state, maps(*[[3, 2, 1, 0, 3, 2]] * LAYERS))
    assert len(made.placements.layers) == 2
    assert made.experts(1)[-1] == [3, 2, 1, 0, 3, 2]


def test_layers_whose_router_is_not_observed_are_left_out(eplb_state: Any) -> None:
    made = Attached(Model(), placement_spec(Model()), unrouted=(1,))
    eplb_state._commit_eplb_maps(made.state, maps(*[[3, 2, 1, 0, 3, 2]] * LAYERS))
    assert made.experts(0) == made.experts(2) == [FIRST, [3, 2, 1, 0, 3, 2]]
    assert made.experts(1) == []


def test_where_no_balanced_layer_is_observed_nothing_is_touched(
    eplb_state: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = dict(vars(eplb_state))
    made = Attached(Model(), placement_spec(Model()), unrouted=range(LAYERS))
    assert vars(eplb_state) == before
    assert made.placements.recorded == 0
    assert Reader(made.recorder.path).header["num_faults"] == 0
    assert not caplog.records


def test_undone_in_any_order_vllm_is_as_it_was(eplb_state: Any) -> None:
    before = dict(vars(eplb_state))
    first, second = attached(), attached()
    assert vars(eplb_state) != before
    first.undo()
    new = maps(*[[3, 2, 1, 0, 3, 2]] * LAYERS)
    eplb_state._commit_eplb_maps(first.state, new)
    eplb_state._commit_eplb_maps(second.state, new)
    assert (first.placements.changes, second.placements.changes) == (0, 1)
    second.undo()
    second.undo()
    assert vars(eplb_state) == before


def test_the_model_is_not_kept_alive() -> None:
    model = Model()
    made = attached(model)
    gone = weakref.ref(model)
    made.state.model = None
    del model
    gc.collect()
    assert gone() is None
    made.undo()


def test_without_a_balancer_or_room_nothing_is_touched(
    eplb_state: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = dict(vars(eplb_state))
    Attached(Model(balanced=False), None).undo()
    assert not caplog.records
    Attached(Model(), None).undo()
    (record,) = caplog.records
    assert "no room for placements" in record.getMessage()
    assert vars(eplb_state) == before


def test_what_fails_is_a_fault_and_vllm_goes_on(
    eplb_state: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = attached()
    with caplog.at_level(logging.ERROR):
        for wrong in ([9] * SLOTS, [0] * (SLOTS + 3), [0] * 4):
            eplb_state._commit_eplb_maps(made.state, maps(*[wrong] * LAYERS))
    assert len(made.state.committed) == 3
    assert len(caplog.records) == 1, "said once"
    assert Reader(made.recorder.path).header["faults"][6] == 3
    eplb_state._commit_eplb_maps(made.state, maps(*[[3, 2, 1, 0, 3, 2]] * LAYERS))
    assert made.placements.changes == 1, "and goes on"
    made.undo()


def test_a_vllm_without_these_functions_is_left_alone(
    eplb_state: Any, caplog: pytest.LogCaptureFixture
) -> None:
    del eplb_state._commit_eplb_maps_for_layer
    before = dict(vars(eplb_state))
    made = attached()
    (record,) = caplog.records
    assert "_commit_eplb_maps_for_layer" in record.getMessage()
    made.undo()
    assert vars(eplb_state) == before
    assert made.placements.changes == 0
