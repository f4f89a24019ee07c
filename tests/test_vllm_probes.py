"""The recorder in vLLM's routers, with stand-ins for vLLM's classes: what is found, chained and undone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dodoco_ext.errors import NothingToObserve
from dodoco_ext.integrations.vllm import attach_loaded

EXPERTS, REPLICAS, TOP_K, TOKENS = 8, 2, 2, 5
_BASE = "vllm.model_executor.layers.fused_moe"


class BaseRouter:
    """As vLLM's: one slot for a function that gets the logical ids."""

    def __init__(self) -> None:
        self.top_k = TOP_K
        self.global_num_experts = EXPERTS + REPLICAS
        self.capture_fn: Callable[[torch.Tensor], None] | None = None

    def set_capture_fn(self, capture_fn: Callable[[torch.Tensor], None] | None) -> None:
        self.capture_fn = capture_fn

    def select(self, ids: torch.Tensor) -> None:
        if self.capture_fn is not None:
            self.capture_fn(ids)


class MoERunner(torch.nn.Module):
    def __init__(self, router: Any, monolithic: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.router = router
        self.is_monolithic = monolithic
        self.moe_config = SimpleNamespace(num_logical_experts=EXPERTS)
        self.routed_experts = SimpleNamespace(quant_method=SimpleNamespace())


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = _BASE.split(".")
    names = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    for name in (*names, f"{_BASE}.router", f"{_BASE}.runner"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for place, kind in (("router.base_router", BaseRouter), ("runner.moe_runner", MoERunner)):
        module = ModuleType(f"{_BASE}.{place}")
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def model(*runners: MoERunner) -> torch.nn.Module:
    return torch.nn.ModuleList(runners)


IDS = torch.arange(TOKENS * TOP_K, dtype=torch.int32).reshape(TOKENS, TOP_K) % EXPERTS


def test_a_pass_is_counted_by_logical_experts_with_no_room_for_replicas() -> None:
    routers = [BaseRouter(), BaseRouter()]
    with attach_loaded(model(*map(MoERunner, routers))) as attachment:
        for router in routers:
            router.select(IDS)
        layers = attachment.snapshot().layers
    assert [(layer.name, layer.num_experts, layer.top_k) for layer in layers] == [
        ("0", EXPERTS, TOP_K),
        ("1", EXPERTS, TOP_K),
    ]
    expected = torch.bincount(IDS.flatten(), minlength=EXPERTS).tolist()
    assert [layer.counts.tolist() for layer in layers] == [expected] * 2


def test_what_was_there_goes_on_being_called_and_is_put_back() -> None:
    router, seen = BaseRouter(), []
    router.set_capture_fn(seen.append)
    theirs = router.capture_fn
    attachment = attach_loaded(model(MoERunner(router)))
    router.select(IDS)
    attachment.detach()
    attachment.detach()
    assert router.capture_fn is theirs
    router.select(IDS)
    assert len(seen) == 2
    assert attachment.snapshot().layers[0].passes == 1


def test_somebody_who_came_later_stays_and_nothing_more_is_counted() -> None:
    router = BaseRouter()
    attachment = attach_loaded(model(MoERunner(router)))
    ours = router.capture_fn
    assert ours is not None
    router.set_capture_fn(lambda ids: ours(ids))
    theirs = router.capture_fn
    attachment.detach()
    assert router.capture_fn is theirs
    router.select(IDS)
    assert attachment.snapshot().layers[0].passes == 0


def test_paused_passes_are_not_counted() -> None:
    router = BaseRouter()
    with attach_loaded(model(MoERunner(router))) as attachment:
        attachment.enabled = False
        router.select(IDS)
        attachment.enabled = True
        router.select(IDS)
        assert attachment.snapshot().layers[0].tokens == TOKENS


def test_layers_that_hand_out_no_ids_are_reported_and_not_shown_as_zeros() -> None:
    found = model(
        MoERunner(BaseRouter()), MoERunner(BaseRouter(), monolithic=True), MoERunner(object())
    )
    with attach_loaded(found) as attachment:
        assert [layer.name for layer in attachment.layers] == ["0"]
        assert [(part.name, part.reason) for part in attachment.uncovered] == [
            ("1", "the kernel of its SimpleNamespace chooses the experts itself"),
            ("2", "object hands out no expert ids"),
        ]
        assert len(attachment.reader.metadata["uncovered"]) == 2


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(NothingToObserve, match="it has none; give a mixture-of-experts model"):
        attach_loaded(torch.nn.Linear(2, 2))
    with pytest.raises(NothingToObserve, match="0: the kernel of its"):
        attach_loaded(model(MoERunner(BaseRouter(), monolithic=True)))
