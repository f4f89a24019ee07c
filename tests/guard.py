"""A guard that fails where a tensor's values are fetched by the host, around probes and captures.

A dispatch mode sees `.item()`, `bool()`, `nonzero()` and copies to another device; `.tolist()` and `.numpy()` of a CPU
tensor pass by the dispatcher, so that those methods are guarded as well. Which calls are ours is told
from the stack: the innermost frame that is neither torch's nor the guard's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dodoco_ext

OURS = str(Path(dodoco_ext.__file__).parent)
TORCHS = str(Path(torch.__file__).parent)
FETCHING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::nonzero_static",
    "aten::is_nonzero",
    "aten::equal",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::bincount",
    "aten::masked_select",
    "aten::repeat_interleave",
}
METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__index__", "nonzero")


class HostSync(AssertionError):
    """Ours fetched a value."""


def _is_ours() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith(TORCHS) and "unittest" not in name:
            return name.startswith(OURS)
        frame = frame.f_back  # type: ignore[assignment]
    return False


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition(".")[0]
        moves = name in ("aten::_to_copy", "aten::copy_") and _changes_device(name, args, kwargs)
        if (name in FETCHING or moves) and _is_ours():
            raise HostSync(f"{name} from {OURS}")
        return func(*args, **kwargs)


def _changes_device(name: str, args: Any, kwargs: Any) -> bool:
    if name == "aten::copy_":
        return bool(args[0].device != args[1].device)
    wanted = kwargs.get("device")
    return wanted is not None and torch.device(wanted) != args[0].device


def _guarded(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if _is_ours():
            raise HostSync(f".{name}() from {OURS}")
        return method(self, *args, **kwargs)

    return guarded


@contextmanager
def no_host_sync(*, allow: tuple[str, ...] = (), mode: bool = True) -> Iterator[None]:
    """Fails where code of the package fetches the value of a tensor.

    Args:
        allow: Methods of tensors that are in order: `numpy` of a host's tensor copies nothing.
        mode: Whether operators are watched too. A capture takes another way where a mode is active.
    """
    patches = [
        patch.object(torch.Tensor, name, _guarded(name, getattr(torch.Tensor, name)))
        for name in METHODS
        if name not in allow
    ]
    for each in patches:
        each.start()
    try:
        with _Mode() if mode else nullcontext():
            yield
    finally:
        for each in patches:
            each.stop()
