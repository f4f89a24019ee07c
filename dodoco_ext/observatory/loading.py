"""How a model is loaded and what runs it, checked before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from dodoco_ext.errors import InputError
from dodoco_ext.observatory import quantization

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""In which a model can be computed; `auto` is its own."""


ENGINES = ("transformers", "vllm")
"""What can run a model."""


@dataclass(frozen=True)
class Loading:
    """How a model is loaded, and what runs it.

    Attributes:
        dtype: One of `DTYPES`.
        device_map: As transformers takes it (`auto`, `cpu`, `cuda:0`, or a JSON object of modules and
            devices, `disk` among them), through the package accelerate; None for the CPU.
        max_memory: What `auto` may use of a device, as `cpu=60GiB` or `0=70GiB`; the rest goes to disk.
        streamed: Layer by layer over all batches (`streamed.StreamedModel`), whatever its size.
        quantization: One of `quantization.METHODS`; None for the weights as they are stored.
        engine: One of `ENGINES`.
    """

    dtype: str = "auto"
    device_map: str | None = None
    max_memory: tuple[str, ...] = ()
    streamed: bool = False
    quantization: str | None = None
    engine: str = "transformers"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype={self.dtype!r} is unknown: give one of {', '.join(DTYPES)}")
        if self.engine not in ENGINES:
            raise InputError(f"engine={self.engine!r} is unknown: give one of {', '.join(ENGINES)}")
        if self.streamed and self.device_map is not None:
            raise InputError("streaming runs on the CPU: leave out --device-map or --streamed")
        if self.streamed and self.quantization is not None:
            raise InputError(
                f"quantization={self.quantization!r} needs the whole model: leave out --streamed"
            )
        if self.engine == "vllm":
            for name in ("device_map", "streamed", "quantization"):
                if value := getattr(self, name):
                    raise InputError(
                        f"{name}={value!r} is for transformers: leave it out, or --engine vllm"
                    )
        if self.max_memory and self.device_map is None:
            raise InputError(
                f"max_memory={self.max_memory[0]!r} needs a device map: --device-map auto"
            )
        if self.device_map is not None and find_spec("accelerate") is None:
            raise InputError(
                f"device_map={self.device_map!r} needs the package accelerate: pip install accelerate"
            )
        self.placement()
        if self.quantization is not None:
            quantization.check(self.quantization)

    def placement(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained` for devices."""
        if self.device_map is None:
            return {}
        placed: Any = self.device_map
        if self.device_map.lstrip().startswith("{"):
            try:
                placed = json.loads(self.device_map)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"device_map={self.device_map!r} is no JSON object ({error.msg}): write it as "
                    '{"model.layers.0": "cpu", "model.layers.1": "disk", ...}'
                ) from None
        found: dict[str, Any] = {"device_map": placed}
        if self.max_memory:
            found["max_memory"] = dict(_amount(text) for text in self.max_memory)
        return found


def _amount(text: str) -> tuple[str | int, str]:
    device, _, amount = text.partition("=")
    if not device or not amount:
        raise InputError(f"max_memory={text!r}: write DEVICE=SIZE, as cpu=60GiB or 0=70GiB")
    return (int(device) if device.isdecimal() else device), amount
