"""Where Megatron's routers leave their choice: the second thing that they return.

A dense bool map [tokens, experts]; from Transformer Engine's fused router also a map of bytes, or one packed
into bits; ids [tokens, top_k] from the inference router. The form may change from call to call
(the inference router returns maps in training), so it is told by dtype each time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from . import megatron_symbols as symbols
from .megatron_origins import in_backward
from .transformers import Router

_before: weakref.WeakKeyDictionary[Any, Callable[[], None]] = weakref.WeakKeyDictionary()


def place_of(router: Any, name: str) -> Router | str:
    """Where to observe a router of Megatron's, or why it cannot be."""
    if not symbols.is_a(router, symbols.ROUTER):
        return f"a {type(router).__name__}: what it returns is not known"
    if router.config.moe_pad_expert_input_to_capacity:
        return (
            "moe_pad_expert_input_to_capacity fills every expert to its capacity before the router "
            "returns: the map that it returns is always even"
        )
    return Router(
        name=name,
        module=router,
        hook="forward",
        extract=choice,
        form="auto",
        num_experts=router.config.num_moe_experts,
        top_k=router.config.moe_router_topk,
    )


def before_each(router: Any, act: Callable[[], None] | None) -> None:
    """Has `act` called before each choice of a router is recorded, repetitions apart; None ends that."""
    if act is None:
        _before.pop(router, None)
    else:
        _before[router] = act


def choice(module: Any, args: Any, output: Any) -> torch.Tensor:
    """The choice out of a router's output: a bool map, a map of bits (uint8), or ids.

    Raises:
        TypeError: It is none of these.
    """
    if not is_dynamo_compiling() and not in_backward() and (act := _before.get(module)):
        act()
    decision: torch.Tensor = output[1]
    columns, num_experts = decision.shape[-1], module.config.num_moe_experts
    if decision.dtype == torch.uint8 and columns == num_experts:
        return decision.view(torch.bool)  # the same bytes
    if decision.dtype not in (torch.bool, torch.uint8) and columns > module.config.moe_router_topk:
        raise TypeError(
            f"{decision.dtype} of {columns} columns from a router of {num_experts} experts is neither a "
            "map of bool or bytes nor ids"
        )
    return decision
