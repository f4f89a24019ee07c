"""An observer of routing that shares nothing with the package: it watches single torch operations.

A dispatch mode sees the operation by which each router makes its choice (`topk`, `max`, `argmax`, a
table look-up, a projection to keys) with its result, and knows the module that runs from PyTorch's
global module hooks. From these the counts per expert are worked out in plain code.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

import families

aten = torch.ops.aten

Choice = Callable[[str, Any, tuple[Any, ...], Any], "torch.Tensor | None"]
Counts = dict[str, list[int]]


def num_classes(family: str) -> int:
    """Classes that a router of the small model chooses among."""
    special = {
        "doge": 16,
        "longcat_flash": families.NUM_EXPERTS + 4,
        "zaya": families.NUM_EXPERTS + 1,
    }
    return special.get(family, families.NUM_EXPERTS)


def top_k(family: str) -> int:
    """Choices per token of the small model."""
    return 1 if family in ("switch_transformers", "zaya") else families.TOP_K


def count(family: str, model: torch.nn.Module, inputs: dict[str, Any]) -> Counts:
    """Runs one forward pass and counts each router's choices.

    Returns:
        Counts per class, by the qualified name of the module that made the choice.
    """
    choices = _Choices(model, _choice_of(family))
    with choices:
        model(**inputs)
    tally = {"switch_transformers": _switch, "nllb_moe": _nllb, "doge": _doge}.get(family, _plain)
    return {name: tally(calls, num_classes(family)) for name, calls in choices.calls.items()}


class _Choices(TorchDispatchMode):
    """Collects what `choice` picks out of the operations, by the innermost module that runs."""

    def __init__(self, model: torch.nn.Module, choice: Choice) -> None:
        super().__init__()
        self.calls: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self._choice = choice
        self._names = {module: name for name, module in model.named_modules()}
        self._stack: list[str] = []

    def __enter__(self) -> _Choices:
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter_module(self, module: torch.nn.Module, args: Any) -> None:
        self._stack.append(self._names.get(module, ""))

    def _leave_module(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._stack:
            chosen = self._choice(self._stack[-1], func, args, output)
            if chosen is not None:
                self.calls[self._stack[-1]].append(chosen.clone())
        return output


def _choice_of(family: str) -> Choice:
    """Which operation's result is a router's choice, by family."""
    classes, k = num_classes(family), top_k(family)

    def topk(name: str, func: Any, args: tuple[Any, ...], output: Any) -> torch.Tensor | None:
        if func is aten.topk.default and args[0].shape[-1] == classes and args[1] == k:
            return output[1]
        return None

    def topk_or_table(
        name: str, func: Any, args: tuple[Any, ...], output: Any
    ) -> torch.Tensor | None:
        if func is aten.index.Tensor and args[0].shape == (families.VOCAB_SIZE, k):
            return output
        return topk(name, func, args, output)

    def maximum(name: str, func: Any, args: tuple[Any, ...], output: Any) -> torch.Tensor | None:
        return output[1] if func is aten.max.dim and name.endswith("router") else None

    def argmax(name: str, func: Any, args: tuple[Any, ...], output: Any) -> torch.Tensor | None:
        return output if func is aten.argmax.default and args[0].shape[-1] == classes else None

    def keys(name: str, func: Any, args: tuple[Any, ...], output: Any) -> torch.Tensor | None:
        return output if func is aten.mm.default and name.endswith("router_gate") else None

    special: dict[str, Choice] = {
        "deepseek_v4": topk_or_table,
        "doge": keys,
        "nllb_moe": argmax,
        "phimoe": maximum,
        "switch_transformers": argmax,
    }
    return special.get(family, topk)


def _plain(calls: list[torch.Tensor], classes: int) -> list[int]:
    counts = [0] * classes
    for ids in calls:
        for expert in ids.flatten().tolist():
            counts[expert] += 1
    return counts


def _switch(calls: list[torch.Tensor], classes: int) -> list[int]:
    """Top-1; of each sequence an expert takes the first `expert_capacity` tokens that ask."""
    capacity = families.OVERRIDES["switch_transformers"]["expert_capacity"]
    counts = [0] * classes
    for ids in calls:
        for sequence in ids.tolist():
            for expert in range(classes):
                counts[expert] += min(sequence.count(expert), capacity)
    return counts


def _nllb(calls: list[torch.Tensor], classes: int) -> list[int]:
    """Top-2; an expert takes first choices up to its capacity, then second ones.

    First choices over capacity still push second ones back.
    """
    fraction = families.OVERRIDES["nllb_moe"]["moe_eval_capacity_token_fraction"]
    counts = [0] * classes
    for first, second in zip(calls[::2], calls[1::2], strict=True):
        capacity = math.ceil(fraction * len(first))
        for expert in range(classes):
            asked = first.tolist().count(expert)
            taken = min(asked, capacity)
            counts[expert] += taken + min(second.tolist().count(expert), capacity - taken)
    return counts


def _doge(calls: list[torch.Tensor], classes: int) -> list[int]:
    """The best pairs of row key and column key, among all pairs."""
    num_keys = math.isqrt(classes)
    counts = [0] * classes
    for logits in calls:
        rows, columns = logits.reshape(2, -1, num_keys)
        scores = (rows[:, :, None] + columns[:, None, :]).flatten(1)
        for token in scores.sort(descending=True).indices[:, : families.TOP_K].tolist():
            for expert in token:
                counts[expert] += 1
    return counts
