"""Quantised loading through transformers, by short names; the libraries are the user's own.

All of them replace `torch.nn.Linear`: attention, shared experts, dense layers. Routers and the
stacked weights of routed experts are parameters of other modules in transformers 5, and stay as
they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from dodoco_ext.errors import InputError


@dataclass(frozen=True)
class Method:
    """One way to quantise while loading.

    Attributes:
        modules: What must be importable, by the package that brings it.
        config: Makes transformers' configuration of it.
    """

    modules: dict[str, str]
    config: Callable[[], Any]


def _torchao(name: str) -> Callable[[], Any]:
    def config() -> Any:
        import torchao.quantization
        from transformers import TorchAoConfig

        return TorchAoConfig(getattr(torchao.quantization, name)())

    return config


def _quanto(weights: str) -> Callable[[], Any]:
    def config() -> Any:
        from transformers import QuantoConfig

        return QuantoConfig(weights=weights)

    return config


def _bitsandbytes(bits: int) -> Callable[[], Any]:
    def config() -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)

    return config


_TORCHAO = {"torchao": "torchao"}
_QUANTO = {"optimum-quanto": "optimum.quanto", "accelerate": "accelerate"}
_BITSANDBYTES = {"bitsandbytes": "bitsandbytes", "accelerate": "accelerate"}

METHODS: dict[str, Method] = {
    "torchao-int8": Method(_TORCHAO, _torchao("Int8WeightOnlyConfig")),
    "torchao-int4": Method(_TORCHAO, _torchao("Int4WeightOnlyConfig")),
    "torchao-float8": Method(_TORCHAO, _torchao("Float8WeightOnlyConfig")),
    "quanto-int8": Method(_QUANTO, _quanto("int8")),
    "quanto-int4": Method(_QUANTO, _quanto("int4")),
    "bitsandbytes-8bit": Method(_BITSANDBYTES, _bitsandbytes(8)),
    "bitsandbytes-4bit": Method(_BITSANDBYTES, _bitsandbytes(4)),
}
"""What `--quantization` takes."""


def check(name: str) -> None:
    """Finds out before anything is loaded whether a method can be used here.

    Raises:
        InputError: There is no such method, or one of its packages is missing.
    """
    if name not in METHODS:
        raise InputError(f"quantization={name!r} is unknown: give one of {', '.join(METHODS)}")
    missing = [package for package, module in METHODS[name].modules.items() if not _found(module)]
    if missing:
        raise InputError(
            f"quantization={name!r} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def config_of(name: str) -> Any:
    """Transformers' configuration of a method, to be given to `from_pretrained`."""
    return METHODS[name].config()


def quantised_weights(model: Any) -> int:
    """Weights that a library replaced by its own kind of parameter.

    A library passes over layers whose sizes it does not take, without a word.
    """
    from torch.nn import Parameter

    return sum(type(parameter) is not Parameter for parameter in model.parameters())


def described(config: Any) -> str:
    """What a model's configuration says of its quantisation; "" if it has none."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return ""
    facts = found if isinstance(found, dict) else found.to_dict()
    method = str(getattr(facts.get("quant_method"), "value", facts.get("quant_method")))
    details = [
        f"{key} {facts[key]}"
        for key in ("bits", "weights", "fmt", "format", "load_in_8bit", "load_in_4bit")
        if facts.get(key)
    ]
    scheme = facts.get("quant_type")
    if isinstance(scheme, dict):  # torchao's, under the key of what it is applied to
        details += [str(kind.get("_type", kind)) for kind in scheme.values()]
    return ", ".join([method, *details])


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False
