"""Models larger than memory: a checkpoint is read layer by layer, each layer once for all batches.

The model is built on the meta device. What is no decoder layer (embedding, norms, head) is loaded
and stays; then each layer is loaded, run over every batch and dropped, so that besides the batches'
hidden states no more than one layer is in memory. A checkpoint is read from disk once a run, however
many batches there are, where offloading would read it once a batch.

What surrounds the layers (masks, positions, the head) stays the model's own code: it runs twice with
stand-ins for the layers, once to learn what each layer is called with, and once to finish. This
holds for layers whose arguments besides the hidden states depend on the inputs alone.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.models import quiet

Inputs = Mapping[str, torch.Tensor]
AfterLayer = Callable[[int, int], None]
"""Called with the layers done and the layers in all."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Checkpoint:
    """The safetensors files of a folder, and which tensor is in which.

    Args:
        folder: Written by `save_pretrained`, or downloaded from the hub.

    Raises:
        InputError: There are no such files, or some that the index names are missing.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._folder = folder
        index = folder / _INDEX
        if index.is_file():
            files: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        elif (folder / _SINGLE).is_file():
            with safe_open(folder / _SINGLE, "pt") as file:
                files = dict.fromkeys(file.keys(), _SINGLE)
        else:
            raise InputError(
                f"{folder} holds neither {_INDEX} nor {_SINGLE}: give a checkpoint in safetensors"
            )
        missing = sorted(name for name in set(files.values()) if not (folder / name).is_file())
        if missing:
            raise InputError(
                f"{folder} lacks {missing[0]}, one of {len(missing)} missing shards: download it again"
            )
        self.files = files

    @contextmanager
    def open(self, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Tensors by key, read only when they are used; their files are closed afterwards."""
        from safetensors import safe_open

        with ExitStack() as stack:
            names = sorted({self.files[key] for key in keys})
            opened = {
                name: stack.enter_context(safe_open(self._folder / name, "pt")) for name in names
            }
            yield {key: opened[self.files[key]].get_slice(key) for key in keys}


