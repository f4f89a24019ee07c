"""Prometheus's text format, written faster than prometheus_client does: thousands of series a scrape.

The bytes are those of `prometheus_client.generate_latest()`. It checks and escapes every name and label at
every scrape, which is most of the time that a scrape takes; here the text of a series is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from prometheus_client import CollectorRegistry
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_number: Callable[[float], str] = floatToGoString
_NAMES = {"counter": ("{}_total", "counter"), "info": ("{}_info", "gauge")}


def render(registry: CollectorRegistry) -> bytes:
    """All metrics of a registry whose names need no escaping, as text."""
    lines: list[str] = []
    for family in registry.collect():
        shape, kind = _NAMES.get(family.type, ("{}", family.type))
        name = shape.format(family.name)
        text = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
        lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}\n")
        for sample in family.samples:
            series = _series(sample.name, tuple(sample.labels.items()))
            lines.append(f"{series} {_number(sample.value)}\n")
    return "".join(lines).encode()


@lru_cache(maxsize=1 << 15)
def _series(name: str, labels: tuple[tuple[str, str], ...]) -> str:
    pairs = ",".join(f'{label}="{_escaped(value)}"' for label, value in sorted(labels))
    return f"{name}{{{pairs}}}" if pairs else name


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
