"""Balance of the routing as scalars for TensorBoard and W&B."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from dodoco_ext import metrics, nulls
from dodoco_ext.errors import InputError
from dodoco_ext.recording import Reader

from .megatron import Found

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True)
class LayerCounts:
    """What one layer counted between two calls.

    Attributes:
        number: Its number, as in Megatron's own metrics.
        top_k: Experts a token is sent to.
        counts: Assignments per expert, [E].
        dropped: Assignments dropped for capacity; None where they were not added up over ranks.
    """

    number: int
    top_k: int
    counts: NDArray[Any]
    dropped: int | None


@dataclass(frozen=True)
class Shape:
    """What the layers of a recording are in the whole model; holds nothing of the model itself.

    Attributes:
        numbers: Number of each layer, as in Megatron's own metrics; None where its router is not observed.
        num_layers: Layers of the whole model.
        num_experts: Experts of each.
        top_k: Experts a token is sent to.
    """

    numbers: tuple[int | None, ...]
    num_layers: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, found: Found) -> Shape:
        """The shape of what was found in a model."""
        numbers = tuple(None if x.router is None else x.number for x in found.layers)
        return cls(numbers, found.num_layers, found.num_experts, found.top_k)


class Window:
    """The counters of a recording since the last look."""

    def __init__(self, reader: Reader, shape: Shape) -> None:
        self.shape = shape
        self._reader = reader
        self._before = reader.snapshot()

    def advance(self) -> list[LayerCounts]:
        """What the observed layers have counted since the last call."""
        now = self._reader.snapshot()
        window, self._before = now - self._before, now
        return [
            LayerCounts(number, counted.top_k, counted.counts, counted.capacity_dropped)
            for number, counted in zip(self.shape.numbers, window.layers, strict=False)
            if number is not None
        ]


def reduced(
    counts: list[LayerCounts], shape: Shape, group: dist.ProcessGroup | None
) -> list[LayerCounts]:
    """Adds the counts of all ranks of a group: one all-reduce.

    Its shape comes from the configuration of the whole model, so it is the same on ranks with other
    layers and on ranks without any.

    Raises:
        InputError: The model does not say how many layers and experts it has, or there is no group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError("reduce='group': torch.distributed is not initialised; leave reduce out")
    if not shape.num_layers or not shape.num_experts:
        raise InputError(
            "reduce='group': the model's config has no num_layers and num_moe_experts, so ranks cannot "
            "agree on a shape; leave reduce out"
        )
    for layer in counts:
        if layer.number >= shape.num_layers or len(layer.counts) != shape.num_experts:
            raise InputError(
                f"reduce='group': layer {layer.number} with {len(layer.counts)} experts does not fit "
                f"{shape.num_layers} layers of {shape.num_experts}; leave reduce out"
            )
    backend = dist.get_backend(group)
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else "cpu"
    table = np.zeros((shape.num_layers, shape.num_experts), np.int64)
    for layer in counts:
        table[layer.number] += layer.counts.astype(np.int64)
    totals = torch.from_numpy(table).to(device)
    dist.all_reduce(totals, group=group)
    return [
        LayerCounts(number, shape.top_k, row, None)
        for number, row in enumerate(totals.cpu().numpy())
        if row.any()
    ]


def summary(counts: Iterable[LayerCounts], scope: str, *, per_layer: bool) -> dict[str, float]:
    """Scalars by tag: quantiles over the layers, and the layers themselves where wanted."""
    by_name: dict[str, dict[int, float]] = {}
    for layer in counts:
        for name, value in _of_layer(layer).items():
            if not math.isnan(value):
                by_name.setdefault(name, {})[layer.number] = value
    values: dict[str, float] = {}
    for name, of_layers in by_name.items():
        tag = f"moe/{scope}_{name}"
        for label, quantile in _QUANTILES.items():
            values[f"{tag}_{label}"] = float(np.quantile([*of_layers.values()], quantile))
        if per_layer:
            values |= {f"{tag}_layer_{number}": value for number, value in of_layers.items()}
    return values


def _of_layer(layer: LayerCounts) -> dict[str, float]:
    total = int(layer.counts.sum())
    if not total:
        return {}
    num_experts = len(layer.counts)
    gini = float(metrics.gini(layer.counts))
    values = {
        "gini": gini,
        "max_over_mean": float(metrics.max_over_mean(layer.counts)),
        "unused_experts": float(metrics.unused_experts(layer.counts)),
    }
    if layer.top_k:
        tokens = max(round(total / layer.top_k), 1)
        values["corrected_gini"] = nulls.corrected_gini([gini], tokens, num_experts, layer.top_k)
    if layer.dropped is not None:
        values["dropped_fraction"] = layer.dropped / (total + layer.dropped)
    return values


def write(writer: Any, values: Mapping[str, float], iteration: int) -> None:
    """Hands scalars to TensorBoard's writer, to a W&B run, to several of them, or to nobody.

    Raises:
        InputError: A writer is neither.
    """
    for each in writer if isinstance(writer, list | tuple) else (writer,):
        if each is None:
            continue
        if hasattr(each, "add_scalar"):
            for tag, value in values.items():
                each.add_scalar(tag, value, iteration)
        elif callable(getattr(each, "log", None)):
            each.log(dict(values), step=iteration)
        else:
            raise InputError(
                f"a {type(each).__name__} is no writer: give one with add_scalar(tag, value, step) or "
                "log(values, step=)"
            )
