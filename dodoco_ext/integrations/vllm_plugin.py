"""The plugin that vLLM loads into each of its processes: entry point `vllm.general_plugins`.

Off unless `DODOCO=1`; `dodoco run -- vllm serve ...` sets that. `register()` itself imports next to
nothing: it leaves a wrapper at the place that every worker passes before it loads a model, and what
records is imported there (`vllm_serving`). Whatever fails of ours, the server runs as without it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from dodoco_ext import settings
from dodoco_ext.integrations.vllm_symbols import WORKER
from dodoco_ext.vllm_versions import is_supported, why_unsupported

# vLLM's logging shows what is logged below its own name, and nothing else.
log = logging.getLogger("vllm.dodoco")

_WRAPPED = "_dodoco_wrapped"


def register() -> None:
    """What vLLM calls in each process, possibly more than once. Never raises."""
    try:
        if not settings.plugins_wanted():
            return
        version = str(getattr(sys.modules.get("vllm"), "__version__", "unknown"))
        if not is_supported(version):
            log.warning("dodoco: nothing is recorded: %s", why_unsupported(version))
            return
        module = import_module("vllm." + WORKER.file.removesuffix(".py").replace("/", "."))
        _wrap(getattr(module, WORKER.name), "init_device", _prepare)
    except Exception as error:  # telemetry never takes down its host
        log.warning("dodoco: nothing is recorded: %s: %s", type(error).__name__, error)


def _wrap(cls: type, name: str, before: Callable[[Any], None]) -> None:
    """Makes a method call `before(self)` first. Idempotent: plugins may be loaded repeatedly."""
    method = getattr(cls, name)
    if getattr(method, _WRAPPED, False):
        return

    @wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        before(self)
        return method(self, *args, **kwargs)

    setattr(wrapper, _WRAPPED, True)
    setattr(cls, name, wrapper)


def _prepare(wrapper: Any) -> None:
    """Before a worker sets up its device, and so before it loads its model. Never raises."""
    try:
        from dodoco_ext.integrations import vllm_serving

        vllm_serving.watch(wrapper.worker)
    except Exception as error:  # telemetry never takes down its host
        log.warning("dodoco: nothing is recorded: %s: %s", type(error).__name__, error)
