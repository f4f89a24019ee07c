"""A plugin of vLLM for tests: layer 1 gets a kernel that chooses the experts itself, as some GPU kernels do.

Its results are those of the kernel in whose place it stands; its layer's router is never called.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

TOP_K = 2


def register() -> None:
    before = RoutedExperts.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        if ".layers.1." in self.layer_name:
            method = self.quant_method
            changed = {"is_monolithic": property(is_monolithic), "apply_monolithic": apply}
            method.__class__ = type("MonolithicMethod", (type(method),), changed)

    RoutedExperts.__init__ = initialise


def is_monolithic(method: Any) -> bool:
    return not vars(method).get("_inside", False)


def apply(method: Any, layer: Any, x: Any, router_logits: Any, input_ids: Any = None) -> Any:
    weights, ids = torch.topk(router_logits.softmax(-1, dtype=torch.float32), TOP_K)
    vars(method)["_inside"] = True
    try:
        return method.apply(
            layer=layer,
            x=x,
            topk_weights=weights / weights.sum(-1, keepdim=True),
            topk_ids=ids.to(torch.int32),
            shared_experts=None,
            shared_experts_input=None,
        )
    finally:
        vars(method)["_inside"] = False
