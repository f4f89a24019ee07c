"""Ways of loading: offloaded by accelerate, quantised by a library, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from dodoco_ext.errors import InputError
from dodoco_ext.observatory import observe, quantization
from dodoco_ext.observatory.conditions import Shape
from dodoco_ext.observatory.loading import Loading
from dodoco_ext.observatory.models import LoadedModel, load_model, quiet
from dodoco_ext.observatory.result import Result
from dodoco_ext.observatory.threads import one_thread
from dodoco_ext.observatory.zoo import shipped
from dodoco_ext.observatory.zoo.species import SPECIES, build

SHAPE = Shape(2, 24, 3)
LAYERS = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def sharded(name: str, folder: Path) -> Path:
    """An untrained model of the zoo in many small files, with the zoo's tokenizer."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    with quiet():
        build(SPECIES[name]).save_pretrained(folder, max_shard_size="300KB")
        AutoTokenizer.from_pretrained(shipped.tokenizer_folder()).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 10
    return folder


def observed(loaded: LoadedModel, *, uncovered: int = 0) -> Result:
    result, _ = observe.run(
        loaded.runner,
        loaded.tokenizer,
        ["builtin:prose"],
        name="m",
        shape=SHAPE,
        checkpoint=loaded.provenance,
    )
    assert len(result.uncovered) == uncovered
    return result


def on_cpu_and_disk(model: Any) -> str:
    """Every second decoder layer on disk, the rest on the CPU."""
    blocks = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    body = blocks.rpartition(".")[0]
    placed = {
        f"{body}.{name}": "cpu"
        for name, _ in model.get_submodule(body).named_children()
        if f"{body}.{name}" != blocks
    }
    for number in range(len(model.get_submodule(blocks))):
        placed[f"{blocks}.{number}"] = "disk" if number % 2 else "cpu"
    return json.dumps({**placed, "lm_head": "cpu"})


@pytest.mark.parametrize("name", SPECIES)
def test_offloading_to_disk_changes_no_count(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder = str(sharded(name, tmp_path / "model"))
    resident = load_model(folder)
    offloaded = load_model(folder, Loading(device_map=on_cpu_and_disk(resident.model)))
    assert {p.device.type for p in offloaded.model.parameters()} == {"cpu", "meta"}
    one, other = observed(resident), observed(offloaded)
    assert one.conditions == other.conditions, "counts, passes, statistics and losses"
    assert one.provenance["placement"] == "cpu"
    assert other.provenance["placement"] == "cpu, disk"


def test_what_exceeds_the_memory_allowed_goes_to_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder = str(sharded("mamba2", tmp_path / "model"))
    loaded = load_model(folder, Loading(device_map="auto", max_memory=("cpu=1200KB",)))
    assert observed(loaded).provenance["placement"] == "cpu, disk"
    assert observed(loaded).conditions == observed(load_model(folder)).conditions


def test_a_model_quantised_while_loading_is_observed_and_named(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    plain = load_model("zoo:gqa")
    loaded = load_model("zoo:gqa", Loading(quantization="torchao-int8"))
    changed = {
        name
        for name, module in loaded.model.named_modules()
        if type(getattr(module, "weight", None)) is not type(torch.nn.Parameter())
        and hasattr(module, "weight")
    }
    assert changed == {
        f"model.layers.{n}.self_attn.{part}_proj" for n in range(LAYERS) for part in "qkvo"
    }, "linear layers alone; routers and experts stay"
    one, other = observed(plain), observed(loaded)
    assert other.provenance["quantization"] == "torchao, Int8WeightOnlyConfig, 16 weights"
    assert "quantization" not in one.provenance
    for before, after in zip(one.conditions[0].layers, other.conditions[0].layers, strict=True):
        assert sum(before.counts) == sum(after.counts) == SHAPE.num_tokens * 4
        moved = sum(abs(a - b) for a, b in zip(before.counts, after.counts, strict=True)) / 2
        assert moved < 0.05 * sum(before.counts)
    assert one.conditions[0].loss != other.conditions[0].loss
    assert other.conditions[0].loss == pytest.approx(one.conditions[0].loss, abs=0.05)


def test_a_checkpoint_that_was_saved_quantised_loads_as_it_is_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    loaded = load_model("zoo:gqa", Loading(quantization="torchao-int8"))
    with quiet():
        loaded.model.save_pretrained(tmp_path)
        loaded.tokenizer.save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    again = load_model(str(tmp_path))
    one, other = observed(loaded), observed(again)
    assert other.provenance["quantization"] == "torchao, Int8WeightOnlyConfig, 16 weights"
    assert [c.layers for c in other.conditions] == [c.layers for c in one.conditions]


def test_a_method_that_passes_over_every_layer_is_refused() -> None:
    pytest.importorskip("torchao")  # groups of 128 do not fit 96 inputs
    with pytest.raises(InputError, match="quantization='torchao-int4' changes nothing in gqa"):
        load_model("zoo:gqa", Loading(quantization="torchao-int4"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3"}, "fp8, fmt e4m3"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, bits 4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, load_in_8bit True"),
        (None, ""),
    ],
)
def test_what_a_configuration_says_of_its_quantisation(config: Any, said: str) -> None:
    class Config:
        quantization_config = config

    assert quantization.described(Config()) == said


@pytest.mark.parametrize("name", quantization.METHODS)
def test_a_library_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda module: None)
    packages = " ".join(quantization.METHODS[name].modules)
    with pytest.raises(InputError, match=f"quantization='{name}' needs .*pip install {packages}"):
        Loading(quantization=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int2"}, "quantization='int2' is unknown: give one of torchao-int8"),
        ({"quantization": "torchao-int8", "streamed": True}, "leave out --streamed"),
        ({"engine": "sglang"}, "engine='sglang' is unknown: give one of transformers, vllm"),
        ({"engine": "vllm", "streamed": True}, "streamed=True is for transformers"),
        ({"engine": "vllm", "device_map": "auto"}, "device_map='auto' is for transformers"),
        ({"engine": "vllm", "quantization": "torchao-int8"}, "quantization='torchao-int8' is for"),
        ({"max_memory": ("cpu=1GiB",)}, "max_memory='cpu=1GiB' needs a device map"),
    ],
)
def test_ways_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Loading(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "{oops"}, r"device_map='\{oops' is no JSON object"),
        ({"device_map": "auto", "max_memory": ("60GiB",)}, "write DEVICE=SIZE, as cpu=60GiB"),
    ],
)
def test_a_device_map_that_cannot_be_read_is_refused(options: dict[str, Any], message: str) -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(InputError, match=message):
        Loading(**options)


def test_vllm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from dodoco_ext.observatory import engine_vllm

    monkeypatch.setattr(engine_vllm, "find_spec", lambda module: None)
    with pytest.raises(InputError, match=r"engine='vllm' needs vLLM.*leave out --engine"):
        load_model("zoo:gqa", Loading(engine="vllm"))


@pytest.mark.parametrize(
    ("shape", "sources", "message"),
    [
        (Shape(2, 24, 3, padding=4), (), "padding=4: vLLM packs sequences"),
        (SHAPE, ("mock-uniform", "generated:a.txt"), "generated:a.txt: vLLM's sampler"),
    ],
)
def test_conditions_that_vllm_does_not_run_are_refused_before_loading(
    shape: Shape, sources: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dodoco_ext.observatory import engine_vllm

    monkeypatch.setattr(engine_vllm, "find_spec", lambda module: object())
    with pytest.raises(InputError, match=message):
        load_model("zoo:gqa", Loading(engine="vllm"), shape=shape, sources=sources)
