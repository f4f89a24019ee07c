"""Finds the MoE routers of a transformers model and says how each one's choice is obtained.

Three sources, the first that answers wins:

1. transformers' own registry: a model class declares in ``_can_record_outputs["router_logits"]``
   which module class is its router. Where in that router's output the ids are comes from a table
   of odd classes or from the class's own source (`transformers_extract`); it is never guessed.
2. The experts module of the same block, if its second argument is named as ids (``top_k_index``).
3. Neither: the block is listed as uncovered, with the reason.

transformers itself is never imported: the declarations are read from the classes of the model's
modules and from the files that define them, so that a plain ``nn.Module`` built from transformers'
blocks works as well. No parameter is read: models on the meta device work.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dodoco_ext.recorder import Uncovered

from .transformers_extract import (
    Extract,
    Form,
    Hook,
    experts_argument,
    is_replaced,
    kind_of,
    passes_ids_by_keyword,
    takes_ids,
)

# What a wrapper calls the module that it wraps. Left out of names, so that a layer is called the
# same with and without torch.compile, activation checkpointing or FSDP1.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

_NUM_EXPERTS_ATTRIBUTES = ("num_experts", "num_local_experts", "n_routed_experts")
_TOP_K_ATTRIBUTES = (
    "top_k",
    "num_experts_per_tok",
    "top_k_experts",
    "moe_topk",
    "num_selected_experts",
)


@dataclass(frozen=True, slots=True)
class Router:
    """One observable router.

    Attributes:
        name: Qualified name of ``module`` in the model, without wrappers.
        module: Where the hook goes.
        hook: "forward" or "forward_pre".
        extract: ``extract(module, args, output)`` gives ids ``[..., top_k]`` or a bool map
            ``[..., num_experts]``; ``output`` is None for "forward_pre".
        form: "ids" or "map"; "auto" where it may change from call to call and the dtype tells: bool and ids
            as before, uint8 a map of bits.
        num_experts: Number of classes the router chooses among, zero and skip experts included.
        top_k: Choices per token; 0 if unknown.
    """

    name: str
    module: torch.nn.Module
    hook: Hook
    extract: Extract
    form: Form
    num_experts: int
    top_k: int


@dataclass(frozen=True, slots=True)
class Discovery:
    """Routers and uncovered blocks of a model, both in execution (that is, registration) order."""

    routers: tuple[Router, ...]
    uncovered: tuple[Uncovered, ...]


@dataclass(frozen=True, slots=True)
class _Target:
    """One entry of the registry: which modules are routers."""

    target_class: type | None
    layer_name: str
    class_name: str

    def matches(self, name: str, module: torch.nn.Module) -> bool:
        if self.layer_name and f".{self.layer_name.strip('.')}." not in f".{name}.":
            return False
        if self.target_class is not None and isinstance(module, self.target_class):
            return True
        return bool(self.class_name) and name.endswith(self.class_name)


def find_routers(model: torch.nn.Module) -> Discovery:
    """Finds every MoE router of a model.

    Args:
        model: A transformers model, a part of one, or a module that contains parts of one; possibly
            compiled, on any device.

    Returns:
        The routers to observe and the MoE blocks that cannot be observed.
    """
    modules = _modules_by_name(model)
    declared = _declared_routers(modules)
    blocks = [name for name in modules if _child(name, "experts") in modules]
    routers: dict[str, Router] = {}
    for name in declared:
        routers.update(_from_declaration(name, modules))
    for name in blocks:
        if not any(_is_inside(other, name) for other in routers):
            routers.update(_from_experts(name, modules))
    uncovered = _bypassed(routers, modules)
    for name in routers.keys() & uncovered.keys():
        del routers[name]
    uncovered |= _without_router(declared, blocks, {**routers, **uncovered}, modules)

    # By place up to here, for the model itself may be a router or a block: then its name is empty.
    return Discovery(
        tuple(routers[name] for name in modules if name in routers),
        tuple(
            Uncovered(name or type(model).__name__, uncovered[name])
            for name in modules
            if name in uncovered
        ),
    )


def moe_blocks(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The MoE block of each router that `find_routers()` finds, by the router's name."""
    modules = _modules_by_name(model)
    return {
        router.name: modules.get(_parent(router.name), router.module)
        for router in find_routers(model).routers
    }


