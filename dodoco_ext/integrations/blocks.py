"""MoE modules whose forward tells which layer a thread is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch

from dodoco_ext.errors import InputError, NothingToObserve
from dodoco_ext.recorder import LayerSpec

from .attribution import LayerScopes
from .transformers import moe_blocks

_MISSING = object()


class Blocks:
    """Replaces the forward of modules by one that enters their layer's scope, and puts it back.

    A replaced forward nests: it calls what was there, whether the class's or somebody else's.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], scopes: LayerScopes) -> None:
        self._replaced: list[tuple[torch.nn.Module, Any, Callable[..., Any]]] = []
        for layer, module in enumerate(modules):
            before = module.__dict__.get("forward", _MISSING)
            ours = MethodType(_scoped(scopes, layer, before), module)
            module.__dict__["forward"] = ours
            self._replaced.append((module, before, ours))

    def restore(self) -> None:
        """Puts back what is still ours; what somebody wrapped meanwhile goes on, without a scope."""
        for module, before, ours in self._replaced:
            if module.__dict__.get("forward") is not ours:
                continue
            if before is _MISSING:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        self._replaced.clear()


def _scoped(scopes: LayerScopes, layer: int, before: Any) -> Callable[..., Any]:
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner = type(self).forward.__get__(self) if before is _MISSING else before
        if torch.compiler.is_compiling():
            return inner(*args, **kwargs)
        with scopes.enter(layer):
            return inner(*args, **kwargs)

    return forward


def blocks_of(
    layers: int | Sequence[str] | None,
    model: torch.nn.Module | None,
    modules: Mapping[str, torch.nn.Module] | Sequence[torch.nn.Module] | None,
    recorded: Sequence[LayerSpec] | None,
) -> dict[str, torch.nn.Module | None]:
    """Names of the layers to capture, with their modules where those are known.

    Args:
        layers: Their number or names, without modules.
        model: A model to find them in.
        modules: They themselves.
        recorded: The layers of a recording that exists: their names stand, in that order.

    Raises:
        InputError: Not one of the first three is given, or they are other layers than the recorded.
        NothingToObserve: The model has no MoE block.
    """
    sources = {"layers": layers, "model": model, "modules": modules}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1 or (not given and recorded is None):
        what = " and ".join(given) or "nothing"
        raise InputError(f"{what} given: give one of layers=, model= and modules=")
    named: dict[str, torch.nn.Module | None]
    if model is not None:
        named = {**moe_blocks(model)}
        if not named:
            raise NothingToObserve(
                f"no MoE block in {type(model).__name__}: give modules=, the MoE modules themselves"
            )
    elif isinstance(modules, Mapping):
        named = {**modules}
    elif modules is not None:
        named = {f"layer {index}": module for index, module in enumerate(modules)}
    elif isinstance(layers, int):
        named = {f"layer {index}": None for index in range(layers)}
    else:
        named = dict.fromkeys(layers or ())
    if recorded is None:
        if not named:
            raise InputError("no layers: name at least one")
        return named
    names = [layer.name for layer in recorded]
    if not given:
        return dict.fromkeys(names)
    if len(named) != len(names) or (model is not None and [*named] != names):
        raise InputError(
            f"{len(named)} layers, and the attachment records {len(names)}: {', '.join(names[:8])}"
        )
    return dict(zip(names, named.values(), strict=True))
