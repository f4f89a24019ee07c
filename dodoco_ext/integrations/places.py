"""Where a part of a model is, as a recording names it, and whether it can be observed there."""

from __future__ import annotations

import torch

from dodoco_ext.device import MAX_EXPERTS
from dodoco_ext.integrations.transformers import Router


def device_of(module: torch.nn.Module) -> torch.device:
    """The device of a module's first tensor; the host for one that has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def place_of(module: torch.nn.Module) -> str:
    """`cpu`, or `cuda:N`. What is on no device yet runs on the host."""
    device = device_of(module)
    if device.type != "cuda":
        return "cpu"
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def why_not(router: Router) -> str:
    """Why a router cannot be observed where it is; "" if it can."""
    return why_not_there(router.module, router.num_experts)


def why_not_there(module: torch.nn.Module, num_experts: int) -> str:
    """Why what a module routes to so many experts cannot be observed where it is; "" if it can."""
    device = device_of(module)
    if device.type in ("cpu", "meta"):
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        kind = "an AMD GPU" if device.type == "cuda" else f"a device of type {device.type}"
        return f"it is on {kind}, and dodoco-ext records on CPUs and NVIDIA GPUs"
    if num_experts > MAX_EXPERTS:
        return f"it has {num_experts} experts, and on a GPU {MAX_EXPERTS} can be counted"
    return ""
