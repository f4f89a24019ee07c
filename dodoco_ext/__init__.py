"""DODOCO: a flight recorder for mixture-of-experts routing.

Importing this package loads neither torch nor triton; `attach` does, when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dodoco_ext.attachment import Attachment, attach
    from dodoco_ext.counters import LayerSnapshot, Snapshot
    from dodoco_ext.integrations.distributed import AlltoAllCapture, capture_alltoall, group_spec
    from dodoco_ext.recording import Reader
    from dodoco_ext.sources import open_recording as open  # noqa: A004

_HOMES = {
    "attach": ("dodoco_ext.attachment", "attach"),
    "Attachment": ("dodoco_ext.attachment", "Attachment"),
    "AlltoAllCapture": ("dodoco_ext.integrations.distributed", "AlltoAllCapture"),
    "capture_alltoall": ("dodoco_ext.integrations.distributed", "capture_alltoall"),
    "group_spec": ("dodoco_ext.integrations.distributed", "group_spec"),
    "open": ("dodoco_ext.sources", "open_recording"),
    "Reader": ("dodoco_ext.recording", "Reader"),
    "Snapshot": ("dodoco_ext.counters", "Snapshot"),
    "LayerSnapshot": ("dodoco_ext.counters", "LayerSnapshot"),
}

__all__ = [
    "AlltoAllCapture",
    "Attachment",
    "LayerSnapshot",
    "Reader",
    "Snapshot",
    "__version__",
    "attach",
    "capture_alltoall",
    "group_spec",
    "open",
]


def __getattr__(name: str) -> Any:
    if name == "_C":  # asked for before Python looks for the submodule
        try:
            return import_module("dodoco_ext._C")
        except ModuleNotFoundError:
            raise ImportError(
                f"no compiled module in {__path__[0]}: if that is a checkout of the sources, run "
                "from another folder; else install dodoco-ext again"
            ) from None
    if name == "megatron":
        return _imported("dodoco_ext.megatron", name)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(_imported(module, name), attribute)
    globals()[name] = value
    return value


def _imported(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"dodoco_ext.{name} needs torch, which is not installed: install the build of torch for "
            "your machine (https://pytorch.org)",
            name="torch",
        ) from None


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
