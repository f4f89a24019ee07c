"""The public API is what tests/public_api.txt says: changing it takes a change there, on purpose."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import dodoco_ext

SNAPSHOT = Path(__file__).with_name("public_api.txt")


def describe(name: str, value: object) -> list[str]:
    if inspect.isclass(value):
        lines = [f"class {name}"]
        for member, attribute in sorted(vars(value).items()):
            if isinstance(attribute, property):
                lines.append(f"{name}.{member}")
            elif inspect.isfunction(attribute) and (
                not member.startswith("_") or member in ("__sub__", "__enter__", "__exit__")
            ):
                lines.append(f"{name}.{member}{inspect.signature(attribute)}")
        lines += [f"{name}.{field}" for field in getattr(value, "__dataclass_fields__", ())]
        return lines
    if callable(value):
        return [f"{name}{inspect.signature(value)}"]
    return [name]


def test_the_public_api_is_the_documented_one() -> None:
    pytest.importorskip("torch", reason="attach() needs torch")
    lines = [
        line
        for name in sorted(dodoco_ext.__all__)
        for line in describe(name, getattr(dodoco_ext, name))
    ]
    # Not among them: a star import would load torch.
    megatron = dodoco_ext.megatron
    for name in sorted(megatron.__all__):
        lines += [f"megatron.{line}" for line in describe(name, getattr(megatron, name))]
    assert lines == SNAPSHOT.read_text(encoding="utf-8").splitlines()