def _modules_by_name(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """All modules by name without wrappers; of a wrapper and what it wraps, the latter."""
    modules: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        modules[".".join(part for part in name.split(".") if part not in _WRAPPED)] = module
    return modules


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _child(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _is_inside(name: str, place: str) -> bool:
    return not place or name == place or name.startswith(f"{place}.")


def _declared_routers(modules: dict[str, torch.nn.Module]) -> list[str]:
    targets = set(_targets({type(module) for module in modules.values()}))
    return [
        name
        for name, module in modules.items()
        if any(target.matches(name, module) for target in targets)
    ]


def _targets(classes: Iterable[type]) -> Iterator[_Target]:
    """Router declarations on the classes, their parents, and the files that define them."""
    known = {parent for cls in classes for parent in cls.__mro__}
    files = {cls.__module__ for cls in known if not cls.__module__.startswith("torch.")}
    for file in files:
        values = vars(sys.modules[file]).values() if file in sys.modules else ()
        known.update(value for value in values if isinstance(value, type))
    for cls in known:
        recorded = vars(cls).get("_can_record_outputs")
        if isinstance(recorded, dict) and "router_logits" in recorded:
            entry = recorded["router_logits"]
            for recorder in entry if isinstance(entry, list) else [entry]:
                yield _target(recorder)


def _target(recorder: Any) -> _Target:
    """A registry entry: an `OutputRecorder`, or a bare class or class-name suffix in its place."""
    if isinstance(recorder, type):
        return _Target(recorder, "", "")
    if isinstance(recorder, str):
        return _Target(None, "", recorder)
    return _Target(
        getattr(recorder, "target_class", None),
        getattr(recorder, "layer_name", None) or "",
        getattr(recorder, "class_name", None) or "",
    )


def _from_declaration(name: str, modules: dict[str, torch.nn.Module]) -> dict[str, Router]:
    """The router that the registry names, if it is known where its ids are."""
    router = modules[name]
    kind = kind_of(type(router))
    # A forward put on the instance is not the one whose source or table entry is known.
    if kind is None or is_replaced(router):
        return {}
    place = _child(name, kind.child) if kind.child else name
    holders = [
        modules[holder]
        for holder in (name, _parent(name), _child(_parent(name), "experts"))
        if holder in modules
    ]
    num_experts = _number(holders, (kind.num_experts, *_NUM_EXPERTS_ATTRIBUTES))
    top_k = kind.top_k
    if isinstance(top_k, str):
        top_k = _number(holders, (top_k, *_TOP_K_ATTRIBUTES))
    if place not in modules or num_experts == 0:
        return {}
    found = Router(
        name=place or type(router).__name__,
        module=modules[place],
        hook=kind.hook,
        extract=kind.extract,
        form=kind.form,
        num_experts=num_experts,
        top_k=top_k,
    )
    return {place: found}


def _from_experts(block: str, modules: dict[str, torch.nn.Module]) -> dict[str, Router]:
    """The experts of a block as the place to observe, if they are handed the ids."""
    name = _child(block, "experts")
    experts = modules[name]
    if not takes_ids(experts) or passes_ids_by_keyword(type(modules[block])):
        return {}
    # The experts last: under expert parallelism they know their own share only.
    siblings = [child for child in modules[block].children() if child is not experts]
    holders = [*siblings, modules[block], experts]
    num_experts = _number(holders, _NUM_EXPERTS_ATTRIBUTES)
    if num_experts == 0:
        return {}
    found = Router(
        name=name,
        module=experts,
        hook="forward_pre",
        extract=experts_argument,
        form="ids",
        num_experts=num_experts,
        top_k=_number(holders, _TOP_K_ATTRIBUTES),
    )
    return {name: found}


def _number(holders: list[torch.nn.Module], attributes: Iterable[str]) -> int:
    """First positive int among the attributes of the modules, then of their configs; 0 if none."""
    attributes = tuple(attributes)
    for holder in (*holders, *(getattr(module, "config", None) for module in holders)):
        for attribute in attributes:
            value = getattr(holder, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def _bypassed(routers: Iterable[str], modules: dict[str, torch.nn.Module]) -> dict[str, str]:
    """Routers whose block never calls them, with the reason."""
    reasons = {}
    for name in routers:
        block = modules[_parent(name)]
        kind = type(block).__name__
        # Only the expert-parallel path of this class calls its router and experts as modules.
        hooked = getattr(getattr(block, "experts", None), "_is_hooked", False)
        if kind.endswith("Mxfp4GptOssMLP") and not hooked:
            reasons[name] = (
                "MXFP4 kernels route inside their block; load it with Mxfp4Config(dequantize=True)"
            )
        elif name and is_replaced(block):
            reasons[name] = f"forward of its {kind} was replaced (hub kernel?), may route by itself"
    return reasons


def _without_router(
    declared: list[str],
    blocks: list[str],
    known: Iterable[str],
    modules: dict[str, torch.nn.Module],
) -> dict[str, str]:
    """MoE blocks and declared routers in which nothing was found, with the reason."""
    reasons = {
        name: _why_no_ids(modules[name], modules[_child(name, "experts")])
        for name in blocks
        if not any(_is_inside(other, name) for other in known)
    }
    known = (*known, *reasons)
    for name in declared:
        if not any(_is_inside(other, place) for place in (name, _parent(name)) for other in known):
            kind = type(modules[name]).__name__
            reasons[name] = (
                f"forward of this {kind} was replaced (hub kernel?)"
                if is_replaced(modules[name])
                else f"{kind} returns no expert ids and its block has no experts module"
            )
    return reasons


def _why_no_ids(block: torch.nn.Module, experts: torch.nn.Module) -> str:
    if type(experts) is torch.nn.ModuleList:
        return "its experts are called one by one: no module is handed the expert ids"
    if takes_ids(experts):
        call = (
            "by keyword"
            if passes_ids_by_keyword(type(block))
            else "without telling how many there are"
        )
        return f"{type(block).__name__} calls its experts {call}"
    parameters = ", ".join([*inspect.signature(type(experts).forward).parameters][1:])
    return (
        f"no router is declared, and {type(experts).__name__} takes ({parameters}), not expert ids"
    )
