"""Finds the MoE layers of a Megatron-Core model: their routers, dispatchers and names.

Megatron is not imported: classes are known by name (`megatron_symbols`). Nothing is looked for in shared
experts, which no router chooses and no AlltoAll reaches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dodoco_ext.recorder import Uncovered

from . import megatron_dispatchers as dispatchers
from . import megatron_routers as routers
from . import megatron_symbols as symbols
from .transformers import Router

# What a wrapper calls the module that it wraps: DDP, Float16Module and FSDP of Megatron, torch.compile,
# torch's checkpoint wrapper.
_WRAPPED = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of this rank.

    Attributes:
        name: Qualified name of its router, with the layer's number in the whole model in place of its
            number on this pipeline stage.
        number: Its number as Megatron's own per-layer metrics count: from 0, MTP layers after the last.
        module: The MoE layer.
        owner: The transformer layer that holds it, or None.
        num_experts: Experts of the whole layer.
        top_k: Experts a token is sent to.
        router: Where its choices are observed; None if nowhere.
        dispatcher: Whose transfers can be recorded; None if there is none.
    """

    name: str
    number: int
    module: torch.nn.Module
    owner: torch.nn.Module | None
    num_experts: int
    top_k: int
    router: Router | None
    dispatcher: Any


@dataclass(frozen=True)
class Found:
    """What a rank holds of a model.

    Attributes:
        layers: Its MoE layers in execution order, chunk by chunk.
        uncovered: Parts that are not observed, with the reason.
        num_layers: Layers of the whole model, on all stages, MTP layers included; 0 if unknown.
        num_experts: Experts of a layer of the whole model; 0 if it has no MoE.
        top_k: Experts that a token is sent to; 0 if unknown.
    """

    layers: tuple[MoELayer, ...]
    uncovered: tuple[Uncovered, ...]
    num_layers: int
    num_experts: int
    top_k: int


def find_layers(chunks: Sequence[torch.nn.Module]) -> Found:
    """Finds the MoE layers of a model.

    Args:
        chunks: The parts of the model on this rank: one, or as many as there are virtual pipeline stages.
    """
    uncovered: list[Uncovered] = []
    layers: list[MoELayer] = []
    for index, chunk in enumerate(chunks):
        prefix = f"chunk{index}." if len(chunks) > 1 else ""
        found = [*_of_chunk(chunk, prefix, uncovered)]
        if not found:
            part = prefix.rstrip(".") or "this rank"
            uncovered.append(Uncovered(part, "no MoE layer is on this pipeline stage"))
        layers += found
    config = next((c for c in map(_config, chunks) if c is not None), None)
    return Found(tuple(layers), tuple(uncovered), _num_layers(config), *_choice(config))


def _of_chunk(
    chunk: torch.nn.Module, prefix: str, uncovered: list[Uncovered]
) -> Iterator[MoELayer]:
    modules = {_plain(name): module for name, module in chunk.named_modules()}
    for name, module in modules.items():
        if not symbols.is_a(module, symbols.LAYER):
            continue
        owner = modules.get(name.rpartition(".")[0])
        is_mtp = "mtp" in name.split(".")
        number = (module.layer_number or 1) - 1
        router: Any = module.router
        own_name = prefix + (name if is_mtp else _renumbered(name, number)) + ".router"
        config: Any = module.config
        place = routers.place_of(router, own_name)
        if isinstance(place, str):
            uncovered.append(Uncovered(own_name, place))
        dispatcher = module.token_dispatcher
        reason = dispatchers.why_not(dispatcher)
        alone = dispatcher.ep_size == 1 and (
            dispatcher.tp_size == 1 or symbols.is_a(dispatcher, symbols.ALLTOALL)
        )
        if reason and not alone:
            uncovered.append(
                Uncovered(own_name.removesuffix("router") + "token_dispatcher", reason)
            )
        yield MoELayer(
            name=own_name,
            # MTP layers follow the others: 0.16 numbers them so itself, later ones from 1.
            number=number + (config.num_layers if is_mtp and number < config.num_layers else 0),
            module=module,
            owner=owner,
            num_experts=config.num_moe_experts,
            top_k=config.moe_router_topk,
            router=None if isinstance(place, str) else place,
            dispatcher=None if reason or alone else dispatcher,
        )


def _plain(name: str) -> str:
    """The name without what wrappers add: at the front by Megatron's, anywhere by torch's."""
    parts = name.split(".")
    while parts and parts[0] in _WRAPPED:
        del parts[0]
    return ".".join(part for part in parts if part not in _WRAPPED[1:])


def _renumbered(name: str, number: int) -> str:
    """`decoder.layers.0.mlp` as `decoder.layers.4.mlp` on the stage that begins with layer 4."""
    parts = name.split(".")
    for index in range(len(parts) - 1, 0, -1):
        if parts[index].isdigit() and parts[index - 1] == "layers":
            parts[index] = str(number)
            break
    return ".".join(parts)


def _config(chunk: torch.nn.Module) -> Any:
    for module in chunk.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "num_moe_experts"):
            return config
    return None


def _num_layers(config: Any) -> int:
    if config is None:
        return 0
    return int(config.num_layers) + int(getattr(config, "mtp_num_layers", None) or 0)


def _choice(config: Any) -> tuple[int, int]:
    num_experts = int(getattr(config, "num_moe_experts", None) or 0)
    return num_experts, int(config.moe_router_topk) if num_experts else 0
