"""Classes with the names and attributes that are relied on of Megatron-Core, without what they do on GPUs.

tests/engines checks the same names against Megatron's sources.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

RANKS = 4
EXPERTS, TOP_K, HIDDEN = 8, 2, 16


def config(**changes: Any) -> SimpleNamespace:
    values = {
        "num_layers": 2,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_pad_expert_input_to_capacity": False,
        "moe_router_fusion": False,
    }
    return SimpleNamespace(**{**values, **changes})


class TopKRouter(torch.nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.topk = config.moe_router_topk
        self.answer = torch.zeros(1, EXPERTS, dtype=torch.bool)

    def forward(self, input: Any, padding_mask: Any = None) -> Any:
        return input, self.answer


class InferenceTopKRouter(TopKRouter):
    pass


class OtherRouter(torch.nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()


class MoETokenDispatcher:
    def __init__(self, ep_size: int = RANKS, tp_size: int = 1) -> None:
        self.ep_size, self.tp_size = ep_size, tp_size
        self.ep_group = self.tp_ep_group = dist.group.WORLD
        self.calls: list[str] = []

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        self.calls.append("dispatch")
        return hidden_states * 2, probs

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls.append("combine")
        return hidden_states * 3


class MoEAlltoAllTokenDispatcher(MoETokenDispatcher):
    drop_and_pad = False

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.input_splits: Any = None
        self.output_splits: Any = None
        self.tokens_per_expert: Any = None
        self.later: Any = None

    def preprocess(self, routing_map: Any) -> Any:
        """Leaves the splits that the next dispatch is to have; routing_map is (send, receive, experts)."""
        self.input_splits, self.output_splits, experts = routing_map
        return experts

    def token_dispatch(self, permutated_local_input_tokens: Any, permuted_probs: Any) -> Any:
        if self.later is not None:  # what moving to the host leaves
            self.input_splits, self.output_splits, self.tokens_per_expert = self.later
        return super().token_dispatch(permutated_local_input_tokens, permuted_probs)


class _DeepepManager:
    def __init__(self) -> None:
        self.handle: Any = None
        self.token_probs = torch.zeros(1, TOP_K)


class _HybridEPManager:
    pass


class MoEFlexTokenDispatcher(MoETokenDispatcher):
    def __init__(self, manager: Any) -> None:
        super().__init__()
        self._comm_manager = manager
        self.next_handle: Any = None

    def token_dispatch(self, hidden_states: torch.Tensor, probs: Any = None) -> Any:
        self._comm_manager.handle = self.next_handle
        return super().token_dispatch(hidden_states, probs)

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self._comm_manager.handle = None
        return super().token_combine(hidden_states)


class BaseMoELayer(torch.nn.Module):
    def __init__(self, router: Any, dispatcher: Any, number: int | None, config: Any) -> None:
        super().__init__()
        self.config, self.layer_number = config, number
        self.router, self.token_dispatcher = router, dispatcher


class TransformerLayer(torch.nn.Module):
    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


class Model(torch.nn.Module):
    """A model of MoE layers with these dispatchers, the first of number `first`."""

    def __init__(
        self, *dispatchers: Any, router: Any = TopKRouter, first: int = 1, **changes: Any
    ) -> None:
        super().__init__()
        self.config = config(**changes)
        layers = [
            TransformerLayer(BaseMoELayer(router(self.config), each, first + i, self.config))
            for i, each in enumerate(dispatchers)
        ]
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(layers)

    def __getitem__(self, index: int) -> Any:
        return self.decoder.layers[index].mlp


class Wrapper(torch.nn.Module):
    """As Megatron's DDP and Float16Module: the wrapped model is `module`."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