class StreamedModel:
    """A causal language model of which no more than one layer is in memory.

    Attributes:
        model: The model, its decoder layers on the meta device; `dodoco.attach` takes it as it is.
        peak_bytes: Most bytes of weights that were in memory at once so far.

    Args:
        folder: Folder of the checkpoint.
        dtype: In which to compute; by default the checkpoint's own.

    Raises:
        InputError: The checkpoint cannot be read, or its layers cannot be told apart.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._checkpoint = Checkpoint(folder)
        with quiet():
            config = AutoConfig.from_pretrained(folder)
            if getattr(config, "quantization_config", None) is not None:
                raise InputError(
                    f"{folder.name} is quantised, and layers are streamed as they are stored: load it "
                    "without --streamed"
                )
            self._dtype = dtype or config.dtype or torch.float32
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(config, dtype=self._dtype)
        self.model.eval()
        self._mapping = get_model_conversion_mapping(self.model)
        self._holder, self._layers = _decoder_layers(self.model)
        prefix = next(n for n, module in self.model.named_modules() if module is self._layers)
        self._keys = self._keys_by_layer(prefix)
        self.peak_bytes = 0
        self._load(self._keys[None])
        self.model.tie_weights()
        _fill_computed_buffers(self.model)
        left = [name for name, tensor in self._resident() if tensor.is_meta]
        if left:
            raise InputError(f"{folder} lacks the weights of {left[0]}: give a complete checkpoint")

    @torch.inference_mode()
    def run(
        self,
        batches: Sequence[Inputs],
        after_layer: AfterLayer | None = None,
        after_pass: Callable[[int], None] | None = None,
    ) -> Iterator[Any]:
        """The model's outputs, batch by batch, once all layers have run over all batches.

        Args:
            batches: Keyword arguments of each call.
            after_layer: Told after each layer has run over all batches.
            after_pass: Told the number of a batch after each layer has run over it.
        """
        stubs = [_Stub(layer) for layer in self._layers]
        with self._stand_ins(stubs):
            for inputs in batches:
                self.model.base_model(**inputs, use_cache=False)
        hidden = list(stubs[0].hidden)
        for index, (layer, stub) in enumerate(zip(self._layers, stubs, strict=True)):
            self._load(self._keys[index])
            self._check(layer, index)
            for number, (arguments, keywords) in enumerate(stub.calls):
                hidden[number] = layer(hidden[number], *arguments, **keywords)
                if after_pass is not None:
                    after_pass(number)
            self._drop(layer)
            stub.calls.clear()
            if after_layer is not None:
                after_layer(index + 1, len(stubs))
        last = _Last(self._layers[-1], hidden)
        with self._stand_ins([*stubs[:-1], last]):
            for inputs in batches:
                yield self.model(**inputs, use_cache=False)

    def num_bytes(self) -> int:
        """Bytes of weights in memory now."""
        tensors = {
            tensor.data_ptr(): tensor.numel() * tensor.element_size()
            for tensor in (*self.model.parameters(), *self.model.buffers())
            if not tensor.is_meta
        }
        return sum(tensors.values())

    @contextmanager
    def _stand_ins(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        self._holder.layers = nn.ModuleList(modules)
        try:
            yield
        finally:
            self._holder.layers = self._layers

    def _keys_by_layer(self, prefix: str) -> dict[int | None, list[str]]:
        """Keys of the checkpoint by the layer they belong to; None for the rest."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        keys: dict[int | None, list[str]] = {n: [] for n in (None, *range(len(self._layers)))}
        for key in self._checkpoint.files:
            name, _ = rename_source_key(
                key, renamings, converters, self.model.base_model_prefix, known
            )
            if name in known:
                inside = name.startswith(f"{prefix}.")
                layer = int(name.removeprefix(f"{prefix}.").split(".")[0]) if inside else None
                keys[layer].append(key)
        return keys

    def _load(self, keys: Sequence[str]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        load_config = LoadStateDictConfig(
            device_map={"": "cpu"},
            dtype=self._dtype,
            dtype_plan=self.model._get_dtype_plan(self._dtype),
            weight_mapping=self._mapping,
        )
        with quiet(), _one_at_a_time(), self._checkpoint.open(keys) as tensors:
            found, _ = convert_and_load_state_dict_in_model(
                model=self.model, state_dict=tensors, load_config=load_config
            )
        problems = [*found.mismatched_keys, *found.conversion_errors]
        if problems:
            raise InputError(f"the checkpoint does not fit its configuration at {problems[0]}")
        self.peak_bytes = max(self.peak_bytes, self.num_bytes())

    def _check(self, layer: nn.Module, index: int) -> None:
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_meta:
                raise InputError(
                    f"the checkpoint lacks {name} of layer {index}: give a complete checkpoint"
                )

    def _drop(self, layer: nn.Module) -> None:
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                    module._parameters[name] = empty
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = buffer.to("meta")
        gc.collect()

    def _resident(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and buffers outside the layers, and computed buffers inside them."""
        inside = {id(t) for _, t in self._layers.state_dict(keep_vars=True).items()}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if id(tensor) not in inside:
                yield name, tensor


class _Stub(nn.Module):
    """Stands in for a layer: remembers how it is called, and returns the hidden states as they are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Not a submodule: what the model asks its layers for is answered by the real one.
        object.__setattr__(self, "_real", layer)
        self.hidden: list[torch.Tensor] = []
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_real"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keeps the arguments."""
        self.hidden.append(hidden_states)
        self.calls.append((args, kwargs))
        return hidden_states


class _Last(_Stub):
    """Stands in for the last layer: returns what all layers together made of each batch, in order."""

    def __init__(self, layer: nn.Module, results: list[torch.Tensor]) -> None:
        super().__init__(layer)
        self._results = iter(results)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The next batch's hidden states."""
        return next(self._results)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keeps transformers from reading tensors ahead in threads: what they read is in memory at once."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name, "")
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ[name] = before  # empty means the same as absent


def _decoder_layers(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds the decoder layers as `layers`, and they."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise InputError(
            f"{type(model).__name__} keeps its layers elsewhere than in `layers`: load it without --streamed"
        )
    return model.base_model, layers


def _fill_computed_buffers(model: Any) -> None:
    """Computes what no checkpoint holds (rotary frequencies), as transformers does after loading."""
    for module in model.modules():
        computed = [n for n in module._non_persistent_buffers_set if module._buffers[n] is not None]
        for name in computed:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if computed:
            model._init_weights(module)
